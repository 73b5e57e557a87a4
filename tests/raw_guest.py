"""Guests of a few lines of assembly: to say to the host what no SDK would.

``assemble(tmp_path, "mov $42, %eax; jmp finish")`` returns the path of a guest that answers every call
with the ULong in RAX. The code follows the label ``dispatch`` and is entered with the registers of abi.md 6.4.
Data may be written where it stands: sandboxes copy on write.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import memory
from hyperlight import SandboxConfiguration

_PATTERN = 0x1122334455667788
_RESULT = memory.encode_return_value(memory.ReturnType.ULong, _PATTERN)
_SIZES = SandboxConfiguration()
OUTPUT = memory.scratch_base_gva(_SIZES.scratch_size) + _SIZES.input_data_size
"""gva of the output buffer, with the default sizes."""

_SOURCE = f"""
        .globl entrypoint
        .text
entrypoint:
        lea dispatch(%rip), %rax
        mov $0xffffffffffffd000, %rsp
halt:   out %eax, $108
        hlt

finish: lea result(%rip), %rsi          # the call's result is RAX
        mov %rax, {_RESULT.index(_PATTERN.to_bytes(8, "little"))}(%rsi)
        movabs ${OUTPUT:#x}, %rdi
        movq ${8 + len(_RESULT) + 8}, (%rdi)
        add $8, %rdi
        mov ${len(_RESULT)}, %ecx
        rep movsb
        movq $8, (%rdi)
        jmp halt

abort:  movzbl (%rsi), %eax             # RCX bytes at RSI are said to the host's abort port
        inc %rsi
        shl $8, %eax
        inc %eax
        out %eax, $102
        loop abort
        jmp halt

        .data
        .balign 8
result: .byte {", ".join(map(str, _RESULT))}

        .text
dispatch:
"""


def assemble(directory: Path, code: str, *, at_entry: str = "") -> Path:
    """Return the guest whose dispatch function is *code*, and that runs *at_entry* first of all; it needs gcc."""
    source, guest = directory / "raw.S", directory / "raw"
    source.write_text(_SOURCE.replace("entrypoint:\n", f"entrypoint:\n{at_entry}\n") + code + "\n")
    options = ("-nostdlib", "-static-pie", "-Wl,--no-dynamic-linker", "-Wl,--build-id=none", "-Wl,-e,entrypoint")
    subprocess.run(["gcc", *options, "-o", guest, source], check=True)
    return guest
