"""Calling guest functions: every type there and back, refusals, state, threads, and memory in the guest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import PRIVILEGES, booted, require
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hyperlight
import memory
from hyperlight import (
    Double,
    ErrorCode,
    Float,
    GuestError,
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

pytestmark = require("kvm")

MIB = 1 << 20
FLOAT_MAX = math.ldexp(2 - 2**-23, 127)
FLOAT_TINY = 2.0**-149


@pytest.fixture(scope="module", params=PRIVILEGES)
def snapshot(request: pytest.FixtureRequest) -> Iterator[Snapshot]:
    with booted("simpleguest", request.param) as sandbox:
        yield sandbox.snapshot()


@pytest.fixture(scope="module")
def shared(snapshot: Snapshot) -> Iterator[MultiUseSandbox]:
    """A sandbox for the tests that leave nothing behind."""
    with MultiUseSandbox.from_snapshot(snapshot) as sandbox:
        yield sandbox


@pytest.fixture
def sandbox(snapshot: Snapshot) -> Iterator[MultiUseSandbox]:
    with MultiUseSandbox.from_snapshot(snapshot) as fresh:
        yield fresh


def use_once(config: SandboxConfiguration, name: str, *arguments: Any, guest: str = "simpleguest") -> Any:
    """Boot a guest, call one function, and return its result."""
    with UninitializedSandbox(guest, config) as uninitialized, uninitialized.evolve() as sandbox:
        return sandbox.call(name, *arguments)


# -- types -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 10, 1000, 8000])
def test_byte_array_goes_in_and_comes_back_zeroed(shared: MultiUseSandbox, size: int) -> None:
    """B.5/91."""
    assert shared.call("SetByteArrayToZero", bytes(range(1, 251)) * 40, returns=bytes) == bytes(10000)
    assert shared.call("SetByteArrayToZero", b"\xff" * size, returns=bytes) == bytes(size)


def test_byte_array_for_a_function_of_other_types_is_refused(shared: MultiUseSandbox) -> None:
    """B.5/91."""
    with pytest.raises(GuestError, match="Expected parameter type VecBytes .* but got Int") as caught:
        shared.call("SetByteArrayToZero", 5)
    assert caught.value.code is ErrorCode.GuestFunctionParameterTypeMismatch


DOUBLES = (0.0, -0.0, math.pi, -math.pi, 1.7976931348623157e308, -1.7976931348623157e308, 5e-324, 2.2e-308,
           math.inf, -math.inf, math.nan)  # fmt: skip
FLOATS = (0.0, -0.0, math.pi, -math.pi, FLOAT_MAX, -FLOAT_MAX, FLOAT_TINY, 2.0**-126, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("value", DOUBLES)
def test_doubles_come_back_equal(shared: MultiUseSandbox, value: float) -> None:
    """B.5/92: -0.0 as 0.0, which FlatBuffers leaves out."""
    came_back = shared.call("EchoDouble", Double(value), returns=Double)
    assert came_back == value or (math.isnan(came_back) and math.isnan(value))


@pytest.mark.parametrize("value", FLOATS)
def test_floats_come_back_equal(shared: MultiUseSandbox, value: float) -> None:
    """B.5/93: what single precision can hold, exactly."""
    came_back = shared.call("EchoFloat", Float(value), returns=Float)
    assert came_back == Float(value) or (math.isnan(came_back) and math.isnan(value))


ECHOES: dict[str, tuple[st.SearchStrategy[Any], Any]] = {
    "EchoInt": (st.integers(-(2**31), 2**31 - 1).map(Int), Int),
    "EchoUInt": (st.integers(0, 2**32 - 1).map(UInt), UInt),
    "EchoLong": (st.integers(-(2**63), 2**63 - 1).map(Long), Long),
    "EchoULong": (st.integers(0, 2**64 - 1).map(ULong), ULong),
    "EchoFloat": (st.floats(width=32, allow_nan=False).map(Float), Float),
    "EchoDouble": (st.floats(allow_nan=False).map(Double), Double),
    "EchoBool": (st.booleans(), bool),
    "Echo": (st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=500), str),
    "EchoBytes": (st.binary(max_size=1000), bytes),
}


@pytest.mark.parametrize("function", ECHOES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_of_any_type_comes_back(shared: MultiUseSandbox, function: str, data: st.DataObject) -> None:
    """B.5/100, B.21/279."""
    values, returns = ECHOES[function]
    value = data.draw(values)
    assert shared.call(function, value, returns=returns) == value


def test_nine_types_at_once(shared: MultiUseSandbox) -> None:
    arguments = (Int(-1), UInt(2), Long(-3), ULong(4), Float(1.5), 2.5, "s", True, b"\1\2\3")
    said = "Int:-1 UInt:2 Long:-3 ULong:4 Float:1.5 Double:2.5 String:s Bool:true VecBytes:010203"
    assert shared.call("AllTypes", *arguments, returns=str) == said


def test_void_is_none(shared: MultiUseSandbox) -> None:
    assert shared.call("ReturnVoid") is None
    assert shared.call("ReturnVoid", returns=None) is None


@pytest.mark.parametrize(
    ("value", "function"),
    [(2**31 - 1, "EchoInt"), (-(2**31), "EchoInt"), (2**31, "EchoLong"), (2**63, "EchoULong")],
)
def test_plain_int_takes_the_first_type_that_it_fits(
    shared: MultiUseSandbox, value: int, function: str
) -> None:
    assert shared.call(function, value, returns=int) == value


# -- refusals ----------------------------------------------------------------------------


def test_unknown_function_is_a_guest_error_with_its_name(shared: MultiUseSandbox) -> None:
    """B.5/94."""
    with pytest.raises(GuestError) as caught:
        shared.call("NotAFunction", "x")
    assert (caught.value.code, caught.value.message) == (ErrorCode.GuestFunctionNotFound, "NotAFunction")
    assert str(caught.value) == "Guest error occurred GuestFunctionNotFound: NotAFunction"


def test_wrong_parameter_type_is_spelled_out(shared: MultiUseSandbox) -> None:
    """B.5/97."""
    with pytest.raises(GuestError) as caught:
        shared.call("Echo", Int(2))
    assert caught.value.code is ErrorCode.GuestFunctionParameterTypeMismatch
    expected = "Expected parameter type String for parameter index 0 of function Echo but got Int."
    assert caught.value.message == expected


def test_wrong_number_of_parameters_is_spelled_out(shared: MultiUseSandbox) -> None:
    """B.5/98."""
    with pytest.raises(GuestError) as caught:
        shared.call("Echo", "1", Int(2))
    assert caught.value.code is ErrorCode.GuestFunctionIncorrecNoOfParameters
    assert caught.value.message == "Called function Echo with 2 parameters but it takes 1."


def test_unregistered_function_reaches_the_fallback_dispatcher(shared: MultiUseSandbox) -> None:
    """B.5/99."""
    assert shared.call("ThisIsNotARealFunctionButTheNameIsImportant", 1, "x") == 99


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, None, object(), 1j, "\ud800", [1], (1,), {}])
def test_value_without_a_wire_type_is_refused_before_anything_is_sent(
    shared: MultiUseSandbox, value: Any
) -> None:
    with pytest.raises(hyperlight.ValueRangeError):
        shared.call("Echo", value)
    assert shared.call("Echo", "unharmed") == "unharmed"


@pytest.mark.parametrize("name", ["", "\ud800", 5, None, b"Echo"])
def test_name_that_is_none_is_refused(shared: MultiUseSandbox, name: Any) -> None:
    with pytest.raises(HyperlightError):
        shared.call(name)
    assert shared.status is SandboxStatus.READY
    assert shared.call("Echo", "unharmed") == "unharmed"


@pytest.mark.parametrize("returns", [list, "Int", 5, dict, object])
def test_return_type_that_cannot_travel_is_refused(shared: MultiUseSandbox, returns: Any) -> None:
    with pytest.raises(HyperlightError, match="is not a type that can travel"):
        shared.call("GetStatic", returns=returns)


# -- printing ----------------------------------------------------------------------------

ARGUMENTS = ("Test4", Int(3), Long(4), "Tested", "5", True, False, UInt(8), ULong(9), Int(10), Float(3.123))
WORDS = ("Test4", "3", "4", "Tested", "5", "true", "false", "8", "9", "10", "3.123")
PRINTERS = ("Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven")


@pytest.mark.parametrize("count", range(2, 12))
def test_guest_prints_mixed_parameters(sandbox: MultiUseSandbox, count: int) -> None:
    """B.5/96: 2 to 11 of them, through HostPrint, in the exact form."""
    printed: list[str] = []

    def hear(text: str) -> Int:
        printed.append(text)
        return Int(len(text))

    sandbox.register("HostPrint", hear)
    expected = "Message:" + "".join(f" arg{i}:{word}" for i, word in enumerate(WORDS[:count], 1)) + "."
    returned = sandbox.call(f"Print{PRINTERS[count - 2]}Args", *ARGUMENTS[:count], returns=Int)
    assert "".join(printed) == expected
    assert returned == len(expected)


def test_four_arguments_return_46(shared: MultiUseSandbox, capsys: pytest.CaptureFixture[str]) -> None:
    """B.5/102: by way of the HostPrint that is there without being registered."""
    assert shared.call("PrintFourArgs", "Test4", Int(3), Long(4), "Tested", returns=Int) == 46
    assert capsys.readouterr().out == "Message: arg1:Test4 arg2:3 arg3:4 arg4:Tested."


def work(sandbox: MultiUseSandbox) -> tuple[Any, ...]:
    """Do what 0.14's simple test does."""
    return (
        sandbox.call("PrintOutput", "Hello, World!\n", returns=Int),
        sandbox.call("Echo", "Hello, World!\n", returns=str),
        sandbox.call("GetSizePrefixedBuffer", b"\1\2\3\4", returns=bytes),
    )


DONE = (14, "Hello, World!\n", b"\1\2\3\4")


def test_print_echo_and_bytes(shared: MultiUseSandbox) -> None:
    """B.5/100."""
    assert work(shared) == DONE


def test_print_echo_and_bytes_in_50_threads(snapshot: Snapshot) -> None:
    """B.5/101: each with a sandbox of its own, all alive at once."""

    def live(number: int) -> tuple[Any, ...]:
        with MultiUseSandbox.from_snapshot(snapshot) as sandbox:
            sandbox.register("HostPrint", lambda text: len(text), (str,), Int)
            return (*work(sandbox), sandbox.call("AddToStatic", number))

    with ThreadPoolExecutor(50) as threads:
        assert list(threads.map(live, range(50))) == [(*DONE, number) for number in range(50)]


# -- state -------------------------------------------------------------------------------


def test_state_survives_calls_and_a_restore_puts_it_back(sandbox: MultiUseSandbox) -> None:
    """B.5/110."""
    before = sandbox.snapshot()
    assert sandbox.call("AddToStatic", 5) == 5
    assert sandbox.call("GetStatic") == 5
    sandbox.restore(before)
    assert sandbox.call("GetStatic") == 0


def test_call_that_must_leave_no_trace(sandbox: MultiUseSandbox) -> None:
    """B.5/109: what 0.14's deprecated call did is a snapshot, a call and a restore."""
    before = sandbox.snapshot()
    for _ in range(3):
        assert sandbox.call("AddToStatic", 5) == 5
        sandbox.restore(before)


def test_typed_callable(shared: MultiUseSandbox) -> None:
    echo = shared.function("EchoLong", (Long,), Long)
    assert echo(5) == 5
    with pytest.raises(hyperlight.UnexpectedNoOfArguments):
        echo()
    with pytest.raises(hyperlight.ValueRangeError):
        echo(2**63)
    with pytest.raises(HyperlightError):
        echo("5")
    assert echo.__name__ == "EchoLong"


# -- memory in the guest -------------------------------------------------------------------


@pytest.mark.parametrize("by_whom", ["guest", "host"])
def test_a_megabyte_of_static_memory(by_whom: Any) -> None:
    """B.5/95: with 16 MiB of scratch the guest can copy every page of it."""
    config = SandboxConfiguration(scratch_size=16 * MIB, copy_on_write=by_whom)
    assert use_once(config, "SetStatic", guest="staticarray") == MIB


def test_malloc(sandbox: MultiUseSandbox) -> None:
    """B.5/103, B.5/104."""
    assert sandbox.call("CallMalloc", 2000) == 2000
    assert sandbox.call("MallocAndFree", 2000) == 2000


def test_freed_memory_is_used_again(sandbox: MultiUseSandbox) -> None:
    """A hundred times more than the heap holds at once."""
    for _ in range(200):
        assert sandbox.call("MallocAndFree", 64 * 1024) == 64 * 1024


@pytest.mark.parametrize(
    ("function", "arguments", "returned"),
    [("SmallVar", (), 1024), ("StackRecurse", (1,), 1), ("StackAllocate", (100,), 100)],
)
def test_stack_variables(
    sandbox: MultiUseSandbox, function: str, arguments: tuple[Any, ...], returned: int
) -> None:
    """B.5/105, B.5/106, B.5/107."""
    assert sandbox.call(function, *arguments) == returned


def small() -> SandboxConfiguration:
    buffers = memory.min_scratch_size(0x4000, 0x4000)
    return SandboxConfiguration(heap_size=20 * 1024, scratch_size=buffers + 128 * 1024)


@pytest.mark.parametrize(
    ("function", "result"),
    [("Echo", lambda text: text), ("PrintUsingPrintf", len)],
)
def test_1000_calls_with_a_small_heap_leak_nothing(function: str, result: Callable[[str], Any]) -> None:
    """B.5/108."""
    with UninitializedSandbox("simpleguest", small()) as uninitialized:
        uninitialized.register("HostPrint", lambda text: len(text), (str,), Int)
        with uninitialized.evolve() as sandbox:
            for number in range(1000):
                text = f"Hello, World! {number}"
                assert sandbox.call(function, text) == result(text)


def test_message_that_does_not_fit_is_refused_and_harms_nothing(sandbox: MultiUseSandbox) -> None:
    with pytest.raises(memory.IoStackError) as caught:
        sandbox.call("EchoBytes", bytes(0x4000))
    message = memory.encode_function_call(
        "EchoBytes",
        [(memory.ParameterType.VecBytes, bytes(0x4000))],
        memory.FunctionCallType.Guest,
        memory.ReturnType.Int,
    )
    expected = f"Not enough space in buffer to push data. Required: {len(message) + 8}, Available: {0x4000 - 8}"
    assert str(caught.value) == expected
    assert sandbox.status is SandboxStatus.READY
    assert sandbox.call("EchoBytes", bytes(0x1000)) == bytes(0x1000)
