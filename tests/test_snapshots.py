"""Snapshots: taken, kept, restored into their own sandbox and others, and what a restore that fails leaves behind."""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tinyguest
from conftest import process_resources, require
from rawguest import ANSWER, GOOD, build
from tinyguest import tiny_guest

import hyperlight
import kvm_abi
import memory
from hyperlight import (
    GuestAborted,
    HostFunctions,
    HyperlightError,
    Int,
    KvmError,
    Long,
    MultiUseSandbox,
    PoisonedSandbox,
    SandboxConfiguration,
    SandboxStatus,
    Snapshot,
    SnapshotHostFunctionMismatch,
    SnapshotMismatch,
    ULong,
    UninitializedSandbox,
    UnrecoverableSandbox,
)
from memory import PAGE_SIZE, MemoryRegionFlags, SharedMemory

pytestmark = require("kvm")

READ = MemoryRegionFlags.READ
BASE = 1 << 32
"""gpa of what the tests map."""


def boot(guest: Any = "simpleguest", **settings: Any) -> MultiUseSandbox:
    with UninitializedSandbox(guest, SandboxConfiguration(**settings)) as uninitialized:
        return uninitialized.evolve()


@pytest.fixture(scope="module")
def snapshot() -> Iterator[Snapshot]:
    with boot() as sandbox:
        yield sandbox.snapshot()


@pytest.fixture
def sandbox(snapshot: Snapshot) -> Iterator[MultiUseSandbox]:
    with MultiUseSandbox.from_snapshot(snapshot) as fresh:
        yield fresh


@pytest.fixture
def other() -> Iterator[MultiUseSandbox]:
    """A sandbox that booted on its own, with the static of its guest at 7."""
    with boot() as sandbox:
        sandbox.call("SetStatic", 7)
        yield sandbox


@pytest.fixture
def region() -> Iterator[SharedMemory]:
    with SharedMemory.anonymous(PAGE_SIZE) as mapping:
        mapping.write(0, b"mapped")
        yield mapping


def static_of(sandbox: MultiUseSandbox) -> int:
    value: int = sandbox.call("GetStatic", returns=int)
    return value


def is_mapped(sandbox: MultiUseSandbox) -> bool:
    answer: bool = sandbox.call("CheckMapped", ULong(BASE), returns=bool)
    return answer


def read_mapped(sandbox: MultiUseSandbox, *, map_it: bool) -> bytes:
    data: bytes = sandbox.call("ReadMappedBuffer", ULong(BASE), ULong(6), map_it, returns=bytes)
    return data


# -- one object until something changes ----------------------------------------------------

Change = Callable[[MultiUseSandbox, SharedMemory], object]


def in_vain(change: Change) -> Change:
    """Return *change*, which must end in an error."""

    def attempt(sandbox: MultiUseSandbox, region: SharedMemory) -> None:
        with pytest.raises(HyperlightError):
            change(sandbox, region)

    return attempt


CHANGES: dict[str, Change] = {
    "a call": lambda sandbox, _: sandbox.call("GetStatic"),
    "a call that ends in an error": in_vain(lambda sandbox, _: sandbox.call("Nope")),
    "map_region": lambda sandbox, region: sandbox.map_region(BASE, region, READ),
    "map_file_cow": lambda sandbox, _: sandbox.map_file_cow(__file__, BASE),
    "register": lambda sandbox, _: sandbox.register("F", len),
}
NO_CHANGES: dict[str, Change] = {
    "nothing": lambda *_: None,
    "a call that was never sent": in_vain(lambda sandbox, _: sandbox.call("F", None)),
    "a mapping that is refused": in_vain(lambda sandbox, region: sandbox.map_region(BASE + 1, region, READ)),
    "a kill that hits nothing": lambda sandbox, _: sandbox.interrupt_handle().kill(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_snapshot_after_a_change_is_another(sandbox: MultiUseSandbox, region: SharedMemory, change: str) -> None:
    """B.9/173, features.md C.6, item 6."""
    before = sandbox.snapshot()
    CHANGES[change](sandbox, region)
    after = sandbox.snapshot()
    assert after is not before
    assert sandbox.snapshot() is after


@pytest.mark.parametrize("change", NO_CHANGES)
def test_snapshot_without_a_change_is_the_same(sandbox: MultiUseSandbox, region: SharedMemory, change: str) -> None:
    """B.9/173: also the one that was restored."""
    before = sandbox.snapshot()
    NO_CHANGES[change](sandbox, region)
    assert sandbox.snapshot() is before
    sandbox.call("SetStatic", 1)
    sandbox.restore(before)
    NO_CHANGES[change](sandbox, region)
    assert sandbox.snapshot() is before


def test_chain_of_snapshots_is_restored_in_any_order(sandbox: MultiUseSandbox) -> None:
    """features.md C.6, items 10 and 11: each has its number."""
    chain = [sandbox.snapshot()]
    for value in range(1, 6):
        sandbox.call("SetStatic", value)
        chain.append(sandbox.snapshot())
    first = chain[0].generation
    assert [each.generation for each in chain] == [*range(first, first + 6)]
    for value in (5, 0, 3, 3, 1, 4, 2):
        sandbox.restore(chain[value])
        assert static_of(sandbox) == value


def test_snapshot_cannot_change_any_more(sandbox: MultiUseSandbox) -> None:
    taken = sandbox.snapshot()
    fd = taken.memory.fileno()
    assert fd is not None
    for change in (lambda: os.pwrite(fd, b"x", 0), lambda: os.ftruncate(fd, 0), lambda: os.ftruncate(fd, 1 << 30)):
        with pytest.raises(PermissionError):
            change()


# -- into any sandbox that it fits ---------------------------------------------------------


def test_snapshot_of_another_sandbox_is_restored(sandbox: MultiUseSandbox, other: MultiUseSandbox) -> None:
    """B.9/169 as later releases have it, features.md C.6, item 1: again and again, and both go on."""
    theirs = other.snapshot()
    for _ in range(3):
        sandbox.restore(theirs)
        assert static_of(sandbox) == 7
        sandbox.call("AddToStatic", 1)
        assert (static_of(sandbox), static_of(other)) == (8, 7)
    other.close()
    sandbox.restore(theirs)
    assert static_of(sandbox) == 7


def test_restore_from_another_sandbox_replaces_the_mappings(
    sandbox: MultiUseSandbox, other: MultiUseSandbox, region: SharedMemory
) -> None:
    """features.md C.6, item 1: the target's are unmapped, what the snapshot's guest had mapped is there."""
    other.map_region(BASE, region, READ)
    assert read_mapped(other, map_it=True) == b"mapped"
    theirs = other.snapshot()
    with SharedMemory.anonymous(PAGE_SIZE) as mine:
        sandbox.map_region(BASE, mine, READ)
        assert read_mapped(sandbox, map_it=True) == bytes(6)
        sandbox.restore(theirs)
        assert read_mapped(sandbox, map_it=False) == b"mapped"
        sandbox.map_region(BASE, mine, READ)  # the place is free


DIFFERENT: dict[str, dict[str, Any]] = {
    "a larger heap": {"heap_size": 8 << 20, "scratch_size": 1 << 20},
    "a larger scratch": {"scratch_size": 4 << 20},
    "larger buffers": {"input_data_size": 0x10000, "output_data_size": 0x8000, "scratch_size": 1 << 20},
    "the guest copying its pages": {"copy_on_write": "guest"},
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_snapshot_brings_its_layout_along(sandbox: MultiUseSandbox, difference: str) -> None:
    """Beyond features.md C.6, item 3: what 0.16 refuses as a layout that differs is a layout that is replaced."""
    mine, small = sandbox.layout, sandbox.snapshot()
    with boot(**DIFFERENT[difference]) as larger:
        larger.call("SetStatic", 5)
        theirs = larger.snapshot()
    payload = bytes(range(256)) * (theirs.layout.input_data_size // 512)
    sandbox.restore(theirs)
    assert sandbox.layout == theirs.layout
    assert static_of(sandbox) == 5
    assert (
        sandbox.call("EchoBytes", payload[: theirs.layout.output_data_size // 2])
        == payload[: theirs.layout.output_data_size // 2]
    )
    sandbox.restore(small)
    assert sandbox.layout == mine
    assert static_of(sandbox) == 0


@require("gcc")
def test_snapshot_brings_its_guest_along(sandbox: MultiUseSandbox) -> None:
    """As 0.17 has it: another guest, of kernel mode in the VM of one of user mode, and back."""
    mine = sandbox.snapshot()
    with boot(build("nop")) as raw:
        theirs = raw.snapshot()
    for _ in range(2):
        sandbox.restore(theirs)
        assert sandbox.call(GOOD) == ANSWER
        sandbox.restore(mine)
        assert sandbox.call("Echo", "x") == "x"


@require("gcc")
def test_guest_gets_the_fpu_that_its_own_note_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that resets its FPU itself says so; the host must not go by another guest's word."""
    resets: list[int] = []
    set_fpu = kvm_abi.Vcpu.set_fpu
    monkeypatch.setattr(kvm_abi.Vcpu, "set_fpu", lambda vcpu, fpu: resets.append(fpu.fcw) or set_fpu(vcpu, fpu))
    with boot(build("nop")) as raw:
        theirs = raw.snapshot()
    with boot(tiny_guest(user_mode=True)) as sandbox:
        mine = sandbox.snapshot()
        assert sandbox.call(tinyguest.ECHO, Long(5)) == 5
        assert resets == []
        sandbox.restore(theirs)
        assert sandbox.call(GOOD) == ANSWER
        assert resets == [0x37F]
        sandbox.restore(mine)
        assert sandbox.call(tinyguest.ECHO, Long(5)) == 5
        assert resets == [0x37F]


# -- misfits -------------------------------------------------------------------------------


def host_add(left: Int, right: Int) -> Int:
    return Int(left + right)


@pytest.fixture
def needs_host_add() -> Snapshot:
    """A snapshot whose guest may call ``HostAdd(Int, Int) -> Int``, with the static at 7."""
    with boot() as sandbox:
        sandbox.register("HostAdd", host_add)
        sandbox.call("SetStatic", 7)
        return sandbox.snapshot()


def test_more_host_functions_than_the_snapshot_needs_are_fine(
    sandbox: MultiUseSandbox, needs_host_add: Snapshot
) -> None:
    """features.md C.6, item 2."""
    sandbox.register("HostAdd", host_add)
    sandbox.register("AndMore", len)
    sandbox.restore(needs_host_add)
    assert sandbox.call("Add", 1, 41) == 42


class Misfit(NamedTuple):
    """What the target registers, and what the refusal says."""

    register: Callable[[MultiUseSandbox], object]
    error: type[HyperlightError]
    text: str


def another_host_add(left: Long, right: Int) -> Int:
    return Int(left + right)


MISFITS = {
    "a host function is missing": Misfit(lambda _: None, SnapshotHostFunctionMismatch, "HostAdd is missing"),
    "a host function has other parameters": Misfit(
        lambda sandbox: sandbox.register("HostAdd", another_host_add),
        SnapshotHostFunctionMismatch,
        r"HostAdd is \(\('Long', 'Int'\), 'Int'\), was \(\('Int', 'Int'\), 'Int'\)",
    ),
    "a host function has another result": Misfit(
        lambda sandbox: sandbox.register("HostAdd", host_add, returns=Long),
        SnapshotHostFunctionMismatch,
        "HostAdd is .*'Long'",
    ),
}


@pytest.mark.parametrize("poisoned", [False, True], ids=["ready", "poisoned"])
@pytest.mark.parametrize("name", MISFITS)
def test_misfit_is_refused_before_anything_is_touched(
    sandbox: MultiUseSandbox, needs_host_add: Snapshot, region: SharedMemory, name: str, poisoned: bool
) -> None:
    """features.md C.6, items 2 and 3: state, mappings and the current snapshot stay, and so does the poison."""
    misfit = MISFITS[name]
    misfit.register(sandbox)
    sandbox.call("SetStatic", 3)
    sandbox.map_region(BASE, region, READ)
    assert read_mapped(sandbox, map_it=True) == b"mapped"
    mine = sandbox.snapshot()
    if poisoned:
        with pytest.raises(GuestAborted):
            sandbox.call("Abort")
    with pytest.raises(misfit.error, match=misfit.text):
        sandbox.restore(needs_host_add)
    if poisoned:
        assert sandbox.status is SandboxStatus.POISONED
        sandbox.restore(mine)
    else:
        assert sandbox.snapshot() is mine
    assert read_mapped(sandbox, map_it=False) == b"mapped"
    assert static_of(sandbox) == 3


def test_snapshot_of_a_guest_that_never_ran_is_no_state_to_go_back_to(sandbox: MultiUseSandbox) -> None:
    sandbox.call("SetStatic", 3)
    with UninitializedSandbox("simpleguest") as uninitialized:
        with pytest.raises(SnapshotMismatch, match="use from_snapshot"):
            sandbox.restore(uninitialized.snapshot())
    assert static_of(sandbox) == 3


def test_snapshot_of_a_guest_that_never_ran_accepts_any_host_functions() -> None:
    """features.md C.6, item 2."""
    with UninitializedSandbox("simpleguest") as uninitialized:
        uninitialized.register("HostAdd", host_add)
        fresh = uninitialized.snapshot()
    with MultiUseSandbox.from_snapshot(fresh, HostFunctions.empty()) as sandbox:
        assert sandbox.call("Echo", "x") == "x"


def test_host_functions_of_a_new_sandbox_must_cover_the_snapshots(needs_host_add: Snapshot) -> None:
    gc.collect()
    before = process_resources()
    with pytest.raises(SnapshotHostFunctionMismatch, match="HostAdd is missing"):
        MultiUseSandbox.from_snapshot(needs_host_add)
    assert process_resources() == before
    functions = HostFunctions()
    functions.register("HostAdd", host_add)
    with MultiUseSandbox.from_snapshot(needs_host_add, functions) as sandbox:
        assert sandbox.call("Add", 1, 41) == 42


@pytest.mark.parametrize("step", range(4))
def test_lack_of_memory_touches_nothing(
    sandbox: MultiUseSandbox, other: MultiUseSandbox, region: SharedMemory, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The new memory is there before the old one goes."""
    theirs = other.snapshot()
    sandbox.map_region(BASE, region, READ)
    assert read_mapped(sandbox, map_it=True) == b"mapped"
    mine = sandbox.snapshot()

    mappings = itertools.count()

    def refuse(*arguments: Any) -> int:
        if next(mappings) == step:
            raise memory.MmapFailed(12, "cannot map")
        return mmap(*arguments)

    mmap = memory._mmap
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_mmap", refuse)
        with pytest.raises(memory.MmapFailed):
            sandbox.restore(theirs)
    assert sandbox.status is SandboxStatus.READY
    assert sandbox.snapshot() is mine
    assert read_mapped(sandbox, map_it=False) == b"mapped"
    sandbox.restore(theirs)
    assert static_of(sandbox) == 7


# -- from_snapshot -------------------------------------------------------------------------


@require("gcc")
def test_initialised_guest_is_neither_loaded_nor_initialised_again(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    says_hello = "push %rax; mov $'!', %eax; out %eax, $103; pop %rax"
    with UninitializedSandbox(build("nop", initialise=says_hello)) as uninitialized:
        fresh = uninitialized.snapshot()
        with uninitialized.evolve() as first:
            initialised = first.snapshot()
    assert capfd.readouterr().err == "!"
    monkeypatch.setattr(memory.GuestElf, "parse", None)
    monkeypatch.setattr(memory.GuestElf, "load", None)
    with MultiUseSandbox.from_snapshot(initialised) as sandbox:
        assert sandbox.call(GOOD) == ANSWER
    assert capfd.readouterr().err == ""
    with MultiUseSandbox.from_snapshot(fresh) as sandbox:
        assert sandbox.call(GOOD) == ANSWER
    assert capfd.readouterr().err == "!"


def test_sandboxes_of_one_snapshot_are_isolated_and_go_on_from_there(snapshot: Snapshot) -> None:
    """features.md C.6, item 10."""
    sandboxes = [MultiUseSandbox.from_snapshot(snapshot) for _ in range(4)]
    for value, each in enumerate(sandboxes):
        each.call("SetStatic", value + 1)
    assert [static_of(each) for each in sandboxes] == [1, 2, 3, 4]
    later = [each.snapshot() for each in sandboxes]
    assert [each.generation for each in later] == [snapshot.generation + 1] * 4
    for each in sandboxes:
        each.restore(snapshot)
        assert static_of(each) == 0
    for each, taken in zip(sandboxes, reversed(later), strict=True):
        each.restore(taken)
    assert [static_of(each) for each in sandboxes] == [4, 3, 2, 1]
    for each in sandboxes:
        each.close()


def test_sizes_are_the_snapshots_and_options_the_configurations(snapshot: Snapshot, tmp_path: Path) -> None:
    """features.md C.6, item 13."""
    config = SandboxConfiguration(heap_size=64 << 20, scratch_size=64 << 20, guest_core_dump=tmp_path)
    with MultiUseSandbox.from_snapshot(snapshot, config=config) as sandbox:
        assert sandbox.layout == snapshot.layout
        with pytest.raises(GuestAborted) as caught:
            sandbox.call("Abort")
        assert caught.value.core_dump is not None
        assert Path(caught.value.core_dump).parent == tmp_path
    with MultiUseSandbox.from_snapshot(snapshot, config=SandboxConfiguration(guest_core_dump=False)) as sandbox:
        assert sandbox.generate_crashdump() is None


# -- page tables ---------------------------------------------------------------------------


def rights_of_pages(sandbox: MultiUseSandbox) -> dict[int, tuple[bool, bool]]:
    """Return (user, executable) of each page below the guest's scratch map, by gva."""
    cr3 = sandbox._guest.vm.sregs().cr3
    leaves = sandbox._guest.physical.walk(cr3)
    return {
        leaf.gva + PAGE_SIZE * index: (leaf.user, leaf.executable)
        for leaf in leaves
        if leaf.gva < sandbox.layout.scratch_base_gva
        for index in range(leaf.page_count)
    }


def page_of_tiny_guest(sandbox: MultiUseSandbox, from_the_end: int) -> int:
    """Return the gva of one of the last pages of the image: PAGE_B is in the last, PAGE_A in the one before."""
    return memory.BASE_ADDRESS + sandbox.layout.code_size - from_the_end * PAGE_SIZE


@require("gcc")
def test_user_bit_survives() -> None:
    """The host of 0.14 makes all pages supervisor pages: a guest at CPL 3 could not run on; nor is it let in."""
    with boot(tiny_guest(user_mode=True, keeps_page_b=True)) as sandbox:
        page_a, page_b = page_of_tiny_guest(sandbox, 2), page_of_tiny_guest(sandbox, 1)

        def look(at: MultiUseSandbox) -> tuple[Any, Any]:
            return at.call(tinyguest.READ, Long(page_a)), at.call(tinyguest.READ, Long(page_b))

        before = rights_of_pages(sandbox)
        assert {user for user, _ in before.values()} == {False, True}
        assert look(sandbox) == (tinyguest.PAGE_A, tinyguest.FAULT)
        with MultiUseSandbox.from_snapshot(sandbox.snapshot()) as other:
            assert rights_of_pages(other) == before
            assert look(other) == (tinyguest.PAGE_A, tinyguest.FAULT)
            again = other.snapshot()
        sandbox.restore(again)
        assert rights_of_pages(sandbox) == before
        assert look(sandbox) == (tinyguest.PAGE_A, tinyguest.FAULT)


@pytest.mark.parametrize("mode", ["guest", "host"])
def test_user_bit_of_pages_that_the_guest_allocated_survives(mode: Any) -> None:
    with boot(copy_on_write=mode) as sandbox:
        sandbox.call("CallMalloc", 0x5000)
        before = rights_of_pages(sandbox)
        assert {user for user, _ in before.values()} == {False, True}
        sandbox.restore(sandbox.snapshot())
        assert rights_of_pages(sandbox) == before
        sandbox.call("CallMalloc", 0x5000)


@require("gcc")
@pytest.mark.parametrize("whose", ["its own", "another sandbox's"])
def test_no_stale_translation_after_a_restore(whose: str) -> None:
    """kvm-hosts.md 4.4: at CPL 3 a KVM with shadow page tables would go on with the page of before."""
    guest = tiny_guest(user_mode=True)
    with boot(guest) as sandbox, boot(guest) as other:
        page_a, page_b = page_of_tiny_guest(sandbox, 2), page_of_tiny_guest(sandbox, 1)

        def shown_by_window() -> Any:
            return sandbox.call(tinyguest.READ, Long(tinyguest.WINDOW))

        assert sandbox.call(tinyguest.READ, Long(page_a)) == tinyguest.PAGE_A
        assert shown_by_window() == tinyguest.PAGE_B
        shows_b = (sandbox if whose == "its own" else other).snapshot()
        for _ in range(3):
            assert sandbox.call(tinyguest.ALIAS, Long(page_a)) == tinyguest.PAGE_A
            shows_a = sandbox.snapshot()
            sandbox.restore(shows_b)
            assert shown_by_window() == tinyguest.PAGE_B
            sandbox.restore(shows_a)
            assert shown_by_window() == tinyguest.PAGE_A
            assert sandbox.call(tinyguest.ALIAS, Long(page_b)) == tinyguest.PAGE_B
            sandbox.restore(shows_a)
            assert shown_by_window() == tinyguest.PAGE_A


# -- random numbers ------------------------------------------------------------------------

SEED_FLAG = 1 << 32


@require("gcc")
def test_restored_guest_is_told_to_seed_its_random_numbers_anew() -> None:
    """features.md C.6, item 12, for guests of this SDK: once, and each time with another seed."""
    with boot(tiny_guest(user_mode=True, takes_seed=True)) as sandbox:
        assert sandbox.call(tinyguest.SEED) == 0
        taken = sandbox.snapshot()
        seeds = []
        for _ in range(8):
            sandbox.restore(taken)
            seeds.append(sandbox.call(tinyguest.SEED))
            assert sandbox.call(tinyguest.SEED) == 0
        with MultiUseSandbox.from_snapshot(taken) as other:
            seeds.append(other.call(tinyguest.SEED))
    assert all(seed >> 32 == 1 for seed in seeds)
    assert len(set(seeds)) > 1  # they have 32 bits


@require("gcc")
def test_guest_that_does_not_ask_for_a_seed_finds_zero() -> None:
    with boot(tiny_guest(user_mode=True)) as sandbox:
        sandbox.restore(sandbox.snapshot())
        assert sandbox.call(tinyguest.SEED) == 0


@require("gcc")
def test_guest_of_0_17_finds_its_request_in_scratch() -> None:
    """features.md C.6, item 12."""

    def request() -> int:
        scratch = sandbox._guest._ram.scratch
        return scratch.read_u64(scratch.size - memory.SCRATCH_TOP_RNG_SEED)

    with boot(tiny_guest(user_mode=True, version=b"0.17.0")) as sandbox:
        taken = sandbox.snapshot()
        assert request() == 0
        requests = []
        for _ in range(8):
            sandbox.restore(taken)
            requests.append(request())
            assert sandbox.call(tinyguest.SEED) == 0
    assert all(each >> 32 == 1 for each in requests)
    assert len(set(requests)) > 1


# -- restores that fail half-way (features.md C.6, item 4) ---------------------------------


def failing(owner: type, method: str, monkeypatch: pytest.MonkeyPatch, *, when: Callable[..., bool]) -> None:
    """Let KVM refuse what *method* asks for, where *when* says so of its arguments."""
    original = getattr(owner, method)

    def refuse(handle: Any, *arguments: Any) -> Any:
        if when(*arguments):
            raise kvm_abi.KvmError(method, 12)
        return original(handle, *arguments)

    monkeypatch.setattr(owner, method, refuse)


VCPU_STEPS = ("KVM_SET_DEBUGREGS", "KVM_SET_XSAVE", "KVM_SET_XCRS", "KVM_SET_MSRS")
"""What a restore asks of the vCPU; special registers and events go with the next entry."""


@pytest.mark.parametrize("whose", ["its own", "another sandbox's"])
@pytest.mark.parametrize("step", [*VCPU_STEPS, "unmapping a region"])
def test_restore_that_fails_at_the_vcpu_or_a_region_can_be_tried_again(
    sandbox: MultiUseSandbox,
    other: MultiUseSandbox,
    region: SharedMemory,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    whose: str,
) -> None:
    mine = sandbox.snapshot()
    wanted, value = (mine, 0) if whose == "its own" else (other.snapshot(), 7)
    sandbox.call("SetStatic", 3)
    sandbox.map_region(BASE, region, READ)
    with monkeypatch.context() as patch:
        if step in VCPU_STEPS:
            make, refused = kvm_abi._quick_ioctl, int(getattr(kvm_abi, step))

            def fail(fd: int, request: int, reference: Any) -> int:
                if request != refused:
                    return make(fd, request, reference)
                ctypes.set_errno(errno.EIO)
                return -1

            patch.setattr(kvm_abi, "_quick_ioctl", fail)
        else:
            failing(kvm_abi.Vm, "set_user_memory_region", patch, when=lambda _slot, _flags, gpa, *_: gpa == BASE)
        with pytest.raises(KvmError):
            sandbox.restore(wanted)
        assert sandbox.status is SandboxStatus.POISONED
        with pytest.raises(PoisonedSandbox):
            sandbox.call("GetStatic")
    sandbox.restore(wanted)
    assert sandbox.status is SandboxStatus.READY
    assert static_of(sandbox) == value
    assert not is_mapped(sandbox)
    sandbox.map_region(BASE, region, READ)
    assert read_mapped(sandbox, map_it=True) == b"mapped"


def of_slot(gpa: int, *, deleted: bool) -> Callable[..., bool]:
    """Whether a KVM_SET_USER_MEMORY_REGION is about the slot at *gpa*, to delete or to make it."""
    return lambda _slot, _flags, place, size, _hva: place == gpa and (size == 0) is deleted


IMAGE_GPA = memory.BASE_ADDRESS
SCRATCH_GPA = memory.scratch_base_gpa(SandboxConfiguration().scratch_size)
LOSSES = {
    "the image is not unmapped": of_slot(IMAGE_GPA, deleted=True),
    "scratch is not unmapped": of_slot(SCRATCH_GPA, deleted=True),
    "the image is not mapped": of_slot(IMAGE_GPA, deleted=False),
    "scratch is not mapped": of_slot(SCRATCH_GPA, deleted=False),
}


@pytest.mark.parametrize("name", LOSSES)
def test_restore_that_loses_the_memory_is_the_end(
    sandbox: MultiUseSandbox, other: MultiUseSandbox, region: SharedMemory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Nothing works any more but the handle, and close(), which leaves nothing behind."""
    mine, theirs = sandbox.snapshot(), other.snapshot()
    with monkeypatch.context() as patch:
        failing(kvm_abi.Vm, "set_user_memory_region", patch, when=LOSSES[name])
        with pytest.raises(UnrecoverableSandbox) as caught:
            sandbox.restore(theirs)
    assert isinstance(caught.value.__cause__, kvm_abi.KvmError)
    assert sandbox.status is SandboxStatus.UNRECOVERABLE
    assert not sandbox.poisoned
    refused: list[Callable[[], object]] = [
        lambda: sandbox.call("GetStatic"),
        sandbox.snapshot,
        lambda: sandbox.restore(mine),
        lambda: sandbox.restore(theirs),
        lambda: sandbox.map_region(BASE, region, READ),
        lambda: sandbox.map_file_cow(__file__, BASE),
        lambda: sandbox.register("F", len),
        sandbox.generate_crashdump,
    ]
    for use in refused:
        with pytest.raises(UnrecoverableSandbox, match="close it and make another"):
            use()
    assert not sandbox.interrupt_handle().kill()
    assert static_of(other) == 7
    with MultiUseSandbox.from_snapshot(mine) as replacement:
        assert static_of(replacement) == 0
    sandbox.close()
    assert sandbox.interrupt_handle().dropped()


def test_ctrl_c_while_memory_is_replaced_is_no_such_end(
    sandbox: MultiUseSandbox, other: MultiUseSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hyperlight._VirtualMachine, "map", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sandbox.restore(other.snapshot())
    assert sandbox.status is SandboxStatus.POISONED
    sandbox.restore(other.snapshot())
    assert static_of(sandbox) == 7


def test_failed_restores_leak_nothing(
    snapshot: Snapshot, other: MultiUseSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = other.snapshot()

    def fail_once(when: Callable[..., bool]) -> None:
        with MultiUseSandbox.from_snapshot(snapshot) as sandbox, monkeypatch.context() as patch:
            failing(kvm_abi.Vm, "set_user_memory_region", patch, when=when)
            with pytest.raises(UnrecoverableSandbox):
                sandbox.restore(theirs)

    fail_once(LOSSES["scratch is not mapped"])
    gc.collect()
    before = process_resources()
    for when in LOSSES.values():
        fail_once(when)
    gc.collect()
    assert process_resources() == before


# -- status --------------------------------------------------------------------------------


def test_status_follows_what_happens(sandbox: MultiUseSandbox) -> None:
    """features.md C.6, item 5; B.9/162, B.9/168."""
    assert [each.value for each in SandboxStatus] == ["ready", "poisoned", "unrecoverable"]
    clean = sandbox.snapshot()
    for _ in range(2):
        assert (sandbox.status, sandbox.poisoned) == (SandboxStatus.READY, False)
        with pytest.raises(GuestAborted):
            sandbox.call("GuestPanic", "on purpose")
        assert (sandbox.status, sandbox.poisoned) == (SandboxStatus.POISONED, True)
        with pytest.raises(PoisonedSandbox):
            sandbox.snapshot()
        sandbox.restore(clean)
    sandbox.call("SetStatic", 4)
    later = sandbox.snapshot()
    assert later is not clean
    sandbox.restore(later)
    assert static_of(sandbox) == 4
