"""Host functions: registering them, what the guest may send and get, their errors, and HostPrint."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import require

import hyperlight
import memory
from hyperlight import (
    Double,
    ErrorCode,
    Float,
    GuestAborted,
    GuestError,
    HostFunctions,
    HyperlightError,
    Int,
    Long,
    MultiUseSandbox,
    SandboxConfiguration,
    SandboxStatus,
    Snapshot,
    UInt,
    ULong,
    UninitializedSandbox,
)
from memory import ParameterType, ReturnType

pytestmark = require("kvm")


@pytest.fixture(scope="module")
def snapshot() -> Iterator[Snapshot]:
    with UninitializedSandbox("simpleguest") as uninitialized, uninitialized.evolve() as sandbox:
        yield sandbox.snapshot()


@pytest.fixture
def sandbox(snapshot: Snapshot) -> Iterator[MultiUseSandbox]:
    with MultiUseSandbox.from_snapshot(snapshot) as fresh:
        yield fresh


# -- the registry ------------------------------------------------------------------------


def answer_of(
    functions: HostFunctions, name: str, *arguments: tuple[ParameterType, Any], expects: ReturnType = ReturnType.Int
) -> Any:
    """Call a host function as a guest's message would."""
    encoded = functions[name].call(arguments, expects)
    result = memory.decode_function_call_result(encoded)
    assert isinstance(result, memory.ReturnValue)
    return result.value


def arithmetic() -> HostFunctions:
    functions = HostFunctions()
    functions.register("Negate", lambda value: -value, (Int,), Int)
    functions.register("Subtract", lambda left, right: left - right, (Int, Int), Int)
    return functions


def test_one_and_two_arguments() -> None:
    """B.7/132, B.7/133."""
    functions = arithmetic()
    assert answer_of(functions, "Negate", (ParameterType.Int, 5)) == -5
    assert answer_of(functions, "Subtract", (ParameterType.Int, 5), (ParameterType.Int, 3)) == 2


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_arguments(count: int) -> None:
    """B.7/134."""
    with pytest.raises(hyperlight.UnexpectedNoOfArguments) as caught:
        answer_of(arithmetic(), "Subtract", *[(ParameterType.Int, 1)] * count)
    assert str(caught.value) == f"The number of arguments to the function is wrong: got {count} expected 2"


def test_unknown_function() -> None:
    """B.7/135."""
    with pytest.raises(KeyError):
        answer_of(arithmetic(), "Divide")


@pytest.mark.parametrize(
    ("kind", "value", "spelled"),
    [
        (ParameterType.String, "x", 'String("x")'),
        (ParameterType.Long, 1, "Long(1)"),
        (ParameterType.Bool, True, "Bool(true)"),
    ],
)
def test_argument_of_another_type(kind: ParameterType, value: Any, spelled: str) -> None:
    with pytest.raises(hyperlight.ParameterValueConversionFailure) as caught:
        answer_of(arithmetic(), "Negate", (kind, value))
    assert str(caught.value) == f'Failed To Convert Parameter Value {spelled} to "Int"'


def test_name_registered_again_is_replaced(sandbox: MultiUseSandbox) -> None:
    sandbox.register("HostAdd", lambda left, right: 1, (Int, Int), Int)
    assert sandbox.call("Add", 2, 3) == 1
    sandbox.register("HostAdd", lambda left, right: left + right, (Int, Int), Int)
    assert sandbox.call("Add", 2, 3) == 5


@pytest.mark.parametrize(
    ("name", "function", "parameters", "returns"),
    [
        ("", len, None, Int),
        (5, len, None, Int),
        ("F", None, None, Int),
        ("F", len, (object,), Int),
        ("F", len, (Int,), list),
        ("F", len, (None,), Int),
        ("F", len, [Int] * 33, Int),
    ],
)
def test_what_cannot_be_offered_is_refused(
    sandbox: MultiUseSandbox, name: Any, function: Any, parameters: Any, returns: Any
) -> None:
    with pytest.raises(HyperlightError):
        sandbox.register(name, function, parameters, returns)


# -- HostPrint ---------------------------------------------------------------------------


class Printer:
    """Collects what is printed."""

    def __init__(self) -> None:
        self.printed: list[str] = []

    def print(self, text: str) -> Int:
        self.printed.append(text)
        return Int(len(text))


def test_closure_as_printer_outlives_the_sandbox() -> None:
    """B.7/136."""
    channel: queue.SimpleQueue[str] = queue.SimpleQueue()

    def send(text: str) -> Int:
        channel.put(text)
        return Int(0)

    with UninitializedSandbox("simpleguest") as uninitialized:
        uninitialized.register("HostPrint", send)
        with uninitialized.evolve() as sandbox:
            sandbox.call("PrintOutput", "one")
            sandbox.call("PrintOutput", "two")
    assert (channel.get_nowait(), channel.get_nowait()) == ("one", "two")


_PRINTED: list[str] = []


def print_to_list(text: str) -> Int:
    _PRINTED.append(text)
    return Int(len(text))


def test_plain_function_as_printer(sandbox: MultiUseSandbox) -> None:
    """B.7/137."""
    sandbox.register("HostPrint", print_to_list)
    sandbox.call("PrintOutput", "plain")
    assert _PRINTED == ["plain"]


def test_method_as_printer(sandbox: MultiUseSandbox) -> None:
    """B.7/138."""
    printer = Printer()
    sandbox.register("HostPrint", printer.print)
    sandbox.call("PrintOutput", "by a method")
    assert printer.printed == ["by a method"]


def test_printer_of_the_library_writes_to_standard_output(
    sandbox: MultiUseSandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sandbox.call("PrintOutput", "żółw\n") == len("żółw\n".encode())
    assert capsys.readouterr().out == "żółw\n"


# -- calls from the guest ------------------------------------------------------------------


def test_guest_calls_a_host_method_with_a_string(sandbox: MultiUseSandbox) -> None:
    """B.7/139."""
    heard: list[str] = []

    def host_method(text: str) -> Int:
        heard.append(text)
        return Int(len(text))

    sandbox.register("HostMethod1", host_method)
    text = "Hello from GuestFunction1, żółw"
    assert sandbox.call("CallHostMethod", "HostMethod1", text) == len(text)
    assert heard == [text]


def test_guests_call_host_methods_in_100_threads(snapshot: Snapshot) -> None:
    """B.7/140: each with its own sandbox and its own text."""

    def live(number: int) -> bool:
        text, heard = f"text {number}", queue.SimpleQueue[str]()

        def host_method(said: str) -> Int:
            heard.put(said)
            return Int(number)

        with MultiUseSandbox.from_snapshot(snapshot) as sandbox:
            sandbox.register("HostMethod1", host_method)
            returned = sandbox.call("CallHostMethod", "HostMethod1", text)
        return bool(returned == number and heard.get_nowait() == text)

    with ThreadPoolExecutor(100) as threads:
        assert all(threads.map(live, range(100)))


BOOL_CASES = [(3, 3), (3, 5), (-1, -1), (0, 0), (0, 1), (2**31 - 1, 2**31 - 1), (-(2**31), 0), (7, -7), (1, 1)]


@pytest.mark.parametrize(("left", "right"), BOOL_CASES)
def test_bool_from_the_host(sandbox: MultiUseSandbox, left: int, right: int) -> None:
    """B.7/145: nine values."""
    sandbox.register("HostBool", lambda one, other: one == other, (Int, Int), bool)
    assert sandbox.call("GuestRetrievesBoolValue", Int(left), Int(right), returns=bool) is (left == right)


def test_float_from_the_host(sandbox: MultiUseSandbox) -> None:
    """B.7/146."""
    sandbox.register("HostAddFloat", lambda left, right: left + right, (Float, Float), Float)
    returned = sandbox.call("GuestRetrievesFloatValue", Float(1.34), Float(1.34), returns=Float)
    assert returned == Float(2.68)


def test_double_from_the_host(sandbox: MultiUseSandbox) -> None:
    """B.7/147."""
    sandbox.register("HostAddDouble", lambda left, right: left + right, (Double, Double), Double)
    assert sandbox.call("GuestRetrievesDoubleValue", 1.34, 1.34, returns=Double) == 2.68


def test_string_from_the_host(sandbox: MultiUseSandbox) -> None:
    """B.7/148."""
    sandbox.register("HostAddStrings", lambda text: text + ", string added by Host Function", (str,), str)
    returned = sandbox.call("GuestRetrievesStringValue", "Guest Function", returns=str)
    assert returned == "Guest Function, string added by Host Function"


ALL_ARGUMENTS = (Int(-1), UInt(2), Long(-3), ULong(2**64 - 1), Float(1.5), 2.5, "s", True, b"\1\2\3")


def test_all_nine_types_reach_the_host_as_they_are(sandbox: MultiUseSandbox) -> None:
    """B.7/149."""
    received: list[tuple[Any, ...]] = []

    def host_all_types(
        a: Int, b: UInt, c: Long, d: ULong, e: Float, f: Double, g: str, h: bool, i: bytes
    ) -> str:
        received.append((a, b, c, d, e, f, g, h, i))
        return "received"

    sandbox.register("HostAllTypes", host_all_types)
    assert sandbox.call("CallHostAllTypes", *ALL_ARGUMENTS, returns=str) == "received"
    assert received == [ALL_ARGUMENTS]


RESULTS = [
    ("I32", Int, -5), ("U32", UInt, 2**32 - 1), ("I64", Long, -(2**63)), ("U64", ULong, 2**64 - 1), ("F32", Float, 1.5),
    ("F64", Double, -2.5), ("String", str, "text"), ("Bool", bool, True), ("Bytes", bytes, b"\0\xff"), ("Void", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("suffix", "returns", "value"), RESULTS)
def test_every_type_of_result_from_the_host(
    sandbox: MultiUseSandbox, suffix: str, returns: Any, value: Any
) -> None:
    sandbox.register("Get", lambda: value, (), returns)
    returned = sandbox.call(f"CallGivenParamlessHostFuncThatReturns{suffix}", "Get", returns=returns)
    assert returned == value


@pytest.mark.parametrize("count", range(33))
def test_host_function_of_0_to_32_parameters(sandbox: MultiUseSandbox, count: int) -> None:
    """B.7/149."""
    received: list[Sequence[int]] = []

    def take(*numbers: int) -> int:
        received.append(numbers)
        return sum(numbers)

    sandbox.register("Take", take, [Int] * count, Int)
    expected = tuple(range(1, count + 1))
    assert sandbox.call("CallHostWithInts", "Take", count) == sum(expected)
    assert received == [expected]


def test_function_without_annotations_takes_and_returns_what_the_guest_says(sandbox: MultiUseSandbox) -> None:
    sandbox.register("HostAdd", lambda left, right: left + right)
    assert sandbox.call("Add", 20, 22) == 42


# -- errors ------------------------------------------------------------------------------


class Failed(Exception):
    pass


def failing(text: str) -> Callable[..., Int]:
    def fail(*_arguments: Any) -> Int:
        raise Failed(text)

    return fail


def test_1000_failing_host_calls_that_the_guest_passes_on(sandbox: MultiUseSandbox) -> None:
    """B.7/141, B.7/142: GuestError with the text; the buffers do not fill up."""
    sandbox.register("Fail", failing("hi"))
    for _ in range(1000):
        with pytest.raises(GuestError) as caught:
            sandbox.call("TryCallHost", "Fail")
        assert (caught.value.code, caught.value.message) == (ErrorCode.HostFunctionError, "hi")
        assert isinstance(caught.value.__cause__, Failed)
    assert sandbox.call("Echo", "unharmed") == "unharmed"


def test_failing_host_calls_that_abort_the_guest(sandbox: MultiUseSandbox) -> None:
    """B.7/141: the C interface cannot pass an error on, so each call needs a restore."""
    sandbox.register("Fail", failing("host function error!"))
    before = sandbox.snapshot()
    for _ in range(100):
        with pytest.raises(GuestAborted, match="host function error!") as caught:
            sandbox.call("CallHostMethod", "Fail", "x")
        assert caught.value.code == ErrorCode.UnknownError
        sandbox.restore(before)


def test_calling_what_nobody_registered_is_an_error_in_the_guest_only(sandbox: MultiUseSandbox) -> None:
    """B.7/143."""
    said = sandbox.call("CallHostExpectError", "SomeUnknownHostFunc", returns=str)
    assert said == "HostFunction SomeUnknownHostFunc was not found"
    assert sandbox.status is SandboxStatus.READY
    with pytest.raises(GuestError) as caught:
        sandbox.call("TryCallHost", "SomeUnknownHostFunc")
    assert isinstance(caught.value.__cause__, hyperlight.HostFunctionNotFound)
    assert caught.value.__cause__.name == "SomeUnknownHostFunc"


def test_1000_rounds_in_small_buffers() -> None:
    """B.7/144: a call that succeeds with the host's help, then one that fails, with buffers of 4 KiB (raised to 8)."""
    config = SandboxConfiguration(input_data_size=4096, output_data_size=4096)
    with UninitializedSandbox("simpleguest", config) as uninitialized:
        uninitialized.register("HostAdd", lambda left, right: left + right, (Int, Int), Int)
        uninitialized.register("Crash", failing("Crash on purpose"))
        with uninitialized.evolve() as sandbox:
            for _ in range(1000):
                assert sandbox.call("Add", 5, 10) == 15
                with pytest.raises(GuestError, match="Crash on purpose"):
                    sandbox.call("TryCallHost", "Crash")


class Mute(Exception):
    """An exception that cannot even say its name."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Failed(""), "Failed"),
        (Failed("\ud800 broken"), "? broken"),
        (Failed("nul \0 byte"), None),
        (Failed("x" * 100_000), None),
        (KeyError("key"), "'key'"),
        (Mute(), None),
    ],
)
def test_any_exception_of_a_host_function_becomes_the_guests_error(
    sandbox: MultiUseSandbox, error: Exception, text: str | None
) -> None:
    def fail() -> Int:
        raise error

    sandbox.register("Fail", fail)
    with pytest.raises(GuestError) as caught:
        sandbox.call("TryCallHost", "Fail")
    assert caught.value.code is ErrorCode.HostFunctionError
    assert text is None or caught.value.message == text
    assert caught.value.__cause__ is error
    assert sandbox.call("Echo", "unharmed") == "unharmed"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_must_end_the_program_passes_through_and_poisons(
    sandbox: MultiUseSandbox, error: type[BaseException]
) -> None:
    def stop() -> Int:
        raise error

    before = sandbox.snapshot()
    sandbox.register("Stop", stop)
    with pytest.raises(error):
        sandbox.call("TryCallHost", "Stop")
    assert sandbox.poisoned
    sandbox.restore(before)
    assert sandbox.call("Echo", "mended") == "mended"


@pytest.mark.parametrize("value", ["text", 2**31, None, 1.5, object(), b"bytes"])
def test_result_that_is_no_int_is_an_error(sandbox: MultiUseSandbox, value: Any) -> None:
    sandbox.register("Wrong", lambda: value, (), Int)
    with pytest.raises(GuestError) as caught:
        sandbox.call("TryCallHost", "Wrong")
    assert caught.value.code is ErrorCode.HostFunctionError
    assert isinstance(caught.value.__cause__, hyperlight.ValueRangeError)


def test_result_of_another_type_than_the_guest_expects_is_the_guests_trouble(sandbox: MultiUseSandbox) -> None:
    before = sandbox.snapshot()
    sandbox.register("Text", lambda: "text", (), str)
    with pytest.raises(GuestAborted) as caught:
        sandbox.call("CallGivenParamlessHostFuncThatReturnsI32", "Text")
    assert caught.value.code == ErrorCode.UnknownError
    sandbox.restore(before)
    assert sandbox.call("Echo", "mended") == "mended"


def test_result_larger_than_the_input_buffer_poisons(sandbox: MultiUseSandbox) -> None:
    before = sandbox.snapshot()
    sandbox.register("Large", lambda: bytes(0x4000), (), bytes)
    with pytest.raises(hyperlight.HandleIoError, match="Not enough space in buffer to push data"):
        sandbox.call("CallGivenParamlessHostFuncThatReturnsBytes", "Large")
    assert sandbox.poisoned
    sandbox.restore(before)
    assert sandbox.call("Echo", "mended") == "mended"


@pytest.mark.parametrize("use", ["call", "snapshot", "restore", "close", "register", "map_file_cow"])
def test_host_function_cannot_use_the_sandbox_that_waits_for_it(sandbox: MultiUseSandbox, use: str) -> None:
    before = sandbox.snapshot()
    uses: dict[str, Callable[[], object]] = {
        "call": lambda: sandbox.call("GetStatic"),
        "snapshot": sandbox.snapshot,
        "restore": lambda: sandbox.restore(before),
        "close": sandbox.close,
        "register": lambda: sandbox.register("Other", len),
        "map_file_cow": lambda: sandbox.map_file_cow(__file__, 0x1_0000_0000),
    }

    def reenter() -> Int:
        with pytest.raises(hyperlight.GuestFunctionCallAlreadyInProgress):
            uses[use]()
        return Int(7)

    sandbox.register("Reenter", reenter)
    assert sandbox.call("TryCallHost", "Reenter") == 7


def test_host_function_may_use_another_sandbox(sandbox: MultiUseSandbox, snapshot: Snapshot) -> None:
    with MultiUseSandbox.from_snapshot(snapshot) as other:
        sandbox.register("Ask", lambda: other.call("AddToStatic", 41), (), Int)
        assert sandbox.call("TryCallHost", "Ask") == 41
        assert sandbox.call("GetStatic") == 0
