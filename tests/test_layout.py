"""Where everything lies: constants, regions, limits and the PEB (abi.md 1 to 3)."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import memory
from memory import (
    BASE_ADDRESS,
    MAX_GPA,
    MAX_GVA,
    MAX_MEMORY_SIZE,
    PAGE_SIZE,
    LayoutError,
    MemoryRegionFlags,
    MemoryRequestTooBig,
    MemoryRequestTooSmall,
    SandboxMemoryLayout,
    build_page_tables,
    image_leaves,
    min_scratch_size,
    page_up,
    scratch_base_gpa,
    scratch_base_gva,
)

GIB = 1 << 30
IO_SIZES = st.integers(memory.MIN_IO_DATA_SIZE, 10 * memory.MIN_IO_DATA_SIZE)


def test_constants_of_the_interface() -> None:
    """abi.md 1.1 and 2: literals, so that no constant moves by accident."""
    assert (BASE_ADDRESS, PAGE_SIZE, memory.PEB_SIZE) == (0x1000, 0x1000, 64)
    assert (MAX_GPA, MAX_GVA) == (0xF_FFFF_FFFF, 0xFFFF_FFFF_FFFF_EFFF)
    assert MAX_MEMORY_SIZE == 16 * GIB - 0x1000 == 0x3_FFFF_F000
    assert (memory.SNAPSHOT_PT_GVA_MIN, memory.SNAPSHOT_PT_GVA_MAX) == (
        0xFFFF8000_00000000,
        0xFFFF80FF_FFFFFFFF,
    )
    assert memory.PROC_CONTROL_GVA == 0xFFFF_FD00_0000_0000
    assert memory.MAIN_STACK_LIMIT_GVA == 0xFFFF_FE00_0000_0000
    assert memory.MAIN_STACK_TOP_GVA == 0xFFFF_FF00_0000_0000
    assert (memory.DEFAULT_INPUT_DATA_SIZE, memory.DEFAULT_OUTPUT_DATA_SIZE) == (0x4000, 0x4000)
    assert (memory.DEFAULT_HEAP_SIZE, memory.DEFAULT_SCRATCH_SIZE, memory.MIN_IO_DATA_SIZE) == (
        131072,
        0x48000,
        0x2000,
    )
    assert (memory.SCRATCH_TOP_SIZE, memory.SCRATCH_TOP_ALLOCATOR, memory.SCRATCH_TOP_SNAPSHOT_PT_BASE) == (
        8,
        16,
        24,
    )
    assert (memory.SCRATCH_TOP_GENERATION, memory.SCRATCH_TOP_RNG_SEED) == (0x20, 0x28)


def test_worked_example() -> None:
    """abi.md 1.7, number by number."""
    layout = SandboxMemoryLayout(code_size=0x18E340)
    tables = build_page_tables(layout, image_leaves(layout))
    layout = layout.with_pt_size(len(tables))
    layout.check()
    assert (layout.peb_offset, layout.peb_gpa) == (0x18F000, 0x190000)
    assert (layout.heap_offset, layout.heap_gpa, layout.heap_size) == (0x190000, 0x191000, 0x20000)
    assert layout.init_data_offset == layout.memory_size == 0x1B0000
    assert layout.init_data_gpa == 0x1B1000
    assert (layout.pt_size, layout.snapshot_size) == (0x7000, 0x1B7000)
    assert (layout.scratch_base_gpa, layout.scratch_base_gva) == (0xF_FFFB_8000, 0xFFFF_FFFF_FFFB_7000)
    assert (layout.input_gva, layout.output_gva) == (0xFFFF_FFFF_FFFB_7000, 0xFFFF_FFFF_FFFB_B000)
    assert (layout.pt_base_gpa, layout.page_table_scratch_offset) == (0xF_FFFC_0000, 0x8000)
    assert layout.first_free_gpa == 0xF_FFFC_7000
    assert layout.first_free_gpa - layout.scratch_base_gpa == 0xF000


def test_peb_is_four_pairs_of_size_and_pointer() -> None:
    """abi.md 3."""
    layout = SandboxMemoryLayout(
        code_size=0x1801, heap_size=0x5001, init_data_size=0x33, input_data_size=0x4001,
        output_data_size=0x2002, scratch_size=0x50000,
    )  # fmt: skip
    assert struct.unpack("<8Q", layout.peb_bytes()) == (
        0x4001, layout.scratch_base_gva,
        0x2002, layout.scratch_base_gva + 0x4001,
        0x33, layout.init_data_gpa,
        0x5001, layout.heap_gpa,
    )  # fmt: skip
    empty = SandboxMemoryLayout(code_size=0x1000)
    assert struct.unpack("<8Q", empty.peb_bytes())[4:6] == (0, empty.init_data_gpa)


def test_memory_size_is_code_peb_page_and_rounded_heap() -> None:
    """B.2/37."""
    layout = SandboxMemoryLayout(code_size=0x2345, heap_size=0x1801)
    assert layout.memory_size == 0x3000 + PAGE_SIZE + 0x2000


def test_a_snapshot_image_may_be_smaller_than_what_is_laid_out() -> None:
    layout = SandboxMemoryLayout(code_size=0x2345, image_size=0x3000, pt_size=0x7000)
    assert (layout.memory_size, layout.snapshot_size, layout.heap_offset) == (0x3000, 0xA000, 0x4000)


def test_regions_and_their_rights() -> None:
    """abi.md 1.6."""
    layout = SandboxMemoryLayout(code_size=0x1001, heap_size=0x1001, init_data_size=1)
    assert [(region.name, region.gpa, region.size, str(region.flags)) for region in layout.regions()] == [
        ("code", 0x1000, 0x2000, "READ | WRITE | EXECUTE"),
        ("peb", 0x3000, 0x1000, "READ"),
        ("heap", 0x4000, 0x2000, "READ | WRITE"),
        ("init_data", 0x6000, 0x1000, "READ"),
    ]
    executable = SandboxMemoryLayout(code_size=1, heap_executable=True, init_data_size=0)
    assert [region.name for region in executable.regions()] == ["code", "peb", "heap"]
    assert executable.regions()[2].flags == MemoryRegionFlags(7)


def test_flags_print_as_words() -> None:
    """abi.md 17 prints them like this in an access violation."""
    assert str(MemoryRegionFlags.READ | MemoryRegionFlags.EXECUTE) == "READ | EXECUTE"
    assert str(MemoryRegionFlags.NONE) == "NONE"


@given(
    code=st.integers(1, 1 << 24), heap=st.integers(0, 1 << 24), init=st.integers(0, 1 << 20), io_in=IO_SIZES,
    io_out=IO_SIZES, pages=st.integers(100, 4000), tables=st.integers(0, 50),
)  # fmt: skip
def test_nothing_overlaps_and_all_is_aligned(
    code: int, heap: int, init: int, io_in: int, io_out: int, pages: int, tables: int
) -> None:
    layout = SandboxMemoryLayout(
        code_size=code, heap_size=heap, init_data_size=init, input_data_size=io_in, output_data_size=io_out,
        scratch_size=pages * PAGE_SIZE, pt_size=tables * PAGE_SIZE,
    )  # fmt: skip
    end = BASE_ADDRESS
    for region in layout.regions():
        assert region.gpa == end
        assert region.size % PAGE_SIZE == 0
        end = region.gpa + region.size
    assert end == BASE_ADDRESS + layout.memory_size
    assert layout.snapshot_size == layout.memory_size + layout.pt_size
    assert layout.output_gva - layout.input_gva == io_in
    assert io_in + io_out <= layout.page_table_scratch_offset < io_in + io_out + PAGE_SIZE
    assert layout.first_free_gpa == layout.pt_base_gpa + layout.pt_size


@given(io_in=IO_SIZES, io_out=IO_SIZES, heap=st.integers(0x1000, 0x10000))
def test_sizes_are_kept_exactly_as_given(io_in: int, io_out: int, heap: int) -> None:
    """B.2/29, B.2/31, B.2/32 and B.2/33, for what the layout does with a configuration."""
    layout = SandboxMemoryLayout(
        code_size=1, heap_size=heap, input_data_size=io_in, output_data_size=io_out, scratch_size=1 << 20
    )
    layout.check()
    assert (layout.heap_size, layout.input_data_size, layout.output_data_size) == (heap, io_in, io_out)
    peb = struct.unpack("<8Q", layout.peb_bytes())
    assert (peb[0], peb[2], peb[6]) == (io_in, io_out, heap)


# Limits -------------------------------------------------------------------------------


def checked(**sizes: Any) -> None:
    SandboxMemoryLayout(**{"code_size": PAGE_SIZE, **sizes}).check()


def test_buffers_that_leave_no_room_in_scratch() -> None:
    """B.2/35."""
    with pytest.raises(MemoryRequestTooSmall) as caught:
        checked(scratch_size=0x48000, input_data_size=0x24000, output_data_size=0x24000)
    assert (caught.value.requested_size, caught.value.min_size) == (0x48000, 0x54000)
    assert str(caught.value) == "Memory requested 294912 is less than the minimum size allowed 344064"


def test_scratch_beyond_the_maximum() -> None:
    """B.2/36."""
    with pytest.raises(MemoryRequestTooBig) as caught:
        checked(scratch_size=17 * GIB)
    assert (caught.value.requested_size, caught.value.max_size) == (17 * GIB, MAX_MEMORY_SIZE)
    assert str(caught.value) == "Memory requested 18253611008 exceeds maximum size allowed 17179865088"


def test_low_memory_beyond_the_maximum() -> None:
    with pytest.raises(MemoryRequestTooBig) as caught:
        checked(heap_size=20 * GIB)
    assert caught.value.requested_size == 20 * GIB + 2 * PAGE_SIZE
    checked(heap_size=MAX_MEMORY_SIZE - 2 * PAGE_SIZE)
    with pytest.raises(MemoryRequestTooBig):
        checked(heap_size=MAX_MEMORY_SIZE - 2 * PAGE_SIZE + 1)


def test_least_scratch() -> None:
    assert min_scratch_size(0x4001, 0x4000) == 0x9000 + 12 * PAGE_SIZE
    least = min_scratch_size(0x4000, 0x4000)
    checked(scratch_size=least)
    with pytest.raises(MemoryRequestTooSmall):
        checked(scratch_size=least - PAGE_SIZE)
    checked(scratch_size=least + 7 * PAGE_SIZE, pt_size=7 * PAGE_SIZE)
    with pytest.raises(MemoryRequestTooSmall) as caught:
        checked(scratch_size=least + 6 * PAGE_SIZE, pt_size=7 * PAGE_SIZE)
    assert caught.value.min_size == least + 7 * PAGE_SIZE


def test_scratch_of_broken_pages() -> None:
    with pytest.raises(LayoutError, match="must be a multiple of 4096"):
        checked(scratch_size=0x48001)


def test_checks_come_in_the_order_of_the_specification() -> None:
    """abi.md 2: each of these breaks several rules; the first one is reported."""
    with pytest.raises(MemoryRequestTooBig, match=str(17 * GIB + 1)):
        checked(scratch_size=17 * GIB + 1, heap_size=30 * GIB)
    with pytest.raises(MemoryRequestTooSmall, match="requested 1 "):
        checked(scratch_size=1, heap_size=30 * GIB)
    with pytest.raises(MemoryRequestTooBig, match=str(30 * GIB)[:4]):
        checked(scratch_size=0x48001, heap_size=30 * GIB)
    with pytest.raises(LayoutError, match="multiple"):
        checked(scratch_size=0x48001, pt_size=1 << 30)


@pytest.mark.parametrize("name", ["code_size", "heap_size", "init_data_size", "scratch_size", "pt_size"])
def test_negative_sizes_are_refused(name: str) -> None:
    with pytest.raises(LayoutError, match=f"{name} is -1"):
        SandboxMemoryLayout(**{"code_size": 1, name: -1})


# Address arithmetic -------------------------------------------------------------------


@given(st.integers(0, 2**64))
def test_page_up(value: int) -> None:
    """B.4/89, the part that is not about Rust's types."""
    result = page_up(value)
    assert result % PAGE_SIZE == 0
    assert 0 <= result - value < PAGE_SIZE


@given(st.integers(1, MAX_MEMORY_SIZE // PAGE_SIZE))
def test_scratch_lies_at_the_top_of_both_spaces(pages: int) -> None:
    """abi.md 1.1: the two differ by a constant."""
    size = pages * PAGE_SIZE
    assert scratch_base_gpa(size) + size == MAX_GPA + 1
    assert scratch_base_gva(size) + size == MAX_GVA + 1
    assert (scratch_base_gva(size) - scratch_base_gpa(size)) % 2**64 == 0xFFFF_FFEF_FFFF_F000
