"""User-mode guests against their own code (issue 6): an intruder at CPL 3, who owns every byte of the guest's memory and
every register, gets nothing of the kernel part's, on hosts of all kinds, before and after a snapshot.

``intruder`` has the means: what is tried here are its snippets, and what ``Guard`` checks afterwards is what counts.
"""

from __future__ import annotations

import contextlib
import itertools
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
from conftest import missing, require
from hypothesis import given, settings
from hypothesis import strategies as st
from intruder import (
    DEVICES,
    EXCEPTION_STACK_TOP,
    IDT,
    MAIN_STACK,
    PROC_CONTROL,
    Arena,
    Attempt,
    Host,
    Outcome,
    State,
    kernel_range,
    symbols,
)

import hyperlight
import memory
from memory import PAGE_SIZE

pytestmark = [require("kvm"), require("gcc")]

PLACES: list[tuple[Host, State]] = [
    (host, state)
    for host in ("host", "guest", "unaware")
    for state in ("fresh", "restored", "from a snapshot")
]
NON_CANONICAL = (1 << 47, (1 << 64) - (1 << 47) - 1, 1 << 63, 1 << 48 | PAGE_SIZE, PROC_CONTROL & (1 << 48) - 1)
"""The last two would lead to what is mapped, if bits 48 to 63 did not count."""
SCRATCH_ALIAS = memory.MAX_GVA - memory.MAX_GPA
FREE_GVA, FREE_GPA = 0x7000_0000_0000, 0x2_0000_0000
"""Where nothing is mapped, and where no memory is."""

# -- what is tried -------------------------------------------------------------------------

ACCESSES = {
    "read": ("mov (%rdi), %al", 0),
    "write": ("mov %al, (%rdi)", 2),
    "jump": ("jmp *%rdi", 16),
    "exchange": ("xchg %al, (%rdi)", 2),
    "string": ("lea zeros(%rip), %rsi; mov $8, %ecx; rep movsb", 2),
    "vector": ("movups %xmm0, (%rdi)", 2),
}
"""Snippet, and the bit that its page fault has in the error code."""

PRIVILEGED = {
    **{name: name for name in ("hlt", "cli", "sti", "clts", "swapgs", "rdmsr", "wrmsr", "sysretl")},
    **{name: name for name in ("sysretq", "sysexitl", "rdpmc", "xsetbv", "invlpg (%rsp)", "lmsw %ax")},
    **{name: name for name in ("lgdt (%rsp)", "lidt (%rsp)", "lldt %ax", "ltr %ax")},
    **{f"mov %cr{number}, %rax": f"mov %cr{number}, %rax" for number in (0, 2, 3, 4, 8)},
    **{f"mov %rax, %cr{number}": f"mov %rax, %cr{number}" for number in (0, 2, 3, 4, 8)},
    **{f"mov %dr{number}, %rax": f"mov %dr{number}, %rax" for number in (0, 6, 7)},
    **{f"mov %rax, %dr{number}": f"mov %rax, %dr{number}" for number in (0, 6, 7)},
    "wrmsr LSTAR": "mov $0xC0000082, %ecx; wrmsr",
    "wrmsr EFER": "mov $0xC0000080, %ecx; wrmsr",
    "wrmsr APIC_BASE": "mov $0x1B, %ecx; wrmsr",
    "in": "in $0x60, %al",
    "rep insb": "lea zeros(%rip), %rdi; mov $0x60, %edx; mov $4, %ecx; rep insb",
    "rep outsb": "lea zeros(%rip), %rsi; mov $0x60, %edx; mov $4, %ecx; rep outsb",
}
ODDITIES = {
    "ud2": ("ud2", "#UD(0x0)"),
    "icebp": (".byte 0xF1", "#DB(0x0)"),
    "int3": ("int3", "#BP(0x0)"),
    "sysenter": ("sysenter", "#UD(0x0) | #GP(0x0)"),
    **{name: (name, "#UD(0x0) | #GP(0x0)") for name in ("vmrun", "vmload", "vmsave", "stgi", "clgi", "skinit", "invlpga")},
    "vmmcall": ("vmmcall; mov $0, %eax", "#UD(0x0) | survived with 0x0"),
    "vmcall": ("vmcall; mov $0, %eax", "#UD(0x0) | #GP(0x0) | survived with 0x0"),
    "invd": ("invd", "#GP(0x0) | survived with 0x0"),  # QEMU knows no caches
    "wbinvd": ("wbinvd", "#GP(0x0) | survived with 0x0"),
    "invpcid": ("invpcid (%rsp), %rax", "#UD(0x0) | #GP(0x0)"),
    "wrfsbase": ("bts $63, %rax; wrfsbase %rax", "#UD(0x0) | #GP(0x0)"),
    "wrgsbase": ("bts $63, %rax; wrgsbase %rax", "#UD(0x0) | #GP(0x0)"),
    "sgdt": ("sgdt zeros(%rip)", "#GP(0x0) | survived with 0x0"),
    "smsw": ("smsw zeros(%rip)", "#GP(0x0) | survived with 0x0"),
}
"""Snippet, and how it may end: processors differ."""

SET_FLAGS = "pushfq; orq ${flags:#x}, (%rsp); popfq"
TF, DF, IOPL, NT, RF, AC, VIRTUAL = 0x100, 0x400, 0x3000, 0x4000, 0x10000, 0x40000, 0x1A0000
GET_FLAGS = "pushfq; pop %rax; pushq $2; popfq"
GATE = "mov $hl_service, %rax; call *%rax"
FLAGS = {
    "trap": (f"{SET_FLAGS.format(flags=TF)}; nop", "#DB(0x0)"),
    "trap over a page fault": (f"{SET_FLAGS.format(flags=TF)}; mov (%rsi), %al", "#DB(0x0)"),
    "trap at the gate": (f"mov $hl_service, %rax; pushq $0; {SET_FLAGS.format(flags=TF)}; jmp *%rax", "#DB(0x0)"),
    "trap behind mov ss": (f"mov %ss, %ecx; {SET_FLAGS.format(flags=TF)}; mov %ecx, %ss; int3", "#DB(0x0) | #BP(0x0)"),
    "nested task": (f"{SET_FLAGS.format(flags=NT)}; mov (%rsi), %al; {GATE}; {GET_FLAGS}; and ${NT:#x}, %eax",
                    f"survived with {NT:#x} | survived with 0x0"),  # kvm_pvm loses it
    "nested task in an exception": (f"{SET_FLAGS.format(flags=NT)}; ud2", "#UD(0x0)"),
    "nested task in iretq": (f"{SET_FLAGS.format(flags=NT)}; iretq", "#GP(0x0)"),
    "alignment check": (f"{SET_FLAGS.format(flags=AC)}; mov 1(%rsp), %rax; xor %eax, %eax",
                        "#AC(0x0) | survived with 0x0"),  # not in QEMU
    "alignment check in the kernel part": (f"{SET_FLAGS.format(flags=AC)}; mov (%rsi), %al; {GATE}; {GET_FLAGS}; "
                                           f"and ${AC:#x}, %eax", f"survived with {AC:#x}"),
    "direction": (f"std; mov (%rsi), %al; {GATE}; {GET_FLAGS}; and ${DF:#x}, %eax", f"survived with {DF:#x}"),
    "direction in an exception": ("std; ud2", "#UD(0x0)"),
    "resume": (f"{SET_FLAGS.format(flags=RF)}; ud2", "#UD(0x0)"),
    "I/O privilege": (f"{SET_FLAGS.format(flags=IOPL)}; {GET_FLAGS}; and ${IOPL:#x}, %eax", "survived with 0x0"),
    "I/O privilege, and a port": (f"{SET_FLAGS.format(flags=IOPL)}; out %al, $0x80", "#GP(0x0)"),
    "virtual 8086": (f"{SET_FLAGS.format(flags=VIRTUAL)}; {GET_FLAGS}; and ${VIRTUAL:#x}, %eax", "survived with 0x0"),
}  # fmt: skip
"""Snippet, with RSI at a page of stack that is not there yet, and how it may end."""

LOADS = {
    "lretq": "push %rdi; lea landing(%rip), %rax; push %rax; lretq",
    "ljmp": "lea landing(%rip), %rax; mov %eax, -16(%rsp); mov %di, -12(%rsp); ljmp *-16(%rsp)",
    "iretq to a code segment": "mov %rsp, %rcx; pushq $0x2b; push %rcx; pushq $2; push %rdi; lea landing(%rip), %rax; "
    "push %rax; iretq",
    "iretq to a stack segment": "mov %rsp, %rcx; push %rdi; push %rcx; pushq $2; pushq $0x33; lea landing(%rip), %rax; "
    "push %rax; iretq",
    **{name: f"mov %edi, %{name}" for name in ("ss", "ds", "es", "fs", "gs")},
}
NP, SS, GP, UD = 11, 12, 13, 6
TO_32_BITS = ("iretq to a code segment", 0x2B)
ENTER_32_BITS = "pushq $0x2b; lea low_stack_top(%rip), %rax; push %rax; pushq $2; pushq $0x2b; lea 1f(%rip), %rax; push %rax; "
CODE_OF_32_BITS = {
    f"in 32 bits, {name}": (f"{ENTER_32_BITS} iretq; 1: .byte {code}, 0x0F, 0x0B", ended)
    for name, code, ended in (
        ("read", "0xA0, 0, 0x20, 0, 0", "abort #PF(0x5) at 0x2000"),
        ("write", "0xA2, 0, 0x20, 0, 0", "abort #PF(0x7) at 0x2000"),
        ("mov %eax, %cr3", "0x0F, 0x22, 0xD8", "abort #GP(0x0)"),
        ("wrmsr", "0x0F, 0x30", "abort #GP(0x0)"),
        ("ljmp 8", "0xEA, 0, 0x20, 0, 0, 8, 0", "abort #GP(0x8)"),
        ("lret 8", "0x6A, 8, 0x68, 0, 0x20, 0, 0, 0xCB", "abort #GP(0x8)"),
        ("iret 8", "0x6A, 2, 0x6A, 8, 0x68, 0, 0x20, 0, 0, 0xCF", "abort #GP(0x0)"),
        ("ljmp 30", "0xEA, 0, 0x20, 0, 0, 0x30, 0", "#PF(0x15) at 0x2000"),
        ("syscall", "0x0F, 0x05", "abort #PF(0x10) at 0x0"),
        ("mov %eax, %ss", "0xB8, 0x10, 0, 0, 0, 0x8E, 0xD0", "abort #GP(0x10)"),
        ("out", "0xE6, 0x80", "abort #GP(0x0)"),
    )
}
"""Snippet, and how it ends where such code runs at all: the kernel part knows no such guest, and aborts."""
SNIPPETS: dict[str, str] = {
    **{name: snippet for name, (snippet, _) in (ACCESSES | ODDITIES | FLAGS | CODE_OF_32_BITS).items()},
    **PRIVILEGED,
    **LOADS,
    **{f"int {number}": f".byte 0xCD, {number}; mov $0, %eax" for number in range(256)},
    "landing": "jmp survived; landing: ud2",
    "out": "mov %edi, %edx; mov %esi, %eax; out %al, %dx",
    "out 16": "mov %edi, %edx; mov %esi, %eax; out %ax, %dx",
    "out 32": "mov %edi, %edx; mov %esi, %eax; out %eax, %dx",
    "service": GATE,
    "flush": f"mov $hl_flush_gate, %rax; {SET_FLAGS.format(flags=TF)}; jmp *%rax",
    "edit": "mov %rdi, edit_offset(%rip); mov %rsi, edit_value(%rip); ud2; xor %eax, %eax",
    "edit, and see the flags": f"mov %rdi, edit_offset(%rip); mov %rsi, edit_value(%rip); ud2; {GET_FLAGS}",
    "ud2 on a stack": "mov %rdi, %rsp; ud2",
    "push on a stack": "mov %rdi, %rsp; push %rax",
    "ud2 behind a service": f"{GATE}; ud2",
    "halt behind a service": f"{GATE}; out %eax, $108",
    "recursion": "mov %rdi, %rsp; movq $-2, edit_offset(%rip); ud2",
    "syscall": "syscall",
    "syscall, trapping": f"{SET_FLAGS.format(flags=TF)}; syscall",
    "abort": "lea zeros(%rip), %rsi; mov %rdi, 0x2a8(%rsi); mov %rdx, 0x298(%rsi); xor %edx, %edx; mov $5, %edi; "
    + GATE,
    "leak": "fninit; incb untouched(%rip); movq $-3, edit_offset(%rip); ud2",
    "own interrupts": """
        mov $0x11, %al; out %al, $0x20; mov %edi, %eax; out %al, $0x21; mov $4, %al; out %al, $0x21
        mov $1, %al; out %al, $0x21; mov $0xFE, %al; out %al, $0x21
        mov $100, %eax; out %eax, $107
        mov $4, %edi; mov $1, %esi; mov $hl_service, %rax; call *%rax
        1: pause; dec %rdx; jnz 1b
        xor %eax, %eax""",
    "touch pages downwards": "1: mov %al, (%rdi); sub $0x1000, %rdi; jmp 1b",
}


# -- the arenas ----------------------------------------------------------------------------


def named(place: tuple[Host, State]) -> str:
    host, state = place
    return f"{host}, {state}"


@pytest.fixture(scope="module", params=PLACES, ids=named)
def places(request: pytest.FixtureRequest) -> Iterator[Arena]:
    host, state = request.param
    arena = Arena(host, state, SNIPPETS)
    yield arena
    arena.close()


@pytest.fixture
def arena(places: Arena) -> Iterator[Arena]:
    """A guest to attack, which is left as it was found."""
    yield places
    places.renew()
    assert places.sandbox.call("Echo", "unharmed") == "unharmed"


def tables_of(arena: Arena) -> list[int]:
    """Return where the scratch map shows each page table (gva)."""
    layout, tables = arena.sandbox.layout, set[int]()

    def noting(gpa: int) -> Any:
        tables.add(gpa)
        return arena.sandbox._guest.physical.read_table(gpa)

    list(memory.walk(noting, layout.pt_base_gpa, max_tables=1000))
    return sorted(gpa + SCRATCH_ALIAS for gpa in tables)


def outcomes(arena: Arena, attempts: Mapping[str, Attempt]) -> dict[str, str]:
    """Return how the attempts end, by name."""
    return dict(zip(attempts, map(str, arena.attack(list(attempts.values()))), strict=True))


def assert_each_ends_as_it_may(found: Mapping[str, str], allowed: Mapping[str, str]) -> None:
    """Fail for an outcome that is not one of those that a string names."""
    assert {name: outcome for name, outcome in found.items() if outcome not in allowed[name].split(" | ")} == {}


# -- memory --------------------------------------------------------------------------------


def kernel_memory(arena: Arena) -> dict[str, int]:
    """Return addresses that are mapped for the kernel part alone."""
    layout = arena.sandbox.layout
    end = layout.scratch_base_gva + layout.scratch_size
    functions = {name: gva for name, gva in symbols().items() if gva in kernel_range() and name}
    return {
        **functions,
        "last byte of its text": kernel_range()[-1] & -8,
        "GDT": PROC_CONTROL + 8,
        "TSS": PROC_CONTROL + 0x40,
        "IST 1": PROC_CONTROL + 0x40 + 0x24,
        "I/O bitmap": PROC_CONTROL + 0x40 + 0x68,
        "IDT": IDT + 13 * 16,
        "end of IDT": IDT + PAGE_SIZE - 16,
        **{f"page table at {gva:#x}": gva + 8 * (gva >> 12 & 511) for gva in tables_of(arena)},
        "behind the tables": layout.scratch_base_gva + layout.page_table_scratch_offset + layout.pt_size,
        "free memory": end - 16 * PAGE_SIZE,
        "exception stack": EXCEPTION_STACK_TOP - 16,
        "below the exception stack": EXCEPTION_STACK_TOP - 2 * PAGE_SIZE,
        **{f"word at -{distance:#x}": end - distance for distance in (0x20, 0x18, 0x10, 0x08)},
    }


def page_faults(accesses: Iterable[tuple[str, int]], present: int) -> dict[str, str]:
    """Return how accesses at CPL 3 end, by name. QEMU takes an exchange for a read."""
    ends = {}
    for access, gva in accesses:
        bits = (ACCESSES[access][1], 0) if access == "exchange" else (ACCESSES[access][1],)
        ends[f"{access} at {gva:#x}"] = " | ".join(f"#PF({4 | present | bit:#x}) at {gva:#x}" for bit in bits)
    return ends


def test_kernel_memory_can_be_neither_read_nor_written_nor_run(arena: Arena) -> None:
    accesses = list(itertools.product(ACCESSES, kernel_memory(arena).values()))
    found = outcomes(arena, {f"{access} at {gva:#x}": Attempt(access, gva) for access, gva in accesses})
    assert_each_ends_as_it_may(found, page_faults(accesses, present=1))


def test_nothing_lies_outside(arena: Arena) -> None:
    unmapped = (0, 0xFF8, FREE_GVA, (1 << 47) - 8, MAIN_STACK.start - 8, MAIN_STACK.stop, IDT + PAGE_SIZE, (1 << 64) - 8)
    accesses = list(itertools.product(ACCESSES, unmapped))
    found = outcomes(arena, {f"{access} at {gva:#x}": Attempt(access, gva) for access, gva in accesses})
    assert_each_ends_as_it_may(found, page_faults(accesses, present=0))
    wild = [Attempt(access, gva) for access, gva in itertools.product(ACCESSES, NON_CANONICAL)]
    assert {str(outcome) for outcome in arena.attack(wild)} == {"#GP(0x0)"}


# -- instructions --------------------------------------------------------------------------


def test_privileged_instructions_are_refused(arena: Arena) -> None:
    found = outcomes(arena, {name: Attempt(name) for name in PRIVILEGED})
    assert found == dict.fromkeys(PRIVILEGED, "#GP(0x0)")


def test_odd_instructions_do_no_harm(arena: Arena) -> None:
    found = outcomes(arena, {name: Attempt(name) for name in ODDITIES})
    assert_each_ends_as_it_may(found, {name: allowed for name, (_, allowed) in ODDITIES.items()})


def test_software_interrupts_reach_no_gate_but_the_debuggers(arena: Arena) -> None:
    found = outcomes(arena, {f"int {number}": Attempt(f"int {number}") for number in range(256)})
    if hyperlight.cpl0_is_emulated():
        expected = dict.fromkeys(found, "#UD(0x0)") | INTERRUPTS_OF_KVM_PVM
    else:
        expected = {f"int {number}": f"#GP({number * 8 + 2:#x})" for number in range(256)}
    assert found == expected | {"int 3": "#BP(0x0)"}


INTERRUPTS_OF_KVM_PVM = {
    "int 4": "#OF(0x0)",
    "int 23": "#GP(0x0)",
    "int 25": "#GP(0x0)",
    "int 26": "survived with 0x0",  # it does a CPUID
}
SELECTORS = [*range(0x44), 0xFFFC, 0xFFFF]
MAY_BE_LOADED = {
    "lretq": {0x33},
    "ljmp": {0x30, 0x31, 0x32, 0x33},
    "iretq to a code segment": {0x33},
    "iretq to a stack segment": {0x2B},
    "ss": {0x2B},
    **{name: {0, 1, 2, 3, *range(0x28, 0x2C), *range(0x30, 0x34)} for name in ("ds", "es", "fs", "gs")},
}


def is_refusal(outcome: Outcome, selector: int) -> bool:
    """Whether an attempt to load *selector* ended in an exception that a processor, or kvm_pvm, has for that."""
    if outcome.vector in (NP, SS, GP):
        return outcome.error_code == selector & ~3
    return outcome.vector == UD and hyperlight.cpl0_is_emulated()


def test_selectors_lead_nowhere(arena: Arena) -> None:
    """Where they may be loaded, the intruder lands at CPL 3."""
    for load in LOADS:
        selectors = [selector for selector in SELECTORS if (load, selector) != TO_32_BITS]
        found = dict(zip(selectors, arena.attack([Attempt(load, selector) for selector in selectors]), strict=True))
        for selector, outcome in found.items():
            if selector in MAY_BE_LOADED[load]:
                assert str(outcome) == (f"survived with {selector:#x}" if len(load) == 2 else "#UD(0x0)"), load
            else:
                assert is_refusal(outcome, selector), (load, hex(selector), str(outcome))


def test_code_of_32_bits_has_no_more_rights(arena: Arena) -> None:
    """kvm_pvm takes the data segment for CS and emulates what follows; others do not let the intruder in."""
    if not hyperlight.cpl0_is_emulated():
        assert outcomes(arena, {name: Attempt(name) for name in CODE_OF_32_BITS}) == dict.fromkeys(
            CODE_OF_32_BITS, "#GP(0x28)"
        )
        return
    for name, (_, expected) in CODE_OF_32_BITS.items():
        assert (name, arena.ruin(Attempt(name))) == (name, expected)
        arena.renew()


def test_flags_do_no_harm(arena: Arena) -> None:
    found: dict[str, str] = {}
    for index, name in enumerate(FLAGS):  # a page of stack that is not there yet for each
        found |= outcomes(arena, {name: Attempt(name, rsi=MAIN_STACK.stop - (index + 16) * PAGE_SIZE)})
    assert_each_ends_as_it_may(found, {name: allowed for name, (_, allowed) in FLAGS.items()})


@pytest.mark.parametrize("name", ["syscall", "syscall, trapping"])
def test_system_calls_lead_to_page_0_where_nothing_is(arena: Arena, name: str) -> None:
    """LSTAR is 0. kvm_pvm goes there at CPL 3, others at CPL 0."""
    allowed = ["#PF(0x14) at 0x0", "abort #PF(0x10) at 0x0"]
    if name == "syscall, trapping":
        allowed += ["#DB(0x0)", "abort #DB(0x0)"]
    assert arena.ruin(Attempt(name)) in allowed


# -- ports ---------------------------------------------------------------------------------

OPEN_PORTS = {0x20, 0x21, 0xA0, 0xA1, *range(99, 112)}
FAR_PORTS = (0x1F0, 0x3F8, 0x402, 0x4D0, 0x4D1, 0x510, 0xCF8, 0xCF9, 0xCFC, 0xB004, 0xFFFE, 0xFFFF)
WIDTHS = {"out": 1, "out 16": 2, "out 32": 4}


def test_other_ports_are_closed_also_to_accesses_that_only_touch_them(arena: Arena) -> None:
    closed = {
        f"{name}, port {port:#x}": Attempt(name, port, 0xFF)
        for name, width in WIDTHS.items()
        for port in (*range(0 if width == 1 else 90, 0xC4), *FAR_PORTS)
        if not OPEN_PORTS.issuperset(range(port, port + width))
    }
    assert outcomes(arena, closed) == dict.fromkeys(closed, "#GP(0x0)")


HOSTILE_VALUES = {
    **{(port, 0): "InvalidPort" for port in (100, 104, 105, 106, 107, 109, 110, 111, 0x20, 0x21, 0xA0, 0xA1)},
    (99, 0): "HandleIoError",
    (101, 0): "HandleIoError",
    (102, 0): "survived with 0x0",
    (102, 0xFF01): "abort 0: ",
    (102, 0xFFFF_FFFF): "abort 0: ",
    (103, 0xFFFF_FFFF): "HandleIoError",
    (108, 0xFFFF_FFFF): "IoStackError",
}


def test_hostile_values_at_open_ports(arena: Arena) -> None:
    for (port, value), expected in HOSTILE_VALUES.items():
        ended = arena.ruin(Attempt("out 32" if 99 <= port < 109 else "out", port, value))
        assert (port, ended) == (port, expected)
        arena.renew()


# -- stacks --------------------------------------------------------------------------------


def bad_stacks(arena: Arena) -> dict[str, int]:
    """Return stack pointers to which no frame may be delivered."""
    layout = arena.sandbox.layout
    tables = layout.scratch_base_gva + layout.page_table_scratch_offset
    return {
        "none": 0,
        "below page 1": 0x1040,
        "begins in page 0": 0x1300,
        "kernel text": kernel_range().start + 0x800,
        "ends in kernel text": kernel_range().start + 0x90,
        "begins in kernel text": kernel_range().stop + 0x200,
        "descriptor tables": PROC_CONTROL + 0x800,
        "end of the descriptor tables": IDT + PAGE_SIZE,
        "ends in a page table": tables + 0x200,
        "page table": tables + 0x800,
        "exception stack": EXCEPTION_STACK_TOP,
        "end of the main stack": MAIN_STACK.start + 0x200,
        "end of the low half": (1 << 47) + 0x200,
        "non-canonical": NON_CANONICAL[0] + 0x1000,
        "end of the world": (1 << 64) - 8,
        "unmapped": FREE_GVA,
    }


def test_frames_are_delivered_to_the_guests_own_memory_alone(arena: Arena) -> None:
    wrong = {}
    for name, gva in bad_stacks(arena).items():
        ended = arena.ruin(Attempt("ud2 on a stack", gva))
        arena.renew()
        if ended != "abort #UD(0x0)":
            wrong[name] = ended
    assert wrong == {}


def test_pushes_into_the_kernel_part_end_the_call(arena: Arena) -> None:
    for name in ("kernel text", "end of the descriptor tables", "page table", "exception stack"):
        gva = bad_stacks(arena)[name]
        assert arena.ruin(Attempt("push on a stack", gva)) == f"abort #PF(0x7) at {gva - 8:#x}"
        arena.renew()


def test_handlers_that_fault_for_ever_run_out_of_stack(arena: Arena) -> None:
    """16 KiB above the stack's limit, and with all the stack that scratch has."""
    assert arena.ruin(Attempt("recursion", MAIN_STACK.start + 0x4000)) == "abort #UD(0x0)"
    arena.renew()
    ended = arena.ruin(Attempt("touch pages downwards", MAIN_STACK.stop - 8))
    assert ended == "abort 13: Out of physical memory"


# -- frames that the handler gives back ----------------------------------------------------

OFFSETS = {"mxcsr": 0x38, "rip": 0x2A8, "cs": 0x2B0, "rflags": 0x2B8, "rsp": 0x2C0, "ss": 0x2C8}


def test_tampered_frames_do_not_lead_to_another_privilege(arena: Arena) -> None:
    kernel, tables = kernel_range().start, tables_of(arena)[0]
    edits = {
        **{("cs", selector): f"#GP({selector & ~3:#x})" for selector in (0, 8, 0xB, 0x10, 0x18, 0x20, 0x30, 0x37)},
        **{("ss", selector): f"#GP({selector & ~3:#x})" for selector in (0, 3, 8, 0xB, 0x10, 0x18, 0x28)},
        ("rip", kernel): f"#PF(0x15) at {kernel:#x}",
        ("rip", 0): "#PF(0x14) at 0x0",
        ("rip", PROC_CONTROL): f"#PF(0x15) at {PROC_CONTROL:#x}",
        ("rip", NON_CANONICAL[0]): "#GP(0x0)",
        ("rsp", tables): "survived with 0x0",
        ("rsp", NON_CANONICAL[0]): "survived with 0x0",
        ("mxcsr", (1 << 64) - 1): "#GP(0x0) | survived with 0x0",  # QEMU takes them
    }
    for (field, value), expected in edits.items():
        (outcome,) = arena.attack([Attempt("edit", OFFSETS[field], value)])
        assert str(outcome) in expected.split(" | ") or (field in ("cs", "ss") and is_refusal(outcome, value)), (field, value)


def test_tampered_flags_do_not_grant_ports(arena: Arena) -> None:
    """IF counts for nothing: kvm_pvm shows it set at CPL 3."""
    attempts = [Attempt("edit, and see the flags", OFFSETS["rflags"], flags) for flags in (IOPL, VIRTUAL, (1 << 64) - 1 & ~TF)]
    for outcome in arena.attack(attempts):
        assert outcome.vector in (None, 13)
        assert outcome.vector == 13 or not outcome.rax & (IOPL | VIRTUAL)


# -- services ------------------------------------------------------------------------------

MAP, IS_MAPPED, VECTOR, INTERRUPTS, ABORT = 1, 2, 3, 4, 5
WRITE_AND_EXECUTE = 6


def maps(gva: int = FREE_GVA, gpa: int = FREE_GPA, size: int = PAGE_SIZE, flags: int = WRITE_AND_EXECUTE) -> Attempt:
    return Attempt("service", MAP, gva, gpa, size, flags)


def kernel_pages(arena: Arena) -> dict[str, int]:
    """Return what must not be mapped (gpa): the kernel part's pages, wherever a snapshot has put them."""
    layout = arena.sandbox.layout
    return {
        **{f"kernel text at {gva:#x}": arena.gpa_of(gva) for gva in kernel_range()[::PAGE_SIZE]},
        "GDT": arena.gpa_of(PROC_CONTROL),
        "IDT": arena.gpa_of(IDT),
        "input buffer": layout.scratch_base_gpa,
        "root table": layout.pt_base_gpa,
        "free page": layout.first_free_gpa + 64 * PAGE_SIZE,
        "exception stack": memory.MAX_GPA + 1 - PAGE_SIZE,
    }


def test_physical_memory_of_the_kernel_part_cannot_be_mapped(arena: Arena) -> None:
    pages = kernel_pages(arena)
    attempts = {name: maps(gpa=gpa) for name, gpa in pages.items()}
    attempts |= {f"around {name}": maps(gpa=gpa - PAGE_SIZE, size=3 * PAGE_SIZE) for name, gpa in pages.items()}
    attempts |= {f"up to {name}": maps(gpa=gpa - PAGE_SIZE, size=2 * PAGE_SIZE) for name, gpa in pages.items()}
    attempts["everything"] = maps(gpa=PAGE_SIZE, size=memory.MAX_GPA + 1 - PAGE_SIZE)
    attempts["everything below scratch"] = maps(gpa=PAGE_SIZE, size=arena.sandbox.layout.scratch_base_gpa - PAGE_SIZE)
    assert outcomes(arena, attempts) == dict.fromkeys(attempts, "survived with 0x0")


def test_of_the_image_only_what_is_surely_the_guests_can_be_mapped(arena: Arena) -> None:
    """Nothing where the host tells how large it is; elsewhere all but the kernel part's own pages."""
    end = memory.BASE_ADDRESS + arena.sandbox.layout.snapshot_size
    refused = range(0, end, PAGE_SIZE) if arena.host != "unaware" else kernel_pages(arena).values()
    attempts = {hex(gpa): maps(gpa=gpa) for gpa in range(PAGE_SIZE, end, PAGE_SIZE)}
    expected = {hex(gpa): f"survived with {int(gpa not in refused):#x}" for gpa in range(PAGE_SIZE, end, PAGE_SIZE)}
    assert outcomes(arena, attempts) == expected
    assert outcomes(arena, {"behind": maps(gpa=end)}) == {"behind": "survived with 0x1"}


def test_registers_of_interrupt_controllers_cannot_be_mapped(arena: Arena) -> None:
    """This host switches the local APIC off. Another would let it send an SMI, whose handler runs at guest-physical
    0x38000 with all privileges.
    """
    attempts = {hex(gpa): maps(gpa=gpa) for gpa in (DEVICES.start, 0xFEE0_0000, DEVICES.stop - PAGE_SIZE)}
    attempts["from below"] = maps(gpa=DEVICES.start - PAGE_SIZE, size=2 * PAGE_SIZE)
    attempts["from above"] = maps(gpa=DEVICES.stop - PAGE_SIZE, size=2 * PAGE_SIZE)
    attempts["around"] = maps(gpa=DEVICES.start - PAGE_SIZE, size=len(DEVICES) + 2 * PAGE_SIZE)
    assert outcomes(arena, attempts) == dict.fromkeys(attempts, "survived with 0x0")
    beside = {"below": maps(gpa=DEVICES.start - PAGE_SIZE), "above": maps(gpa=DEVICES.stop)}
    assert outcomes(arena, beside) == dict.fromkeys(beside, "survived with 0x1")


def test_addresses_of_the_kernel_part_cannot_be_mapped_over(arena: Arena) -> None:
    layout, last = arena.sandbox.layout, (1 << 47) - PAGE_SIZE
    attempts = {f"kernel text at {gva:#x}": maps(gva) for gva in kernel_range()[::PAGE_SIZE]}
    attempts |= {
        "into kernel text": maps(PAGE_SIZE, size=2 * PAGE_SIZE),
        "around kernel text": maps(kernel_range().start - PAGE_SIZE, size=len(kernel_range()) + 2 * PAGE_SIZE),
        "page 0": maps(0),
        "page 0 and on": maps(0, size=2 * PAGE_SIZE),
        "end of the low half": maps(1 << 47),
        "over the end of the low half": maps(last, size=2 * PAGE_SIZE),
        "buffers": maps(layout.scratch_base_gva),
        "page tables": maps(layout.scratch_base_gva + layout.page_table_scratch_offset),
        "main stack": maps(MAIN_STACK.start),
        "descriptor tables": maps(PROC_CONTROL),
        "exception stack": maps(EXCEPTION_STACK_TOP & -PAGE_SIZE),
        "last page": maps(-PAGE_SIZE % (1 << 64)),
        "all": maps(PAGE_SIZE, PAGE_SIZE, -2 * PAGE_SIZE % (1 << 64)),
        **{f"size {size:#x}": maps(size=size) for size in (1 << 47, 1 << 63, (1 << 64) - PAGE_SIZE)},
        **{f"gpa {gpa:#x}": maps(gpa=gpa) for gpa in (1 << 36, 1 << 52, 1 << 63, (1 << 64) - PAGE_SIZE)},
        "unaligned gva": maps(FREE_GVA + 8),
        "unaligned gpa": maps(gpa=FREE_GPA + 1),
        "unaligned size": maps(size=PAGE_SIZE - 1),
    }
    assert outcomes(arena, attempts) == dict.fromkeys(attempts, "survived with 0x0")
    fine = {"last page": maps(last), "nothing": maps(size=0), "all flags": maps(flags=(1 << 64) - 1), "first": maps(PAGE_SIZE, size=0)}
    assert outcomes(arena, fine) == dict.fromkeys(fine, "survived with 0x1")


@pytest.mark.parametrize("place", PLACES[::4], ids=named)
def test_a_mapping_without_end_runs_out_of_memory(place: tuple[Host, State]) -> None:
    arena = Arena(*place, SNIPPETS, scratch_size=0x58000)
    assert arena.ruin(maps(1 << 40, size=1 << 35)) == "abort 13: Out of physical memory"
    arena.renew()
    assert arena.sandbox.call("Echo", "unharmed") == "unharmed"
    arena.close()


def test_memory_that_a_guest_takes_from_under_itself_is_missing_for_the_kernel_part_too(arena: Arena) -> None:
    """What it needs of the guest's memory is which vectors have handlers, and a stack."""
    needed = symbols()["hl_handled_vectors"] & -PAGE_SIZE
    assert arena.ruin(maps(needed)._replace(snippet="ud2 behind a service")) == "MmioReadUnmapped"
    arena.renew()
    assert str(arena.attack([maps()])[0]) == "survived with 0x1"
    assert arena.ruin(Attempt("ud2 on a stack", FREE_GVA + 0x800)) == "MmioWriteUnmapped"
    arena.renew()
    assert arena.ruin(maps(needed)._replace(snippet="halt behind a service")) == "IoStackError"
    with hyperlight.MultiUseSandbox.from_snapshot(arena.captured()) as other:  # which drops what lies nowhere
        with pytest.raises(hyperlight.GuestAborted) as caught:
            other.call("Echo", "x")
    assert (caught.value.vector, caught.value.address) == (14, symbols()["hl_handled_vectors"])
    assert caught.value.registers["cs"] == 8


def test_questions_about_addresses_are_answered(arena: Arena) -> None:
    answers = dict.fromkeys((0, FREE_GVA, MAIN_STACK.start, MAIN_STACK.stop, (1 << 64) - 1, *NON_CANONICAL), 0)
    answers |= dict.fromkeys((PAGE_SIZE, kernel_range().start, PROC_CONTROL, IDT, EXCEPTION_STACK_TOP), 1)
    found = outcomes(arena, {hex(gva): Attempt("service", IS_MAPPED, gva) for gva in answers})
    assert found == {hex(gva): f"survived with {answer:#x}" for gva, answer in answers.items()}


def test_services_that_are_none_are_refused(arena: Arena) -> None:
    attempts = {f"service {number:#x}": Attempt("service", number, 1) for number in (0, 6, 7, 1 << 32 | 1, (1 << 64) - 1)}
    attempts |= {
        f"vector {vector:#x}": Attempt("service", VECTOR, vector)
        for vector in (*range(32), 48, 49, 255, 256, 1 << 32 | 32, (1 << 64) - 1, (1 << 64) - 224)
    }
    assert outcomes(arena, attempts) == dict.fromkeys(attempts, "survived with 0x0")
    assert outcomes(arena, {"flush": Attempt("flush")}) == {"flush": "#DB(0x0)"}  # behind the gate, a call begins


def test_interrupts_get_their_gates_and_nothing_else_changes(places: Arena) -> None:
    """Also where a snapshot has made the page of the IDT copy-on-write."""
    vectors = range(32, 48)
    attempts = {f"vector {vector}": Attempt("service", VECTOR, vector) for vector in vectors}
    assert outcomes(places, attempts) == dict.fromkeys(attempts, "survived with 0x1")
    stubs = [symbols()["hl_vector_stubs"] + 16 * vector for vector in vectors]
    gates = places.sandbox._guest.physical.read_virt(places.sandbox.layout.pt_base_gpa, IDT + 32 * 16, 16 * 16)
    assert [gates[16 * index : 16 * index + 8] for index in range(16)] == [
        struct.pack("<HHHH", stub & 0xFFFF, 8, 0x8E01, stub >> 16) for stub in stubs
    ]
    places.renew(opened_interrupts=True)


def test_aborts_with_a_frame_elsewhere_are_refused(arena: Arena) -> None:
    frames = {
        **bad_stacks(arena),
        **kernel_memory(arena),
        "before kernel text": kernel_range().start - 8,
        "before the tables": arena.sandbox.layout.scratch_base_gva + arena.sandbox.layout.page_table_scratch_offset - 8,
    }
    refused = {name: Attempt("service", ABORT, gva) for name, gva in frames.items() if name not in IN_THE_GUESTS_MEMORY}
    assert outcomes(arena, refused) == dict.fromkeys(refused, "survived with 0x0")


IN_THE_GUESTS_MEMORY = {"below page 1", "begins in page 0", "begins in kernel text", "end of the main stack"}
"""Stack pointers of ``bad_stacks`` above which, not below which, lies memory of the guest's, or none."""


def test_aborts_with_a_frame_full_of_lies_say_what_it_says(arena: Arena) -> None:
    for rip in (0, kernel_range().start, PROC_CONTROL, EXCEPTION_STACK_TOP - 4, (1 << 64) - 4, *NON_CANONICAL):
        assert arena.ruin(Attempt("abort", rip, rdx=6)) == "abort #UD(0x0)"
        arena.renew()
    assert arena.ruin(Attempt("abort", 0, rdx=0xFF)) == "abort 15: "


# -- what the exception stack held -----------------------------------------------------------


def test_handlers_see_nothing_that_the_exception_stack_held_before(arena: Arena) -> None:
    """FXSAVE leaves out 96 bytes, and some processors the address of the last x87 operation."""
    (outcome,) = arena.attack([Attempt("leak")])
    assert str(outcome) == "survived with 0x0"


# -- interrupts ------------------------------------------------------------------------------

TURNS = 1 << 32
"""Of a loop that waits for an interrupt: more than come to pass."""


@require("timer_interrupts")
@pytest.mark.parametrize("place", PLACES, ids=named)
def test_vectors_that_an_intruder_gives_to_interrupts(place: tuple[Host, State]) -> None:
    """The ports of the interrupt controller are the guest's: it may have an interrupt look like any exception."""
    arena = Arena(*place, SNIPPETS, hardware_timer=True)
    for vector, expected in {
        0x20: "vector 32(0x0)",
        0x28: "vector 40(0x0)",
        0x00: "#DE(0x0)",
        0x10: "#MF(0x0)",
        0x18: "#GP(0xc2) | #NP(0xc2)",
        0xF8: "#GP(0x7c2) | #NP(0x7c2)",
        0x08: "abort #GP(0x0)",  # a frame that lacks the error code, where FXSAVE finds no aligned place
    }.items():
        if expected.startswith("vector"):
            assert str(arena.attack([Attempt("service", VECTOR, vector)])[0]) == "survived with 0x1"
        ended = arena.ruin(Attempt("own interrupts", vector, rdx=TURNS))
        kvm_pvm = vector == 8 and ended.startswith("abort #DF(")  # it takes any place, and the fields are shifted
        assert ended in expected.split(" | ") or kvm_pvm
        arena.renew(opened_interrupts=True)
    arena.close()


# -- the end of the low half -----------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES[::4], ids=named)
def test_code_that_ends_where_addresses_end(place: tuple[Host, State]) -> None:
    """What follows is not canonical, and stands in frames of exceptions that report the next instruction."""
    arena, last = Arena(*place, SNIPPETS), (1 << 47) - PAGE_SIZE
    with memory.SharedMemory.anonymous(PAGE_SIZE, shared=True) as page:
        for code, expected in ((b"\xCC", "#BP(0x0)"), (b"\xF1", "#DB(0x0)"), (b"\xF4", "#GP(0x0)"),
                               (b"\x90", f"#GP(0x0) | #PF(0x14) at {1 << 47:#x}")):  # fmt: skip
            page.write(PAGE_SIZE - 1, code)
            arena.sandbox.map_region(FREE_GPA, page, memory.MemoryRegionFlags.READ | memory.MemoryRegionFlags.EXECUTE)
            assert outcomes(arena, {"map": maps(last)}) == {"map": "survived with 0x1"}
            assert str(arena.attack([Attempt("jump", (1 << 47) - 1)])[0]) in expected.split(" | ")
            arena.renew()
        arena.close()


# -- anything at all -------------------------------------------------------------------------

U64 = st.integers(0, (1 << 64) - 1)
EDGES = (0, PAGE_SIZE, kernel_range().start, kernel_range().stop, 1 << 47, PROC_CONTROL, IDT, MAIN_STACK.start, MAIN_STACK.stop,
         memory.MAX_GPA + 1, memory.MAX_GVA + 1, FREE_GVA, FREE_GPA, DEVICES.start, DEVICES.stop, EXCEPTION_STACK_TOP)  # fmt: skip
NEAR_EDGES = st.builds(
    lambda edge, pages, bytes_: (edge + pages * PAGE_SIZE + bytes_) % (1 << 64),
    st.sampled_from(EDGES), st.integers(-64, 64), st.sampled_from((0, 0, 0, 0, 1, 8, 0x800)),
)  # fmt: skip
ADDRESSES = st.one_of(NEAR_EDGES, NEAR_EDGES, U64)
SIZES = st.one_of(st.integers(0, 70).map(lambda pages: pages * PAGE_SIZE), ADDRESSES)
SOME_SNIPPETS = [*ACCESSES.keys() - {"jump"}, *LOADS, *WIDTHS, "ud2 on a stack", "push on a stack", "syscall", "service"]
"""Not those that could have the guest run its own code anywhere, and for ever."""


def attempts_with(*strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[Attempt]:
    return st.tuples(*strategies).map(lambda values: Attempt(*values))


ANY_ATTEMPT = st.one_of(
    attempts_with(st.just("service"), st.just(MAP), ADDRESSES, ADDRESSES, SIZES, U64),
    attempts_with(st.just("service"), st.integers(0, 8), ADDRESSES, ADDRESSES, SIZES, U64),
    attempts_with(st.sampled_from(sorted(SOME_SNIPPETS)), ADDRESSES, U64),
    attempts_with(st.just("edit"), st.sampled_from(sorted({*OFFSETS.values()} - {OFFSETS["rip"]})), ADDRESSES),
)


@settings(max_examples=20 if missing("native_cpu") is None else 4, deadline=None)
@given(attempts=st.lists(ANY_ATTEMPT, min_size=1, max_size=12))
def test_whatever_is_tried_the_walls_stand(places: Arena, attempts: list[Attempt]) -> None:
    """Every call ends in an answer or an error of this library's; which, other tests say."""
    with contextlib.suppress(hyperlight.HyperlightError):
        places.attack(attempts)
    places.renew(opened_interrupts=True)


# -- the guard itself ------------------------------------------------------------------------


def page_at(arena: Arena, gva: int, entry_of: int) -> tuple[int, bytes]:
    """Return where the entry is that maps *gva*, and an entry that has it show the page of *entry_of* to CPL 3."""
    layout, table = arena.sandbox.layout, arena.sandbox.layout.pt_base_gpa
    for level in (4, 3, 2):
        entry = arena.sandbox._guest.physical.read_entry(table + 8 * memory.table_index(gva, level))
        assert entry is not None
        table = entry & memory.PTE_ADDRESS_MASK
    shown = arena.gpa_of(entry_of) & -PAGE_SIZE if entry_of else layout.pt_base_gpa
    return table + 8 * memory.table_index(gva, 1), struct.pack("<Q", shown | 0x67)


@pytest.mark.parametrize(
    ("gva", "shows"),
    [
        (kernel_range().start, kernel_range().start),
        (PROC_CONTROL, PROC_CONTROL),
        (EXCEPTION_STACK_TOP, EXCEPTION_STACK_TOP),
        (kernel_range().stop, kernel_range().start),
        (kernel_range().stop, IDT),
        (kernel_range().stop, EXCEPTION_STACK_TOP),
        (kernel_range().stop, 0),
        (MAIN_STACK.stop - 8, kernel_range().start),
    ],
    ids=hex,
)
def test_the_guard_sees_a_page_that_is_open_to_cpl_3(gva: int, shows: int) -> None:
    arena = Arena("host", "fresh", SNIPPETS)
    arena.renew()
    gpa, entry = page_at(arena, gva, shows)
    arena.sandbox._guest.physical.write_phys(gpa, entry)
    with pytest.raises(AssertionError):
        arena.renew()
    arena.close()


@pytest.mark.parametrize("gva", [kernel_range()[-1], PROC_CONTROL + 0x41, IDT + 8, IDT + 33 * 16, 0xFFFF_FFFF_FFFF_EFF8,
                                 0xFFFF_FFFF_FFFF_EFE0, EXCEPTION_STACK_TOP - 5 * PAGE_SIZE])  # fmt: skip
def test_the_guard_sees_a_byte_that_has_changed(gva: int) -> None:
    arena = Arena("host", "fresh", SNIPPETS)
    arena._write(gva, b"!")
    with pytest.raises(AssertionError):
        arena.renew()
    arena.close()
