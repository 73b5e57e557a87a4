"""Host mappings and the guest-physical view: bounds, life time, sealing, guard pages."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
import signal
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import memory
from memory import (
    MAX_GPA,
    PAGE_SIZE,
    BoundsCheckFailed,
    GuestMemory,
    HyperlightError,
    LayoutError,
    MemoryRegionFlags,
    MmapFailed,
    PhysicalFault,
    SharedMemory,
    ValueRangeError,
)

SIZE = 4 * PAGE_SIZE
READ_WRITE = MemoryRegionFlags.READ | MemoryRegionFlags.WRITE
Width = tuple[int, Callable[[SharedMemory, int], int], Callable[[SharedMemory, int, int], None]]
WIDTHS: list[Width] = [
    (1, SharedMemory.read_u8, SharedMemory.write_u8),
    (2, SharedMemory.read_u16, SharedMemory.write_u16),
    (4, SharedMemory.read_u32, SharedMemory.write_u32),
    (8, SharedMemory.read_u64, SharedMemory.write_u64),
]
# Offsets and sizes around the borders, and those whose sum wraps in 64 bits.
OFFSETS = st.one_of(
    st.integers(-9, SIZE + 9), st.sampled_from([-(2**63), 2**63, 2**64 - 1, 2**64 - 8, 1 << 200])
)
SIZES = OFFSETS


@pytest.fixture
def shared() -> Iterator[SharedMemory]:
    with SharedMemory.anonymous(SIZE) as mapping:
        yield mapping


@pytest.fixture
def filled(shared: SharedMemory) -> SharedMemory:
    shared.write(0, pattern(SIZE))
    return shared


def pattern(size: int) -> bytes:
    """Return bytes in which every page and every offset differs from its neighbours."""
    return bytes((index * 7 + index // 256) & 0xFF for index in range(size))


def mapped_ranges() -> list[tuple[int, int]]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [(int(start, 16), int(end, 16)) for start, end in (line.split()[0].split("-") for line in lines)]


def is_mapped(address: int) -> bool:
    return any(start <= address < end for start, end in mapped_ranges())


# Reading and writing ------------------------------------------------------------------


@given(OFFSETS, SIZES)
def test_an_access_is_inside_or_an_error(offset: int, size: int) -> None:
    """B.4/63, and the ranges of B.4/64."""
    with SharedMemory.anonymous(SIZE) as mapping, SharedMemory.anonymous(SIZE) as other:
        mapping.write(0, pattern(SIZE))
        inside = offset >= 0 and size >= 0 and offset + size <= SIZE
        if inside:
            assert mapping.read(offset, size) == pattern(SIZE)[offset : offset + size]
            other.copy_from(0, mapping, offset, size)
            assert other.read(0, size) == mapping.read(offset, size)
            mapping.fill(offset, size, 0xAA)
            assert mapping.read(offset, size) == b"\xaa" * size
            return
        attempts: list[Callable[[], object]] = [
            lambda: mapping.read(offset, size),
            lambda: mapping.fill(offset, size, 0xAA),
            lambda: mapping.copy_from(offset, other, 0, size),
            lambda: mapping.copy_from(0, other, offset, size),
            lambda: mapping.discard(offset, size),
        ]
        for attempt in attempts:
            with pytest.raises(BoundsCheckFailed) as caught:
                attempt()
            assert (caught.value.size, caught.value.limit) == (size, SIZE)
            assert caught.value.offset in (0, offset)
        assert mapping.read(0, SIZE) == pattern(SIZE)


@given(OFFSETS, st.binary(max_size=40))
def test_a_write_is_inside_or_an_error(offset: int, data: bytes) -> None:
    """B.4/64."""
    with SharedMemory.anonymous(SIZE) as mapping:
        model = bytearray(SIZE)
        if offset >= 0 and offset + len(data) <= SIZE:
            mapping.write(offset, data)
            model[offset : offset + len(data)] = data
        else:
            with pytest.raises(BoundsCheckFailed):
                mapping.write(offset, data)
        assert mapping.read(0, SIZE) == model


@pytest.mark.parametrize("width", WIDTHS, ids=["u8", "u16", "u32", "u64"])
@given(offset=OFFSETS, value=st.integers(-1, 2**64))
def test_every_width_at_every_offset(width: Width, offset: int, value: int) -> None:
    """B.4/65."""
    size, read, write = width
    with SharedMemory.anonymous(SIZE) as mapping:
        model = bytearray(SIZE)
        if not 0 <= offset <= SIZE - size:
            for attempt in (lambda: read(mapping, offset), lambda: write(mapping, offset, value)):
                with pytest.raises(BoundsCheckFailed):
                    attempt()
        elif not 0 <= value < 1 << (8 * size):
            with pytest.raises(ValueRangeError):
                write(mapping, offset, value)
        else:
            write(mapping, offset, value)
            model[offset : offset + size] = value.to_bytes(size, "little")
            assert read(mapping, offset) == value
        assert mapping.read(0, SIZE) == model


@pytest.mark.parametrize("shared_form", [False, True])
def test_scalars_at_start_middle_and_end(shared_form: bool) -> None:
    """B.4/65, exclusive and shared forms."""
    with SharedMemory.anonymous(SIZE, shared=shared_form) as mapping:
        for offset in (0, SIZE // 2, SIZE - 8):
            mapping.write_u64(offset, 0x1122_3344_5566_7788)
            assert mapping.read_u32(offset + 4) == 0x1122_3344


def test_fill_by_quarters_and_whole(shared: SharedMemory) -> None:
    """B.4/62."""
    for quarter in range(4):
        shared.fill(quarter * PAGE_SIZE, PAGE_SIZE, quarter + 1)
    assert shared.read(0, SIZE) == b"".join(bytes([byte]) * PAGE_SIZE for byte in (1, 2, 3, 4))
    shared.fill(0, SIZE, 5)
    assert shared.read(0, SIZE) == b"\5" * SIZE
    for byte in (-1, 256):
        with pytest.raises(ValueRangeError):
            shared.fill(0, 1, byte)


def test_whole_memory_reads_at_once(filled: SharedMemory) -> None:
    """B.4/68."""
    assert filled.read(0, SIZE) == pattern(SIZE)


LENGTHS = [*range(18), 31, 33, 63, 64, 65, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 2 * PAGE_SIZE + 3]


@pytest.mark.parametrize("length", LENGTHS)
def test_copies_and_fills_of_every_alignment_agree(filled: SharedMemory, length: int) -> None:
    """B.4/70-78: alignments, small, odd and exact lengths, zero length and the borders."""
    for start in (*range(9), SIZE - length):
        model = bytearray(pattern(SIZE))
        with SharedMemory.anonymous(SIZE) as target:
            target.copy_from(start, filled, start // 2, length)
            assert target.read(start, length) == model[start // 2 : start // 2 + length]
            target.write(SIZE - length, target.read(start, length))
            assert target.read(SIZE - length, length) == model[start // 2 : start // 2 + length]
            target.fill(0, SIZE, 0x11)
            target.fill(start, length, 0x22)
            expected = b"\x11" * start + b"\x22" * length + b"\x11" * (SIZE - start - length)
            assert target.read(0, SIZE) == expected


def test_overlapping_copies_move(filled: SharedMemory) -> None:
    model = bytearray(pattern(SIZE))
    for target, source in ((100, 50), (50, 100)):
        filled.copy_from(target, filled, source, 2 * PAGE_SIZE)
        model[target : target + 2 * PAGE_SIZE] = model[source : source + 2 * PAGE_SIZE]
        assert filled.read(0, SIZE) == model


@pytest.mark.parametrize(
    "data",
    [b"abcdef", bytearray(b"abcdef"), memoryview(b"abcdef"), array("H", [0x6261, 0x6463, 0x6665]),
     (ctypes.c_char * 6)(*b"abcdef"), memoryview(b"a-b-c-d-e-f-")[::2]],
    ids=["bytes", "bytearray", "memoryview", "array", "ctypes", "strided"],
)  # fmt: skip
def test_any_buffer_is_written_whole(shared: SharedMemory, data: bytes) -> None:
    shared.write(3, data)
    assert shared.read(2, 8) == b"\0abcdef\0"


@pytest.mark.parametrize("data", [b"", bytearray(), memoryview(b""), array("Q")])
def test_nothing_may_be_written_anywhere_inside(shared: SharedMemory, data: bytes) -> None:
    shared.write(0, data)
    shared.write(SIZE, data)
    with pytest.raises(BoundsCheckFailed):
        shared.write(SIZE + 1, data)


# Creation -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1, -PAGE_SIZE, 1, PAGE_SIZE + 1, 1 << 47, 2**63, 2**64 - 1, 2**64])
@pytest.mark.parametrize("create", [SharedMemory.anonymous, SharedMemory.memfd])
def test_impossible_sizes_are_refused(create: Callable[[int], SharedMemory], size: int) -> None:
    """B.4/66."""
    with pytest.raises(LayoutError):
        create(size)


def test_a_mapping_that_the_kernel_refuses_says_so() -> None:
    with pytest.raises(MmapFailed) as caught:
        SharedMemory.from_fd(-1, PAGE_SIZE)
    assert caught.value.errno == 9
    assert isinstance(caught.value, OSError)
    with pytest.raises(MmapFailed, match="memory file"):
        SharedMemory.memfd(PAGE_SIZE, name="nul\0byte")


def test_memory_is_not_reserved_before_it_is_touched() -> None:
    with SharedMemory.anonymous(1 << 42) as mapping:  # 4 TiB
        mapping.write_u64((1 << 42) - 8, 7)
        assert mapping.read_u64((1 << 42) - 8) == 7


def test_anonymous_memory_may_be_shared_with_a_child() -> None:
    for shared_form, expected in ((True, 42), (False, 0)):
        with SharedMemory.anonymous(PAGE_SIZE, shared=shared_form) as mapping:
            child = os.fork()
            if child == 0:
                mapping.write_u8(0, 42)
                os._exit(0)
            os.waitpid(child, 0)
            assert mapping.read_u8(0) == expected


# Life time ----------------------------------------------------------------------------


def every_access(mapping: SharedMemory) -> list[Callable[[], object]]:
    return [
        lambda: mapping.read(0, 1),
        lambda: mapping.read(0, 0),
        lambda: mapping.write(0, b"x"),
        lambda: mapping.write(0, b""),
        lambda: mapping.fill(0, 1),
        lambda: mapping.copy_from(0, mapping, 0, 1),
        lambda: mapping.read_u64(0),
        lambda: mapping.write_u8(0, 0),
        lambda: mapping.discard(),
        lambda: mapping.seal(),
        lambda: mapping.map_private(),
        lambda: mapping.fileno(),
        lambda: mapping.with_hva(hex),
    ]


def test_a_closed_memory_refuses_every_access() -> None:
    mapping = SharedMemory.memfd(PAGE_SIZE)
    mapping.close()
    mapping.close()
    assert mapping.closed
    for access in every_access(mapping):
        with pytest.raises(HyperlightError, match="closed"):
            access()
    with SharedMemory.anonymous(PAGE_SIZE) as other, pytest.raises(HyperlightError, match="closed"):
        other.copy_from(0, mapping, 0, 1)


def test_closing_unmaps_at_once() -> None:
    mapping = SharedMemory.anonymous(SIZE)
    address = mapping.with_hva(int)
    assert is_mapped(address)
    mapping.close()
    assert not is_mapped(address)


def test_dropping_the_last_reference_unmaps() -> None:
    """B.4/69."""
    mapping = SharedMemory.anonymous(SIZE)
    address = mapping.with_hva(int)
    assert all(is_mapped(place) for place in (address - PAGE_SIZE, address, address + SIZE))
    del mapping
    gc.collect()
    assert not any(is_mapped(place) for place in (address - PAGE_SIZE, address, address + SIZE))


def test_many_threads_may_close() -> None:
    for _ in range(50):
        mapping = SharedMemory.anonymous(PAGE_SIZE)
        threads = [threading.Thread(target=mapping.close) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert mapping.closed


@pytest.mark.usefixtures("no_leaks")
def test_nothing_is_left_of_many_mappings() -> None:
    for _ in range(100):
        with SharedMemory.memfd(PAGE_SIZE) as snapshot:
            snapshot.seal()
            snapshot.map_private().close()
        SharedMemory.sealed(PAGE_SIZE, [(0, b"x")]).close()
        with pytest.raises(BoundsCheckFailed):
            SharedMemory.sealed(PAGE_SIZE, [(PAGE_SIZE, b"x")])
    gc.collect()


def test_repr_tells_size_kind_and_state() -> None:
    with SharedMemory.memfd(PAGE_SIZE) as mapping:
        assert repr(mapping) == f"<SharedMemory 0x1000 bytes, shared file {mapping.fileno()}>"
    assert repr(mapping) == "<SharedMemory 0x1000 bytes, closed>"
    assert "private anonymous" in repr(SharedMemory.anonymous(PAGE_SIZE))


# Files --------------------------------------------------------------------------------


def sealed_pattern() -> SharedMemory:
    snapshot = SharedMemory.memfd(SIZE)
    snapshot.write(0, pattern(SIZE))
    snapshot.seal()
    return snapshot


def test_private_mappings_of_a_sealed_file_share_content_and_not_changes() -> None:
    """B.4/67: clones share size and content and survive dropping the first."""
    with sealed_pattern() as snapshot:
        first, second = snapshot.map_private(), snapshot.map_private()
    third = first.map_private()
    assert first.with_hva(int) != second.with_hva(int)
    first.write(0, b"first")
    assert first.read(0, 5) == b"first"
    for other in (second, third):
        assert other.size == SIZE
        assert other.read(0, SIZE) == pattern(SIZE)


def test_a_sealed_file_cannot_be_changed() -> None:
    with sealed_pattern() as snapshot:
        descriptor = snapshot.fileno()
        assert descriptor is not None
        for change in (lambda: os.pwrite(descriptor, b"x", 0), lambda: os.ftruncate(descriptor, 0)):
            with pytest.raises(PermissionError):
                change()
        with pytest.raises(MmapFailed):
            SharedMemory.from_fd(descriptor, SIZE, writable=True, shared=True)
        snapshot.write(0, b"own")
        assert os.pread(descriptor, 3, 0) == pattern(3)


def test_sealing_keeps_the_address() -> None:
    with SharedMemory.memfd(SIZE) as snapshot:
        before = snapshot.with_hva(int)
        snapshot.write(0, pattern(SIZE))
        snapshot.seal()
        assert snapshot.with_hva(int) == before
        assert snapshot.read(0, SIZE) == pattern(SIZE)


def test_sealing_twice_or_what_is_no_memory_file_is_refused() -> None:
    with sealed_pattern() as snapshot, SharedMemory.anonymous(SIZE) as anonymous:
        for mapping in (snapshot, anonymous):
            with pytest.raises(HyperlightError, match="sealed"):
                mapping.seal()
        with pytest.raises(HyperlightError, match="anonymous"):
            anonymous.map_private()


def test_another_writer_prevents_sealing() -> None:
    with SharedMemory.memfd(SIZE) as snapshot:
        descriptor = snapshot.fileno()
        assert descriptor is not None
        with SharedMemory.from_fd(descriptor, SIZE, writable=True, shared=True):
            with pytest.raises(MmapFailed, match="seal"):
                snapshot.seal()
            assert snapshot.read(0, SIZE) == bytes(SIZE)


def test_sealed_from_pieces_is_zero_between_them() -> None:
    pieces = [(5, b"ab"), (PAGE_SIZE, bytearray(b"cd")), (0, array("H", [0x6665])), (2 * PAGE_SIZE, b"")]
    with SharedMemory.sealed(2 * PAGE_SIZE, iter(pieces)) as snapshot:
        expected = bytearray(2 * PAGE_SIZE)
        expected[5:7], expected[PAGE_SIZE : PAGE_SIZE + 2], expected[0:2] = b"ab", b"cd", b"ef"
        assert snapshot.read(0, snapshot.size) == expected
        with snapshot.map_private() as clone, pytest.raises(HyperlightError):
            assert clone.read(5, 2) == b"ab"
            clone.seal()


@pytest.mark.parametrize("offset", [-1, PAGE_SIZE - 1, PAGE_SIZE + 1, 1 << 64])
def test_pieces_outside_are_refused(offset: int) -> None:
    with pytest.raises(BoundsCheckFailed):
        SharedMemory.sealed(PAGE_SIZE, [(offset, b"xy")])


def test_an_overlay_shows_the_file_and_is_what_a_discard_brings_back() -> None:
    with SharedMemory.anonymous(SIZE) as scratch:
        with sealed_pattern() as snapshot:
            scratch.overlay(PAGE_SIZE, snapshot, 2 * PAGE_SIZE, PAGE_SIZE)
            scratch.overlay(0, snapshot, 0, 0)
        shown = pattern(SIZE)[2 * PAGE_SIZE : 3 * PAGE_SIZE]
        fresh = bytes(PAGE_SIZE) + shown + bytes(2 * PAGE_SIZE)
        assert list(scratch.populated(0, SIZE)) == [(PAGE_SIZE, PAGE_SIZE)]
        assert scratch.read(0, SIZE) == fresh
        scratch.fill(0, SIZE, 0xEE)
        scratch.discard()
        assert scratch.read(0, SIZE) == fresh


def test_overlays_that_cannot_be_are_refused(shared: SharedMemory) -> None:
    with sealed_pattern() as snapshot, SharedMemory.memfd(SIZE) as file:
        for offset, source_offset, size in ((1, 0, PAGE_SIZE), (0, 1, PAGE_SIZE), (0, 0, 1)):
            with pytest.raises(LayoutError, match="whole pages"):
                shared.overlay(offset, snapshot, source_offset, size)
        shared.overlay(PAGE_SIZE, snapshot, 0, 2 * PAGE_SIZE)
        for page in (0, 1, 2):
            with pytest.raises(LayoutError, match="already"):
                shared.overlay(page * PAGE_SIZE, snapshot, 0, 2 * PAGE_SIZE)
        for offset, source_offset, size in ((SIZE, 0, PAGE_SIZE), (0, SIZE, PAGE_SIZE), (0, 0, -PAGE_SIZE)):
            with pytest.raises(BoundsCheckFailed):
                shared.overlay(offset, snapshot, source_offset, size)
        with pytest.raises(HyperlightError, match="anonymous"):
            snapshot.overlay(0, shared, 0, PAGE_SIZE)
        with pytest.raises(HyperlightError, match="private"):
            file.overlay(0, snapshot, 0, PAGE_SIZE)


def test_populated_finds_what_was_written_here_or_lies_in_the_file() -> None:
    pieces = [(3 * PAGE_SIZE, b"x"), (600 * PAGE_SIZE, bytes(300 * PAGE_SIZE))]
    with SharedMemory.sealed(1000 * PAGE_SIZE, pieces) as mapping:
        mapping.write(10 * PAGE_SIZE - 1, b"ab")
        runs = [
            (offset // PAGE_SIZE, size // PAGE_SIZE) for offset, size in mapping.populated(0, mapping.size)
        ]
        assert runs == [(3, 1), (9, 2), (600, 256), (856, 44)]
        assert list(mapping.populated(4 * PAGE_SIZE, 5 * PAGE_SIZE)) == []
        assert list(mapping.populated(0, 0)) == []
        for offset, size in ((1, PAGE_SIZE), (0, 1)):
            with pytest.raises(LayoutError):
                list(mapping.populated(offset, size))
        with pytest.raises(BoundsCheckFailed):
            list(mapping.populated(0, 1001 * PAGE_SIZE))


def test_part_of_a_file_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(pattern(2 * PAGE_SIZE + 10))
    descriptor = os.open(path, os.O_RDONLY)
    mapping = SharedMemory.from_fd(descriptor, 2 * PAGE_SIZE, offset=PAGE_SIZE)
    os.close(descriptor)
    with mapping, mapping.map_private() as clone:
        tail = pattern(2 * PAGE_SIZE + 10)[PAGE_SIZE:].ljust(2 * PAGE_SIZE, b"\0")
        assert mapping.read(0, 2 * PAGE_SIZE) == tail
        assert not mapping.writable
        clone.write(0, b"changed")
        assert mapping.read(0, 2 * PAGE_SIZE) == tail
    assert path.read_bytes() == pattern(2 * PAGE_SIZE + 10)


def test_a_read_only_mapping_refuses_writes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE_SIZE))
    with path.open("rb") as stream, SharedMemory.from_fd(stream.fileno(), PAGE_SIZE) as mapping:
        for write in (
            lambda: mapping.write(0, b"x"),
            lambda: mapping.fill(0, 1),
            lambda: mapping.write_u32(0, 0),
            lambda: mapping.copy_from(0, mapping, 0, 1),
        ):
            with pytest.raises(HyperlightError, match="read-only"):
                write()
        assert mapping.read_u64(0) == 0


@pytest.mark.parametrize("offset", [-PAGE_SIZE, 1, PAGE_SIZE, 1 << 62])
def test_a_file_that_ends_too_early_is_refused(tmp_path: Path, offset: int) -> None:
    """Touching a page wholly behind the end would kill the process."""
    path = tmp_path / "file"
    path.write_bytes(b"short")
    with path.open("rb") as stream, pytest.raises(LayoutError):
        SharedMemory.from_fd(stream.fileno(), PAGE_SIZE, offset=offset)


def test_a_writable_shared_mapping_writes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE_SIZE))
    with (
        path.open("r+b") as stream,
        SharedMemory.from_fd(stream.fileno(), PAGE_SIZE, writable=True, shared=True) as mapping,
    ):
        mapping.write(5, b"hello")
    assert path.read_bytes()[5:10] == b"hello"


# Discarding ---------------------------------------------------------------------------


def test_discarded_anonymous_pages_read_as_zero(filled: SharedMemory) -> None:
    filled.discard(PAGE_SIZE, PAGE_SIZE)
    assert filled.read(0, PAGE_SIZE) == pattern(SIZE)[:PAGE_SIZE]
    assert filled.read(PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)
    filled.discard()
    assert filled.read(0, SIZE) == bytes(SIZE)


def test_discarded_file_pages_read_as_the_file() -> None:
    with sealed_pattern() as snapshot, snapshot.map_private() as mapping:
        mapping.fill(0, SIZE, 0xEE)
        mapping.discard(2 * PAGE_SIZE)
        assert mapping.read(0, SIZE) == b"\xee" * 2 * PAGE_SIZE + pattern(SIZE)[2 * PAGE_SIZE :]


@contextlib.contextmanager
def adjacent(scratch_size: int, way: str = "scanned") -> Iterator[memory.AdjacentMemories]:
    """Scratch, and the pattern as image; what has changed is read as Linux before 6.7 offers it, or scanned."""
    with sealed_pattern() as snapshot, contextlib.closing(memory.AdjacentMemories(scratch_size, snapshot)) as both:
        assert both.changed() is not None
        if way == "read":
            assert both._pagemap is not None
            both._pagemap._scan = None
        yield both


@pytest.fixture(params=["scanned", "read"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def both(way: str) -> Iterator[memory.AdjacentMemories]:
    """Scratch has four pages, the second of which is the image's first."""
    with adjacent(SIZE, way) as both, sealed_pattern() as snapshot:
        both.scratch.overlay(PAGE_SIZE, snapshot, 0, PAGE_SIZE)
        yield both


def test_reverted_pages_read_as_the_file_the_overlay_or_zero(both: memory.AdjacentMemories) -> None:
    scratch, image = both.scratch, both.image
    original = scratch.read(0, SIZE)
    assert original == bytes(PAGE_SIZE) + pattern(SIZE)[:PAGE_SIZE] + bytes(2 * PAGE_SIZE)
    assert image.read(0, SIZE) == pattern(SIZE)
    for touched in (range(0, SIZE, PAGE_SIZE), (0,), (PAGE_SIZE,), (SIZE - PAGE_SIZE,), ()):
        for _ in ("first", "again"):
            for page in touched:
                image.write(page + 5, b"changed")
                scratch.write(page + 5, b"changed")
            changed = both.changed()
            assert changed is not None
            found = {page for start, end in changed.runs for page in range(start, end, PAGE_SIZE)}
            assert found >= {*touched, *(SIZE + PAGE_SIZE + page for page in touched)}
            assert all(changed.touch(page, page + 1) for page in touched)
            both.revert(changed)
            assert scratch.read(0, SIZE) == original
            assert image.read(0, SIZE) == pattern(SIZE)


def test_plan_is_kept_for_the_same_pages_and_no_others(both: memory.AdjacentMemories) -> None:
    """What an earlier restore put back says nothing about which pages the next one has to."""
    reverted = []
    for page in (0, 0, 2, 0, 2):
        both.discard()
        both.scratch.write(page * PAGE_SIZE, b"changed")
        changed = both.changed()
        assert changed is not None
        assert changed.runs == [(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)]
        both.revert(changed)
        assert both.scratch.read(page * PAGE_SIZE, 7) == bytes(7)
        reverted.append(changed)
    first, second, third, *_ = reverted
    assert first is second
    assert second is not third


def test_presets_are_there_after_every_way_back(both: memory.AdjacentMemories) -> None:
    presets = {0: b"begin", PAGE_SIZE - 2: b"across", SIZE - 3: b"end"}
    for offset, data in presets.items():
        both.preset(offset, data)
    original = both.scratch.read(0, SIZE)
    expected = bytearray(bytes(PAGE_SIZE) + pattern(SIZE)[:PAGE_SIZE] + bytes(2 * PAGE_SIZE))
    for offset, data in presets.items():
        expected[offset : offset + len(data)] = data
    assert original == expected
    for back in ("revert", "discard", "revert", "revert", "partly"):
        both.scratch.fill(0, SIZE, 0xEE)
        both.image.fill(0, SIZE, 0xEE)
        changed = both.changed()
        assert changed is not None
        if back == "revert":
            both.revert(changed)
        elif back == "discard":
            both.discard()
        else:
            both.revert(memory.ChangedPages([(0, PAGE_SIZE)], PAGE_SIZE))
        assert both.scratch.read(0, SIZE) == expected
        assert both.image.read(0, SIZE) == pattern(SIZE)
    with pytest.raises(BoundsCheckFailed):
        both.preset(SIZE - 1, b"xy")


@pytest.mark.parametrize("step", range(5))
def test_discard_that_fails_half_way_is_done_again(
    both: memory.AdjacentMemories, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Two memories are discarded and three presets written; whichever of these fails, nothing is taken for done."""
    presets = {0: b"begin", PAGE_SIZE - 2: b"across", SIZE - 3: b"end"}
    for offset, data in presets.items():
        both.preset(offset, data)
    expected = both.scratch.read(0, SIZE)
    both.scratch.fill(0, SIZE, 0xEE)
    both.image.fill(0, SIZE, 0xEE)
    calls = itertools.count()

    def failing(method: Callable[..., None]) -> Callable[..., None]:
        def fail(*arguments: Any) -> None:
            if next(calls) == step:
                raise memory.MmapFailed(12, "cannot")
            method(*arguments)

        return fail

    with monkeypatch.context() as patch:
        for name in ("discard", "write"):
            patch.setattr(SharedMemory, name, failing(getattr(SharedMemory, name)))
        with pytest.raises(memory.MmapFailed):
            both.discard()
    assert both.changed() is None
    both.discard()
    assert both.scratch.read(0, SIZE) == expected
    assert both.image.read(0, SIZE) == pattern(SIZE)
    assert both.changed() is not None


def test_run_of_changed_pages_may_lie_partly_under_an_overlay(both: memory.AdjacentMemories) -> None:
    original = both.scratch.read(0, SIZE)
    for first, count in ((0, 2), (1, 2), (0, 4), (2, 2)):
        both.scratch.fill(0, SIZE, 0xEE)
        both.revert(memory.ChangedPages([(first * PAGE_SIZE, (first + count) * PAGE_SIZE)], 2 * SIZE + PAGE_SIZE))
        expected = bytearray(b"\xee" * SIZE)
        reverted = slice(first * PAGE_SIZE, (first + count) * PAGE_SIZE)
        expected[reverted] = original[reverted]
        assert both.scratch.read(0, SIZE) == expected


def test_pages_count_as_changed_beyond_the_end_of_the_search() -> None:
    changed = memory.ChangedPages([(PAGE_SIZE, 2 * PAGE_SIZE)], 4 * PAGE_SIZE)
    ranges = {(0, 1): False, (1, 2): True, (0, 2): True, (2, 3): False, (2, 4): False, (3, 5): True, (5, 6): True}
    for (begin, end), touched in ranges.items():
        assert changed.touch(begin * PAGE_SIZE, end * PAGE_SIZE) is touched


@pytest.mark.parametrize("end", [0, PAGE_SIZE, SIZE, SIZE + PAGE_SIZE, SIZE + 2 * PAGE_SIZE, 2 * SIZE])
def test_what_lies_beyond_the_end_of_the_search_is_discarded(both: memory.AdjacentMemories, end: int) -> None:
    original = both.scratch.read(0, SIZE)
    both.scratch.fill(0, SIZE, 0xEE)
    both.image.fill(0, SIZE, 0xEE)
    both.revert(memory.ChangedPages([], end))
    kept = min(end, SIZE)
    assert both.scratch.read(0, SIZE) == b"\xee" * kept + original[kept:]
    kept = max(end - SIZE - PAGE_SIZE, 0)
    assert both.image.read(0, SIZE) == b"\xee" * kept + pattern(SIZE)[kept:]


def test_many_changed_pages_are_better_discarded_and_so_are_unknown_ones(way: str) -> None:
    size, most = 130 * PAGE_SIZE, 128
    with adjacent(size, way) as both:
        searched = size + PAGE_SIZE + SIZE
        both.scratch.fill(0, most * PAGE_SIZE, 1)
        assert both.changed() == ([(0, most * PAGE_SIZE)], searched)
        both.discard()
        for page in range(0, 130, 2):  # each a run of its own
            both.scratch.write_u8(page * PAGE_SIZE, 1)
        runs = [(page * PAGE_SIZE, (page + 1) * PAGE_SIZE) for page in range(0, 130, 2)]
        assert both.changed() == (runs, searched)
        both.scratch.fill(0, (most + 1) * PAGE_SIZE, 1)
        assert both.changed() is None
        both.discard()
        assert both.changed() == ([], searched)
        assert both._pagemap is not None
        both._pagemap.close()
        assert both.changed() is None


def test_pages_that_were_only_read_have_not_changed() -> None:
    with adjacent(SIZE) as both:
        assert both.image.read(0, SIZE) == pattern(SIZE)
        assert both.changed() == ([], 2 * SIZE + PAGE_SIZE)


def test_what_lies_beyond_the_first_mebibyte_is_reverted_too(way: str) -> None:
    with adjacent(2 << 20, way) as both:
        both.scratch.write(PAGE_SIZE, b"near")
        both.scratch.write((1 << 20) + PAGE_SIZE, b"far")
        both.image.fill(0, SIZE, 0xEE)
        changed = both.changed()
        assert changed is not None
        both.revert(changed)
        assert both.scratch.read(0, 2 << 20) == bytes(2 << 20)
        assert both.image.read(0, SIZE) == pattern(SIZE)


def test_nothing_reaches_closed_memories() -> None:
    with adjacent(SIZE) as both:
        both.close()
        for use in (
            both.changed,
            lambda: both.revert(memory.ChangedPages([(0, PAGE_SIZE)], PAGE_SIZE)),
            both.discard,
            lambda: both.scratch.read(0, 1),
            lambda: both.image.read(0, 1),
        ):
            with pytest.raises(HyperlightError):
                use()


@pytest.mark.parametrize("size", [-PAGE_SIZE, 0, 1, PAGE_SIZE + 1, 1 << 60])
def test_adjacent_memories_of_impossible_sizes_are_refused(size: int) -> None:
    with sealed_pattern() as snapshot, pytest.raises(HyperlightError):
        memory.AdjacentMemories(size, snapshot)


def test_image_that_could_change_is_refused() -> None:
    with SharedMemory.memfd(SIZE) as unsealed, SharedMemory.anonymous(SIZE) as anonymous:
        for source in (unsealed, anonymous):
            with pytest.raises(HyperlightError, match="sealed"):
                memory.AdjacentMemories(SIZE, source)


def test_memories_stay_mapped_for_as_long_as_one_of_them_is_used() -> None:
    with sealed_pattern() as snapshot:
        both = memory.AdjacentMemories(SIZE, snapshot)
    scratch, held = both.scratch, both.image.hold()
    both.image.close()
    scratch.write(0, b"still here")
    assert scratch.read(0, 10) == b"still here"
    both.close()
    address = held.address  # type: ignore[attr-defined]
    assert f"{address:x}-" in Path("/proc/self/maps").read_text()
    del held, both, scratch
    assert f"{address:x}-" not in Path("/proc/self/maps").read_text()


def test_only_whole_private_pages_can_be_discarded(shared: SharedMemory) -> None:
    for offset, size in ((1, PAGE_SIZE), (0, 1), (PAGE_SIZE - 1, 1)):
        with pytest.raises(LayoutError, match="whole pages"):
            shared.discard(offset, size)
    with SharedMemory.memfd(PAGE_SIZE) as mapping, pytest.raises(HyperlightError, match="private"):
        mapping.discard()


# Guard pages --------------------------------------------------------------------------

TOUCH = """
import ctypes, sys
import memory
from memory import PAGE_SIZE, SharedMemory
mapping = SharedMemory.{create}
address = mapping.with_hva(int)
ctypes.string_at(address, mapping.size)             # the inside is fine
{touch}
print("survived")
"""
PAIR = "anonymous(PAGE_SIZE); mapping = memory.AdjacentMemories(PAGE_SIZE, SharedMemory.sealed(PAGE_SIZE, []))."
TOUCHES = {
    "read": "ctypes.string_at(address - 1, 1)",
    "write": "ctypes.memset(address - 1, 0, 1)",
    "exec": "ctypes.CFUNCTYPE(None)(address - 16)()",
    "read behind": "ctypes.string_at(address + mapping.size, 1)",
    "write behind": "ctypes.memset(address + mapping.size, 0, 1)",
}


@pytest.mark.parametrize("create", ["anonymous(2 * PAGE_SIZE)", "memfd(PAGE_SIZE)", f"{PAIR}scratch", f"{PAIR}image"])
@pytest.mark.parametrize("touch", TOUCHES)
def test_touching_a_guard_page_faults(touch: str, create: str) -> None:
    """B.4/86, B.4/87 and B.4/88."""
    code = TOUCH.format(create=create, touch=TOUCHES[touch])
    root = Path(memory.__file__).parent
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=False)
    assert result.returncode == -signal.SIGSEGV, result
    assert result.stdout == b""


# Against a model ----------------------------------------------------------------------


class MappingMachine(RuleBasedStateMachine):
    """A private mapping of a sealed file against a bytearray."""

    def __init__(self) -> None:
        super().__init__()
        self.original = pattern(SIZE)
        with sealed_pattern() as snapshot:
            self.mapping = snapshot.map_private()
        self.model = bytearray(self.original)

    @rule(offset=st.integers(0, SIZE - 64), data=st.binary(max_size=64))
    def write(self, offset: int, data: bytes) -> None:
        self.mapping.write(offset, data)
        self.model[offset : offset + len(data)] = data

    @rule(offset=st.integers(0, SIZE), size=st.integers(0, SIZE), byte=st.integers(0, 255))
    def fill(self, offset: int, size: int, byte: int) -> None:
        size = min(size, SIZE - offset)
        self.mapping.fill(offset, size, byte)
        self.model[offset : offset + size] = bytes([byte]) * size

    @rule(start=st.integers(0, SIZE), source=st.integers(0, SIZE), size=st.integers(0, SIZE))
    def move(self, start: int, source: int, size: int) -> None:
        size = min(size, SIZE - start, SIZE - source)
        self.mapping.copy_from(start, self.mapping, source, size)
        self.model[start : start + size] = self.model[source : source + size]

    @rule(first=st.integers(0, 3), count=st.integers(0, 4))
    def discard(self, first: int, count: int) -> None:
        start, size = first * PAGE_SIZE, min(count, 4 - first) * PAGE_SIZE
        self.mapping.discard(start, size)
        self.model[start : start + size] = self.original[start : start + size]

    @invariant()
    def content_is_the_model(self) -> None:
        assert self.mapping.read(0, SIZE) == self.model

    def teardown(self) -> None:
        self.mapping.close()


TestMappingMachine = MappingMachine.TestCase


# Guest-physical view ------------------------------------------------------------------


@pytest.fixture
def guest() -> Iterator[GuestMemory]:
    """Two adjacent regions, the first read-only to the guest, and one far away."""
    view = GuestMemory()
    with (
        SharedMemory.anonymous(SIZE) as low,
        SharedMemory.anonymous(SIZE) as high,
        SharedMemory.anonymous(PAGE_SIZE) as dynamic,
    ):
        view.add(0x1000 + SIZE, high, READ_WRITE)
        view.add(0x1000, low, MemoryRegionFlags.READ)
        view.add(0x10_0000, dynamic, READ_WRITE, holds_tables=False)
        yield view


def test_regions_are_ordered_and_resolved(guest: GuestMemory) -> None:
    assert [(region.gpa, region.size, region.end) for region in guest.regions()] == [
        (0x1000, SIZE, 0x1000 + SIZE),
        (0x1000 + SIZE, SIZE, 0x1000 + 2 * SIZE),
        (0x10_0000, 0x1000, 0x10_1000),
    ]  # fmt: skip
    low = guest.regions()[0].mapping
    assert guest.resolve(0x1000 + 5, SIZE - 5) == (low, 5)
    for gpa, size in ((0xFFF, 1), (0x1000, SIZE + 1), (0x10_1000, 1), (-1, 1), (2**64, 1), (0x1000, -1)):
        assert guest.resolve(gpa, size) is None


def test_accesses_cross_adjacent_regions(guest: GuestMemory) -> None:
    border = 0x1000 + SIZE
    guest.write_phys(border - 3, b"abcdef", force=True)
    assert guest.read_phys(border - 4, 8) == b"\0abcdef\0"
    assert guest.read_phys(0x10_1000, 0) == b""


def test_holes_and_read_only_regions_are_faults(guest: GuestMemory) -> None:
    border = 0x1000 + SIZE
    with pytest.raises(PhysicalFault, match="read-only") as caught:
        guest.write_phys(border - 1, b"xy")
    assert caught.value.gpa == border - 1
    with pytest.raises(PhysicalFault, match="not backed") as caught:
        guest.write_phys(border + SIZE - 1, b"xy")
    assert caught.value.gpa == border + SIZE
    assert guest.read_phys(border + SIZE - 1, 1) == b"\0"
    for gpa, size in ((0, 1), (0x1000, 2 * SIZE + 1), (MAX_GPA + 1, 8)):
        with pytest.raises(PhysicalFault):
            guest.read_phys(gpa, size)
    for size in (-1, 1 << 60):
        with pytest.raises(BoundsCheckFailed):
            guest.read_phys(0x1000, size)


def test_tables_are_read_where_tables_may_be(guest: GuestMemory) -> None:
    """B.3/61, and abi.md 5.4: not in dynamic mappings."""
    guest.write_phys(0x1008, (7).to_bytes(8, "little"), force=True)
    table = guest.read_table(0x1000)
    assert table is not None
    assert (len(table), table[1], guest.read_entry(0x1008)) == (512, 7, 7)
    for gpa in (0, 0x10_0000, MAX_GPA & ~0xFFF, 1 << 51):
        assert guest.read_table(gpa) is None
        assert guest.read_entry(gpa) is None


@pytest.mark.parametrize(
    "gpa", [0x1001, -0x1000, 0, SIZE, 0x1000 + 2 * SIZE - 0x1000, MAX_GPA + 1 - PAGE_SIZE]
)
def test_regions_that_do_not_fit_are_refused(guest: GuestMemory, gpa: int) -> None:
    before = guest.regions()
    with SharedMemory.anonymous(2 * PAGE_SIZE) as extra, pytest.raises(LayoutError):
        guest.add(gpa, extra, READ_WRITE)
    assert guest.regions() == before


def test_regions_are_replaced_and_removed(guest: GuestMemory) -> None:
    old = guest.regions()[0].mapping
    with SharedMemory.anonymous(PAGE_SIZE) as small, SharedMemory.anonymous(2 * SIZE) as large:
        assert guest.replace(0x1000, small, READ_WRITE) is old
        assert guest.regions()[0].flags == READ_WRITE
        with pytest.raises(LayoutError, match="overlaps"):
            guest.replace(0x1000, large)
        assert guest.regions()[0].mapping is small
        assert guest.remove(0x1000) is small
    for gpa in (0x1000, 0x2000 + SIZE):
        with pytest.raises(LayoutError, match="no memory region"):
            guest.remove(gpa)
