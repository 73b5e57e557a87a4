"""The whole path of a sandbox, from the guest's file to its end; on the prebuilt guests."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import process_resources, require, rounds

import hyperlight
from hyperlight import (
    Double,
    ErrorCode,
    Float,
    GuestAborted,
    GuestEnvironment,
    GuestError,
    HyperlightError,
    Int,
    Long,
    MultiUseSandbox,
    SandboxConfiguration,
    SandboxStatus,
    UInt,
    ULong,
    UninitializedSandbox,
)

pytestmark = require("kvm")


@pytest.fixture(scope="module")
def snapshot() -> Iterator[hyperlight.Snapshot]:
    """An initialised simpleguest, from which the tests start sandboxes."""
    with UninitializedSandbox("simpleguest") as uninitialized, uninitialized.evolve() as sandbox:
        yield sandbox.snapshot()


@pytest.fixture
def sandbox(snapshot: hyperlight.Snapshot) -> Iterator[MultiUseSandbox]:
    with MultiUseSandbox.from_snapshot(snapshot) as fresh:
        yield fresh


# -- life --------------------------------------------------------------------------------


def test_creating_and_dropping_1000_sandboxes_leaks_nothing(snapshot: hyperlight.Snapshot) -> None:
    """Issue 2, item 5; every other one goes without being closed."""

    def live_once(number: int) -> None:
        fresh = MultiUseSandbox.from_snapshot(snapshot)
        if number % 10 == 0:
            assert fresh.call("GetStatic") == 0
        if number % 2:
            fresh.close()

    live_once(0)
    gc.collect()
    before = process_resources()
    for number in range(rounds(1000)):
        live_once(number)
    assert process_resources() == before


def test_booting_from_the_elf_leaks_nothing() -> None:
    def boot() -> None:
        with UninitializedSandbox("hello") as uninitialized, uninitialized.evolve():
            pass

    boot()
    gc.collect()  # what earlier tests left lying about must not go in between
    before = process_resources()
    for _ in range(20):
        boot()
    assert process_resources() == before


def test_sandboxes_move_between_threads() -> None:
    """B.1/10: made on one thread, evolved on others, used on yet others."""
    made = [UninitializedSandbox("simpleguest") for _ in range(4)]
    with ThreadPoolExecutor(4) as evolving:
        evolved = list(evolving.map(UninitializedSandbox.evolve, made))
    with ThreadPoolExecutor(4) as using:
        assert list(using.map(lambda each: each.call("Echo", "x"), evolved)) == ["x"] * 4
    for each in evolved:
        each.close()


def test_closing_releases_the_vm_whoever_keeps_the_object_or_its_errors(snapshot: hyperlight.Snapshot) -> None:
    kept: list[object] = []

    def live_once() -> None:
        with MultiUseSandbox.from_snapshot(snapshot) as fresh:
            with pytest.raises(GuestAborted) as caught:
                fresh.call("TriggerException")
            kept.append((fresh, fresh.interrupt_handle(), caught.value))

    live_once()
    gc.collect()
    before = process_resources()
    for _ in range(3):
        live_once()
    assert process_resources() == before


def test_use_after_close_is_refused(sandbox: MultiUseSandbox) -> None:
    sandbox.close()
    sandbox.close()
    for use in (lambda: sandbox.call("GetStatic"), sandbox.snapshot):
        with pytest.raises(hyperlight.SandboxClosed):
            use()


def test_init_data_reaches_the_guest() -> None:
    """B.1/8."""
    environment = GuestEnvironment("simpleguest", b"\x01\x02\x03\x04")
    with UninitializedSandbox(environment) as uninitialized, uninitialized.evolve() as sandbox:
        assert sandbox.call("ReadInitData", returns=bytes) == b"\x01\x02\x03\x04"


# -- calls and types ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "value"),
    [
        ("EchoInt", Int(-5)),
        ("EchoInt", 5),
        ("EchoUInt", UInt(2**32 - 1)),
        ("EchoLong", Long(-(2**63))),
        ("EchoLong", 2**40),
        ("EchoULong", ULong(2**64 - 1)),
        ("EchoFloat", Float(1.5)),
        ("EchoDouble", 2.5),
        ("EchoDouble", Double(float("inf"))),
        ("EchoBool", True),
        ("Echo", "żółw"),
        ("Echo", ""),
        ("EchoBytes", bytes(range(256))),
        ("EchoBytes", b""),
    ],
)
def test_every_type_goes_there_and_back(sandbox: MultiUseSandbox, function: str, value: Any) -> None:
    """B.5/92, B.5/93, B.5/100."""
    assert sandbox.call(function, value, returns=type(value)) == value


def test_nine_parameters_of_nine_types(sandbox: MultiUseSandbox) -> None:
    arguments = (Int(-1), UInt(2), Long(-3), ULong(4), Float(1.5), 2.5, "s", True, b"\1\2\3")
    said = "Int:-1 UInt:2 Long:-3 ULong:4 Float:1.5 Double:2.5 String:s Bool:true VecBytes:010203"
    assert sandbox.call("AllTypes", *arguments, returns=str) == said


def test_typed_callable_converts_and_checks(sandbox: MultiUseSandbox) -> None:
    echo = sandbox.function("EchoLong", (Long,), Long)
    assert echo(5) == 5
    with pytest.raises(hyperlight.UnexpectedNoOfArguments):
        echo(1, 2)
    with pytest.raises(hyperlight.ValueRangeError):
        echo(2**63)


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, object(), None, "\ud800", [1]])
def test_values_that_fit_no_type_raise_before_anything_is_sent(sandbox: MultiUseSandbox, value: object) -> None:
    with pytest.raises(hyperlight.ValueRangeError):
        sandbox.call("Echo", value)
    assert sandbox.status is SandboxStatus.READY
    assert sandbox.call("Echo", "still there") == "still there"


def test_wrong_return_type_is_an_error_and_no_poison(sandbox: MultiUseSandbox) -> None:
    with pytest.raises(hyperlight.ReturnValueConversionFailure, match='Int\\(0\\) to "String"'):
        sandbox.call("GetStatic", returns=str)
    assert sandbox.call("GetStatic", returns=int) == 0


@pytest.mark.parametrize(
    ("function", "arguments", "code", "message"),
    [
        ("Nope", (), ErrorCode.GuestFunctionNotFound, "Nope"),
        (
            "Echo",
            ("a", "b"),
            ErrorCode.GuestFunctionIncorrecNoOfParameters,
            "Called function Echo with 2 parameters but it takes 1.",
        ),
        (
            "Echo",
            (1,),
            ErrorCode.GuestFunctionParameterTypeMismatch,
            "Expected parameter type String for parameter index 0 of function Echo but got Int.",
        ),
    ],
)
def test_refused_calls_say_why(
    sandbox: MultiUseSandbox, function: str, arguments: tuple[Any, ...], code: ErrorCode, message: str
) -> None:
    """B.5/94, B.5/97, B.5/98."""
    with pytest.raises(GuestError) as caught:
        sandbox.call(function, *arguments)
    assert (caught.value.code, caught.value.message) == (code, message)
    assert sandbox.status is SandboxStatus.READY


def test_message_that_does_not_fit_is_refused_and_nothing_is_lost(sandbox: MultiUseSandbox) -> None:
    with pytest.raises(HyperlightError, match="Not enough space in buffer to push data"):
        sandbox.call("EchoBytes", bytes(0x4000))
    assert sandbox.call("EchoBytes", bytes(0x1000)) == bytes(0x1000)


# -- host functions ----------------------------------------------------------------------


def test_host_function_types_come_from_annotations() -> None:
    def host_add(left: Int, right: Int) -> Int:
        return Int(left + right)

    with UninitializedSandbox("simpleguest") as uninitialized:
        uninitialized.register("HostAdd", host_add)
        with uninitialized.evolve() as sandbox:
            assert sandbox.call("Add", 1, 41) == 42


def test_exception_of_a_host_function_comes_back_as_the_cause(sandbox: MultiUseSandbox) -> None:
    """B.7/141: an error in the guest's eyes; the sandbox stays usable."""

    def fail() -> Int:
        raise KeyError("hi")

    sandbox.register("Fail", fail)
    with pytest.raises(GuestError, match="hi") as caught:
        sandbox.call("TryCallHost", "Fail")
    assert caught.value.code is ErrorCode.HostFunctionError
    assert isinstance(caught.value.__cause__, KeyError)
    assert sandbox.call("Echo", "x") == "x"


def test_host_function_may_not_use_its_own_sandbox(sandbox: MultiUseSandbox) -> None:
    refusals: list[HyperlightError] = []

    def reenter() -> Int:
        with pytest.raises(hyperlight.GuestFunctionCallAlreadyInProgress) as caught:
            sandbox.call("GetStatic")
        refusals.append(caught.value)
        return Int(7)

    sandbox.register("Reenter", reenter)
    assert sandbox.call("TryCallHost", "Reenter") == 7
    assert len(refusals) == 1


@pytest.mark.parametrize("count", [0, 1, 2, 31, 32])
def test_host_functions_of_0_to_32_parameters(sandbox: MultiUseSandbox, count: int) -> None:
    """B.7/149."""
    sandbox.register("Sum", lambda *numbers: sum(numbers), [Int] * count, Int)
    assert sandbox.call("CallHostWithInts", "Sum", count) == sum(range(1, count + 1))


def test_33_parameters_are_refused(sandbox: MultiUseSandbox) -> None:
    with pytest.raises(HyperlightError, match="at most 32"):
        sandbox.register("Sum", lambda *numbers: sum(numbers), [Int] * 33, Int)


def test_a_second_thread_waits_for_the_first(sandbox: MultiUseSandbox) -> None:
    inside, let_go = threading.Event(), threading.Event()

    def wait() -> Int:
        inside.set()
        let_go.wait()
        return Int(1)

    sandbox.register("Wait", wait)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(sandbox.call, "TryCallHost", "Wait")
        inside.wait()
        second = threads.submit(sandbox.call, "Echo", "second")
        assert not second.done()
        let_go.set()
        assert (first.result(), second.result()) == (1, "second")


# -- failures ----------------------------------------------------------------------------


def test_cpu_exception_is_reported_with_its_registers_and_restore_mends(sandbox: MultiUseSandbox) -> None:
    """B.6/127, B.9/162, B.9/168."""
    clean = sandbox.snapshot()
    with pytest.raises(GuestAborted, match="InvalidOpcode") as caught:
        sandbox.call("TriggerException")
    failure = caught.value
    assert failure.code == ErrorCode.GuestError
    assert failure.vector == 6
    assert failure.registers["rip"] == failure.instruction
    assert sandbox.status is SandboxStatus.POISONED
    with pytest.raises(hyperlight.PoisonedSandbox):
        sandbox.call("GetStatic")
    with pytest.raises(hyperlight.PoisonedSandbox):
        sandbox.snapshot()
    sandbox.restore(clean)
    assert sandbox.call("Echo", "again") == "again"


@pytest.mark.parametrize(
    ("function", "code", "message"),
    [
        ("GuestPanic", ErrorCode.UnknownError, "panicked at"),
        ("InfiniteRecursion", ErrorCode.MallocFailed, "Out of physical memory"),
        ("ReadUnmapped", ErrorCode.GuestError, "PageFault"),
    ],
)
def test_failures_poison_and_say_what_happened(
    sandbox: MultiUseSandbox, function: str, code: ErrorCode, message: str
) -> None:
    """B.6/115, B.6/124."""
    arguments = ("boom",) if function == "GuestPanic" else ()
    with pytest.raises(GuestAborted, match=message) as caught:
        sandbox.call(function, *arguments)
    assert caught.value.code == code
    assert sandbox.poisoned


def test_kill_ends_a_call_and_nothing_else(sandbox: MultiUseSandbox) -> None:
    """B.8/151, B.8/152."""
    clean, handle, inside = sandbox.snapshot(), sandbox.interrupt_handle(), threading.Event()
    assert not handle.kill()
    assert sandbox.call("Echo", "unharmed") == "unharmed"

    def enter() -> Int:
        inside.set()
        return Int(0)

    sandbox.register("Enter", enter)
    with ThreadPoolExecutor(1) as thread:
        endless = thread.submit(sandbox.call, "HostCallLoop", "Enter")
        inside.wait()
        assert handle.kill()
        with pytest.raises(hyperlight.ExecutionCanceledByHost):
            endless.result()
    sandbox.restore(clean)
    assert sandbox.call("Echo", "x") == "x"
    sandbox.close()
    assert handle.dropped()


# -- logs --------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "count"), [("off", 0), ("error", 1), ("warn", 2), ("info", 3), ("trace", 5)])
def test_guest_sends_no_more_than_its_level(caplog: pytest.LogCaptureFixture, level: str, count: int) -> None:
    """B.13/226."""
    caplog.set_level(hyperlight.TRACE, "hyperlight_guest")
    config = SandboxConfiguration(guest_log_level=level)
    with UninitializedSandbox("simpleguest", config) as uninitialized, uninitialized.evolve() as sandbox:
        caplog.clear()
        sandbox.call("LogEveryLevel", "text")
    levels = [record.levelno for record in caplog.records if record.name == "hyperlight_guest"]
    assert levels == [logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG, hyperlight.TRACE][:count]


# -- copy-on-write -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["guest", "host"])
def test_snapshots_work_in_both_modes_of_copy_on_write(mode: Any) -> None:
    """B.5/110, B.9/172."""
    config = SandboxConfiguration(copy_on_write=mode)
    with UninitializedSandbox("simpleguest", config) as uninitialized, uninitialized.evolve() as sandbox:
        zero = sandbox.snapshot()
        assert sandbox.snapshot() is zero
        sandbox.call("SetStatic", 5)
        five = sandbox.snapshot()
        assert five is not zero
        sandbox.call("SetStatic", 6)
        for wanted, each in ((0, zero), (5, five), (0, zero)):
            sandbox.restore(each)
            assert sandbox.call("GetStatic") == wanted
        with MultiUseSandbox.from_snapshot(five) as other:
            other.call("AddToStatic", 1)
            assert (other.call("GetStatic"), sandbox.call("GetStatic")) == (6, 0)
