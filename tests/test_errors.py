"""Every way in which a call can end: the error's class, its text, and whether the sandbox is poisoned.

The rows of ``OUTCOMES`` are those of features.md A.4; abi.md 17 has the texts.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import require

import hyperlight
import kvm_abi
import memory
from hyperlight import (
    ErrorCode,
    GuestAborted,
    GuestError,
    HyperlightError,
    Int,
    MultiUseSandbox,
    SandboxStatus,
    Snapshot,
    UInt,
    ULong,
    UninitializedSandbox,
)
from memory import MemoryRegionFlags

pytestmark = require("kvm")

MAPPED = 0x1_0000_0000
"""gpa of the file that the sandboxes here have mapped, read-only."""
HOLE = 0x2_0000_0000
"""gpa where there is nothing."""
WINDOW = 0x3_0000_0000
"""gva through which the guest looks at HOLE."""
READ, WRITE, EXECUTE = MemoryRegionFlags.READ, MemoryRegionFlags.WRITE, MemoryRegionFlags.EXECUTE
VM_ERROR = "Internal Hyperlight VM error: Dispatch guest call error: Failed to run vm: "


@pytest.fixture(scope="module")
def snapshot() -> Iterator[Snapshot]:
    with UninitializedSandbox("simpleguest") as uninitialized, uninitialized.evolve() as sandbox:
        yield sandbox.snapshot()


@pytest.fixture
def sandbox(snapshot: Snapshot) -> Iterator[MultiUseSandbox]:
    with MultiUseSandbox.from_snapshot(snapshot) as fresh:
        yield fresh


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mapped"
    path.write_bytes(b"\xc3" * 4096)
    return path


class Outcome(NamedTuple):
    """How a call ends: what ``str`` of the error contains, and its attributes."""

    call: Callable[[MultiUseSandbox], object]
    error: type[HyperlightError]
    text: str
    poisons: bool
    attributes: dict[str, Any] = {}  # noqa: RUF012


def call(name: str, *arguments: Any, returns: Any = Any) -> Callable[[MultiUseSandbox], object]:
    return lambda sandbox: sandbox.call(name, *arguments, returns=returns)


def look_into_the_hole(write: bool) -> Callable[[MultiUseSandbox], object]:
    """Return a call that maps a hole of the physical memory and touches it."""

    def touch(sandbox: MultiUseSandbox) -> object:
        sandbox.call("MapGpa", ULong(WINDOW), ULong(HOLE), ULong(4096), UInt(7))
        if write:
            return sandbox.call("WriteByte", ULong(WINDOW + 8), 1)
        return sandbox.call("ReadByte", ULong(WINDOW + 8))

    return touch


def cancel(sandbox: MultiUseSandbox) -> object:
    """Kill an endless call from another thread, once it has begun."""
    begun = threading.Event()

    def begin() -> Int:
        begun.set()
        return Int(0)

    sandbox.register("Begin", begin)
    with ThreadPoolExecutor(1) as thread:
        endless = thread.submit(sandbox.call, "HostCallLoop", "Begin")
        begun.wait()
        assert sandbox.interrupt_handle().kill()
        return endless.result()


OUTCOMES = {
    "the function's own error": Outcome(
        call("ReturnError", Int(10), "text"),
        GuestError,
        "Guest error occurred GsCheckFailed: text",
        False,
        {"code": ErrorCode.GsCheckFailed, "message": "text"},
    ),
    "an error code that nobody knows": Outcome(
        call("ReturnError", Int(1234), "text"),
        GuestError,
        "Guest error occurred UnknownError: text",
        False,
        {"code": ErrorCode.UnknownError},
    ),
    "unknown function": Outcome(
        call("Nope"),
        GuestError,
        "Guest error occurred GuestFunctionNotFound: Nope",
        False,
        {"code": ErrorCode.GuestFunctionNotFound, "message": "Nope"},
    ),
    "wrong argument count": Outcome(
        call("Echo"),
        GuestError,
        "Guest error occurred GuestFunctionIncorrecNoOfParameters: "
        "Called function Echo with 0 parameters but it takes 1.",
        False,
        {"code": ErrorCode.GuestFunctionIncorrecNoOfParameters},
    ),
    "wrong argument type": Outcome(
        call("Echo", True),
        GuestError,
        "Guest error occurred GuestFunctionParameterTypeMismatch: "
        "Expected parameter type String for parameter index 0 of function Echo but got Bool.",
        False,
        {"code": ErrorCode.GuestFunctionParameterTypeMismatch},
    ),
    "abort": Outcome(
        call("GuestAbortWithMessage", Int(25), "Oh no"),
        GuestAborted,
        "Guest aborted: 25 Oh no",
        True,
        {"code": 25, "message": "Oh no", "vector": None},
    ),
    "abort text too long": Outcome(
        call("GuestAbortWithMessage", Int(25), "x" * 2000),
        GuestAborted,
        "Guest aborted: 0 Guest abort buffer overflowed",
        True,
        {"code": 0},
    ),
    "CPU exception": Outcome(
        call("TriggerException"),
        GuestAborted,
        "Guest aborted: 15 Exception: InvalidOpcode | Exception vector: 6\nFaulting Instruction: 0x",
        True,
        {"code": ErrorCode.GuestError, "vector": 6, "error_code": 0, "address": None},
    ),
    "panic": Outcome(
        call("GuestPanic", "so it is"), GuestAborted, "Guest aborted: 8 panicked at ", True, {"code": 8}
    ),
    "malloc failure": Outcome(call("CallMalloc", 2**30), GuestAborted, "Guest aborted: 13 ", True, {"code": 13}),
    "stack exhaustion": Outcome(
        call("LargeVar"), GuestAborted, "Guest aborted: 13 Out of physical memory", True, {"code": 13}
    ),
    "allocator out of memory": Outcome(
        call("ExhaustHeapAndPanic", 65536),
        GuestAborted,
        "memory allocation of 65536 bytes failed",
        True,
        {"code": ErrorCode.UnknownError},
    ),
    "write to a read-only mapped region": Outcome(
        call("WriteMappedBuffer", ULong(MAPPED), ULong(1)),
        hyperlight.MemoryAccessViolation,
        f"Memory Access Violation at address {MAPPED:#x} of type WRITE, "
        "but memory is marked as READ | EXECUTE",
        True,
        {"address": MAPPED, "tried": WRITE, "flags": READ | EXECUTE},
    ),
    "read of an unmapped gpa": Outcome(
        look_into_the_hole(write=False),
        hyperlight.MmioReadUnmapped,
        f"{VM_ERROR}MMIO READ access to unmapped address {HOLE + 8:#x}",
        True,
        {"gpa": HOLE + 8},
    ),
    "write to an unmapped gpa": Outcome(
        look_into_the_hole(write=True),
        hyperlight.MmioWriteUnmapped,
        f"{VM_ERROR}MMIO WRITE access to unmapped address {HOLE + 8:#x}",
        True,
        {"gpa": HOLE + 8},
    ),
    "OUT to an unknown port": Outcome(
        call("OutbWithPort", UInt(100), UInt(0)),
        hyperlight.InvalidPort,
        f"{VM_ERROR}IO handling error: Invalid outb port: Invalid OutBAction value: 100",
        True,
        {"port": 100},
    ),
    "a character that is none": Outcome(
        call("OutbWithPort", UInt(103), UInt(0xD800)),
        hyperlight.HandleIoError,
        f"{VM_ERROR}IO handling error: Invalid character for debug print: 55296",
        True,
    ),
    "cancelled": Outcome(
        cancel, hyperlight.ExecutionCanceledByHost, "Execution was cancelled by the host.", True
    ),
    "corrupt size prefix": Outcome(
        call("CorruptOutputSizePrefix"), memory.IoStackError, "Corrupt buffer size prefix", False
    ),
    "corrupt back-pointer": Outcome(
        call("CorruptOutputBackPointer"), memory.IoStackError, "Corrupt buffer back-pointer", False
    ),
    "argument buffer too small": Outcome(
        call("EchoBytes", bytes(0x8000)),
        memory.IoStackFull,
        "Not enough space in buffer to push data. Required: ",
        False,
    ),
    "result of another type": Outcome(
        call("GetStatic", returns=str),
        hyperlight.ReturnValueConversionFailure,
        'Failed To Convert Return Value Int(0) to "String"',
        False,
    ),
    "argument that fits no type": Outcome(call("EchoInt", 2**64), hyperlight.ValueRangeError, "", False),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_outcome(sandbox: MultiUseSandbox, file: Path, name: str) -> None:
    """B.12/212, B.12/213, B.12/214, B.12/215: features.md A.4, row by row, and A.5: what poisons."""
    outcome = OUTCOMES[name]
    before = sandbox.snapshot()
    sandbox.map_file_cow(file, MAPPED)
    with pytest.raises(outcome.error) as caught:
        outcome.call(sandbox)
    failure = caught.value
    assert type(failure) is outcome.error
    assert outcome.text in str(failure)
    for attribute, value in outcome.attributes.items():
        assert getattr(failure, attribute) == value
    assert isinstance(failure, hyperlight.GuestFailure) == outcome.poisons
    assert sandbox.status is (SandboxStatus.POISONED if outcome.poisons else SandboxStatus.READY)
    if outcome.poisons:
        assert failure.registers.keys() >= {"rax", "rsp", "rip", "rflags"}
    sandbox.restore(before)
    assert sandbox.call("Echo", "mended") == "mended"


def test_poisoned_sandbox_refuses_everything_but_restore(sandbox: MultiUseSandbox, file: Path) -> None:
    """B.9/163-166, features.md A.5: the handle, the status and the restore work."""
    before = sandbox.snapshot()
    with pytest.raises(GuestAborted):
        sandbox.call("Abort")
    with memory.SharedMemory.anonymous(4096) as region:
        refused: list[Callable[[], object]] = [
            lambda: sandbox.call("Echo", "x"),
            sandbox.snapshot,
            lambda: sandbox.map_region(MAPPED, region, READ),
            lambda: sandbox.map_file_cow("/there/is/no/such/file", MAPPED),
            lambda: sandbox.register("F", len),
        ]
        for use in refused:
            with pytest.raises(hyperlight.PoisonedSandbox, match="The sandbox was poisoned"):
                use()
    assert sandbox.poisoned
    assert not sandbox.interrupt_handle().kill()
    sandbox.restore(before)
    assert not sandbox.poisoned
    assert sandbox.map_file_cow(file, MAPPED) == 4096


def test_guest_errors_are_counted_and_aborts_are_not(sandbox: MultiUseSandbox) -> None:
    """B.13/232: by numeric code."""
    counter = hyperlight.metrics.guest_errors
    before = counter.value(code="10"), counter.value(code="25")
    with pytest.raises(GuestError):
        sandbox.call("ReturnError", Int(10), "text")
    with pytest.raises(GuestAborted):
        sandbox.call("GuestAbortWithCode", Int(25))
    assert (counter.value(code="10"), counter.value(code="25")) == (before[0] + 1, before[1])


def test_cancellations_are_counted(sandbox: MultiUseSandbox) -> None:
    counter = hyperlight.metrics.guest_cancellations
    before = counter.value()
    with pytest.raises(hyperlight.ExecutionCanceledByHost):
        cancel(sandbox)
    assert counter.value() == before + 1


def public_errors() -> list[type[BaseException]]:
    named = [getattr(hyperlight, name) for name in hyperlight.__all__]
    return [each for each in named if isinstance(each, type) and issubclass(each, BaseException)]


def test_every_public_error_is_under_the_root() -> None:
    errors = public_errors()
    assert hyperlight.HyperlightError in errors
    assert len(errors) > 20
    assert [each for each in errors if not issubclass(each, HyperlightError)] == []


def test_errors_of_the_layers_below_are_public() -> None:
    below = [each for each in vars(memory).values() if isinstance(each, type) and issubclass(each, HyperlightError)]
    assert [each.__name__ for each in below if each not in public_errors()] == []


PICKLED = [
    GuestError(ErrorCode.GuestError, "text"),
    GuestAborted(13, "text"),
    hyperlight.ExecutionCanceledByHost(),
    hyperlight.MemoryAccessViolation(0x1000, WRITE, READ),
    hyperlight.PoisonedSandbox(),
    hyperlight.MmioReadUnmapped(0x1000),
    hyperlight.InvalidPort(7),
    hyperlight.HostFunctionNotFound("F"),
    memory.MemoryRequestTooBig(2, 1),
    hyperlight.EmulationFailure(b"\x0f\x57\xc0", 0x1000, emulates_cpl0=True),
    hyperlight.GuestBinaryNotFound(2, "No such file or directory", "/guest"),
    hyperlight.KvmError(kvm_abi.KvmError("KVM_CREATE_VM", 22)),
]


@pytest.mark.parametrize("error", PICKLED, ids=lambda error: type(error).__name__)
def test_errors_travel_between_processes(error: HyperlightError) -> None:
    """What a worker of ``multiprocessing`` raises must arrive as it was."""
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)
    for attribute in ("errno", "strerror", "filename"):
        assert getattr(arrived, attribute, None) == getattr(error, attribute, None)
