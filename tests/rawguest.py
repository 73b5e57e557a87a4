"""Raw guests: kernel-mode ELFs without an SDK, assembled from a few lines, that do the unspeakable.

``build(evil)`` returns an ELF whose initialisation succeeds, which answers 42 to ``call(GOOD)``, and runs
the lines of *evil* for every other call. ``PARROT`` puts on the output stack, byte for byte, what it is
told to (``parrot_call``), so that a test can play a guest which says anything at all.

The addresses in the assembly (``INPUT``, ``OUTPUT``, ``PML4`` ...) are those of the default configuration.
"""

from __future__ import annotations

import functools
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import hyperlight
import memory
from memory import FunctionCallType, ReturnType

GOOD = "Good"
"""The function that every raw guest answers, with ``ANSWER``."""
ANSWER = 42

CONFIGURATION = hyperlight.SandboxConfiguration()
SCRATCH_GVA = memory.scratch_base_gva(CONFIGURATION.scratch_size)
SCRATCH_GPA = memory.scratch_base_gpa(CONFIGURATION.scratch_size)
TABLES_OFFSET = CONFIGURATION.input_data_size + CONFIGURATION.output_data_size
OUTPUT_SIZE = CONFIGURATION.output_data_size

NEVER_MAPPED = 0x7000_0000_0000
"""A gva that no raw guest maps."""

_ANSWER = memory.encode_return_value(ReturnType.Int, ANSWER)
_ELEMENT = 8
"""Where the first element of an empty stack buffer goes."""


def _encoded_call(name: str, *parameters: tuple[memory.ParameterType, Any]) -> bytes:
    return memory.encode_function_call(name, parameters, FunctionCallType.Guest, ReturnType.Int)


def stack_with(element: bytes) -> bytes:
    """Return a stack buffer's bytes that hold *element*, well formed."""
    return struct.pack("<Q", _ELEMENT + len(element) + 8) + element + struct.pack("<Q", _ELEMENT)


_ADDRESSES = {
    "INPUT": SCRATCH_GVA,
    "OUTPUT": SCRATCH_GVA + CONFIGURATION.input_data_size,
    "PML4": SCRATCH_GVA + TABLES_OFFSET,
    "PML4_GPA": SCRATCH_GPA + TABLES_OFFSET,
    "FREE": SCRATCH_GVA + CONFIGURATION.scratch_size - 16 * memory.PAGE_SIZE,
    "FREE_GPA": SCRATCH_GPA + CONFIGURATION.scratch_size - 16 * memory.PAGE_SIZE,
    "SCRATCH_GPA": SCRATCH_GPA,
    "STACK_TOP": 0xFFFF_FFFF_FFFF_D000,
    "HOLE": NEVER_MAPPED,
}

_FRAME = """
.macro put_on_output from, size         # the bytes at a label become the whole output stack
    lea \\from(%rip), %rsi
    movabs $OUTPUT, %rdi
    mov $\\size, %ecx
    cld
    rep movsb
.endm
.macro say from, port                   # the same, and an OUT
    put_on_output \\from, \\from\\()_size
    xor %eax, %eax
    out %eax, $\\port
.endm
.text
.globl entrypoint
entrypoint:
    movabs $STACK_TOP, %rsp
    lea dispatch(%rip), %rax
    INITIALISE
    out %eax, $108
    hlt
dispatch:
    ENTER
    movabs $INPUT, %rdi
    mov (%rdi), %rdx
    movq $8, (%rdi)
    cmp $GOOD_TOP, %rdx
    jne evil
good:
    say answer, 108
    hlt
evil:
    EVIL
    jmp good
.section .rodata
answer: ANSWER_BYTES
.set answer_size, . - answer
DATA
"""


def _byte_list(data: bytes) -> str:
    return ".byte " + ",".join(map(str, data)) if data else ""


@functools.cache
def assemble(source: str) -> bytes:
    """Return the ELF of assembly *source*, whose entry point is the symbol ``entrypoint``."""
    with tempfile.TemporaryDirectory() as directory:
        listing, elf = Path(directory, "guest.S"), Path(directory, "guest")
        listing.write_text(source)
        command = ["gcc", "-static-pie", "-nostdlib", "-Wl,--no-dynamic-linker,-z,norelro,-z,noexecstack"]
        command += ["-Wl,--build-id=none,-e,entrypoint", "-o", str(elf), str(listing)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return elf.read_bytes()


def build(evil: str, *, initialise: str = "", enter: str = "", **stacks: bytes) -> bytes:
    """Return a guest that runs *evil* when any function but ``GOOD`` is called.

    *initialise* runs before the halt that ends initialisation, with the values of a good guest in RAX and
    RSP; *enter* runs first in every call, with the registers as the host set them. Each of *stacks* is a
    label: data to be put on the output stack, as in ``say label, 108``.
    """
    data = "".join(f"{name}: {_byte_list(value)}\n.set {name}_size, {len(value)}\n" for name, value in stacks.items())
    pieces = {
        "GOOD_TOP": str(_ELEMENT + len(_encoded_call(GOOD)) + 8),
        "INITIALISE": initialise,
        "ENTER": enter,
        "EVIL": evil,
        "ANSWER_BYTES": _byte_list(stack_with(_ANSWER)),
        "DATA": data,
    }
    source = _FRAME
    for name, text in pieces.items():
        source = source.replace(name, text)
    symbols = "".join(f".set {name}, {value:#x}\n" for name, value in _ADDRESSES.items())
    return assemble(symbols + source)


# -- the parrot ----------------------------------------------------------------------------

SAID_SIZE = 1016
"""Bytes of the output stack buffer that a parrot fills."""
_PARROT_NAME = "Parrot"
_ORDER = struct.Struct(f"<II{SAID_SIZE}s")


def _parrot_parameter(order: bytes) -> tuple[memory.ParameterType, Any]:
    return memory.ParameterType.VecBytes, order


def _offset_of_order() -> int:
    """Find where in the input buffer the canonical encoding puts the parrot's orders."""
    marked = bytes(range(1, 251)) * 5
    order = marked[: _ORDER.size]
    return _ELEMENT + _encoded_call(_PARROT_NAME, _parrot_parameter(order)).index(order)


def parrot() -> bytes:
    """Return a guest that says what it is told, through the port it is told, and then answers as a good one."""
    return build(
        f"""
        lea {_offset_of_order()}(%rdi), %rsi
        mov (%rsi), %edx
        mov 4(%rsi), %eax
        add $8, %rsi
        movabs $OUTPUT, %rdi
        mov ${SAID_SIZE // 8}, %ecx
        cld
        rep movsq
        out %eax, %dx
        movabs $INPUT, %rdi
        movq $8, (%rdi)
        """
    )


def tell(
    sandbox: hyperlight.MultiUseSandbox, buffer: bytes, *, port: int = 108, value: int = 0, returns: Any = Any
) -> Any:
    """Make a parrot fill the output stack buffer with *buffer* and write *value* to *port*."""
    order = _ORDER.pack(port, value, buffer)
    return sandbox.call(_PARROT_NAME, order, returns=returns)
