"""Guests that fail: aborts, panics, no memory, CPU exceptions, corrupt results. Each error says what happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import conftest
import pytest
from conftest import PRIVILEGES, require

import hyperlight
import memory
from hyperlight import (
    ErrorCode,
    GuestAborted,
    Int,
    MultiUseSandbox,
    SandboxConfiguration,
    SandboxStatus,
    Snapshot,
    UInt,
    ULong,
    UninitializedSandbox,
)

pytestmark = require("kvm")

KIB, MIB = 1 << 10, 1 << 20
NEVER_MAPPED = 0x7000_0000_0000
NON_CANONICAL = 1 << 63
PRESENT, WRITE, USER, FETCH = 1, 2, 4, 16
"""Bits of a page fault's error code; whether USER is set depends on the guest's privilege."""
BY_WHOM: list[Any] = ["guest", "host"]


@pytest.fixture(scope="module", params=PRIVILEGES)
def privilege(request: pytest.FixtureRequest) -> str:
    """How the guest of the tests runs; exceptions report the same at either privilege."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def snapshot(privilege: str) -> Iterator[Snapshot]:
    with conftest.booted("simpleguest", privilege) as sandbox:
        yield sandbox.snapshot()


@pytest.fixture
def sandbox(snapshot: Snapshot) -> Iterator[MultiUseSandbox]:
    with MultiUseSandbox.from_snapshot(snapshot) as fresh:
        yield fresh


def abort_of(sandbox: MultiUseSandbox, function: str, *arguments: Any) -> GuestAborted:
    """Return the abort that a call ends in; check that it poisons, and that a restore mends."""
    before = sandbox.snapshot()
    with pytest.raises(GuestAborted) as caught:
        sandbox.call(function, *arguments)
    assert sandbox.status is SandboxStatus.POISONED
    with pytest.raises(hyperlight.PoisonedSandbox):
        sandbox.call("Echo", "x")
    sandbox.restore(before)
    assert sandbox.call("Echo", "mended") == "mended"
    return caught.value


def booted(**settings: Any) -> MultiUseSandbox:
    with UninitializedSandbox("simpleguest", SandboxConfiguration(**settings)) as uninitialized:
        return uninitialized.evolve()


# -- aborts and panics -------------------------------------------------------------------


def test_abort_with_a_code_and_no_text(sandbox: MultiUseSandbox) -> None:
    """B.6/111."""
    failure = abort_of(sandbox, "GuestAbortWithCode", Int(13))
    assert (failure.code, failure.message) == (ErrorCode.MallocFailed, "")
    assert str(failure) == "Guest aborted: 13 "


def test_abort_without_code_and_text(sandbox: MultiUseSandbox) -> None:
    failure = abort_of(sandbox, "Abort")
    assert (failure.code, failure.message) == (0, "")


@pytest.mark.parametrize(
    ("code", "text"),
    [(25, "Oh no"), (75, "This is a test error message"), (13, "żółw"), (0, "\n"), (254, "x" * 1022)],
)
def test_abort_with_a_code_and_a_text(sandbox: MultiUseSandbox, code: int, text: str) -> None:
    """B.6/112, B.6/114."""
    expected = "Exception: InvalidTSS | " if text == "\n" else text  # a first byte of 10 reads as a vector
    failure = abort_of(sandbox, "GuestAbortWithMessage", Int(code), text)
    assert (failure.code, failure.message) == (code, expected)
    assert failure.vector is None


@pytest.mark.parametrize("size", [1024, 1025, 5000])
def test_abort_text_that_overflows_the_buffer_of_the_host(sandbox: MultiUseSandbox, size: int) -> None:
    """B.6/113."""
    failure = abort_of(sandbox, "GuestAbortWithMessage", Int(25), "a" * size)
    assert (failure.code, failure.message) == (0, "Guest abort buffer overflowed")


def test_panic_carries_its_place_and_text(sandbox: MultiUseSandbox) -> None:
    """B.6/115."""
    failure = abort_of(sandbox, "GuestPanic", "Error... error...")
    assert failure.code == ErrorCode.UnknownError
    assert failure.message.startswith("panicked at ")
    assert failure.message.endswith("\nError... error...")


def test_half_an_abort_does_not_leak_into_the_next_call(sandbox: MultiUseSandbox) -> None:
    """B.6/130: neither into its result nor into its abort."""
    sandbox.call("LeakAbortBytes")
    assert sandbox.call("Echo", "unharmed") == "unharmed"
    sandbox.call("LeakAbortBytes")
    failure = abort_of(sandbox, "GuestAbortWithMessage", Int(25), "own text")
    assert (failure.code, failure.message) == (25, "own text")


OVERRUN = """
#include "hyperlight_guest.h"
#include <string.h>

__attribute__((noinline, optimize("stack-protector-all"))) static int32_t copy(const char *text) {
    char buffer[16];
    strcpy(buffer, text);
    return buffer[0];
}

HYPERLIGHT_WRAP_FUNCTION(copy, Int, 1, String)
void hyperlight_main(void) { HYPERLIGHT_REGISTER_FUNCTION("BufferOverrun", copy); }
hl_Vec *c_guest_dispatch_function(const hl_FunctionCall *call) { (void)call; return NULL; }
"""


@require("gcc")
def test_buffer_overrun_on_the_stack_is_noticed(tmp_path: Path) -> None:
    """B.6/131: in a guest whose functions are compiled with a stack protector."""
    source, guest = tmp_path / "overrun.c", tmp_path / "overrun"
    source.write_text(OVERRUN)
    assert hyperlight.main(["build", str(source), "-o", str(guest)]) == 0
    with UninitializedSandbox(guest) as uninitialized, uninitialized.evolve() as sandbox:
        assert sandbox.call("BufferOverrun", "fits") == ord("f")
        with pytest.raises(GuestAborted) as caught:
            sandbox.call("BufferOverrun", "x" * 100)
    assert caught.value.code == ErrorCode.GsCheckFailed


# -- no memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [20 * MIB, 200 * KIB])
def test_malloc_of_more_than_the_heap(sandbox: MultiUseSandbox, size: int) -> None:
    """B.6/116."""
    failure = abort_of(sandbox, "CallMalloc", size)
    assert (failure.code, failure.message) == (ErrorCode.MallocFailed, "")


def test_mallocs_until_the_heap_is_full(sandbox: MultiUseSandbox) -> None:
    assert abort_of(sandbox, "ExhaustHeap", 1024).code == ErrorCode.MallocFailed


def test_panic_at_an_allocation_that_fails() -> None:
    """B.6/117: 64 KiB in a heap of 16 KiB."""
    with booted(heap_size=16 * KIB) as sandbox:
        failure = abort_of(sandbox, "ExhaustHeapAndPanic", 64 * KIB)
    assert failure.code == ErrorCode.UnknownError
    assert f"memory allocation of {64 * KIB} bytes failed" in failure.message


def test_panic_with_a_full_heap_needs_no_memory(sandbox: MultiUseSandbox) -> None:
    """B.6/118."""
    failure = abort_of(sandbox, "ExhaustHeapAndPanic", 32)
    assert failure.code == ErrorCode.UnknownError
    assert "memory allocation of 32 bytes failed" in failure.message


@pytest.mark.parametrize("by_whom", BY_WHOM)
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("StackAllocate", (128 * MIB,)),  # B.6/122
        ("LargeVar", ()),  # B.6/123
        ("InfiniteRecursion", ()),  # B.6/124
        ("StackRecurse", (5000,)),  # B.6/125
    ],
)
def test_stack_without_end(by_whom: Any, function: str, arguments: tuple[Any, ...]) -> None:
    """B.6/122, B.6/123, B.6/124, B.6/125: scratch is what limits the stack."""
    with booted(copy_on_write=by_whom) as sandbox:
        failure = abort_of(sandbox, function, *arguments)
    assert (failure.code, failure.message) == (ErrorCode.MallocFailed, "Out of physical memory")


def test_recursion_that_fits() -> None:
    with booted(scratch_size=1 * MIB) as sandbox:
        assert sandbox.call("StackRecurse", 1000) == 1000


# -- CPU exceptions ----------------------------------------------------------------------


def test_invalid_instruction(sandbox: MultiUseSandbox) -> None:
    """B.6/127."""
    failure = abort_of(sandbox, "TriggerException")
    assert failure.code == ErrorCode.GuestError
    assert failure.message.startswith("Exception: InvalidOpcode | Exception vector: 6\n")
    assert (failure.vector, failure.error_code, failure.address) == (6, 0, None)
    assert failure.registers["rip"] == failure.instruction
    assert f"Faulting Instruction: {failure.instruction:#x}\n" in failure.message
    assert "Bytes At Faulting Instruction: [15, 11, " in failure.message


def test_division_by_zero(sandbox: MultiUseSandbox) -> None:
    failure = abort_of(sandbox, "DivideByZero", 1000)
    assert "Exception: DivideByZero | " in failure.message
    assert (failure.vector, failure.error_code, failure.address) == (0, 0, None)
    assert failure.registers["rax"] == 1000


@pytest.mark.parametrize("by_whom", BY_WHOM)
@pytest.mark.parametrize(
    ("function", "arguments", "address", "bits"),
    [
        ("ReadUnmapped", (), NEVER_MAPPED, 0),
        ("WriteUnmapped", (), NEVER_MAPPED, WRITE),
        ("ReadByte", (ULong(0),), 0, 0),
        ("WriteByte", (ULong(NEVER_MAPPED + 5), 1), NEVER_MAPPED + 5, WRITE),
        ("JumpTo", (ULong(NEVER_MAPPED + 6),), NEVER_MAPPED + 6, FETCH),
        ("JumpTo", (ULong(0),), 0, FETCH),
    ],
)
def test_page_fault_where_nothing_is(
    by_whom: Any, function: str, arguments: tuple[Any, ...], address: int, bits: int
) -> None:
    with booted(copy_on_write=by_whom) as sandbox:
        failure = abort_of(sandbox, function, *arguments)
    assert failure.message.startswith("Exception: PageFault | ")
    assert (failure.vector, failure.address) == (14, address)
    assert failure.error_code is not None
    assert failure.error_code & ~USER == bits
    if bits & FETCH:
        assert failure.instruction == address
    assert failure.registers["rip"] == failure.instruction


def test_write_over_the_peb_is_a_page_fault(sandbox: MultiUseSandbox) -> None:
    failure = abort_of(sandbox, "WritePeb")
    peb = sandbox.layout.peb_gpa
    assert failure.vector == 14
    assert failure.address is not None
    assert peb <= failure.address < peb + 64
    assert failure.error_code is not None
    assert failure.error_code & ~USER == PRESENT | WRITE


@pytest.mark.parametrize("function", ["ReadByte", "JumpTo"])
def test_non_canonical_address_is_a_general_protection_fault(sandbox: MultiUseSandbox, function: str) -> None:
    failure = abort_of(sandbox, function, ULong(NON_CANONICAL))
    assert "Exception: GeneralProtectionFault | " in failure.message
    assert (failure.vector, failure.error_code, failure.address) == (13, 0, None)


@pytest.mark.parametrize("function", ["ExecuteOnHeap", "ExecuteOnStack"])
def test_data_is_not_executable(sandbox: MultiUseSandbox, function: str) -> None:
    """B.6/126."""
    failure = abort_of(sandbox, function)
    assert "Exception: PageFault | " in failure.message
    assert failure.vector == 14
    assert failure.address == failure.instruction
    assert failure.error_code is not None
    assert failure.error_code & ~USER == PRESENT | FETCH


@pytest.mark.parametrize("by_whom", BY_WHOM)
def test_heap_is_executable_where_the_configuration_says_so(by_whom: Any) -> None:
    """B.6/126: the heap alone, not the stack."""
    with booted(executable_heap=True, copy_on_write=by_whom) as sandbox:
        assert sandbox.call("ExecuteOnHeap") == "executed"
        assert abort_of(sandbox, "ExecuteOnStack").vector == 14


@pytest.mark.parametrize(("vector", "trigger"), [(3, "TriggerInt3"), (6, "TriggerException")])
def test_handler_that_the_guest_installs(sandbox: MultiUseSandbox, privilege: str, vector: int, trigger: str) -> None:
    """B.6/128: it counts 0, 1, 2, may be installed again, and taken away."""
    if vector == 3 and privilege == "kernel":
        conftest.need("real_cpl0")
    for _ in range(2):
        sandbox.call("InstallHandler", vector)
        for count in range(3):
            assert sandbox.call("GetExceptionHandlerCallCount") == count
            sandbox.call(trigger)
    sandbox.call("RemoveHandler", vector)
    assert abort_of(sandbox, trigger).vector == vector


def test_handler_that_refuses(sandbox: MultiUseSandbox) -> None:
    sandbox.call("InstallRefusingHandler", 6)
    assert abort_of(sandbox, "TriggerException").vector == 6


def test_exception_with_a_full_heap_reports_all_the_same(sandbox: MultiUseSandbox) -> None:
    """B.6/129."""
    failure = abort_of(sandbox, "FillHeapAndCauseException")
    assert failure.code == ErrorCode.GuestError
    lines = failure.message.split("\n")
    assert lines[0] == "Exception: InvalidOpcode | Exception vector: 6"
    assert lines[1] == f"Faulting Instruction: {failure.instruction:#x}"
    assert lines[-1].startswith("Stack Pointer: 0x")
    assert failure.vector == 6


# -- ports and corrupt results -------------------------------------------------------------


def test_write_to_an_unknown_port_poisons(sandbox: MultiUseSandbox, privilege: str) -> None:
    """B.6/119. A user-mode guest cannot even reach most ports."""
    port = 0x1234 if privilege == "kernel" else 100
    before = sandbox.snapshot()
    with pytest.raises(hyperlight.InvalidPort) as caught:
        sandbox.call("OutbWithPort", UInt(port), UInt(0))
    assert caught.value.port == port
    assert str(caught.value) == (
        "Internal Hyperlight VM error: Dispatch guest call error: Failed to run vm: "
        f"IO handling error: Invalid outb port: Invalid OutBAction value: {port}"
    )
    assert sandbox.poisoned
    sandbox.restore(before)
    assert sandbox.call("Echo", "mended") == "mended"


@pytest.mark.parametrize("port", [100, 104, 105, 106, 107, 0, 0xFFFF])
def test_ports_of_features_that_are_off_are_unknown(sandbox: MultiUseSandbox, privilege: str, port: int) -> None:
    closed = privilege != "kernel" and port not in range(99, 109)
    with pytest.raises(GuestAborted if closed else hyperlight.InvalidPort) as caught:
        sandbox.call("OutbWithPort", UInt(port), UInt(0))
    assert not closed or caught.value.vector == 13
    assert sandbox.poisoned


SIZE_OF_OUTPUT = 0x4000


@pytest.mark.parametrize(
    ("function", "arguments", "text"),
    [
        (
            "CorruptOutputSizePrefix",
            (),
            "Corrupt buffer size prefix: flatbuffer claims 4294967295 bytes "
            "but the element slot is only 8 bytes.",
        ),
        (
            "CorruptOutputBackPointer",
            (),
            "Corrupt buffer back-pointer: element offset 57005 is outside valid range [8, 8].",
        ),
        *(
            (
                "CorruptOutputStackPointer",
                (ULong(pointer),),
                "Unable to pop data from buffer: Stack pointer is out of bounds. "
                f"Stack pointer: {pointer}, Buffer size: {SIZE_OF_OUTPUT}",
            )
            for pointer in (0, 15, SIZE_OF_OUTPUT + 1, 2**64 - 1)
        ),
        (
            "HaltWithoutResult",
            (),
            "Unable to pop data from buffer: Stack pointer is out of bounds. "
            f"Stack pointer: 8, Buffer size: {SIZE_OF_OUTPUT}",
        ),
    ],
)
def test_corrupt_result_is_refused_and_does_not_poison(
    sandbox: MultiUseSandbox, function: str, arguments: tuple[Any, ...], text: str
) -> None:
    """B.6/120, B.6/121."""
    before = sandbox.snapshot()
    with pytest.raises(memory.IoStackError) as caught:
        sandbox.call(function, *arguments)
    assert str(caught.value) == text
    assert sandbox.status is SandboxStatus.READY
    sandbox.restore(before)
    assert sandbox.call("Echo", "mended") == "mended"


def test_registers_full_of_ones_at_the_end_of_a_call(sandbox: MultiUseSandbox) -> None:
    with pytest.raises(memory.IoStackError):
        sandbox.call("DirtyRegisters")
    assert sandbox.call("Echo", "unharmed") == "unharmed"
