"""Write small ELF-64 files from a declaration, right or wrong ones, for the tests of the loader.

write_elf([Load(0, code, executable=True)], entry=0, sections=[Section(".note.x", NOTE, note(...))])
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_TLS = 1, 2, 3, 7
SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_NOTE = 1, 2, 3, 7
DT_NEEDED, DT_PLTRELSZ, DT_RELA, DT_RELASZ = 1, 2, 7, 8
DT_REL, DT_RELSZ, DT_PLTREL, DT_JMPREL, DT_RELRSZ, DT_RELR = 17, 18, 20, 23, 35, 36
R_NONE, R_64, R_RELATIVE, R_IRELATIVE = 0, 1, 8, 37

HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
SYMBOL = struct.Struct("<IBBHQQ")


class Load(NamedTuple):
    """A PT_LOAD: bytes at an address, zeros behind them up to `memory_size`."""

    address: int
    data: bytes
    memory_size: int | None = None
    executable: bool = False


class Section(NamedTuple):
    name: str
    type: int
    data: bytes
    alignment: int = 8
    link: int = 0


def note(name: bytes, kind: int, description: bytes, alignment: int = 8) -> bytes:
    """Return one note; the header, name and description together end on the alignment."""
    head = struct.pack("<III", len(name) + 1, len(description), kind) + name + b"\0"
    head += bytes(-len(head) % alignment)
    return head + description + bytes(-len(description) % alignment)


def version_note(version: bytes) -> Section:
    return Section(".note.hyperlight-version", SHT_NOTE, note(b"Hyperlight", 1, version + b"\0"))


def rela(*relocations: tuple[int, int, int]) -> bytes:
    """Return a table of (offset, type, addend)."""
    return b"".join(struct.pack("<QQq", *relocation) for relocation in relocations)


def write_elf(
    loads: Sequence[Load],
    *,
    entry: int = 0,
    dynamic: Sequence[tuple[int, int]] = (),
    sections: Sequence[Section] = (),
    extra_headers: Sequence[int] = (),
    machine: int = 62,
    kind: int = 3,
    elf_class: int = 2,
    byte_order: int = 1,
) -> bytes:
    """Return the file: header, program headers, contents, section names, section headers."""
    count = len(loads) + bool(dynamic) + len(extra_headers)
    body = bytearray(HEADER.size + count * PROGRAM_HEADER.size)
    headers = []
    for load in loads:
        size = len(load.data) if load.memory_size is None else load.memory_size
        flags = 5 if load.executable else 6
        headers.append((PT_LOAD, flags, len(body), load.address, load.address, len(load.data), size, 4096))
        body += load.data
    if dynamic:
        table = b"".join(struct.pack("<qQ", *item) for item in (*dynamic, (0, 0)))
        headers.append((PT_DYNAMIC, 6, len(body), 0, 0, len(table), len(table), 8))
        body += table
    headers += [(kind_of_header, 4, 0, 0, 0, 0, 0, 1) for kind_of_header in extra_headers]
    for index, header in enumerate(headers):
        PROGRAM_HEADER.pack_into(body, HEADER.size + index * PROGRAM_HEADER.size, *header)
    section_offset, section_count = _append_sections(body, sections)
    ident = b"\x7fELF" + bytes((elf_class, byte_order, 1)) + bytes(9)
    HEADER.pack_into(
        body, 0, ident, kind, machine, 1, entry, HEADER.size, section_offset, 0, HEADER.size,
        PROGRAM_HEADER.size, count, SECTION_HEADER.size, section_count, max(section_count - 1, 0),
    )  # fmt: skip
    return bytes(body)


def _append_sections(body: bytearray, sections: Sequence[Section]) -> tuple[int, int]:
    """Append the sections, their names last; return where their headers begin and how many."""
    if not sections:
        return 0, 0
    names = b"\0"
    headers = [bytes(SECTION_HEADER.size)]
    for section in (*sections, Section(".shstrtab", SHT_STRTAB, b"")):
        name = len(names)
        names += section.name.encode() + b"\0"
        data = section.data if section.name != ".shstrtab" else names
        headers.append(
            SECTION_HEADER.pack(
                name, section.type, 2, 0, len(body), len(data), section.link, 0, section.alignment, 0
            )
        )
        body += data
    start = len(body)
    body += b"".join(headers)
    return start, len(headers)
