"""Page tables: building, translating and walking, against a naive model (abi.md 5)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import memory
from memory import (
    MAX_GPA,
    MAX_GVA,
    PAGE_SIZE,
    BoundsCheckFailed,
    GuestMemory,
    HyperlightError,
    Leaf,
    MemoryRegionFlags,
    MemoryRequestTooSmall,
    PageTableBuilder,
    PageTableError,
    PrivilegeNote,
    SandboxMemoryLayout,
    SharedMemory,
    Translation,
    TranslationFault,
    build_page_tables,
    count_tables,
    image_leaves,
    table_index,
    translate,
    walk,
)

BASE = 0xF_FF00_0000  # where the tables of these tests lie
MIB = 1 << 20
ADDRESS = memory.PTE_ADDRESS_MASK
NX = 1 << 63


class Tables:
    """Page tables somewhere in an otherwise empty guest memory."""

    def __init__(self, content: bytes, base: int = BASE) -> None:
        self.base = base
        self.entries = array("Q", content)

    def read_entry(self, gpa: int) -> int | None:
        index = (gpa - self.base) // 8
        return self.entries[index] if 0 <= index < len(self.entries) else None

    def read_table(self, gpa: int) -> array[int] | None:
        index = (gpa - self.base) // 8
        return self.entries[index : index + 512] if 0 <= index <= len(self.entries) - 512 else None

    def translate(self, gva: int) -> Translation:
        return translate(self.read_entry, self.base, gva)

    def walk(self, max_tables: int = 1000, *, skip_large_pages: bool = False) -> list[Leaf]:
        return list(
            walk(self.read_table, self.base, max_tables=max_tables, skip_large_pages=skip_large_pages)
        )


def built(*mappings: tuple[int, int, int], writable: bool = True, executable: bool = False) -> Tables:
    builder = PageTableBuilder(BASE)
    for gva, gpa, size in mappings:
        builder.map(gva, gpa, size, writable=writable, executable=executable)
    return Tables(builder.to_bytes())


def entry_of(tables: Tables, gva: int) -> int:
    """Return the level-1 entry of a gva by following the tables by hand."""
    table = tables.base
    for level in (4, 3, 2):
        entry = tables.read_entry(table + 8 * table_index(gva, level))
        assert entry is not None
        table = entry & ADDRESS
    leaf = tables.read_entry(table + 8 * table_index(gva, 1))
    assert leaf is not None
    return leaf


# Entries ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gva", "indices"),
    [
        pytest.param(0x0000_0080_0000_0000, (1, 0, 0, 0), id="PML4"),
        pytest.param(0x0000_0000_4000_0000, (0, 1, 0, 0), id="PDPT"),
        pytest.param(0x0000_0000_0020_0000, (0, 0, 1, 0), id="PD"),
        pytest.param(0x0000_0000_0000_1000, (0, 0, 0, 1), id="PT"),
        pytest.param(0xFFFF_FFFF_FFFF_FFFF, (511, 511, 511, 511), id="all bits"),
        pytest.param(0x0000_7F00_0000_0FFF, (254, 0, 0, 0), id="offset bits"),
    ],
)
def test_indices_of_an_address(gva: int, indices: tuple[int, ...]) -> None:
    """B.3/45."""
    assert tuple(table_index(gva, level) for level in (4, 3, 2, 1)) == indices


@pytest.mark.parametrize(
    ("writable", "executable", "copy_on_write", "user", "flags"),
    [
        (True, False, False, False, NX | 0x63),
        (False, False, False, False, NX | 0x61),
        (False, True, False, False, 0x61),
        (True, True, False, False, 0x63),
        (False, False, True, False, NX | 0x261),
        (True, True, True, False, 0x261),
        (True, True, False, True, 0x67),
        (False, False, True, True, NX | 0x265),
    ],
)
def test_leaf_values(writable: bool, executable: bool, copy_on_write: bool, user: bool, flags: int) -> None:
    """B.3/46, B.3/47, B.3/49: the table of abi.md 5.1; and what is read back from it (B.3/56)."""
    builder = PageTableBuilder(BASE)
    builder.map(
        0x5000, 0x12_3000, 1, writable=writable, executable=executable, copy_on_write=copy_on_write, user=user
    )
    tables = Tables(builder.to_bytes())
    assert entry_of(tables, 0x5000) == 0x12_3000 | flags
    expected = (writable and not copy_on_write, executable, copy_on_write, user)
    assert tables.translate(0x5678) == (0x12_3678, PAGE_SIZE, *expected)
    assert tables.walk() == [(0x5000, 0x12_3000, 1, *expected)]


def test_one_page_makes_the_chain_of_tables() -> None:
    """B.3/48 and B.3/60: root, PDPT, PD, PT in this order, each named by its gpa with 0x23."""
    tables = built((0x1000, 0x7000, PAGE_SIZE))
    assert len(tables.entries) == 4 * 512
    present = {index: entry for index, entry in enumerate(tables.entries) if entry}
    assert present == {
        0: BASE + 0x1000 | 0x23,
        512: BASE + 0x2000 | 0x23,
        1024: BASE + 0x3000 | 0x23,
        1536 + 1: 0x7000 | NX | 0x63,
    }


def test_consecutive_pages_are_consecutive_entries() -> None:
    """B.3/50."""
    tables = built((0x1000, 0x1000, 3 * PAGE_SIZE))
    assert list(tables.entries[1536:1541]) == [0, *(page * PAGE_SIZE | NX | 0x63 for page in (1, 2, 3)), 0]


def test_tables_are_reused() -> None:
    """B.3/51."""
    once, twice = built((0x1000, 0x1000, 1)), built((0x1000, 0x1000, 1), (0x2000, 0x9000, 1))
    assert len(once.entries) == len(twice.entries)
    assert twice.translate(0x2000).gpa == 0x9000


def test_tables_are_made_depth_first_as_mappings_need_them() -> None:
    """abi.md 5.2."""
    tables = built((2 * MIB - PAGE_SIZE, 0, 2 * PAGE_SIZE), (MAX_GVA + 1 - PAGE_SIZE, 0, PAGE_SIZE))
    assert [entry & ADDRESS for entry in tables.entries[1024:1026]] == [BASE + 0x3000, BASE + 0x4000]
    assert tables.entries[511] & ADDRESS == BASE + 0x5000
    assert len(tables.entries) // 512 == 8


@pytest.mark.parametrize(
    ("start", "size", "pages"),
    [
        (0x1000, PAGE_SIZE, 1),
        (0x1000, 1, 1),
        (0x1000, 3 * PAGE_SIZE, 3),
        (0x1000, 0, 0),
        (0x1F_F000, 0x402_000, 1026),
    ],
)
def test_mapping_touches_exactly_its_entries(start: int, size: int, pages: int) -> None:
    """B.3/59: one page, several, none, and over the borders of tables."""
    tables = built((start, start, size))
    leaves = tables.walk()
    assert sum(leaf.page_count for leaf in leaves) == pages
    assert leaves == ([Leaf(start, start, pages, True, False, False, False)] if pages else [])


def test_a_later_mapping_replaces_an_earlier_one() -> None:
    tables = built((0x1000, 0x1000, 4 * PAGE_SIZE), (0x2000, 0x9000, PAGE_SIZE))
    assert [(leaf.gva, leaf.gpa, leaf.page_count) for leaf in tables.walk()] == [
        (0x1000, 0x1000, 1), (0x2000, 0x9000, 1), (0x3000, 0x3000, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gva", "gpa", "size"),
    [
        (0x1001, 0, 1), (0, 0x10, 1), (-PAGE_SIZE, 0, 1), (0, -PAGE_SIZE, 1), (0, 0, -PAGE_SIZE),
        (0x7FFF_FFFF_F000, 0, 0x2000), (0x8000_0000_0000, 0, 1), (0xFFFF_7FFF_FFFF_F000, 0, 0x2000),
        (0xFFFF_FFFF_FFFF_F000, 0, 0x2000), (1 << 64, 0, 1), (0, MAX_GPA + 1 - PAGE_SIZE, 0x2000),
        (0, 1 << 52, 1),
    ],
)  # fmt: skip
def test_mappings_outside_the_address_spaces_are_refused(gva: int, gpa: int, size: int) -> None:
    builder = PageTableBuilder(BASE)
    with pytest.raises(PageTableError):
        builder.map(gva, gpa, size, writable=True, executable=False)
    assert builder.size == PAGE_SIZE


def test_number_of_tables_is_limited() -> None:
    builder = PageTableBuilder(BASE, max_tables=4)
    builder.map(0, 0, 2 * MIB, writable=True, executable=False)
    assert builder.size == 4 * PAGE_SIZE
    with pytest.raises(PageTableError, match="more than 4 page tables"):
        builder.map(2 * MIB, 0, 1, writable=True, executable=False)
    for base in (1, -PAGE_SIZE, MAX_GPA + 1):
        with pytest.raises(PageTableError):
            PageTableBuilder(base)


# Translating --------------------------------------------------------------------------


def test_unaligned_addresses_keep_their_offset() -> None:
    """B.3/52 and B.3/53."""
    tables = built((0x1000, 0x7000, PAGE_SIZE))
    assert tables.translate(0x1000).gpa == 0x7000
    assert tables.translate(0x1FFF).gpa == 0x7FFF


@pytest.mark.parametrize(
    ("gva", "level", "reason"),
    [
        (0x0000, 1, "not present"),
        (0x20_0000, 2, "not present"),
        (0x4000_0000, 3, "not present"),
        (0xFFFF_8000_0000_0000, 4, "not present"),
        (0x0000_8000_0000_0000, 4, "not canonical"),
        (0xFFFF_7FFF_FFFF_FFFF, 4, "not canonical"),
        (-1, 4, "not canonical"),
        (1 << 64, 4, "not canonical"),
    ],
)
def test_addresses_without_translation(gva: int, level: int, reason: str) -> None:
    """B.3/57."""
    with pytest.raises(TranslationFault) as caught:
        built((0x1000, 0x7000, PAGE_SIZE)).translate(gva)
    assert (caught.value.gva, caught.value.level, caught.value.reason) == (gva, level, reason)


def test_tables_outside_memory() -> None:
    """B.3/61: a fault for one address, nothing there for a walk."""
    tables = built((0x1000, 0x7000, PAGE_SIZE), (1 << 39, 0x8000, PAGE_SIZE))
    tables.entries[0] = 0xDEAD_B000 | 0x23
    with pytest.raises(TranslationFault, match="outside at level 3"):
        tables.translate(0x1000)
    assert [leaf.gva for leaf in tables.walk()] == [1 << 39]


@pytest.mark.parametrize(("level", "page_size"), [(3, 1 << 30), (2, 2 * MIB)])
def test_large_pages_translate_but_do_not_walk(level: int, page_size: int) -> None:
    tables = built((0x1000, 0x7000, PAGE_SIZE), (1 << 39, 0x8000, PAGE_SIZE))
    tables.entries[512 * (4 - level)] = (3 << 30) | NX | memory.PTE_LARGE | 0x1063  # bit 12 is PAT
    assert tables.translate(0x1234) == Translation((3 << 30) + 0x1234, page_size, True, False, False, False)
    with pytest.raises(PageTableError, match=f"0x0 is larger than 4 KiB .level {level}"):
        tables.walk()
    assert [leaf.gva for leaf in tables.walk(skip_large_pages=True)] == [1 << 39]


def test_the_size_bit_means_nothing_at_level_1_and_is_reserved_at_level_4() -> None:
    tables = built((0x1000, 0x7000, PAGE_SIZE))
    tables.entries[1536 + 1] |= memory.PTE_LARGE
    assert tables.translate(0x1000).page_size == PAGE_SIZE
    assert len(tables.walk()) == 1
    tables.entries[0] |= memory.PTE_LARGE
    with pytest.raises(TranslationFault, match="reserved bit at level 4"):
        tables.translate(0x1000)


@pytest.mark.parametrize("index", [0, 512, 1024])
def test_rights_are_those_of_all_levels(index: int) -> None:
    builder = PageTableBuilder(BASE)
    builder.map(0x1000, 0x7000, 1, writable=True, executable=True, user=True)
    tables = Tables(builder.to_bytes())
    assert tables.walk() == [Leaf(0x1000, 0x7000, 1, True, True, False, True)]
    tables.entries[index] = tables.entries[index] & ~(memory.PTE_WRITABLE | memory.PTE_USER) | NX
    assert tables.walk() == [Leaf(0x1000, 0x7000, 1, False, False, False, False)]
    assert tables.translate(0x1000)[2:] == (False, False, False, False)


@pytest.mark.parametrize(
    ("bits", "is_cow"), [(0x200, True), (0, False), (0x600, False), (0xA00, False), (0xE00, False)]
)
def test_the_whole_software_field_marks_copy_on_write(bits: int, is_cow: bool) -> None:
    """abi.md 5.1."""
    tables = built((0x1000, 0x7000, PAGE_SIZE))
    tables.entries[1536 + 1] |= bits
    assert tables.translate(0x1000).copy_on_write is is_cow
    assert tables.walk()[0].copy_on_write is is_cow


# Walking ------------------------------------------------------------------------------


def test_runs_are_merged_over_tables_and_split_by_rights_and_addresses() -> None:
    builder = PageTableBuilder(BASE)
    builder.map(0x1000, 0x10_0000, 5 * MIB, writable=False, executable=False)
    builder.map(0x20_1000, 0x30_0000, PAGE_SIZE, writable=True, executable=False)
    builder.map(5 * MIB + 0x1000, 0x10_0000, PAGE_SIZE, writable=False, executable=False)
    leaves = Tables(builder.to_bytes()).walk()
    assert [(leaf.gva, leaf.gpa, leaf.page_count, leaf.writable) for leaf in leaves] == [
        (0x1000, 0x10_0000, 512, False),
        (0x20_1000, 0x30_0000, 1, True),
        (0x20_2000, 0x30_1000, 1280 - 513, False),
        (0x50_1000, 0x10_0000, 1, False),
    ]


def test_ignored_bits_do_not_split_a_run() -> None:
    tables = built((0, 0, 4 * PAGE_SIZE))
    tables.entries[1536 + 1] &= ~(memory.PTE_DIRTY | memory.PTE_ACCESSED)
    tables.entries[1536 + 2] |= 0x118  # global, PCD, PWT
    assert tables.walk() == [Leaf(0, 0, 4, True, False, False, False)]


def test_a_run_ends_at_the_last_physical_page() -> None:
    tables = built((0, 0, 4 * PAGE_SIZE))
    tables.entries[1536] = ADDRESS | 1
    tables.entries[1537] = (ADDRESS | 1) + PAGE_SIZE  # the flags of the next, with address 0
    assert [(leaf.gpa, leaf.page_count) for leaf in tables.walk()][:2] == [(ADDRESS, 1), (0, 1)]


def test_tables_that_lead_back_to_themselves_end_with_an_error() -> None:
    itself = Tables(array("Q", [BASE | 0x23] * 512).tobytes())
    with pytest.raises(PageTableError, match="more than 100 page tables"):
        itself.walk(100)
    # Through itself four times, the root is its own leaf: canonical, and a bounded number of reads.
    once = Tables(array("Q", [0] * 511 + [BASE | 0x23]).tobytes())
    assert once.walk(4) == [Leaf(0xFFFF_FFFF_FFFF_F000, BASE, 1, True, True, False, False)]
    assert once.translate(0xFFFF_FFFF_FFFF_F008).gpa == BASE + 8


def test_a_walk_needs_no_more_than_a_few_tables_at_a_time() -> None:
    """It is a generator: the first run of an endless walk comes at once."""
    itself = Tables(array("Q", [BASE | 0x23] * 512).tobytes())
    leaf = next(walk(itself.read_table, BASE, max_tables=1 << 60))
    assert (leaf.gva, leaf.gpa, leaf.page_count) == (0, BASE, 1)


# Against a model ----------------------------------------------------------------------


class Mapping(NamedTuple):
    gva: int
    gpa: int
    page_count: int
    writable: bool
    executable: bool
    copy_on_write: bool
    user: bool


PLACES = [0x1000, 0x1F_E000, 0x3FFF_F000, 0x7F_FFFF_F000, 0xFFFF_8000_0000_0000, MAX_GVA + 1 - 0x60_0000]
MAPPINGS = st.builds(
    Mapping,
    st.builds(lambda place, page: place + page * PAGE_SIZE, st.sampled_from(PLACES), st.integers(0, 600)),
    st.builds(lambda page: page * PAGE_SIZE, st.one_of(st.integers(0, 700), st.integers(0, 0xFF_FFFF - 800))),
    st.one_of(st.integers(0, 5), st.sampled_from([511, 512, 513, 700])),
    st.booleans(), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip


class Model:
    """Page by page, in a dict: gva -> the translation of its first byte."""

    def __init__(self, mappings: list[Mapping]) -> None:
        self.pages: dict[int, Translation] = {}
        for mapping in mappings:
            writable = mapping.writable and not mapping.copy_on_write
            rights = (writable, mapping.executable, mapping.copy_on_write, mapping.user)
            for index in range(mapping.page_count):
                page = Translation(mapping.gpa + index * PAGE_SIZE, PAGE_SIZE, *rights)
                self.pages[mapping.gva + index * PAGE_SIZE] = page


def build_model(mappings: list[Mapping]) -> Tables:
    builder = PageTableBuilder(BASE)
    for mapping in mappings:
        gva, gpa, page_count, writable, executable, copy_on_write, user = mapping
        builder.map(
            gva, gpa, page_count * PAGE_SIZE,
            writable=writable, executable=executable, copy_on_write=copy_on_write, user=user,
        )  # fmt: skip
    table_count = count_tables((mapping.gva, mapping.page_count * PAGE_SIZE) for mapping in mappings)
    assert builder.size == table_count * PAGE_SIZE
    return Tables(builder.to_bytes())


@given(st.lists(MAPPINGS, max_size=5), st.data())
def test_translation_agrees_with_the_model(mappings: list[Mapping], data: st.DataObject) -> None:
    tables, model = build_model(mappings), Model(mappings)
    anywhere = st.one_of(st.sampled_from(PLACES), st.integers(0, 2**64 - 1))
    starts = st.sampled_from([mapping.gva for mapping in mappings] or [0])
    near = st.builds(lambda start, page: start + page * PAGE_SIZE, starts, st.integers(-1, 800))
    for gva in data.draw(st.lists(st.one_of(anywhere, near), max_size=20)):
        offset = data.draw(st.integers(0, PAGE_SIZE - 1))
        gva = gva & -PAGE_SIZE | offset
        expected = model.pages.get(gva - offset)
        if expected is None:
            with pytest.raises(TranslationFault):
                tables.translate(gva)
        else:
            assert tables.translate(gva) == expected._replace(gpa=expected.gpa + offset)


@given(st.lists(MAPPINGS, max_size=5))
def test_a_walk_agrees_with_the_model(mappings: list[Mapping]) -> None:
    tables, model = build_model(mappings), Model(mappings)
    leaves = tables.walk()
    found: dict[int, Translation] = {}
    for leaf in leaves:
        for index in range(leaf.page_count):
            found[leaf.gva + index * PAGE_SIZE] = Translation(
                leaf.gpa + index * PAGE_SIZE, PAGE_SIZE, *leaf[3:]
            )
    assert found == model.pages
    assert list(found) == sorted(found)
    for first, second in pairwise(leaves):
        assert first.gva + first.page_count * PAGE_SIZE <= second.gva
        follows = first.gva + first.page_count * PAGE_SIZE == second.gva
        joins = first.gpa + first.page_count * PAGE_SIZE == second.gpa and first[3:] == second[3:]
        assert not (follows and joins), "runs are as long as they can be"


ENTRIES = st.one_of(
    st.sampled_from([BASE + table * PAGE_SIZE | 0x23 for table in range(4)]),
    st.integers(0, 2**64 - 1),
    st.builds(
        lambda page, flags: page * PAGE_SIZE | flags,
        st.integers(0, 2**40 - 1),
        st.sampled_from([0x63, 0xE3, NX | 0x261]),
    ),
)


@given(
    st.lists(st.tuples(st.integers(0, 4 * 512 - 1), ENTRIES), max_size=30), st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
)  # fmt: skip
@example([(index, BASE | 0x23) for index in range(4)], BASE, 0)
def test_garbage_tables_raise_nothing_of_their_own(
    garbage: list[tuple[int, int]], cr3: int, gva: int
) -> None:
    tables = Tables(bytes(4 * PAGE_SIZE))
    for index, entry in garbage:
        tables.entries[index] = entry
    for root in (BASE, cr3):
        reads = 0

        def read_table(gpa: int) -> array[int] | None:
            nonlocal reads
            table = tables.read_table(gpa)
            reads += table is not None
            return table

        try:
            for leaf in walk(read_table, root, max_tables=50):
                expected = translate(tables.read_entry, root, leaf.gva)
                assert expected == (leaf.gpa, PAGE_SIZE, *leaf[3:])
                last = leaf.gva + leaf.page_count * PAGE_SIZE - 1
                assert (
                    translate(tables.read_entry, root, last).gpa == leaf.gpa + leaf.page_count * PAGE_SIZE - 1
                )
        except PageTableError:
            pass
        assert reads <= 51  # the one too many is read, but not looked into
        try:
            translate(tables.read_entry, root, gva)
        except TranslationFault as fault:
            assert fault.gva == gva


# Guest virtual memory -----------------------------------------------------------------


@pytest.fixture
def guest() -> Iterator[GuestMemory]:
    """Four pages at gpa 0x1000, mapped in reverse order at 0x10000, and tables at BASE."""
    builder = PageTableBuilder(BASE)
    for page in range(4):
        builder.map(0x1_0000 + page * PAGE_SIZE, (4 - page) * PAGE_SIZE, 1, writable=False, executable=False)
    builder.map(0x2_0000, 0x10_0000, 1, writable=True, executable=False)
    view = GuestMemory()
    with (
        SharedMemory.anonymous(4 * PAGE_SIZE) as low,
        SharedMemory.sealed(builder.size, [(0, builder.to_bytes())]) as high,
    ):
        view.add(0x1000, low, MemoryRegionFlags.READ)
        view.add(BASE, high, MemoryRegionFlags.READ)
        yield view


@given(st.integers(-PAGE_SIZE, 5 * PAGE_SIZE), st.binary(max_size=3 * PAGE_SIZE))
def test_virtual_accesses_agree_with_a_bytearray(start: int, data: bytes) -> None:
    """B.3/54, B.3/55, B.3/58: ranges over one border, over several, and partly mapped ones."""
    with SharedMemory.anonymous(4 * PAGE_SIZE) as low:
        builder = PageTableBuilder(BASE)
        for page in range(4):
            builder.map(
                0x1_0000 + page * PAGE_SIZE, (4 - page) * PAGE_SIZE, 1, writable=False, executable=False
            )
        with SharedMemory.sealed(builder.size, [(0, builder.to_bytes())]) as high:
            view = GuestMemory()
            view.add(0x1000, low, MemoryRegionFlags.READ)
            view.add(BASE, high, MemoryRegionFlags.READ)
            gva = 0x1_0000 + start
            if data and not 0 <= start <= start + len(data) <= 4 * PAGE_SIZE:
                for attempt in (
                    lambda: view.write_virt(BASE, gva, data),
                    lambda: view.read_virt(BASE, gva, len(data)),
                ):
                    with pytest.raises(TranslationFault):
                        attempt()
                assert low.read(0, low.size) == bytes(low.size), "nothing was written"
                return
            view.write_virt(BASE, gva, data)
            assert view.read_virt(BASE, gva, len(data)) == data
            if data:
                model = bytearray(4 * PAGE_SIZE)
                model[start : start + len(data)] = data
                for page in range(4):
                    there = model[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
                    assert low.read((3 - page) * PAGE_SIZE, PAGE_SIZE) == there


def test_a_page_that_leads_out_of_memory_is_a_fault(guest: GuestMemory) -> None:
    assert guest.translate(BASE, 0x2_0000).gpa == 0x10_0000
    with pytest.raises(TranslationFault, match="outside at level 0") as caught:
        guest.read_virt(BASE, 0x2_0008, 8)
    assert caught.value.gva == 0x2_0008


def test_sizes_that_only_aliases_could_satisfy_are_refused(guest: GuestMemory) -> None:
    for size in (-1, 1 << 20, 1 << 62):
        with pytest.raises(BoundsCheckFailed):
            guest.read_virt(BASE, 0x1_0000, size)


def test_memory_that_the_host_maps_read_only_is_not_written(guest: GuestMemory) -> None:
    with SharedMemory.memfd(PAGE_SIZE) as file:
        descriptor = file.fileno()
        assert descriptor is not None
        with SharedMemory.from_fd(descriptor, PAGE_SIZE) as read_only:
            guest.add(0x10_0000, read_only, MemoryRegionFlags.READ, holds_tables=False)
            with pytest.raises(HyperlightError, match="read-only"):
                guest.write_virt(BASE, 0x2_0000, b"x")
            assert guest.read_virt(BASE, 0x2_0000, 1) == b"\0"


def test_a_guest_memory_walks_its_own_tables(guest: GuestMemory) -> None:
    assert [(leaf.gva, leaf.gpa) for leaf in guest.walk(BASE)][:2] == [(0x1_0000, 0x4000), (0x1_1000, 0x3000)]
    assert list(guest.walk(0x10_0000)) == []


# The tables of a sandbox --------------------------------------------------------------


def sandbox_tables(layout: SandboxMemoryLayout, **options: str) -> Tables:
    content = build_page_tables(layout, image_leaves(layout), **options)  # type: ignore[arg-type]
    return Tables(content, layout.pt_base_gpa)


@pytest.mark.parametrize("mode", ["guest", "host"])
@pytest.mark.parametrize("heap_mib", [None, 8, 64, 256])
def test_every_region_is_mapped_with_its_rights(heap_mib: int | None, mode: str) -> None:
    """B.3/38."""
    sizes = {} if heap_mib is None else {"heap_size": heap_mib * MIB, "scratch_size": 2 * MIB}
    layout = SandboxMemoryLayout(code_size=0x18E340, init_data_size=0x1800, **sizes)
    tables = sandbox_tables(layout, copy_on_write=mode)
    with pytest.raises(TranslationFault):
        tables.translate(0)
    guest, host = mode == "guest", mode == "host"
    base = layout.scratch_base_gva
    assert tables.walk() == [
        Leaf(0x1000, 0x1000, 0x18F, host, True, guest, False),
        Leaf(0x19_0000, 0x19_0000, 1, False, False, False, False),
        Leaf(0x19_1000, 0x19_1000, layout.heap_size // PAGE_SIZE, host, False, guest, False),
        Leaf(layout.init_data_gpa, layout.init_data_gpa, 2, False, False, False, False),
        Leaf(base, layout.scratch_base_gpa, layout.scratch_size // PAGE_SIZE, True, False, False, False),
    ]
    for region in layout.regions():
        for gva in range(region.gpa, region.gpa + region.size, PAGE_SIZE):
            found = tables.translate(gva)
            may_write = bool(region.flags & MemoryRegionFlags.WRITE)
            assert (found.gpa, found.executable) == (gva, bool(region.flags & MemoryRegionFlags.EXECUTE))
            assert may_write == (found.copy_on_write if guest else found.writable)


@pytest.mark.parametrize(
    ("flags", "rights"),
    [
        (0, (False, False, False)),
        (1, (False, False, False)),
        (5, (False, True, False)),
        (3, (False, False, True)),
        (7, (False, True, True)),
    ],
)
def test_init_data_has_the_rights_that_it_is_given(flags: int, rights: tuple[bool, bool, bool]) -> None:
    """abi.md 1.6."""
    layout = SandboxMemoryLayout(code_size=1, init_data_size=1, init_data_flags=MemoryRegionFlags(flags))
    found = sandbox_tables(layout).translate(layout.init_data_gpa)
    assert (found.writable, found.executable, found.copy_on_write) == rights


def test_page_tables_that_do_not_fit_in_scratch_are_refused_before_they_are_built() -> None:
    layout = SandboxMemoryLayout(code_size=1, heap_size=15 << 30)
    with pytest.raises(MemoryRequestTooSmall) as caught:
        sandbox_tables(layout)
    assert caught.value.min_size > 7680 * PAGE_SIZE
    builder = PageTableBuilder(layout.pt_base_gpa)
    assert builder.size == PAGE_SIZE


def test_room_for_52_tables_by_default() -> None:
    """abi.md 2: 52 page-table pages with the default scratch."""
    room = SandboxMemoryLayout(code_size=1, heap_size=45 * 2 * MIB)
    assert len(sandbox_tables(room).entries) == 512 * 52
    with pytest.raises(MemoryRequestTooSmall):
        sandbox_tables(SandboxMemoryLayout(code_size=1, heap_size=46 * 2 * MIB))


@pytest.mark.parametrize("mode", ["guest", "host"])
def test_snapshot_leaves_are_mapped_by_the_same_rule(mode: str) -> None:
    """abi.md 5.7: writable becomes copy-on-write, copy-on-write stays, read-only stays; US is kept."""
    layout = SandboxMemoryLayout(code_size=1)
    kinds = [(True, False, False, False), (False, True, True, True), (False, True, False, False)]
    leaves = [Leaf((index + 1) << 30, 0x1000 * (index + 1), 1, *kind) for index, kind in enumerate(kinds)]
    content = build_page_tables(layout, leaves, copy_on_write=mode)  # type: ignore[arg-type]
    tables = Tables(content, layout.pt_base_gpa)
    changeable = (True, False) if mode == "host" else (False, True)
    found = [(leaf.writable, leaf.copy_on_write, leaf.executable, leaf.user) for leaf in tables.walk()[:3]]
    assert found == [(*changeable, False, False), (*changeable, True, True), (False, False, True, False)]


def test_user_mode_leaves_kernel_pages_and_page_tables_to_the_supervisor() -> None:
    layout = SandboxMemoryLayout(
        code_size=0x7800, init_data_size=1, input_data_size=0x2001, output_data_size=0x2001
    )
    note = PrivilegeNote(True, False, False, 2 * PAGE_SIZE, 3 * PAGE_SIZE)
    content = build_page_tables(layout, image_leaves(layout, note), user_io=True)
    tables = Tables(content, layout.pt_base_gpa)
    base = layout.scratch_base_gva
    assert [(leaf.gva, leaf.page_count, leaf.user) for leaf in tables.walk()] == [
        (0x1000, 2, True),
        (0x3000, 3, False),
        (0x6000, 3, True),
        (layout.peb_gpa, 1, True),
        (layout.heap_gpa, 32, True),
        (layout.init_data_gpa, 1, True),
        (base, 5, True),
        (base + 5 * PAGE_SIZE, 0x48 - 5, False),
    ]
    assert tables.entries[0] & 0xFFF == tables.entries[511] & 0xFFF == 0x27


@pytest.mark.parametrize("note", [None, PrivilegeNote(False, True, False, 0, PAGE_SIZE)])
def test_without_user_mode_no_entry_has_the_user_bit(note: PrivilegeNote | None) -> None:
    layout = SandboxMemoryLayout(code_size=0x7800)
    content = build_page_tables(layout, image_leaves(layout, note))
    assert not any(entry & memory.PTE_USER for entry in array("Q", content))


@pytest.mark.parametrize(
    ("offset", "size", "users"), [(0, 0, [True]), (0, 2, [False]), (0, 1, [False, True])]
)
def test_kernel_range_at_the_borders_of_the_image(offset: int, size: int, users: list[bool]) -> None:
    layout = SandboxMemoryLayout(code_size=0x2000)
    leaves = image_leaves(layout, PrivilegeNote(True, False, False, offset * PAGE_SIZE, size * PAGE_SIZE))
    assert [leaf.user for leaf in leaves if leaf.gva < layout.peb_gpa] == users
