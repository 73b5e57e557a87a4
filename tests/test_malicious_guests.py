"""Guests that attack the host: each ends in the documented error, within a bound, and a restore mends.

The guests are raw (``rawguest``): a few lines of assembly at CPL 0, with the whole machine at their command.
"""

from __future__ import annotations

import contextlib
import logging
import random
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import rawguest
from conftest import require
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rawguest import ANSWER, GOOD, OUTPUT_SIZE, SAID_SIZE, build, stack_with, tell

import hyperlight
import memory
from hyperlight import (
    GuestAborted,
    HandleIoError,
    HyperlightError,
    HyperlightVmError,
    Int,
    InvalidPort,
    MemoryProfile,
    MultiUseSandbox,
    SandboxConfiguration,
    SandboxStatus,
    Snapshot,
    TraceRecorder,
    UnexpectedVmExit,
    UninitializedSandbox,
)
from memory import (
    FunctionCallType,
    GuestLogData,
    GuestLogLevel,
    IoStackError,
    PageTableError,
    ParameterType,
    ReturnType,
)

pytestmark = [require("kvm"), require("gcc")]

EVIL = "A function that does evil"
MAX_CPU_SECONDS = 10.0
"""What this process may spend on one attack, however long the machine takes."""
MAX_GROWTH = 64 << 20
"""Bytes by which this process may grow under one attack."""
LOG, HOST_CALL, ABORT, DEBUG_PRINT, HALT = 99, 101, 102, 103, 108


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * memory.PAGE_SIZE


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fail where the host needs much time or memory."""
    cpu, resident = time.process_time(), resident_bytes()
    yield
    assert time.process_time() - cpu < MAX_CPU_SECONDS
    assert resident_bytes() - resident < MAX_GROWTH


@contextlib.contextmanager
def attacked(guest: bytes, config: SandboxConfiguration | None = None) -> Iterator[MultiUseSandbox]:
    """Boot *guest* for an attack; afterwards a restore must bring it back, and nothing may be lost."""
    with UninitializedSandbox(guest, config) as uninitialized, uninitialized.evolve() as sandbox:
        before = sandbox.snapshot()
        with bounded():
            yield sandbox
        sandbox.restore(before)
        assert sandbox.status is SandboxStatus.READY
        assert sandbox.call(GOOD) == ANSWER
        again = sandbox.snapshot()
        assert again.layout == before.layout


# -- attacks that end the run --------------------------------------------------------------

WINDOW = 1 << 39
"""gva of what ``MAP_WINDOW`` maps: the first address under the second entry of the root table."""


def map_window(leaf: int, *, level: int = 1) -> str:
    """Return code that enters *leaf* for WINDOW at *level* of the page tables, in tables made of free pages."""
    tables = [f"movabs $FREE_GPA + {0x1000 * index} + 3, %rax; movabs $" for index in range(3)]
    places = ["PML4 + 8", "FREE", "FREE + 0x1000", "FREE + 0x2000"]
    lines = [f"{tables[index]}{places[index]}, %rdi; mov %rax, (%rdi)" for index in range(4 - level)]
    lines.append(f"movabs ${leaf:#x}, %rax; movabs ${places[4 - level]}, %rdi; mov %rax, (%rdi)")
    return "\n".join([*lines, "mov %cr3, %rax; mov %rax, %cr3"])


HOLE_GPA = 0x5_0000_0000
PRESENT_WRITABLE, LARGE = 3, 1 << 7


class Attack(NamedTuple):
    """What the guest does, and the error in which it must end."""

    evil: str
    error: type[HyperlightError]
    text: str


SHUTDOWN = "Unexpected VM exit: KVM_EXIT_SHUTDOWN"

ATTACKS = {
    "triple fault": Attack("ud2", UnexpectedVmExit, SHUTDOWN),
    "software interrupt without an IDT": Attack("int $0x80", UnexpectedVmExit, "Unexpected VM exit: "),
    "jump into the hole": Attack("movabs $HOLE, %rax; jmp *%rax", UnexpectedVmExit, SHUTDOWN),
    "jump to a non-canonical address": Attack("bts $63, %rax; jmp *%rax", UnexpectedVmExit, SHUTDOWN),
    "read from the hole": Attack("movabs $HOLE, %rax; mov (%rax), %rax", UnexpectedVmExit, SHUTDOWN),
    "stack in the hole": Attack("movabs $HOLE, %rsp; push %rax", UnexpectedVmExit, SHUTDOWN),
    "wild CR3": Attack(f"movabs ${HOLE_GPA:#x}, %rax; mov %rax, %cr3; nop", HyperlightVmError, ""),
    "CR3 of zero": Attack("xor %eax, %eax; mov %rax, %cr3; nop", HyperlightVmError, ""),
    "CR3 with reserved bits": Attack("mov $-1, %rax; mov %rax, %cr3; nop", HyperlightVmError, ""),
    "root table unmapped": Attack(
        "movabs $PML4, %rdi; movq $0, (%rdi); mov %cr3, %rax; mov %rax, %cr3; nop", HyperlightVmError, ""
    ),
    "read of a physical hole": Attack(
        f"{map_window(HOLE_GPA | PRESENT_WRITABLE)}; movabs ${WINDOW + 8:#x}, %rax; mov (%rax), %rax",
        hyperlight.MmioReadUnmapped,
        f"MMIO READ access to unmapped address {HOLE_GPA + 8:#x}",
    ),
    "write to a physical hole": Attack(
        f"{map_window(HOLE_GPA | PRESENT_WRITABLE)}; movabs ${WINDOW + 8:#x}, %rax; mov %rax, (%rax)",
        hyperlight.MmioWriteUnmapped,
        f"MMIO WRITE access to unmapped address {HOLE_GPA + 8:#x}",
    ),
    "jump into a physical hole": Attack(
        f"{map_window(HOLE_GPA | PRESENT_WRITABLE)}; movabs ${WINDOW:#x}, %rax; jmp *%rax",
        HyperlightVmError,
        "",
    ),
    "IN": Attack("in $0x60, %eax", UnexpectedVmExit, "Unexpected VM exit: KVM_EXIT_IO: IN, port 0x60"),
    "IN from the halt port": Attack("in $108, %al", UnexpectedVmExit, "IN, port 0x6c"),
    "REP INS": Attack(
        "movabs $FREE, %rdi; mov $99, %edx; mov $100, %ecx; rep insb", UnexpectedVmExit, "IN, port 0x63"
    ),
    "OUT to an unknown port": Attack("mov $0xffff, %edx; out %al, %dx", InvalidPort, "OutBAction value: 65535"),
    "REP OUTS to an unknown port": Attack(
        "movabs $FREE, %rsi; mov $0x1234, %edx; mov $-1, %rcx; rep outsb", InvalidPort, "OutBAction value: 4660"
    ),
    "REP OUTS of an abort": Attack(
        "movabs $FREE, %rsi; movq $0xff01, (%rsi); mov $102, %edx; mov $4, %ecx; rep outsl",
        GuestAborted,
        "Guest aborted: 0 ",
    ),
    "abort without end": Attack(
        "1: mov $0x41414103, %eax; out %eax, $102; jmp 1b",
        GuestAborted,
        "Guest aborted: 0 Guest abort buffer overflowed",
    ),
    "abort that claims 255 bytes": Attack(
        "1: mov $0x414141ff, %eax; out %eax, $102; jmp 1b",
        GuestAborted,
        "Guest aborted: 0 Guest abort buffer overflowed",
    ),
    "abort with invalid UTF-8": Attack(
        "mov $0xfe9d4203, %eax; out %eax, $102; mov $0xff01, %eax; out %eax, $102",
        GuestAborted,
        "Guest aborted: 66 \ufffd\ufffd",
    ),
    "a character beyond Unicode": Attack(
        "mov $0x110000, %eax; out %eax, $103", HandleIoError, "Invalid character for debug print: 1114112"
    ),
    "half of a surrogate pair": Attack(
        "mov $0xdfff, %eax; out %eax, $103", HandleIoError, "Invalid character for debug print: 57343"
    ),
    "log without a record": Attack("out %eax, $99", HandleIoError, "Failed to read guest log data: "),
    "host call without a call": Attack("out %eax, $101", HandleIoError, "Failed to read host function call: "),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_ends_the_run(name: str) -> None:
    """Issue 3, item 3."""
    attack = ATTACKS[name]
    with attacked(build(attack.evil)) as sandbox:
        with pytest.raises(attack.error) as caught:
            sandbox.call(EVIL)
        assert attack.text in str(caught.value)
        assert sandbox.status is SandboxStatus.POISONED


def test_what_cannot_be_emulated_is_told_apart() -> None:
    """Every KVM emulates access to addresses without memory; not every KVM emulates all code at CPL 0."""
    addps = f"{map_window(HOLE_GPA | PRESENT_WRITABLE)}; movabs ${WINDOW:#x}, %rax; addps (%rax), %xmm0"
    with attacked(build(addps)) as sandbox:
        with pytest.raises(hyperlight.EmulationFailure, match=r"\(bytes 0f 58 00 ") as caught:
            sandbox.call(EVIL)
        assert sandbox.status is SandboxStatus.POISONED
    emulated = hyperlight.cpl0_is_emulated()
    assert ("This KVM emulates code at CPL 0" in str(caught.value)) is emulated
    assert ("touches an address without memory" in str(caught.value)) is not emulated


def test_rep_outs_to_the_halt_port_halts() -> None:
    with attacked(
        build("put_on_output fine, fine_size; mov $108, %edx; mov $-1, %rcx; rep outsb", fine=answer(7))
    ) as sandbox:
        assert sandbox.call(EVIL) == 7


def answer(value: int) -> bytes:
    return stack_with(memory.encode_return_value(ReturnType.Int, value))


def test_rep_outs_to_debug_print_loses_all_but_the_first_character(
    capsys: pytest.CaptureFixture[str],
) -> None:
    order = "movabs $FREE, %rsi; movl $0x78, (%rsi); mov $103, %edx; mov $8, %ecx; rep outsl"
    with attacked(build(order)) as sandbox:
        assert sandbox.call(EVIL) == ANSWER
    assert capsys.readouterr().err.startswith("x")


# -- attacks that never end, unless they are killed ------------------------------------------

RECORD = GuestLogData("a record", "source", GuestLogLevel.Error, "caller", "file", 1)
CALL_TICK = memory.encode_function_call("Tick", (), FunctionCallType.Host, ReturnType.Int)
NOT_REGISTERED = memory.encode_function_call("x" * 500, (), FunctionCallType.Host, ReturnType.Int)
TICK = "say tick, 101; movabs $INPUT, %rdi; movq $8, (%rdi)"
STORMS = {
    "endless loop": f"{TICK}; 2: jmp 2b",
    "logs": f"1: {TICK}; .rept 20; say record, 99; .endr; jmp 1b",
    "debug prints": f"1: {TICK}; mov $'x', %eax; .rept 100; out %eax, $103; .endr; jmp 1b",
    "aborts of no bytes": f"1: {TICK}; .rept 100; mov $0, %eax; out %eax, $102; .endr; jmp 1b",
    "host calls": f"1: {TICK}; jmp 1b",
    "calls of unknown functions": f"1: {TICK}; say unknown, 101; movabs $INPUT, %rdi; movq $8, (%rdi); jmp 1b",
    "traces": f"1: {TICK}; mov $104, %r8; lea batch(%rip), %r9; mov $batch_size, %r10; .rept 100; out %eax, $104; .endr; jmp 1b",
    "allocations": f"1: {TICK}; .rept 100; inc %r12; mov %r12, %rcx; mov $-1, %rax; out %eax, $105; .endr; jmp 1b",
    "frees": f"1: {TICK}; .rept 100; inc %r12; mov %r12, %rcx; out %eax, $106; .endr; jmp 1b",
}
BATCH = b"".join(
    memory.encode_trace_event(event) for event in (memory.GuestStart(0), memory.LogEvent(0, "n" * 3900, 0))
)


class Sink:
    """A stream that counts what it is given and keeps nothing."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, text: str) -> int:
        self.count += 1
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("storm", STORMS)
def test_storm_is_ended_by_kill(storm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 3, item 3: endless logs, debug prints, aborts and host calls; killed once they are under way."""
    under_way, ticks = threading.Event(), 0
    monkeypatch.setattr(sys, "stderr", sink := Sink())
    monkeypatch.setattr(logging.getLogger("hyperlight_guest"), "disabled", True)
    wanted = 1 if storm == "endless loop" else 20

    def tick() -> Int:
        nonlocal ticks
        ticks += 1
        if ticks == wanted:
            under_way.set()
        return Int(0)

    guest = build(
        STORMS[storm],
        tick=stack_with(CALL_TICK),
        record=stack_with(memory.encode_guest_log_data(RECORD)),
        unknown=stack_with(NOT_REGISTERED),
        batch=BATCH,
    )
    recorder, profile = TraceRecorder(max_text=1 << 20), MemoryProfile()
    config = SandboxConfiguration(
        trace=recorder if storm == "traces" else None, memory_profile=profile if storm in ("allocations", "frees") else None
    )
    with attacked(guest, config) as sandbox, ThreadPoolExecutor(1) as thread:
        sandbox.register("Tick", tick)
        raging = thread.submit(sandbox.call, EVIL)
        under_way.wait()
        assert sandbox.interrupt_handle().kill()
        with pytest.raises(hyperlight.ExecutionCanceledByHost):
            raging.result()
        assert sandbox.status is SandboxStatus.POISONED
    assert sink.count > 0 or storm != "debug prints"
    assert recorder.dropped > 0 or storm != "traces"
    assert profile.live_bytes > 0 or storm != "allocations"


# -- attacks during initialisation -----------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("ud2", SHUTDOWN),
        ("mov $8, %esp", "Guest initialised stack pointer to architecturally invalid value: 8"),
        (
            "mov $-1, %rsp",
            "Guest initialised stack pointer to architecturally invalid value: 18446744073709551615",
        ),
        ("in $0x60, %eax", "IN, port 0x60"),
        ("out %eax, $100", "Invalid OutBAction value: 100"),
        ("mov $0xff0d02, %eax; out %eax, $102", "Guest aborted: 13"),
        ("1: mov $0x41414103, %eax; out %eax, $102; jmp 1b", "Guest abort buffer overflowed"),
        (f"movabs ${HOLE_GPA:#x}, %rax; mov %rax, %cr3; nop", "Unexpected VM exit: "),
    ],
)
def test_initialisation_that_fails_makes_no_sandbox(code: str, text: str) -> None:
    with UninitializedSandbox(build("", initialise=code)) as uninitialized, bounded():
        with pytest.raises(hyperlight.InitializeError) as caught:
            uninitialized.evolve()
    assert str(caught.value).startswith("Internal Hyperlight VM error: Initialize error: ")
    assert text in str(caught.value)


def test_initialisation_without_end_is_ended_by_kill() -> None:
    begun = threading.Event()
    guest = build("", initialise=f"{TICK}; 1: jmp 1b", tick=stack_with(CALL_TICK))
    with UninitializedSandbox(guest) as uninitialized, ThreadPoolExecutor(1) as thread:
        uninitialized.register("Tick", lambda: begun.set() or 0, (), Int)
        handle = uninitialized.interrupt_handle()
        evolving = thread.submit(uninitialized.evolve)
        begun.wait()
        assert handle.kill()
        with pytest.raises(hyperlight.InitializeError) as caught:
            evolving.result()
    assert isinstance(caught.value.__cause__, hyperlight.ExecutionCanceledByHost)


@pytest.mark.parametrize("stack", [0, 0xFFFF_FFFF_FFFF_FFF0, 1 << 63, 0x7FFF_FFFF_FFFF_FFF0])
def test_stack_pointer_at_the_end_of_the_world(stack: int) -> None:
    """An aligned one is taken as it is; the guest alone suffers from it."""
    guest = build("movabs $HOLE, %rsp; push %rax", initialise=f"movabs ${stack:#x}, %rsp")
    with attacked(guest) as sandbox:
        assert sandbox.call(GOOD) == ANSWER
        with pytest.raises(UnexpectedVmExit):
            sandbox.call(EVIL)


@pytest.mark.parametrize("entry", [0, 1 << 63, rawguest.NEVER_MAPPED, 0xFFFF_FFFF_FFFF_FFFF])
def test_dispatch_function_that_is_nowhere(entry: int) -> None:
    guest = build("", initialise=f"movabs ${entry:#x}, %rax")
    with UninitializedSandbox(guest) as uninitialized, uninitialized.evolve() as sandbox, bounded():
        before = sandbox.snapshot()
        for _ in range(2):
            with pytest.raises(HyperlightVmError):
                sandbox.call(GOOD)
            assert sandbox.poisoned
            sandbox.restore(before)


# -- page tables -----------------------------------------------------------------------------

FILL_ROOT = """
    movabs $PML4 + 8, %rdi              # all entries but those of the image and of scratch
    movabs ${entry}, %rax
    mov $510, %ecx
    cld
    rep stosq
"""
FILL_FREE = """
    movabs $FREE + {offset:#x}, %rdi
    movabs ${entry}, %rax
    mov $512, %ecx
    cld
    rep stosq
"""
HUGE_TREE = "".join(
    [
        FILL_ROOT.format(entry="FREE_GPA + 3"),
        FILL_FREE.format(offset=0, entry="FREE_GPA + 0x1003"),
        FILL_FREE.format(offset=0x1000, entry="FREE_GPA + 0x2003"),
        FILL_FREE.format(offset=0x2000, entry="FREE_GPA + 0x3003"),
    ]
)

REFUSED_TABLES = {
    "root that points to itself": FILL_ROOT.format(entry="PML4_GPA + 3"),
    "510 names for one table": FILL_ROOT.format(entry="0xffffff003"),
    "2 MiB page": map_window(PRESENT_WRITABLE | LARGE, level=2),
    "2 MiB page in the hole": map_window(HOLE_GPA | PRESENT_WRITABLE | LARGE, level=2),
    "1 GiB page": map_window(PRESENT_WRITABLE | LARGE, level=3),
    "512 to the power of 4 pages in four tables": HUGE_TREE,
}
HARMLESS_TABLES = {
    "one entry that points to the root": "movabs $PML4, %rdi; movabs $PML4_GPA + 3, %rax; mov %rax, 8(%rdi)",
    "tables in the hole": FILL_ROOT.format(entry=f"{HOLE_GPA + 3:#x}"),
    "tables beyond the physical address space": FILL_ROOT.format(entry=f"{(1 << 51) + 3:#x}"),
    "page in the hole": map_window(HOLE_GPA | PRESENT_WRITABLE),
    "page beyond the physical address space": map_window((1 << 51) | PRESENT_WRITABLE),
    "page at zero": map_window(PRESENT_WRITABLE),
    "page of the tables themselves": map_window(
        rawguest.SCRATCH_GPA + rawguest.TABLES_OFFSET | PRESENT_WRITABLE
    ),
    "all flags at once": map_window(
        (0xFFF0_0000_0000_0FFF & ~LARGE) | rawguest.SCRATCH_GPA + rawguest.TABLES_OFFSET
    ),
    "512 names for one page": map_window(PRESENT_WRITABLE)
    + FILL_FREE.format(offset=0x2000, entry="FREE_GPA + 0x3003"),
}


@pytest.mark.parametrize("name", REFUSED_TABLES)
def test_snapshot_refuses_page_tables_that_make_no_sense(name: str) -> None:
    """Issue 3, item 3: self-referring tables and large pages; in bounded time."""
    with attacked(build(REFUSED_TABLES[name])) as sandbox:
        assert sandbox.call(EVIL) == ANSWER
        with pytest.raises(PageTableError):
            sandbox.snapshot()
        assert sandbox.status is SandboxStatus.READY


@pytest.mark.parametrize("by_whom", ["guest", "host"])
@pytest.mark.parametrize("name", HARMLESS_TABLES)
def test_snapshot_leaves_out_what_is_not_there(name: str, by_whom: Any) -> None:
    """Issue 3, item 3, and B.3/61: tables and pages out of range; the snapshot holds no more than there is."""
    config = SandboxConfiguration(copy_on_write=by_whom)
    with attacked(build(HARMLESS_TABLES[name]), config) as sandbox:
        before = sandbox.snapshot()
        assert sandbox.call(EVIL) == ANSWER
        after = sandbox.snapshot()
        assert after.layout.memory_size <= before.layout.memory_size + config.scratch_size
        sandbox.restore(after)
        assert sandbox.call(GOOD) == ANSWER


def test_tables_reused_without_a_flush_do_no_harm() -> None:
    """The guest swaps its own image for another page while the processor may still hold the old translation."""
    swap = "movabs $PML4, %rdi; movq $0, 8(%rdi); movq $0, 16(%rdi); say answer, 108"
    with attacked(build(swap)) as sandbox:
        assert sandbox.call(EVIL) == ANSWER


# -- memory that belongs to the host ---------------------------------------------------------

WRITE_PEB = """
    mov %cr0, %rax
    btr $16, %rax                       # WP: read-only pages bind the kernel no more
    mov %rax, %cr0
    lea _end + 4095(%rip), %rdi         # the PEB follows the image
    and $-4096, %rdi
    movq $-1, (%rdi)
"""


def peb_of(snapshot: Snapshot) -> bytes:
    return snapshot.memory.read(snapshot.layout.peb_offset, 64)


def test_peb_overwritten_with_write_protection_off_host_copies() -> None:
    """The sandbox's own copy changes, nobody else's; the host never reads it."""
    with attacked(build(WRITE_PEB)) as sandbox:
        before = sandbox.snapshot()
        original = peb_of(before)
        assert sandbox.call(EVIL) == ANSWER
        assert peb_of(sandbox.snapshot())[:8] == b"\xff" * 8
        sandbox.restore(before)
        sandbox.call(GOOD)
        assert peb_of(sandbox.snapshot()) == original
        with MultiUseSandbox.from_snapshot(before) as other:
            other.call(GOOD)
            assert peb_of(other.snapshot()) == original


def test_peb_overwritten_with_write_protection_off_guest_copies() -> None:
    """KVM maps the image read-only there, whatever the guest's registers say."""
    with attacked(build(WRITE_PEB), SandboxConfiguration(copy_on_write="guest")) as sandbox:
        peb_gpa = sandbox.layout.peb_gpa
        with pytest.raises(hyperlight.MmioWriteUnmapped) as caught:
            sandbox.call(EVIL)
        assert caught.value.gpa == peb_gpa


def test_bookkeeping_and_tables_overwritten_are_restored() -> None:
    """All of scratch that the guest can reach without losing its own footing."""
    wipe = """
    movabs $FREE, %rdi
    mov $-1, %rax
    mov $16 * 4096 / 8, %ecx
    cld
    rep stosq
    """
    with attacked(build(wipe)) as sandbox:
        assert sandbox.call(EVIL) == ANSWER


# -- stack buffers -----------------------------------------------------------------------------


def test_input_stack_scribbled_over_before_the_host_answers() -> None:
    scribble = "movabs $INPUT, %rdi; movq $-1, (%rdi); say tick, 101"
    with attacked(build(scribble, tick=stack_with(CALL_TICK))) as sandbox:
        sandbox.register("Tick", lambda: 1, (), Int)
        with pytest.raises(HandleIoError) as caught:
            sandbox.call(EVIL)
        assert (
            "Unable to push data to buffer: Stack pointer is out of bounds. "
            f"Stack pointer: {2**64 - 1}, Buffer size: {OUTPUT_SIZE}" in str(caught.value)
        )
        assert sandbox.poisoned


@pytest.mark.parametrize("pointer", [0, 7, OUTPUT_SIZE + 1, 2**63, 2**64 - 1])
def test_input_stack_left_in_ruins_is_put_right_at_the_next_call(pointer: int) -> None:
    leave = f"movabs $INPUT, %rdi; movabs ${pointer:#x}, %rax; mov %rax, (%rdi); say answer, 108"
    with attacked(build(leave)) as sandbox:
        assert sandbox.call(EVIL) == ANSWER
        assert sandbox.call(GOOD) == ANSWER
        assert sandbox.status is SandboxStatus.READY


def test_answers_that_the_guest_never_takes_fill_its_input_stack() -> None:
    hoard = "1: say tick, 101; jmp 1b"
    with attacked(build(hoard, tick=stack_with(CALL_TICK))) as sandbox:
        sandbox.register("Tick", lambda: "x" * 1000, (), str)
        with pytest.raises(HandleIoError, match="Not enough space in buffer to push data"):
            sandbox.call(EVIL)


# -- host calls --------------------------------------------------------------------------------


def host_call(name: str, *parameters: tuple[ParameterType, Any]) -> bytes:
    return stack_with(memory.encode_function_call(name, parameters, FunctionCallType.Host, ReturnType.Int))


PASS_ON = """
    movabs $INPUT + {offset}, %rsi      # the host's answer, buffer and all, becomes the result
    movabs $OUTPUT + {offset}, %rdi
    mov $0x1400, %ecx
    cld
    rep movsb
    out %eax, $108
"""


def refused_by(sandbox: MultiUseSandbox) -> str:
    """Make a guest pass on how the host answered its call, and return the host's words."""
    with pytest.raises(hyperlight.GuestError) as caught:
        sandbox.call(EVIL)
    assert caught.value.code is hyperlight.ErrorCode.HostFunctionError
    return caught.value.message


@pytest.mark.parametrize("name", ["x" * 15_000, "\x1b[2J\r\n", "\0", "%s{}{0}", "żółw" * 1000, "__class__", ""])
def test_names_of_host_functions(name: str) -> None:
    """Whatever the guest asks for, it is told that there is none, and nothing else happens."""
    guest = build("say order, 101" + PASS_ON.format(offset=0), order=host_call(name))
    with attacked(guest) as sandbox:
        assert refused_by(sandbox) == f"HostFunction {name} was not found"[:1024]


THOUSAND = [(ParameterType.Int, number) for number in range(1000)]
WIDE = SandboxConfiguration(scratch_size=0x100000, output_data_size=0x20000)
WIDE_OFFSET = memory.scratch_base_gva(WIDE.scratch_size) - rawguest.SCRATCH_GVA
"""How far from the default its scratch, which ends at a fixed address, begins."""


def wide_guest(order: bytes) -> bytes:
    """Return a guest for WIDE that puts *order* to the host at every call, and passes the answer on."""
    code = f"""
    movabs $INPUT + {WIDE_OFFSET}, %rdi
    movq $8, (%rdi)
    lea order(%rip), %rsi
    movabs $OUTPUT + {WIDE_OFFSET}, %rdi
    mov $order_size, %ecx
    cld
    rep movsb
    out %eax, $101
    {PASS_ON.format(offset=WIDE_OFFSET)}
    """
    return build("", initialise=f"lea wide(%rip), %rax; jmp 9f; wide: {code}; 9:", order=order)


def test_host_call_with_1000_parameters() -> None:
    received: list[int] = []

    def take(*numbers: int) -> Int:
        received.extend(numbers)
        return Int(len(numbers))

    with UninitializedSandbox(wide_guest(host_call("Take", *THOUSAND)), WIDE) as uninitialized:
        uninitialized.register("Take", take)
        with uninitialized.evolve() as sandbox, bounded():
            assert sandbox.call(EVIL) == 1000
            assert received == list(range(1000))
            sandbox.register("Take", lambda one, two: 0, (Int, Int), Int)
            expected = "The number of arguments to the function is wrong: got 1000 expected 2"
            assert refused_by(sandbox) == expected


# -- a guest that says anything ------------------------------------------------------------------


@pytest.fixture(scope="module")
def parrot() -> Iterator[tuple[MultiUseSandbox, Snapshot]]:
    with UninitializedSandbox(rawguest.parrot()) as uninitialized, uninitialized.evolve() as sandbox:
        sandbox.register("Take", lambda *_arguments: 0)
        yield sandbox, sandbox.snapshot()


def say(parrot: tuple[MultiUseSandbox, Snapshot], buffer: bytes, port: int = HALT, value: int = 0) -> Any:
    """Have the parrot say *buffer*; whatever error comes, it is one of ours, and a restore mends."""
    sandbox, before = parrot
    try:
        return tell(sandbox, buffer, port=port, value=value)
    except HyperlightError as error:
        assert sandbox.poisoned == isinstance(error, hyperlight.GuestFailure)
        return error
    finally:
        sandbox.restore(before)


def element(data: bytes, *, top: int | None = None, back: int = 8) -> bytes:
    """Return a stack buffer with one element, and pointers that may lie."""
    return struct.pack("<Q", 16 + len(data) if top is None else top) + data + struct.pack("<Q", back)


VALID = memory.encode_return_value(ReturnType.Int, 7)
TOO_LONG = struct.pack("<I", 0xFFFF_FFFC)
CORRUPT = {
    "stack pointer of 0": (element(VALID, top=0), "Stack pointer: 0, Buffer size: 16384"),
    "stack pointer of 15": (element(VALID, top=15), "Stack pointer: 15, "),
    "stack pointer past the end": (element(VALID, top=OUTPUT_SIZE + 1), f"Stack pointer: {OUTPUT_SIZE + 1}, "),
    "largest stack pointer": (element(VALID, top=2**64 - 1), f"Stack pointer: {2**64 - 1}, "),
    "back pointer of 0": (element(VALID, back=0), "element offset 0 is outside valid range [8, "),
    "back pointer of 7": (element(VALID, back=7), "element offset 7 is outside valid range [8, "),
    "back pointer to itself": (
        element(VALID, back=8 + len(VALID)),
        f"element offset {8 + len(VALID)} is outside valid range [8, {len(VALID)}]",
    ),
    "largest back pointer": (element(VALID, back=2**64 - 1), f"element offset {2**64 - 1} is outside"),
    "size that overflows": (element(TOO_LONG + VALID[4:]), "value 4294967292 overflows"),
    "size one too large": (
        element(struct.pack("<I", len(VALID) - 3) + VALID[4:]),
        f"flatbuffer claims {len(VALID) + 1} bytes but the element slot is only {len(VALID)} bytes",
    ),
}


@pytest.mark.parametrize("name", CORRUPT)
@pytest.mark.parametrize(
    ("port", "error"), [(HALT, IoStackError), (LOG, HandleIoError), (HOST_CALL, HandleIoError)]
)
def test_corrupt_stack_is_refused_with_the_reason(
    parrot: tuple[MultiUseSandbox, Snapshot], name: str, port: int, error: type[HyperlightError]
) -> None:
    """Issue 3, item 3: garbage lengths, back pointers and offsets, in a result, a record and a host call."""
    buffer, text = CORRUPT[name]
    failure = say(parrot, buffer, port)
    assert type(failure) is error
    assert text in str(failure)


MESSAGES = {
    HALT: [
        VALID,
        memory.encode_return_value(ReturnType.VecBytes, b"bytes"),
        memory.encode_guest_error(hyperlight.ErrorCode.GuestError, "text"),
    ],
    LOG: [memory.encode_guest_log_data(RECORD)],
    HOST_CALL: [
        memory.encode_function_call(
            "Take",
            [(ParameterType.Int, 5), (ParameterType.String, "text"), (ParameterType.VecBytes, b"bytes")],
            FunctionCallType.Host,
            ReturnType.Int,
        )
    ],
}


@pytest.mark.parametrize("port", MESSAGES)
def test_every_byte_of_a_message_may_lie(parrot: tuple[MultiUseSandbox, Snapshot], port: int) -> None:
    """Issue 3, item 3: offsets, lengths, message types and enum values; each byte of each message in turn."""
    values = random.Random(port)
    for message in MESSAGES[port]:
        for place in range(len(message)):
            for wrong in {0, 0xFF, message[place] ^ 0x80, values.randrange(256)} - {message[place]}:
                lie = bytearray(message)
                lie[place] = wrong
                say(parrot, stack_with(bytes(lie)), port)
    sandbox, _ = parrot
    assert sandbox.call(GOOD) == ANSWER


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    buffer=st.one_of(
        st.binary(max_size=SAID_SIZE),
        st.binary(max_size=200).map(stack_with),
        st.binary(min_size=4, max_size=200).map(lambda data: stack_with(struct.pack("<I", len(data)) + data)),
    ),
    port=st.sampled_from([HALT, LOG, HOST_CALL, ABORT, DEBUG_PRINT, 100, 104, 107]),
    value=st.integers(0, 2**32 - 1),
)
def test_anything_said_ends_in_a_value_or_an_error_of_ours(
    parrot: tuple[MultiUseSandbox, Snapshot], buffer: bytes, port: int, value: int
) -> None:
    """B.21/280 and beyond: results, records and host calls of arbitrary bytes."""
    say(parrot, buffer, port, value)


def test_many_elements_are_drained_in_bounded_time(parrot: tuple[MultiUseSandbox, Snapshot]) -> None:
    """A failing call drains the output stack: as many elements as there is room for, each pointing to the one before."""
    pointers, place = bytearray(), 8
    while place + 16 <= SAID_SIZE:
        pointers += struct.pack("<IIQ", 4, 0, place)
        place += 16
    failure = say(parrot, struct.pack("<Q", place) + bytes(pointers), ABORT, 0xFF01)
    assert isinstance(failure, GuestAborted)


WRONG_TYPES: list[tuple[str, Callable[[], bytes], int]] = [
    ("a host call as a result", lambda: MESSAGES[HOST_CALL][0], HALT),
    ("a result as a record", lambda: VALID, LOG),
    ("a record as a host call", lambda: MESSAGES[LOG][0], HOST_CALL),
    ("a call of no type", lambda: rawcall(FunctionCallType.Host, 0), HOST_CALL),
    ("a call of an unknown type", lambda: rawcall(FunctionCallType.Host, 77), HOST_CALL),
]


def rawcall(known: FunctionCallType, replaced_by: int) -> bytes:
    """Return a call without parameters whose one byte for the type is something else."""
    one = memory.encode_function_call("Take", (), known, ReturnType.Void)
    other = memory.encode_function_call("Take", (), FunctionCallType.Guest, ReturnType.Void)
    (place,) = [index for index, (left, right) in enumerate(zip(one, other, strict=True)) if left != right]
    return one[:place] + bytes([replaced_by]) + one[place + 1 :]


@pytest.mark.parametrize(("name", "message", "port"), WRONG_TYPES)
def test_message_of_another_kind_is_refused(
    parrot: tuple[MultiUseSandbox, Snapshot], name: str, message: Callable[[], bytes], port: int
) -> None:
    """Issue 3, item 3: message types."""
    assert isinstance(say(parrot, stack_with(message()), port), HyperlightError), name
