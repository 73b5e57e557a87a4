"""An intruder at CPL 3 in a user-mode guest, and a guard who looks after what is the kernel part's.

The intruder is machine code in the guest's init data. It goes through rows of attempts: a snippet to run and the
registers to run it with. An exception handler, which the host has put in the guest's place, notes how each ended and
goes on to the next, so that one call makes hundreds of attempts. What cannot be handled ends the call in an error.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import struct
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import conftest
import pytest
from elftools.elf.elffile import ELFFile
from tinyguest import assemble_flat

import hyperlight
import memory
from hyperlight import GuestAborted, HyperlightError, MultiUseSandbox, Snapshot, ULong
from memory import PAGE_SIZE, MemoryRegionFlags

GUEST = hyperlight.find_guest("simpleguest")
KERNEL_GUEST = str(conftest.KERNEL_GUESTS / "simpleguest")
"""The same, with all its code at CPL 0: not to be attacked, but to compare with."""
PROC_CONTROL = 0xFFFF_FD00_0000_0000
"""gva of the kernel part's two pages: GDT and TSS, IDT (abi.md 5.5)."""
IDT = PROC_CONTROL + PAGE_SIZE
MAIN_STACK = range(0xFFFF_FE00_0000_0000, 0xFFFF_FF00_0000_0000)
EXCEPTION_STACK_TOP = 0xFFFF_FFFF_FFFF_EFE0
DEVICES = range(0xFEC0_0000, 0xFEF0_0000)
"""Where the interrupt controllers have their registers (gpa)."""
_LAST_PAGES = 3
"""Of scratch, which no allocation reaches: the exception stack, and the bookkeeping words above it (abi.md 1.4)."""
_VECTORS = 48


@functools.cache
def symbols(guest: str = GUEST) -> dict[str, int]:
    """Return a guest's symbols: name to gva."""
    with open(guest, "rb") as file:
        (table,) = ELFFile(file).iter_sections("SHT_SYMTAB")
        return {symbol.name: memory.BASE_ADDRESS + symbol["st_value"] for symbol in table.iter_symbols()}


@functools.cache
def kernel_range() -> range:
    """Return where the kernel part's code and constants lie (gva)."""
    note = memory.GuestElf.parse(Path(GUEST).read_bytes()).privilege
    first = memory.BASE_ADDRESS + note.kernel_offset
    return range(first, first + note.kernel_size)


# -- the intruder --------------------------------------------------------------------------

MAX_ATTEMPTS = 640
_ROW = struct.Struct("<12Q")
_HEADER = struct.Struct("<2Q")
_SURVIVED = (1 << 64) - 1
_PATIENCE_S = 60.0
"""Seconds that a call may take: none of those that end well needs a fraction of them."""

_SOURCE = """
.text
base:
    .quad rows - base, handler - base
    OFFSETS
.globl entry
entry:
    push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15
    mov %rsp, saved_rsp(%rip)
    lea rows(%rip), %rbx
attempt:                                # row rbx
    mov saved_rsp(%rip), %rsp
    pushq $2
    popfq
    mov %rbx, row(%rip)
    movq $-1, edit_offset(%rip)
    mov (%rbx), %r10
    test %r10, %r10
    jz done
    lea base(%rip), %rax
    add %rax, %r10
    mov 8(%rbx), %rdi
    mov 16(%rbx), %rsi
    mov 24(%rbx), %rdx
    mov 32(%rbx), %rcx
    mov 40(%rbx), %r8
    mov %rdi, %rax
    jmp *%r10
done:
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx
    ret
survived:
    mov row(%rip), %rbx
    movq $-1, 48(%rbx)
    mov %rax, 72(%rbx)
    jmp next
handler:                                # rdi context, rsi fault address, as in hyperlight_ext.h
    mov edit_offset(%rip), %rcx
    cmp $-1, %rcx
    jne edit
    mov row(%rip), %rbx
    mov %rsi, 64(%rbx)
    mov 0x298(%rdi), %rax
    mov %rax, 48(%rbx)
    mov 0x2a0(%rdi), %rax
    mov %rax, 56(%rbx)
    mov 0x2a8(%rdi), %rax
    mov %rax, 80(%rbx)
    mov 0x2b0(%rdi), %rax
    mov %rax, 88(%rbx)
next:
    add $96, %rbx
    jmp attempt
edit:                                   # -2: faults for ever
    cmp $-2, %rcx
    jne 1f
    ud2
1:  cmp $-3, %rcx                       # -3: shows what the FXSAVE image has where FXSAVE need not write
    jne 1f
    mov 0x28(%rdi), %rax
    or 0x30(%rdi), %rax
    .irp offset, 0x1c0, 0x1c8, 0x1d0, 0x1d8, 0x1e0, 0x1e8, 0x1f0, 0x1f8, 0x200, 0x208, 0x210, 0x218
    or \\offset(%rdi), %rax
    .endr
    jmp survived
1:  cmp $-4, %rcx                       # -4: uses the registers that it could have to itself
    jne 1f
    fninit
    .irp number, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    pcmpeqd %xmm\\number, %xmm\\number
    .endr
    mov $0x2a0, %ecx
1:  addq $2, 0x2a8(%rdi)
    mov edit_value(%rip), %rax
    mov %rax, (%rdi,%rcx)
    movq $-1, edit_offset(%rip)
    mov $1, %eax
    ret
SNIPPETS
    .balign 4096
saved_rsp: .quad 0
row: .quad 0
edit_offset: .quad 0
edit_value: .quad 0
zeros: .zero 2048
low_stack: .zero 2048
low_stack_top:
    .balign 4096
untouched: .zero 4096                   # by anyone but a snippet
rows: .zero MAX_ATTEMPTS * 96
"""


@functools.cache
def _assembled(snippets: tuple[str, ...], guest: str) -> tuple[bytes, tuple[int, ...]]:
    """Return the intruder's code, with room for its rows, and the offset of each snippet."""
    code = "\n".join(f"snippet_{index}:\n{text}\n    jmp survived" for index, text in enumerate(snippets))
    offsets = "\n".join(f"    .quad snippet_{index} - base" for index in range(len(snippets)))
    source = _SOURCE.replace("MAX_ATTEMPTS", str(MAX_ATTEMPTS)).replace("OFFSETS", offsets).replace("SNIPPETS", code)
    names = [name for name in ("hl_service", "hl_flush_gate") if name in symbols(guest)]
    gates = "".join(f".set {name}, {symbols(guest)[name]:#x}\n" for name in names)
    flat = assemble_flat(gates + source, 0)
    return flat, struct.unpack_from(f"<{len(snippets)}Q", flat, _HEADER.size)


class Attempt(NamedTuple):
    """A snippet by name, and the registers that it begins with; RAX is RDI."""

    snippet: str
    rdi: int = 0
    rsi: int = 0
    rdx: int = 0
    rcx: int = 0
    r8: int = 0


class Outcome(NamedTuple):
    """How an attempt ended: `vector` is None where nothing happened, and `rax` is for that case."""

    vector: int | None
    error_code: int
    address: int
    rax: int
    rip: int
    cs: int

    def __str__(self) -> str:
        if self.vector is None:
            return f"survived with {self.rax:#x}"
        return _spelled(self.vector, self.error_code, self.address)


_NAMES = {0: "#DE", 1: "#DB", 2: "#NMI", 3: "#BP", 4: "#OF", 6: "#UD", 8: "#DF", 10: "#TS", 11: "#NP", 12: "#SS", 13: "#GP",
          14: "#PF", 16: "#MF", 17: "#AC", 19: "#XM"}  # fmt: skip


def _spelled(vector: int, error_code: int, address: int) -> str:
    where = f" at {address:#x}" if vector == 14 else ""
    return f"{_NAMES.get(vector, f'vector {vector}')}({error_code:#x}){where}"


def _described(error: HyperlightError) -> str:
    if not isinstance(error, GuestAborted):
        return type(error).__name__
    if error.vector is None:
        return f"abort {error.code}: {error.message}"
    return f"abort {_spelled(error.vector, error.error_code or 0, error.address or 0)}"


Host = Literal["host", "guest", "unaware"]
State = Literal["fresh", "restored", "from a snapshot"]


class Arena:
    """A guest with an intruder in it, on one of three hosts, in one of three states.

    The hosts are this one with either kind of copy-on-write, and one that does not know of user mode: it maps
    every page for the supervisor, and so do its snapshots (abi.md 5.7).
    """

    def __init__(
        self, host: Host, state: State, snippets: Mapping[str, str], *, guest: str = GUEST, **settings: Any
    ) -> None:
        self.host, self.state, self.guest = host, state, guest
        self._flat, offsets = _assembled(tuple(snippets.values()), guest)
        self._offset_of = dict(zip(snippets, offsets, strict=True))
        settings = {"scratch_size": 0x80000, "copy_on_write": "host" if host == "host" else "guest"} | settings
        self._config = hyperlight.SandboxConfiguration(**settings)
        everything = MemoryRegionFlags.READ | MemoryRegionFlags.WRITE | MemoryRegionFlags.EXECUTE
        environment = hyperlight.GuestEnvironment(guest, self._flat, everything)
        with conftest.unaware_of_user_mode(host == "unaware"):
            image = hyperlight.UninitializedSandbox(environment, self._config).snapshot()
        self._snapshot = image
        self.sandbox = self._booted()
        if state != "fresh":
            self._snapshot = self.captured()
            self._begin()
        self._guard = Guard(self.sandbox) if guest == GUEST else None

    def renew(self, *, opened_interrupts: bool = False) -> None:
        """Have the guard look at the guest, as it is after an attack, and put it back to the state of the arena."""
        try:
            if self._guard is not None:
                self._guard.check(self.sandbox, opened_interrupts=opened_interrupts)
        finally:
            self._begin()

    def close(self) -> None:
        self.sandbox.close()

    def _begin(self) -> None:
        if self.state == "restored":
            self.sandbox.restore(self._snapshot)
            return
        self.sandbox.close()
        self.sandbox = self._booted()

    def captured(self) -> Snapshot:
        """Take a snapshot as the arena's host does."""
        with pytest.MonkeyPatch.context() as patch:
            if self.host == "unaware":
                patch.setattr("hyperlight._compact", _compacted_for_the_supervisor)
            return self.sandbox.snapshot()

    def attack(self, attempts: Sequence[Attempt]) -> list[Outcome]:
        """Make the attempts in one call; each must leave the guest running."""
        assert len(attempts) < MAX_ATTEMPTS
        rows = b"".join(_ROW.pack(self._offset_of[name], *registers, *[0] * 6) for name, *registers in attempts)
        self._write(self._rows, rows + bytes(_ROW.size))
        with self._killed_in_the_end():
            self.sandbox.call("JumpTo", ULong(self._base + _HEADER.size + 8 * len(self._offset_of)))
        results = self._read(self._rows, len(rows))
        return [
            Outcome(None if vector == _SURVIVED else vector, *rest)
            for *_, vector, error_code, address, rax, rip, cs in _ROW.iter_unpack(results)
            for rest in [(error_code, address, rax, rip, cs)]
        ]

    @contextlib.contextmanager
    def _killed_in_the_end(self) -> Iterator[None]:
        """End a call in which the intruder has got to where he runs for ever."""
        watchdog = threading.Timer(_PATIENCE_S, self.sandbox.interrupt_handle().kill)
        watchdog.start()
        try:
            yield
        finally:
            watchdog.cancel()
            watchdog.join()

    def ruin(self, attempt: Attempt) -> str:
        """Make one attempt that may end the call in an error, and say how it ended."""
        try:
            return str(self.attack([attempt])[0])
        except HyperlightError as error:
            return _described(error)

    def gpa_of(self, gva: int) -> int:
        """Return where a gva leads by the tables in force."""
        return self.sandbox._guest.physical.translate(self.sandbox.layout.pt_base_gpa, gva).gpa

    def _booted(self) -> MultiUseSandbox:
        sandbox = MultiUseSandbox.from_snapshot(self._snapshot, config=self._config)
        self._base = sandbox.layout.init_data_gpa
        rows, handler = _HEADER.unpack_from(self._flat)
        self._rows = self._base + rows
        self.sandbox = sandbox
        self._write(symbols(self.guest)["hl_handled_vectors"], b"\xff" * 8)
        self._write(symbols(self.guest)["exception_handlers"], struct.pack("<Q", self._base + handler) * _VECTORS)
        return sandbox

    def _write(self, gva: int, data: bytes) -> None:
        self.sandbox._guest.physical.write_virt(self.sandbox.layout.pt_base_gpa, gva, data)

    def _read(self, gva: int, size: int) -> bytes:
        return self.sandbox._guest.physical.read_virt(self.sandbox.layout.pt_base_gpa, gva, size)


_compact = hyperlight._compact


def _compacted_for_the_supervisor(
    leaves: Sequence[memory.Leaf], physical: memory.GuestMemory
) -> tuple[list[memory.Leaf], list[tuple[int, int]]]:
    moved, spans = _compact(leaves, physical)
    return [leaf._replace(user=False) for leaf in moved], spans


# -- the guard -----------------------------------------------------------------------------


class Guard:
    """Knows what is the kernel part's, and checks that no one else has got at it.

    The exception stack may change; nobody but the kernel part may see it.
    """

    def __init__(self, sandbox: MultiUseSandbox) -> None:
        self._before = _Watched(sandbox)

    def check(self, sandbox: MultiUseSandbox, *, opened_interrupts: bool = False) -> None:
        """Fail where the intruder has reached anything, by whatever way.

        A guest may open the gates of interrupts; that writes to the IDT, whose page may have been copy-on-write.
        """
        before, now = self._before, _Watched(sandbox)
        now.assert_walls_stand()
        assert now.registers == before.registers
        assert now.text == before.text
        assert now.control[:PAGE_SIZE] == before.control[:PAGE_SIZE]
        assert now.words == before.words
        assert now.allocator >= now.layout.first_free_gpa
        assert now.free == bytes(len(now.free))
        if opened_interrupts:
            assert _without_interrupts(now.control) == _without_interrupts(before.control)
            assert _copied(now.supervisor) == _copied(before.supervisor)
        else:
            assert now.control == before.control
            assert now.supervisor == before.supervisor


class _Watched:
    """What the guard looks at: memory as the host sees it, and the registers that CPL 3 cannot load."""

    def __init__(self, sandbox: MultiUseSandbox) -> None:
        guest, layout = sandbox._guest, sandbox.layout
        physical, cr3 = guest.physical, layout.pt_base_gpa
        self.layout = layout
        self.registers = _system_registers(sandbox)
        self.tables: set[int] = set()
        leaves = list(memory.walk(self._noting(physical.read_table), cr3, max_tables=1000))
        self.user = [leaf for leaf in leaves if leaf.user]
        self.supervisor = list(_clipped(leaves, kernel_parts(layout)))
        self.text = physical.read_virt(cr3, kernel_range().start, len(kernel_range()))
        self.control = physical.read_virt(cr3, PROC_CONTROL, 2 * PAGE_SIZE)
        self.private = {physical.translate(cr3, gva).gpa for gva in (PROC_CONTROL, IDT)}
        self.private |= {physical.translate(cr3, gva).gpa for gva in kernel_range()[::PAGE_SIZE]}
        end = layout.scratch_base_gpa + layout.scratch_size
        self.words = physical.read_phys(end - memory.SCRATCH_TOP_SIZE, 8)
        self.words += physical.read_phys(end - memory.SCRATCH_TOP_IMAGE_END, 8)
        self.allocator = int.from_bytes(physical.read_phys(end - memory.SCRATCH_TOP_ALLOCATOR, 8), "little")
        self.never_allocated = range(end - _LAST_PAGES * PAGE_SIZE, end)
        free_from = min(self.allocator, self.never_allocated.start)
        self.free = physical.read_phys(free_from, self.never_allocated.start - free_from)

    def _noting(self, read_table: Callable[[int], array[int] | None]) -> Callable[[int], array[int] | None]:
        def read(gpa: int) -> array[int] | None:
            self.tables.add(gpa)
            return read_table(gpa)

        return read

    def assert_walls_stand(self) -> None:
        """Check what CPL 3 can reach: pages of its own at addresses of its own, and none of them twice."""
        scratch = range(self.layout.scratch_base_gpa, self.never_allocated.stop)
        buffers = range(self.layout.scratch_base_gpa, self.layout.pt_base_gpa)
        allocated = range(self.layout.first_free_gpa, min(self.allocator, self.never_allocated.start))
        assert all(gpa in range(self.layout.pt_base_gpa, allocated.stop) for gpa in self.tables)
        assert list(_clipped(self.user, kernel_parts(self.layout))) == []
        in_scratch = []
        for leaf in self.user:
            shown = range(leaf.gpa, leaf.gpa + leaf.page_count * PAGE_SIZE)
            assert [hex(gpa) for gpa in self.private | self.tables if gpa in shown] == [], leaf
            assert shown.stop <= DEVICES.start or shown.start >= DEVICES.stop, leaf
            if shown.stop > scratch.start:
                own = buffers if leaf.gva >= self.layout.scratch_base_gva else allocated
                assert shown[0] in own and shown[-1] in own, leaf
                in_scratch.append(shown)
        in_scratch.sort(key=lambda shown: shown.start)
        assert all(one.stop <= next_one.start for one, next_one in itertools.pairwise(in_scratch))


def kernel_parts(layout: memory.SandboxMemoryLayout) -> list[range]:
    """Return the addresses that the guest's own code may not use."""
    buffers = range(layout.scratch_base_gva, layout.scratch_base_gva + layout.page_table_scratch_offset)
    return [
        range(PAGE_SIZE),
        kernel_range(),
        range(1 << 47, MAIN_STACK.start),
        range(MAIN_STACK.stop, buffers.start),
        range(buffers.stop, 1 << 64),
    ]


def _clipped(leaves: Iterable[memory.Leaf], ranges: Iterable[range]) -> Iterator[memory.Leaf]:
    """Yield what of the *leaves* lies in the *ranges*."""
    for leaf, part in itertools.product(leaves, ranges):
        first = max(leaf.gva, part.start)
        end = min(leaf.gva + leaf.page_count * PAGE_SIZE, part.stop)
        if first < end:
            pages = (end - first) // PAGE_SIZE
            yield leaf._replace(gva=first, gpa=leaf.gpa + first - leaf.gva, page_count=pages)


def _system_registers(sandbox: MultiUseSandbox) -> dict[str, object]:
    vcpu, sregs = sandbox._guest.vm.vcpu, sandbox._guest.vm.sregs()
    values: dict[str, object] = {name: getattr(sregs, name) for name in ("cr0", "cr3", "cr4", "cr8", "efer", "apic_base")}
    values |= {name: bytes(getattr(sregs, name)) for name in ("gdt", "idt", "tr", "ldt")}
    return values | {"xcr0": vcpu.get_xcrs().xcrs[0].value, "msrs": vcpu.get_msrs(_MSRS)}


_MSRS = (0x174, 0x175, 0x176, 0xC000_0081, 0xC000_0082, 0xC000_0083, 0xC000_0084, 0xC000_0102)
"""SYSENTER_CS, _ESP, _EIP; STAR, LSTAR, CSTAR, FMASK, KERNEL_GS_BASE."""


def _without_interrupts(control: bytes) -> bytes:
    gates = slice(PAGE_SIZE + 32 * 16, PAGE_SIZE + _VECTORS * 16)
    return control[: gates.start] + control[gates.stop :]


def _copied(leaves: list[memory.Leaf]) -> list[memory.Leaf]:
    """Return the mappings as they are once the IDT is no longer copy-on-write, wherever its copy lies."""
    elsewhere = [leaf for leaf in leaves if not PROC_CONTROL <= leaf.gva < IDT + PAGE_SIZE]
    return [*elsewhere, *_clipped(leaves, [range(PROC_CONTROL, IDT)])]
