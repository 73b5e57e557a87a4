"""A guest of a few dozen instructions: the cheapest that keeps the protocol, at CPL 0 or at CPL 3.

``tiny_guest(user_mode=...)`` returns its ELF. It uses no stack, tells its functions apart by the last
character of the message (so their names have one letter), and copies its answers from constants::

    echo(Long) -> Long        the argument
    add(Long) -> Long         adds to a counter in the image and returns it; only with copy_on_write="host"
    work(Long) -> Long        returns once the time stamp counter has advanced so far
    spin()                    for ever
    meet() -> Long            calls the host function ``Meet`` once
    meet_and_spin()           the same, then spins for ever
    meet_for_ever()           calls ``Meet`` over and over
    read(Long gva) -> Long    the 8 bytes there, or FAULT in user mode if nothing is mapped
    alias(Long gva) -> Long   user mode: makes WINDOW show the page of *gva*; then as read(WINDOW)
    seed() -> Long            what RDI held at this entry

Arguments may not be 0, which a FlatBuffer leaves out. In user mode the guest owns a GDT, an IDT and a TSS
in its image, enters CPL 3 once, while it initialises, and is entered there ever after; `ud2` is its system call.
"""

from __future__ import annotations

import functools
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from elfwriter import SHT_NOTE, Load, Section, note, version_note, write_elf

import hyperlight
import memory
from memory import FunctionCallType, ReturnType

CONFIGURATION = hyperlight.SandboxConfiguration()
WINDOW = 0x1F_0000
"""A gva in the page table of the image, but outside it."""
PAGE_A, PAGE_B = 0x1111_AAAA, 0x2222_BBBB
"""The first 8 bytes of two pages of the image; ``WINDOW`` shows the second at first."""
FAULT = -1
MEET = "Meet"

ECHO, ADD, WORK, SPIN, READ, ALIAS, SEED = "EAWSRLD"
MEET_ONCE, MEET_AND_SPIN, MEET_FOR_EVER = "M1I"

_BASE = memory.BASE_ADDRESS
_USER_CODE, _USER_DATA, _KERNEL_CODE, _TSS = 0x33, 0x2B, 0x08, 0x18


def _stack_with(element: bytes) -> bytes:
    return struct.pack("<Q", 8 + len(element) + 8) + element + struct.pack("<Q", 8)


_ANSWER = _stack_with(memory.encode_return_value(ReturnType.Long, 1))
_MEETING = _stack_with(memory.encode_function_call(MEET, [], FunctionCallType.Host, ReturnType.Int))

_SYMBOLS = {
    "INPUT": memory.scratch_base_gva(CONFIGURATION.scratch_size),
    "OUTPUT": memory.scratch_base_gva(CONFIGURATION.scratch_size) + CONFIGURATION.input_data_size,
    "GVA_MINUS_GPA": memory.scratch_base_gva(CONFIGURATION.scratch_size)
    - memory.scratch_base_gpa(CONFIGURATION.scratch_size),
    "STACK_TOP": memory.exception_stack_top_gva("0.17.0"),
    "STACK_PAGE": memory.exception_stack_top_gva("0.17.0") & -memory.PAGE_SIZE,
    "ANSWER_WORDS": len(_ANSWER) // 8,
    "MEETING_WORDS": len(_MEETING) // 8,
    "WINDOW": WINDOW,
    "FAULT": FAULT,
    "PAGE_A": PAGE_A,
    "PAGE_B": PAGE_B,
    "USER_CODE": _USER_CODE,
    "USER_DATA": _USER_DATA,
    "KERNEL_CODE": _KERNEL_CODE,
    "TSS": _TSS,
    "F_ECHO": ord(ECHO),
    "F_ADD": ord(ADD),
    "F_WORK": ord(WORK),
    "F_SPIN": ord(SPIN),
    "F_READ": ord(READ),
    "F_ALIAS": ord(ALIAS),
    "F_SEED": ord(SEED),
    "F_MEET_ONCE": ord(MEET_ONCE),
    "F_MEET_AND_SPIN": ord(MEET_AND_SPIN),
    "F_MEET_FOR_EVER": ord(MEET_FOR_EVER),
}

# rsi, rdi and rcx are scratch registers; r8 is the argument, r9 the result, r15 RDI as it was at the entry.
_SOURCE = """
.macro put from, words
    lea \\from(%rip), %rsi
    movabs $OUTPUT, %rdi
    mov $\\words, %ecx
    rep movsq
.endm
.macro on name, target
    cmp $F_\\name, %al
    je \\target
.endm

entrypoint:
    movabs $STACK_TOP, %rsp
    .ifdef USER
    call enter_user_mode
    .endif
initialised:
    lea dispatch(%rip), %rax
    movabs $STACK_PAGE, %rsp        # what is published must be aligned; nothing uses it
    out %al, $108
    hlt

dispatch:
    mov %rdi, %r15
    movabs $INPUT, %rdi
    mov (%rdi), %rdx
    movq $8, (%rdi)
    mov -12(%rdi,%rdx), %al         # the name, at the end of the message
    mov -24(%rdi,%rdx), %r8         # a Long argument, right before it
    on ECHO, echo
    on ADD, add
    on WORK, work
    on SPIN, spin
    on MEET_AND_SPIN, meet
    on MEET_ONCE, meet
    on MEET_FOR_EVER, meet
    on READ, read
    .ifdef USER
    on ALIAS, alias
    .endif
    on SEED, seed
    ud2
echo:
    mov %r8, %r9
answer:
    put the_answer, ANSWER_WORDS
    mov %r9, -16(%rdi)              # the value is the last field of the message
    out %al, $108
    hlt
add:
    lock xadd %r8, counter(%rip)
    mov counter(%rip), %r9
    jmp answer
seed:
    mov %r15, %r9
    jmp answer
work:
    mov %r8, %r9
    rdtsc
    shl $32, %rdx
    or %rax, %rdx
    mov %rdx, %r10
1:  rdtsc
    shl $32, %rdx
    or %rax, %rdx
    sub %r10, %rdx
    cmp %r8, %rdx
    jb 1b
    jmp answer
spin:
    pause
    jmp spin
meet:
    mov %al, %r11b
    put the_meeting, MEETING_WORDS
    out %al, $101
    movabs $INPUT, %rdi
    movq $8, (%rdi)
    mov %r11b, %al
    on MEET_AND_SPIN, spin
    on MEET_FOR_EVER, meet
    mov $1, %r9d
    jmp answer
read:
    mov (%r8), %r9
    jmp answer

    .ifdef USER
alias:
    ud2                             # the kernel makes WINDOW show the page of r8
    mov $WINDOW, %r8
    jmp read

enter_user_mode:
    lgdt gdt_pointer(%rip)
    lidt idt_pointer(%rip)
    mov $TSS, %eax
    ltr %ax
    mov $WINDOW, %edi
    lea page_b(%rip), %rsi
    call point
    mov $USER_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    pushq $USER_DATA
    pushq $0                        # CPL 3 needs no stack
    pushq $2
    pushq $USER_CODE
    lea initialised(%rip), %rax
    push %rax
    iretq

system_call:                        # from gate 6
    addq $2, (%rsp)
    mov $WINDOW, %edi
    mov %r8, %rsi
    call point
    iretq

page_fault:                         # from gate 14: the reader gets FAULT
    add $8, %rsp
    mov $FAULT, %r9
    lea answer(%rip), %rax
    mov %rax, (%rsp)
    iretq

point:                              # the entry of page rdi := that of page rsi; both in the first 2 MiB
    mov %cr3, %rax
    movabs $GVA_MINUS_GPA, %rdx
    movabs $0xFFFFFFFFFF000, %r10
    .rept 3
    and %r10, %rax
    mov (%rax,%rdx), %rax
    .endr
    and %r10, %rax
    add %rdx, %rax
    mov %rdi, %rcx
    shr $12, %rcx
    shr $12, %rsi
    mov (%rax,%rsi,8), %rsi
    mov %rsi, (%rax,%rcx,8)
    invlpg (%rdi)
    ret

    .balign 8
gdt:
    .quad 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF
    .word 0x2068, tss - base + BASE, 0x8900, 0, 0, 0, 0, 0  # the image lies below 64 KiB
    .quad 0x00CFF3000000FFFF, 0x00AFFB000000FFFF
gdt_pointer:
    .word 7*8 - 1
    .quad gdt - base + BASE
idt_pointer:
    .word 256*16 - 1
    .quad idt - base + BASE
    .balign 4096
tss:
    .long 0
    .quad STACK_TOP
    .zero 0x66 - 12
    .word 0x68
    .zero 0x2000
    .byte 0xFF
    .balign 8
idt:
    .macro gate target
    .word \\target - base + BASE, KERNEL_CODE, 0x8E00, 0, 0, 0, 0, 0
    .endm
    .zero 6*16
    gate system_call
    .zero 7*16
    gate page_fault
    .zero 241*16
    .endif

    .balign 8
the_answer: .byte ANSWER_BYTES
the_meeting: .byte MEETING_BYTES
    .balign 4096
counter: .quad 0
    .balign 4096
page_a: .quad PAGE_A
    .balign 4096
page_b: .quad PAGE_B
    .balign 4096
"""


@functools.cache
def assemble_flat(source: str, base: int = _BASE) -> bytes:
    """Return the bytes of assembly *source* as they lie in memory from *base* up."""
    with tempfile.TemporaryDirectory() as directory:
        listing, linked = Path(directory, "code.S"), Path(directory, "code")
        listing.write_text(source + "\n")
        command = ["gcc", "-nostdlib", "-static", f"-Wl,-Ttext={base:#x},--oformat=binary,--build-id=none,-e,0"]
        subprocess.run([*command, "-o", str(linked), str(listing)], check=True, capture_output=True, text=True)
        return linked.read_bytes()


@functools.cache
def _image(user_mode: bool) -> bytes:
    source = ".text\nbase:\n.set BASE, " + hex(_BASE) + "\n"
    source += "".join(f".set {name}, {value:#x}\n" for name, value in _SYMBOLS.items())
    if user_mode:
        source += ".set USER, 1\n"
    body = _SOURCE.replace("ANSWER_BYTES", ",".join(map(str, _ANSWER)))
    return assemble_flat(source + body.replace("MEETING_BYTES", ",".join(map(str, _MEETING))))


CODE = range(_BASE, _BASE + memory.PAGE_SIZE)
"""Where the guest's instructions lie (gva)."""


def privilege_note(*, resets_fpu: bool = True, takes_seed: bool = True, kernel: range = range(0)) -> Section:
    """Return the note of a guest that runs at CPL 3 in all pages of its image but *kernel* (offsets in bytes)."""
    flags = 1 | resets_fpu << 1 | takes_seed << 2
    description = struct.pack("<IIQQ", 1, flags, kernel.start, len(kernel))
    return Section(".note.hyperlight-privilege", SHT_NOTE, note(b"Hyperlight", 2, description))


def tiny_guest(
    *, user_mode: bool, takes_seed: bool = False, version: bytes | None = None, keeps_page_b: bool = False
) -> bytes:
    """Return the guest's ELF. *version* goes into the version note.

    *takes_seed* needs user mode, and *keeps_page_b*, which makes the page that holds PAGE_B the kernel's.
    """
    image = _image(user_mode)
    kernel = range(len(image) - memory.PAGE_SIZE, len(image)) if keeps_page_b else range(0)
    sections = [privilege_note(takes_seed=takes_seed, kernel=kernel)] if user_mode else []
    if version is not None:
        sections.append(version_note(version))
    return write_elf([Load(0, image, executable=True)], sections=sections)


# -- sandboxes of it -----------------------------------------------------------------------


@functools.cache
def snapshot_of(user_mode: bool) -> hyperlight.Snapshot:
    """Return an initialised tiny guest, recorded with ``Meet`` among its host functions."""
    with hyperlight.UninitializedSandbox(tiny_guest(user_mode=user_mode)) as uninitialized:
        uninitialized.register(MEET, lambda: None, [], hyperlight.Int)
        with uninitialized.evolve() as sandbox:
            return sandbox.snapshot()


def sandbox_meeting(
    snapshot: hyperlight.Snapshot,
    meet: Callable[[], object] = lambda: None,
    config: hyperlight.SandboxConfiguration | None = None,
) -> hyperlight.MultiUseSandbox:
    """Start a sandbox that calls *meet* when its guest calls ``Meet``."""

    def answer() -> hyperlight.Int:
        meet()
        return hyperlight.Int(0)

    functions = hyperlight.HostFunctions()
    functions.register(MEET, answer, [], hyperlight.Int)
    return hyperlight.MultiUseSandbox.from_snapshot(snapshot, functions, config)
