"""Memory and files of the host that a guest may see, before and after ``evolve()`` (features.md A.7, abi.md 16)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import require

import hyperlight
import kvm_abi
import memory
from hyperlight import (
    GuestAborted,
    MapRegionError,
    MemoryAccessViolation,
    MultiUseSandbox,
    Snapshot,
    UInt,
    ULong,
    UninitializedSandbox,
)
from memory import MAX_GPA, PAGE_SIZE, MemoryRegionFlags, SharedMemory

READ, WRITE, EXECUTE = MemoryRegionFlags.READ, MemoryRegionFlags.WRITE, MemoryRegionFlags.EXECUTE
BASE = 1 << 32
"""gpa: 4 GiB, far from everything else."""
CONTENT = bytes(range(1, 252)) * 20 + b"the end"
"""A page and a bit."""
MAPPED_SIZE = 2 * PAGE_SIZE
GUEST_MAP_WRITE = 2
"""HL_MAP_WRITE of hyperlight_ext.h."""


@pytest.fixture(scope="module")
def snapshot() -> Iterator[Snapshot]:
    with UninitializedSandbox("simpleguest") as uninitialized, uninitialized.evolve() as sandbox:
        yield sandbox.snapshot()


@pytest.fixture
def sandbox(snapshot: Snapshot) -> Iterator[MultiUseSandbox]:
    with MultiUseSandbox.from_snapshot(snapshot) as fresh:
        yield fresh


@pytest.fixture
def uninitialized() -> Iterator[UninitializedSandbox]:
    with UninitializedSandbox("simpleguest") as fresh:
        yield fresh


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file that a guest may see"
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def region() -> Iterator[SharedMemory]:
    with SharedMemory.anonymous(MAPPED_SIZE) as mapping:
        mapping.write(0, CONTENT)
        yield mapping


def read_from(sandbox: MultiUseSandbox, base: int = BASE, size: int = len(CONTENT), *, map_it: bool = True) -> bytes:
    """Have the guest read guest-virtual *base*, after it entered that into its page tables if *map_it*."""
    data: bytes = sandbox.call("ReadMappedBuffer", ULong(base), ULong(size), map_it, returns=bytes)
    return data


def write_to(sandbox: MultiUseSandbox, base: int) -> MemoryAccessViolation:
    """Have the guest write to *base* and return the error in which that must end."""
    with pytest.raises(MemoryAccessViolation) as caught:
        sandbox.call("WriteMappedBuffer", ULong(base), ULong(1))
    return caught.value


def is_mapped(sandbox: MultiUseSandbox, base: int = BASE) -> bool:
    """Ask the guest whether its page tables have an entry for *base*."""
    answer: bool = sandbox.call("CheckMapped", ULong(base), returns=bool)
    return answer


def host_mappings(path: Path) -> int:
    """Count how often this process has *path* mapped."""
    return sum(line.endswith(str(path)) for line in Path("/proc/self/maps").read_text().splitlines())


def open_descriptors(path: Path) -> int:
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum(os.path.lexists(link) and os.readlink(link) == str(path) for link in links)


# -- regions -------------------------------------------------------------------------------


@require("kvm")
def test_region_is_read_by_the_guest(sandbox: MultiUseSandbox, region: SharedMemory) -> None:
    """B.10/174: and what the host writes into it later is seen, too."""
    sandbox.map_region(BASE, region, READ)
    assert read_from(sandbox) == CONTENT
    region.write(0, b"later")
    assert read_from(sandbox, size=5, map_it=False) == b"later"


@require("kvm")
def test_region_is_executed_but_not_written(sandbox: MultiUseSandbox, region: SharedMemory) -> None:
    """B.10/175: the error names the very address."""
    region.write(0, b"\xc3")  # ret
    sandbox.map_region(BASE, region, READ | EXECUTE)
    assert sandbox.call("ExecMappedBuffer", ULong(BASE), ULong(MAPPED_SIZE)) is True
    violation = write_to(sandbox, BASE)
    assert (violation.address, violation.tried, violation.flags) == (BASE, WRITE, READ | EXECUTE)
    assert sandbox.poisoned
    assert region.read(0, 2) == b"\xc3" + CONTENT[1:2]


@require("kvm")
def test_violation_names_the_address_inside_the_region(sandbox: MultiUseSandbox, region: SharedMemory) -> None:
    sandbox.map_region(BASE, region, READ)
    sandbox.call("MapGpa", ULong(BASE), ULong(BASE), ULong(MAPPED_SIZE), UInt(GUEST_MAP_WRITE))
    with pytest.raises(MemoryAccessViolation) as caught:
        sandbox.call("WriteByte", ULong(BASE + PAGE_SIZE + 0x123), 1)
    assert caught.value.address == BASE + PAGE_SIZE + 0x123


@require("kvm")
@pytest.mark.parametrize("end", ["closed", "dropped"])
@pytest.mark.parametrize("release", ["restore", "close"])
def test_region_that_goes_too_early_shows_nothing_else(
    snapshot: Snapshot, sandbox: MultiUseSandbox, end: str, release: str
) -> None:
    """Nothing that the host maps later comes to lie where the guest looks; with the sandbox, the region goes."""
    region = SharedMemory.anonymous(MAPPED_SIZE)
    region.write(0, CONTENT)
    address = region.with_hva(lambda hva: hva)
    sandbox.map_region(BASE, region, READ)
    if end == "closed":
        region.close()
        with pytest.raises(hyperlight.HyperlightError, match="closed"):
            region.read(0, 1)
    del region
    secrets = [SharedMemory.anonymous(MAPPED_SIZE) for _ in range(20)]
    for secret in secrets:
        secret.write(0, b"secret")
    seen = sandbox.call("ReadMappedBuffer", ULong(BASE), ULong(len(CONTENT)), True, returns=bytes)
    assert seen == CONTENT
    assert is_mapped_in_host(address)
    sandbox.restore(snapshot) if release == "restore" else sandbox.close()
    assert not is_mapped_in_host(address)


def is_mapped_in_host(address: int) -> bool:
    """Whether *address*, of memory, is in this process's map; guard pages do not count."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return "---p" not in line
    return False


def test_writable_region_is_refused(sandbox: MultiUseSandbox, region: SharedMemory) -> None:
    with pytest.raises(MapRegionError, match="Writable mappings not yet supported"):
        sandbox.map_region(BASE, region, READ | WRITE)


@require("kvm")
def test_regions_that_touch_are_accepted(sandbox: MultiUseSandbox, region: SharedMemory) -> None:
    """features.md C.6, item 7: end to end with each other, with the snapshot's memory and with scratch."""
    layout = sandbox.layout
    end_of_snapshot = memory.BASE_ADDRESS + layout.snapshot_size
    places = (BASE, BASE + MAPPED_SIZE, BASE - MAPPED_SIZE, end_of_snapshot, layout.scratch_base_gpa - MAPPED_SIZE)
    for place in places:
        sandbox.map_region(place, region, READ)
    for place in (BASE, BASE + MAPPED_SIZE, BASE - MAPPED_SIZE):
        assert read_from(sandbox, place) == CONTENT


OVERLAPS: dict[str, Callable[[memory.SandboxMemoryLayout], int]] = {
    "the first page of the image": lambda _: memory.BASE_ADDRESS,
    "the last page of the image": lambda layout: memory.BASE_ADDRESS + layout.snapshot_size - PAGE_SIZE,
    "the image from page 0 on": lambda _: 0,
    "the middle of the image": lambda layout: layout.heap_gpa,
    "the first page of scratch": lambda layout: layout.scratch_base_gpa - PAGE_SIZE,
    "the last page of scratch": lambda _: MAX_GPA + 1 - MAPPED_SIZE,
    "another region": lambda _: BASE,
    "the end of another region": lambda _: BASE + PAGE_SIZE,
    "the beginning of another region": lambda _: BASE - PAGE_SIZE,
}


@require("kvm")
@pytest.mark.parametrize("name", OVERLAPS)
def test_region_that_overlaps_anything_is_refused(sandbox: MultiUseSandbox, region: SharedMemory, name: str) -> None:
    """B.10/191, B.10/192 and features.md C.6, item 7: wholly or in part; the sandbox stays as it is."""
    sandbox.map_region(BASE, region, READ)
    before = sandbox.snapshot()
    with pytest.raises(MapRegionError, match=r"overlaps \[0x"):
        sandbox.map_region(OVERLAPS[name](sandbox.layout), region, READ)
    assert sandbox.snapshot() is before
    assert read_from(sandbox) == CONTENT


IMPOSSIBLE = {
    "unaligned": (BASE + 0x800, "no multiple"),
    "unaligned by one": (BASE + 1, "no multiple"),
    "beyond the physical space": (MAX_GPA + 1, "physical space"),
    "across the end of the physical space": (MAX_GPA + 1 - PAGE_SIZE, "physical space"),
    "where 64 bits overflow": ((1 << 64) - PAGE_SIZE, "physical space"),
    "below zero": (-PAGE_SIZE, "physical space"),
}


@require("kvm")
@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_region_that_can_be_nowhere_is_refused(sandbox: MultiUseSandbox, region: SharedMemory, name: str) -> None:
    gpa, why = IMPOSSIBLE[name]
    with pytest.raises(MapRegionError, match=why):
        sandbox.map_region(gpa, region, READ)


@require("kvm")
def test_page_0_stays_unmapped(sandbox: MultiUseSandbox) -> None:
    with SharedMemory.anonymous(PAGE_SIZE) as page, pytest.raises(MapRegionError, match="page at 0"):
        sandbox.map_region(0, page, READ)


# -- files, once the guest runs ------------------------------------------------------------


@require("kvm")
def test_file_is_read_by_the_guest(sandbox: MultiUseSandbox, file: Path) -> None:
    """B.10/176: whole pages are mapped, zeros behind the end."""
    assert sandbox.map_file_cow(file, BASE) == MAPPED_SIZE
    assert read_from(sandbox, size=MAPPED_SIZE) == CONTENT.ljust(MAPPED_SIZE, b"\0")


@require("kvm")
def test_file_is_not_written_by_the_guest(sandbox: MultiUseSandbox, file: Path) -> None:
    """B.10/177."""
    sandbox.map_file_cow(file, BASE)
    violation = write_to(sandbox, BASE)
    assert (violation.address, violation.flags) == (BASE, READ | EXECUTE)
    assert file.read_bytes() == CONTENT


@require("kvm")
def test_file_is_refused_while_poisoned(sandbox: MultiUseSandbox, file: Path) -> None:
    """B.10/178."""
    clean = sandbox.snapshot()
    with pytest.raises(GuestAborted):
        sandbox.call("Abort")
    with pytest.raises(hyperlight.PoisonedSandbox):
        sandbox.map_file_cow(file, BASE)
    assert host_mappings(file) == 0
    sandbox.restore(clean)
    sandbox.map_file_cow(file, BASE)
    assert read_from(sandbox) == CONTENT


@require("kvm")
def test_two_sandboxes_see_one_file(snapshot: Snapshot, file: Path) -> None:
    """B.10/179: the end of one is not the other's."""
    with MultiUseSandbox.from_snapshot(snapshot) as first, MultiUseSandbox.from_snapshot(snapshot) as second:
        for each in (first, second):
            each.map_file_cow(file, BASE)
        assert read_from(first) == read_from(second) == CONTENT
        first.close()
        assert read_from(second) == CONTENT


@require("kvm")
def test_five_threads_see_one_file(snapshot: Snapshot, file: Path) -> None:
    """B.10/180."""

    def read_it(_: int) -> bytes:
        with MultiUseSandbox.from_snapshot(snapshot) as sandbox:
            sandbox.map_file_cow(file, BASE)
            return read_from(sandbox)

    with ThreadPoolExecutor(5) as threads:
        assert list(threads.map(read_it, range(5))) == [CONTENT] * 5


@require("kvm")
@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("end", ["close", "drop", "restore"])
def test_file_is_released(snapshot: Snapshot, file: Path, end: str) -> None:
    """B.10/181: neither mapped nor open when the sandbox is closed, dropped, or restored."""
    sandbox = MultiUseSandbox.from_snapshot(snapshot)
    sandbox.map_file_cow(file, BASE)
    assert (host_mappings(file), open_descriptors(file)) == (1, 1)
    if end == "restore":
        sandbox.restore(snapshot)
        assert (host_mappings(file), open_descriptors(file)) == (0, 0)
    if end != "drop":
        sandbox.close()
    del sandbox
    assert (host_mappings(file), open_descriptors(file)) == (0, 0)


@require("kvm")
@pytest.mark.usefixtures("no_leaks")
def test_file_that_kvm_refuses_is_released(
    sandbox: MultiUseSandbox, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(kvm_abi.Vm, "set_user_memory_region", _refuse)
        with pytest.raises(hyperlight.KvmError, match="ENOMEM"):
            sandbox.map_file_cow(file, BASE)
    assert (host_mappings(file), open_descriptors(file)) == (0, 0)
    sandbox.map_file_cow(file, BASE)
    assert read_from(sandbox) == CONTENT
    sandbox.close()


def _refuse(*_: object) -> None:
    raise kvm_abi.KvmError("KVM_SET_USER_MEMORY_REGION", 12)


# -- files and snapshots -------------------------------------------------------------------


@require("kvm")
@pytest.mark.parametrize("what", ["file", "region"])
def test_snapshots_with_and_without_a_mapping(
    sandbox: MultiUseSandbox, file: Path, region: SharedMemory, what: str
) -> None:
    """B.9/170 and B.10/182: restored to the first nothing is mapped, to the second the bytes are in the snapshot."""
    without = sandbox.snapshot()
    if what == "file":
        sandbox.map_file_cow(file, BASE)
    else:
        sandbox.map_region(BASE, region, READ)
    assert read_from(sandbox) == CONTENT
    with_mapping = sandbox.snapshot()
    for _ in range(2):
        sandbox.restore(without)
        assert not is_mapped(sandbox)
        sandbox.restore(with_mapping)
        assert (host_mappings(file), open_descriptors(file)) == (0, 0)
        assert is_mapped(sandbox)
        region.fill(0, MAPPED_SIZE)
        assert read_from(sandbox, map_it=False) == CONTENT


@require("kvm")
def test_snapshot_holds_the_content_of_a_file(sandbox: MultiUseSandbox, file: Path) -> None:
    """B.10/183: even when the file is gone, and in another sandbox."""
    sandbox.map_file_cow(file, BASE)
    assert read_from(sandbox) == CONTENT
    after = sandbox.snapshot()
    file.unlink()
    sandbox.restore(after)
    assert read_from(sandbox, map_it=False) == CONTENT
    with MultiUseSandbox.from_snapshot(after) as other:
        assert read_from(other, map_it=False) == CONTENT


@require("kvm")
def test_restore_takes_mapped_files_away_and_leaves_the_sandbox_ready(sandbox: MultiUseSandbox, file: Path) -> None:
    """B.9/170: to the snapshot before the mapping, and to the one after it; nobody used the file."""
    before = sandbox.snapshot()
    for snapshot_after in (True, False):
        sandbox.map_file_cow(file, BASE)
        sandbox.restore(sandbox.snapshot() if snapshot_after else before)
        assert sandbox.call("Echo", "ready") == "ready"


@require("kvm")
def test_place_of_a_file_is_free_after_a_restore(sandbox: MultiUseSandbox, file: Path, region: SharedMemory) -> None:
    before = sandbox.snapshot()
    sandbox.map_file_cow(file, BASE)
    sandbox.restore(before)
    region.fill(0, MAPPED_SIZE, 7)
    sandbox.map_region(BASE, region, READ)
    assert read_from(sandbox, size=3) == b"\7\7\7"


# -- files, before the guest runs ----------------------------------------------------------


@require("kvm")
def test_file_mapped_before_evolve_is_read_by_the_guest(uninitialized: UninitializedSandbox, file: Path) -> None:
    """B.10/184."""
    assert uninitialized.map_file_cow(file, BASE) == MAPPED_SIZE
    with uninitialized.evolve() as sandbox:
        assert read_from(sandbox) == CONTENT
        assert host_mappings(file) == 1
    assert (host_mappings(file), open_descriptors(file)) == (0, 0)


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("end", ["close", "drop"])
def test_file_of_a_sandbox_that_never_ran_is_released(file: Path, end: str) -> None:
    """B.10/185."""
    uninitialized = UninitializedSandbox("simpleguest")
    uninitialized.map_file_cow(file, BASE)
    assert (host_mappings(file), open_descriptors(file)) == (1, 1)
    if end == "close":
        uninitialized.close()
    del uninitialized
    assert (host_mappings(file), open_descriptors(file)) == (0, 0)


@require("kvm")
@pytest.mark.usefixtures("no_leaks")
def test_file_of_a_guest_that_fails_to_initialise_is_released(
    uninitialized: UninitializedSandbox, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninitialized.map_file_cow(file, BASE)
    monkeypatch.setattr(kvm_abi.Vm, "set_user_memory_region", _refuse)
    with pytest.raises(hyperlight.KvmError):
        uninitialized.evolve()
    assert (host_mappings(file), open_descriptors(file)) == (0, 0)


def test_closed_sandbox_takes_no_file(uninitialized: UninitializedSandbox, file: Path) -> None:
    uninitialized.close()
    with pytest.raises(hyperlight.SandboxClosed):
        uninitialized.map_file_cow(file, BASE)
    assert (host_mappings(file), open_descriptors(file)) == (0, 0)


@pytest.fixture(params=["before evolve", pytest.param("after evolve", marks=require("kvm"))])
def either(
    request: pytest.FixtureRequest, uninitialized: UninitializedSandbox
) -> UninitializedSandbox | MultiUseSandbox:
    """A sandbox before and after ``evolve()``: files are checked alike."""
    if request.param == "before evolve":
        return uninitialized
    sandbox: MultiUseSandbox = request.getfixturevalue("sandbox")
    return sandbox


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_file_that_can_be_nowhere_is_refused(
    either: UninitializedSandbox | MultiUseSandbox, file: Path, name: str
) -> None:
    """B.10/186, and the end of the physical space."""
    gpa, why = IMPOSSIBLE[name]
    with pytest.raises(MapRegionError, match=why):
        either.map_file_cow(file, gpa)
    assert (host_mappings(file), open_descriptors(file)) == (0, 0)


def test_empty_file_is_refused(either: UninitializedSandbox | MultiUseSandbox, tmp_path: Path) -> None:
    """B.10/187."""
    (tmp_path / "empty").touch()
    with pytest.raises(MapRegionError, match="is empty"):
        either.map_file_cow(tmp_path / "empty", BASE)


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "NUL"])
def test_what_is_no_regular_file_is_refused(
    either: UninitializedSandbox | MultiUseSandbox, tmp_path: Path, kind: str
) -> None:
    path = str(tmp_path / kind)
    if kind == "directory":
        os.mkdir(path)
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(MapRegionError, match="cannot be mapped"):
        either.map_file_cow(path + "\0" if kind == "NUL" else path, BASE)


@pytest.mark.parametrize("label", ["custom", "", "x" * 63, "ü" * 31])
def test_label_of_up_to_63_bytes_is_accepted(
    either: UninitializedSandbox | MultiUseSandbox, file: Path, label: str
) -> None:
    """B.10/188, B.10/189."""
    assert either.map_file_cow(file, BASE, label) == MAPPED_SIZE


@pytest.mark.parametrize("label", ["x" * 64, "ü" * 32, "a\0b", "\ud800" * 32])
def test_label_that_is_too_long_or_has_a_nul_is_refused(
    either: UninitializedSandbox | MultiUseSandbox, file: Path, label: str
) -> None:
    """B.10/189, B.10/190."""
    with pytest.raises(MapRegionError, match="at most 63 bytes and no NUL"):
        either.map_file_cow(file, BASE, label)


@pytest.mark.parametrize("name", OVERLAPS)
def test_file_that_overlaps_anything_is_refused(
    either: UninitializedSandbox | MultiUseSandbox, file: Path, name: str
) -> None:
    """B.10/191, B.10/192: the image, scratch and other files, wholly or in part; at once, also before ``evolve()``."""
    either.map_file_cow(file, BASE)
    with pytest.raises(MapRegionError, match=r"overlaps \[0x"):
        either.map_file_cow(file, OVERLAPS[name](either.layout))
    assert (host_mappings(file), open_descriptors(file)) == (1, 1)


@require("kvm")
def test_33rd_file_before_evolve_is_refused(uninitialized: UninitializedSandbox, file: Path) -> None:
    """B.10/193: 32 are accepted, side by side, and all are there."""
    for number in range(32):
        uninitialized.map_file_cow(file, BASE + number * MAPPED_SIZE)
    with pytest.raises(MapRegionError, match="at most 32 files"):
        uninitialized.map_file_cow(file, BASE + 32 * MAPPED_SIZE)
    with uninitialized.evolve() as sandbox:
        sandbox.map_file_cow(file, BASE + 32 * MAPPED_SIZE)
        for number in (0, 31, 32):
            assert read_from(sandbox, BASE + number * MAPPED_SIZE, 8) == CONTENT[:8]


# -- files that change under a mapping -----------------------------------------------------


def test_file_cut_short_reads_as_zeros_and_kills_nobody(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 2 * PAGE_SIZE)
    with path.open("rb") as opened:
        mapping = SharedMemory.from_fd(opened.fileno(), 2 * PAGE_SIZE)
    with mapping:
        os.truncate(path, 10)
        assert mapping.read(0, PAGE_SIZE) == b"x" * 10 + bytes(PAGE_SIZE - 10)
        assert mapping.read(PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)
        assert mapping.read_u64(PAGE_SIZE) == mapping.read_u8(PAGE_SIZE) == 0
        assert mapping.read_u32(0) == int.from_bytes(b"xxxx", "little")


@require("kvm")
def test_file_cut_short_under_a_guest_hurts_the_call_alone(sandbox: MultiUseSandbox, file: Path) -> None:
    """What is gone cannot be read: KVM says so, and the sandbox can be restored."""
    clean = sandbox.snapshot()
    sandbox.map_file_cow(file, BASE)
    os.truncate(file, 0)
    with pytest.raises(hyperlight.GuestFailure):
        read_from(sandbox)
    sandbox.restore(clean)
    assert sandbox.call("Echo", "x") == "x"
