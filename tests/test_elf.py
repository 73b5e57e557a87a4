"""The guest's ELF file: what is accepted, what is refused and in which words (abi.md 4)."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import elfwriter as ew
import pytest
from conftest import require
from hypothesis import given
from hypothesis import strategies as st

import memory
from memory import (
    BASE_ADDRESS,
    PAGE_SIZE,
    ElfError,
    GuestBinVersionMismatch,
    GuestElf,
    PrivilegeNote,
    Symbol,
    exception_stack_top_gva,
)

CODE = bytes(range(256)) * 2


def simple(**options: object) -> bytes:
    """Return a guest of one segment of 0x200 bytes, executable, followed by 0x100 zeros."""
    return ew.write_elf([ew.Load(0, CODE, 0x300, executable=True)], **options)  # type: ignore[arg-type]


def relocated(table: bytes, dynamic: list[tuple[int, int]], image_size: int = 0x400) -> bytearray:
    """Load a guest whose relocation table lies at 0x200 of its image."""
    code = CODE + table
    return GuestElf.parse(
        ew.write_elf([ew.Load(0, code, image_size, executable=True)], dynamic=dynamic)
    ).load()


def relocated_by_rela(*relocations: tuple[int, int, int]) -> bytearray:
    table = ew.rela(*relocations)
    return relocated(table, [(ew.DT_RELA, 0x200), (ew.DT_RELASZ, len(table))])


def refusal(data: bytes) -> str:
    """Return the one line with which a file is refused, on parsing or on loading."""
    with pytest.raises(ElfError) as caught:
        GuestElf.parse(data).load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is read -------------------------------------------------------------------------


def test_image_is_the_segments_with_zeros_behind_their_file_bytes() -> None:
    loads = [ew.Load(0, CODE, executable=True), ew.Load(0x1000, b"data", 0x1808)]
    guest = GuestElf.parse(ew.write_elf(loads, entry=0x10), path="some/guest")
    assert (guest.entry, guest.code_size, guest.path) == (0x10, 0x2808, "some/guest")
    assert guest.load() == CODE + bytes(0x1000 - len(CODE)) + b"data" + bytes(0x1804)


def test_relative_relocations_store_base_plus_addend() -> None:
    image = relocated_by_rela(
        (0, ew.R_RELATIVE, 0x123),
        (0x11, ew.R_RELATIVE, -0x1001),
        (9, ew.R_NONE, 7),
        (0x3F8, ew.R_RELATIVE, 5),
    )
    assert struct.unpack_from("<Q", image, 0)[0] == BASE_ADDRESS + 0x123
    assert struct.unpack_from("<Q", image, 0x11)[0] == 2**64 - 1
    assert struct.unpack_from("<Q", image, 0x3F8)[0] == BASE_ADDRESS + 5
    assert image[8:0x11] == CODE[8:0x11]


def test_relocations_follow_the_base() -> None:
    table = ew.rela((0, ew.R_RELATIVE, 0x10))
    dynamic = [(ew.DT_JMPREL, 0x200), (ew.DT_PLTRELSZ, len(table)), (ew.DT_PLTREL, ew.DT_RELA)]
    guest = GuestElf.parse(ew.write_elf([ew.Load(0, CODE + table, executable=True)], dynamic=dynamic))
    assert struct.unpack_from("<Q", guest.load(0x4000))[0] == 0x4010


def test_packed_relative_relocations() -> None:
    # The word at 8, then a bitmap: the words 0 and 62 behind it; then a bitmap for the next 63.
    table = struct.pack("<3Q", 8, 1 | 1 << 1 | 1 << 63, 1 | 1 << 1)
    image = relocated(table, [(ew.DT_RELR, 0x200), (ew.DT_RELRSZ, len(table))])
    before = bytearray(CODE + table + bytes(0x400))[:0x400]
    changed = [8, 16, 16 + 62 * 8, 16 + 63 * 8]
    for offset in changed:
        (word,) = struct.unpack_from("<Q", before, offset)
        struct.pack_into("<Q", before, offset, word + BASE_ADDRESS & 2**64 - 1)
    assert image == before


def test_functions_of_the_symbol_table() -> None:
    names = b"\0late\0early\0object\0imported\0"
    entries = [(1, 2, 1, 0x80, 8), (6, 0x12, 1, 0x10, 0x20), (12, 1, 1, 0, 8), (19, 0x12, 0, 0, 0)]
    table = b"".join(
        ew.SYMBOL.pack(name, info, 0, index, value, size) for name, info, index, value, size in entries
    )
    sections = [
        ew.Section(".symtab", ew.SHT_SYMTAB, table, link=2),
        ew.Section(".strtab", ew.SHT_STRTAB, names),
    ]
    guest = GuestElf.parse(simple(sections=sections))
    assert guest.symbols() == [Symbol("early", 0x10, 0x20), Symbol("late", 0x80, 8)]
    assert GuestElf.parse(simple()).symbols() == []


def test_a_symbol_table_without_names_is_refused() -> None:
    sections = [ew.Section(".symtab", ew.SHT_SYMTAB, bytes(24), link=99)]
    guest = GuestElf.parse(simple(sections=sections))
    with pytest.raises(ElfError, match="no string table"):
        guest.symbols()


# Version note -------------------------------------------------------------------------


@pytest.mark.parametrize("version", memory.SUPPORTED_GUEST_VERSIONS)
def test_version_note_is_read_and_accepted(version: str) -> None:
    """B.3/39 and B.3/43."""
    assert GuestElf.parse(simple(sections=[ew.version_note(version.encode())])).version == version


def test_version_note_of_0_14_0_is_these_bytes() -> None:
    """abi.md 4.7, verified there against a shipped guest."""
    expected = "0b000000 07000000 01000000 48797065726c6967687400 00 302e31342e3000 00"
    assert ew.version_note(b"0.14.0").data == bytes.fromhex(expected)


def test_a_guest_without_version_note_is_accepted() -> None:
    """B.3/40 and B.3/41."""
    assert GuestElf.parse(simple()).version is None


@pytest.mark.parametrize("version", ["0.0.0", "0.13.0", "0.18.0", "0.14", "", "evil\n\x1b[2J" + "x" * 99])
def test_another_version_is_refused_with_both_versions(version: str) -> None:
    """B.3/42 and B.3/44."""
    with pytest.raises(GuestBinVersionMismatch) as caught:
        GuestElf.parse(simple(sections=[ew.version_note(version.encode())]))
    assert caught.value.guest_bin_version == version
    assert caught.value.host_version == "0.14.0"
    start, _, rest = str(caught.value).partition(", but ")
    assert start.startswith("Guest binary was built with hyperlight-guest-bin ")
    assert rest.startswith("the host is running hyperlight 0.14.0")
    assert all(known in rest for known in memory.SUPPORTED_GUEST_VERSIONS)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(
            ew.Section(".note_hyperlight_metadata", ew.SHT_NOTE, b"36.0.6" + bytes(26)), id="foreign"
        ),
        pytest.param(ew.version_note(b"\xff\xfe"), id="not UTF-8"),
        pytest.param(ew.version_note(b"0.13.0")._replace(type=ew.SHT_PROGBITS), id="not a note section"),
        pytest.param(ew.version_note(b"0.13.0")._replace(alignment=16), id="odd alignment"),
        pytest.param(ew.version_note(b"0.13.0")._replace(data=b"\xff" * 64), id="sizes beyond the section"),
        pytest.param(ew.version_note(b"0.13.0")._replace(data=b"\x0b\0\0"), id="shorter than a header"),
        pytest.param(
            ew.Section(".note.hyperlight-version", ew.SHT_NOTE, ew.note(b"GNU", 1, b"0.13.0\0")), id="name"
        ),
        pytest.param(
            ew.Section(".note.hyperlight-version", ew.SHT_NOTE, ew.note(b"Hyperlight", 9, b"0.13.0\0")),
            id="type",
        ),
    ],
)
def test_what_is_no_version_note_is_no_version(section: ew.Section) -> None:
    assert GuestElf.parse(simple(sections=[section])).version is None


def test_the_first_note_of_that_name_and_type_counts() -> None:
    content = (
        ew.note(b"Other", 1, b"x")
        + ew.note(b"Hyperlight", 1, b"0.15.0\0")
        + ew.note(b"Hyperlight", 1, b"9\0")
    )
    section = ew.Section(".note.hyperlight-version", ew.SHT_NOTE, content)
    assert GuestElf.parse(simple(sections=[section])).version == "0.15.0"


@pytest.mark.parametrize("alignment", [0, 1, 4])
def test_small_alignments_pad_to_four(alignment: int) -> None:
    content = ew.note(b"Go", 1, b"12345", 4) + ew.note(b"Hyperlight", 1, b"0.16.0\0", 4)
    section = ew.Section(".note.hyperlight-version", ew.SHT_NOTE, content, alignment)
    assert GuestElf.parse(simple(sections=[section])).version == "0.16.0"


@pytest.mark.parametrize(
    ("version", "top"),
    [(None, 0xEFE0), ("0.14.0", 0xEFE0), ("0.15.0", 0xEFD0), ("0.16.0", 0xEFD0), ("0.17.0", 0xEFD0)],
)
def test_exception_stack_top_follows_the_version(version: str | None, top: int) -> None:
    """guest-versions.md 7."""
    assert exception_stack_top_gva(version) == 0xFFFF_FFFF_FFFF_0000 + top
    sections = [] if version is None else [ew.version_note(version.encode())]
    assert GuestElf.parse(simple(sections=sections)).exception_stack_top_gva & 0xFFFF == top


# Privilege note -----------------------------------------------------------------------


def privilege(version: int, flags: int, offset: int, size: int) -> bytes:
    description = struct.pack("<IIQQ", version, flags, offset, size)
    section = ew.Section(".note.hyperlight-privilege", ew.SHT_NOTE, ew.note(b"Hyperlight", 2, description))
    return ew.write_elf([ew.Load(0, CODE, 3 * PAGE_SIZE - 5, executable=True)], sections=[section])


def test_privilege_note_is_read() -> None:
    note = GuestElf.parse(privilege(1, 3, PAGE_SIZE, 2 * PAGE_SIZE)).privilege
    assert note == PrivilegeNote(True, True, False, PAGE_SIZE, 2 * PAGE_SIZE)
    assert GuestElf.parse(simple()).privilege == PrivilegeNote()


@pytest.mark.parametrize(
    "fields",
    [
        (2, 1, 0, 0),
        (1, 8, 0, 0),
        (1, 1, 1, 0),
        (1, 1, 0, 100),
        (1, 1, PAGE_SIZE, 3 * PAGE_SIZE),
        (1, 1, 2**63, 0),
    ],
)
def test_privilege_note_that_cannot_be_obeyed_is_refused(fields: tuple[int, int, int, int]) -> None:
    assert "privilege note" in refusal(privilege(*fields))


# What is refused ----------------------------------------------------------------------

TWO_LOADS = [ew.Load(0, CODE, executable=True), ew.Load(0x100, CODE)]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        pytest.param(b"", "not an ELF file", id="empty"),
        pytest.param(b"#!/bin/sh\necho hello\n", "not an ELF file", id="text file"),
        pytest.param(simple()[:40], "truncated", id="half a header"),
        pytest.param(simple()[:100], "truncated", id="100 bytes (B.1/7)"),
        pytest.param(simple()[:-1], "truncated", id="one byte short"),
        pytest.param(simple(sections=[ew.version_note(b"0.14.0")])[:-1], "truncated", id="section headers"),
        pytest.param(simple(elf_class=1), "64-bit", id="32 bits"),
        pytest.param(simple(byte_order=2), "little-endian", id="big endian"),
        pytest.param(simple(machine=183), "machine 183 (AARCH64)", id="another machine"),
        pytest.param(simple(machine=0xFEED), "machine 65261 (unknown)", id="unheard-of machine"),
        pytest.param(simple(kind=2), "-static-pie", id="ET_EXEC"),
        pytest.param(simple(kind=1), "-static-pie", id="object file"),
        pytest.param(simple(extra_headers=[ew.PT_INTERP]), "dynamically linked", id="PT_INTERP"),
        pytest.param(simple(dynamic=[(ew.DT_NEEDED, 1)]), "shared libraries", id="DT_NEEDED"),
        pytest.param(ew.write_elf([]), "at least one PT_LOAD", id="nothing to load"),
        pytest.param(ew.write_elf([ew.Load(0x1000, CODE)]), "not at 0", id="not at 0"),
        pytest.param(ew.write_elf(TWO_LOADS), "before the one before it ends", id="overlap"),
        pytest.param(ew.write_elf([ew.Load(0, CODE, 8)]), "more bytes in the file", id="filesz > memsz"),
        pytest.param(ew.write_elf([ew.Load(0, CODE, 1 << 40)]), "image ends at", id="too large"),
        pytest.param(ew.write_elf([ew.Load(0, CODE)]), "entry point 0x0", id="entry not executable"),
        pytest.param(simple(entry=0x200), "entry point 0x200", id="entry in zeros"),
        pytest.param(simple(extra_headers=[ew.PT_TLS] * 64), "at most 64", id="too many headers"),
        pytest.param(
            simple(dynamic=[(ew.DT_RELA, 0x2F8), (ew.DT_RELASZ, 24)]), "not inside", id="table outside"
        ),
        pytest.param(simple(dynamic=[(ew.DT_RELA, 0), (ew.DT_RELASZ, 25)]), "not inside", id="table size"),
        pytest.param(simple(dynamic=[(ew.DT_RELRSZ, 1 << 30)]), "larger than the ELF file", id="vast table"),
    ],
)
def test_bad_files_are_refused_in_one_clear_line(data: bytes, words: str) -> None:
    assert words in refusal(data)


def test_the_line_names_the_file() -> None:
    with pytest.raises(ElfError, match=r"^guests/no\\ne: not an ELF file"):
        GuestElf.parse(b"MZ", path="guests/no\ne")


@pytest.mark.parametrize(
    ("relocation", "words"),
    [
        ((0, ew.R_64, 0), "unsupported x86_64 relocation 1"),
        ((0, ew.R_IRELATIVE, 0), "unsupported x86_64 relocation 37"),
        ((0x3F9, ew.R_RELATIVE, 0), "outside the image"),
        ((2**64 - 8, ew.R_RELATIVE, 0), "outside the image"),
    ],
)
def test_relocations_that_cannot_be_applied_are_refused(relocation: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ElfError, match=words):
        relocated_by_rela(relocation)


def test_rel_entries_need_an_addend_unless_they_ask_for_nothing() -> None:
    dynamic = [(ew.DT_REL, 0x200), (ew.DT_RELSZ, 16)]
    assert relocated(struct.pack("<QQ", 0, ew.R_NONE), dynamic)[:0x200] == CODE
    with pytest.raises(ElfError, match="R_X86_64_RELATIVE missing addend"):
        relocated(struct.pack("<QQ", 0, ew.R_RELATIVE), dynamic)
    with pytest.raises(ElfError, match="R_X86_64_RELATIVE missing addend"):
        plt = [(ew.DT_JMPREL, 0x200), (ew.DT_PLTRELSZ, 16), (ew.DT_PLTREL, ew.DT_REL)]
        relocated(struct.pack("<QQ", 0, ew.R_RELATIVE), plt)


def test_packed_relocation_outside_the_image_is_refused() -> None:
    with pytest.raises(ElfError, match="outside the image"):
        relocated(struct.pack("<Q", 0x3FA), [(ew.DT_RELR, 0x200), (ew.DT_RELRSZ, 8)])


# Hostile files ------------------------------------------------------------------------


def rich() -> bytes:
    """Return a guest with one of everything that the loader reads."""
    table = ew.rela((0, ew.R_RELATIVE, 0x10), (8, ew.R_NONE, 0))
    symbols = ew.SYMBOL.pack(1, 0x12, 0, 1, 0x20, 4)
    description = struct.pack("<IIQQ", 1, 1, 0, PAGE_SIZE)
    return ew.write_elf(
        [ew.Load(0, CODE + table, 0x300, executable=True), ew.Load(0x1000, CODE, 0x1000)],
        dynamic=[
            (ew.DT_RELA, 0x200),
            (ew.DT_RELASZ, len(table)),
            (ew.DT_JMPREL, 0x200),
            (ew.DT_PLTRELSZ, 24),
        ],
        sections=[
            ew.version_note(b"0.14.0"),
            ew.Section(".symtab", ew.SHT_SYMTAB, symbols, link=3),
            ew.Section(".strtab", ew.SHT_STRTAB, b"\0main\0"),
            ew.Section(".note.hyperlight-privilege", ew.SHT_NOTE, ew.note(b"Hyperlight", 2, description)),
        ],
    )


RICH = rich()
# Bytes worth changing: the headers and tables, not the 0x400 bytes of code.
INTERESTING = sorted({*range(0x150), *range(0x350, 0x380), *range(0x580, len(RICH))})
MUTATION = st.tuples(st.sampled_from(INTERESTING), st.sampled_from([0, 1, 2, 3, 7, 8, 0x7F, 0x80, 0xFF]))


def try_everything(data: bytes) -> None:
    """Use a file in every way; only ElfError may come out."""
    try:
        guest = GuestElf.parse(data)
        if guest.code_size <= 1 << 24:
            assert len(guest.load()) == guest.code_size
        guest.symbols()
    except ElfError as error:
        assert str(error).isprintable()


def test_the_unchanged_rich_file_is_a_guest() -> None:
    guest = GuestElf.parse(RICH)
    assert (guest.version, guest.code_size) == ("0.14.0", 0x2000)
    assert guest.symbols() == [Symbol("main", 0x20, 4)]
    assert guest.load()[:8] == struct.pack("<Q", BASE_ADDRESS + 0x10)


@given(st.lists(MUTATION, min_size=1, max_size=6))
def test_changed_bytes_raise_elf_error_only(mutations: list[tuple[int, int]]) -> None:
    data = bytearray(RICH)
    for position, value in mutations:
        data[position] = value
    try_everything(bytes(data))


@given(st.integers(0, len(RICH)), st.binary(max_size=64))
def test_cut_and_continued_files_raise_elf_error_only(length: int, tail: bytes) -> None:
    try_everything(RICH[:length] + tail)


@given(st.binary(max_size=256))
def test_arbitrary_bytes_behind_a_magic_raise_elf_error_only(data: bytes) -> None:
    try_everything(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\0\x3e\0" + data)


def test_importing_memory_does_not_import_pyelftools() -> None:
    code = "import sys, memory; print(sorted(name for name in sys.modules if name.startswith('elftools')))"
    root = Path(memory.__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


# Files of a real linker ---------------------------------------------------------------

SOURCE = """
static int value = 7;
int *pointer = &value;
int helper(int x) { return x + *pointer; }
void _start(void) { helper(1); for (;;) ; }
"""


def compiled(directory: Path, *options: str) -> bytes:
    (directory / "guest.c").write_text(SOURCE)
    command = ["gcc", "-O0", "-nostdlib", "-fno-stack-protector", *options, "guest.c", "-o", "guest"]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
    return (directory / "guest").read_bytes()


@require("gcc")
def test_a_static_pie_of_gcc_is_loaded_and_relocated(tmp_path: Path) -> None:
    guest = GuestElf.parse(compiled(tmp_path, "-fPIE", "-static-pie"))
    names = {symbol.name: symbol for symbol in guest.symbols()}
    assert names["_start"].offset == guest.entry
    assert names["helper"].size > 0
    moved = guest.load(0x40_0000)
    (original,) = struct.unpack("<Q", _changed_word(guest.load(0), moved))
    assert 0x40_0000 < original < 0x40_0000 + guest.code_size  # the address of `value`


def _changed_word(first: bytearray, second: bytearray) -> bytes:
    """Return, from the second image, the only aligned word in which the two differ."""
    differing = [at for at in range(0, len(first), 8) if first[at : at + 8] != second[at : at + 8]]
    (offset,) = [at for at in differing if at + 8 <= len(first)]
    return bytes(second[offset : offset + 8])


@require("gcc")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-static", "-no-pie"], "static-pie"),
        (["-fPIC", "-shared"], "unsupported x86_64 relocation 6"),
        (["-fPIE", "-pie"], "dynamic"),
    ],
)
def test_other_kinds_of_link_are_refused(tmp_path: Path, options: list[str], words: str) -> None:
    assert words in refusal(compiled(tmp_path, *options))
