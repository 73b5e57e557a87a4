"""Making sandboxes: from files, bytes and snapshots, in every size, on every thread, and in numbers."""

from __future__ import annotations

import functools
import gc
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import process_resources, require, rounds
from elfwriter import Load, write_elf

import hyperlight
from hyperlight import (
    GuestEnvironment,
    HyperlightError,
    Int,
    MultiUseSandbox,
    SandboxConfiguration,
    Snapshot,
    UninitializedSandbox,
)

pytestmark = require("kvm")

KIB, MIB = 1 << 10, 1 << 20
SIMPLEGUEST = Path(hyperlight.find_guest("simpleguest"))

BY_WHOM: list[Any] = ["guest", "host"]
"""Who copies a page at its first write."""


def image(
    config: SandboxConfiguration | None = None, guest: Any = "simpleguest", init_data: bytes = b""
) -> Snapshot:
    """Return the snapshot of a guest that has not run yet."""
    with UninitializedSandbox(GuestEnvironment(guest, init_data), config) as uninitialized:
        return uninitialized.snapshot()


def echoes(sandbox: MultiUseSandbox) -> bool:
    text = f"I am sandbox {id(sandbox)}"
    return bool(sandbox.call("Echo", text, returns=str) == text)


# -- from a file or from bytes -------------------------------------------------------------


def test_path_evolves() -> None:
    """B.1/1, B.1/2, B.1/5: a path, the default configuration, no host function registered."""
    with UninitializedSandbox(SIMPLEGUEST) as uninitialized, uninitialized.evolve() as sandbox:
        assert echoes(sandbox)


def test_path_as_text_and_name_of_an_included_guest_are_the_same() -> None:
    with UninitializedSandbox(str(SIMPLEGUEST)) as by_path, UninitializedSandbox("simpleguest") as by_name:
        assert by_path.snapshot().elf == by_name.snapshot().elf


def test_bytes_of_a_guest_evolve() -> None:
    """B.1/6."""
    with UninitializedSandbox(SIMPLEGUEST.read_bytes()) as uninitialized, uninitialized.evolve() as sandbox:
        assert echoes(sandbox)


def test_parsed_guest_evolves() -> None:
    elf = hyperlight.memory.GuestElf.parse(SIMPLEGUEST.read_bytes())
    with UninitializedSandbox(elf) as uninitialized, uninitialized.evolve() as sandbox:
        assert sandbox.snapshot().elf is elf
        assert echoes(sandbox)


def test_image_of_a_guest_is_laid_out_once_for_the_same_sizes() -> None:
    assert image() is image()
    assert image() is image(guest=SIMPLEGUEST, init_data=bytearray())
    assert image() is not image(SandboxConfiguration(heap_size=MIB))
    assert image() is not image(SandboxConfiguration(copy_on_write="guest"))
    assert image(init_data=b"1") is not image(init_data=b"1")
    code = SIMPLEGUEST.read_bytes()
    assert image(guest=code) is not image(guest=code)


def test_sandboxes_of_one_image_share_nothing_that_changes() -> None:
    with UninitializedSandbox("simpleguest") as one, UninitializedSandbox("simpleguest") as other:
        assert one.snapshot() is other.snapshot()
        with one.evolve() as first, other.evolve() as second:
            assert first.call("AddToStatic", Int(5), returns=Int) == 5
            assert second.call("AddToStatic", Int(1), returns=Int) == 1
    with UninitializedSandbox("simpleguest") as late, late.evolve() as third:
        assert third.call("GetStatic", returns=Int) == 0


def test_changed_guest_file_is_another_guest(tmp_path: Path) -> None:
    copy = tmp_path / "guest"
    copy.write_bytes(SIMPLEGUEST.read_bytes())
    before = image(guest=copy)
    copy.write_bytes(Path(hyperlight.find_guest("hello")).read_bytes())
    assert image(guest=copy).elf.code_size != before.elf.code_size


def test_truncated_bytes_are_refused() -> None:
    """B.1/7."""
    with pytest.raises(hyperlight.memory.ElfError):
        UninitializedSandbox(SIMPLEGUEST.read_bytes()[:100])


@pytest.mark.parametrize("path", ["/some/path/that/does/not/exist", "some/path/that/does/not/exist"])
def test_missing_file_is_named_with_the_reason(path: str) -> None:
    """B.1/3, B.1/9."""
    with pytest.raises(hyperlight.GuestBinaryNotFound) as caught:
        UninitializedSandbox(path)
    expected = f"GuestBinary not found: '{path}': No such file or directory (os error 2)"
    assert str(caught.value) == expected


def test_directory_and_unreadable_name_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / ("x" * 300), "nul\0byte"):
        with pytest.raises(HyperlightError):
            UninitializedSandbox(path)


def test_smallest_sizes_are_accepted() -> None:
    """B.1/4: buffers and heap of one page; the buffers are raised to their minimum."""
    config = SandboxConfiguration(input_data_size=0x1000, output_data_size=0x1000, heap_size=0x1000)
    with UninitializedSandbox("simpleguest", config) as uninitialized:
        assert uninitialized.layout.input_data_size == uninitialized.layout.output_data_size == 0x2000


def test_init_data_is_there_for_the_guest() -> None:
    """B.1/8."""
    environment = GuestEnvironment("simpleguest", b"\x0a\x0b\x0c\x0d")
    with UninitializedSandbox(environment) as uninitialized, uninitialized.evolve() as sandbox:
        assert sandbox.call("ReadInitData", returns=bytes) == b"\x0a\x0b\x0c\x0d"


@pytest.mark.parametrize("by_whom", BY_WHOM)
@pytest.mark.parametrize("heap_size", [8 * MIB, 64 * MIB, 256 * MIB])
def test_large_heaps(heap_size: int, by_whom: Any) -> None:
    """B.1/22: with a scratch of 1 MiB, for the page tables."""
    config = SandboxConfiguration(heap_size=heap_size, scratch_size=MIB, copy_on_write=by_whom)
    with UninitializedSandbox("simpleguest", config) as uninitialized, uninitialized.evolve() as sandbox:
        assert sandbox.layout.heap_size == heap_size
        assert echoes(sandbox)


@pytest.mark.parametrize(("level", "number"), [("off", 0), ("error", 1), ("trace", 5)])
def test_guest_initialises_with_the_arguments_of_the_abi(level: str, number: int) -> None:
    """B.1/20: the PEB in RDI, the page size in RDX, the log level in RCX; a wrong one is a triple fault."""
    # cmp edx, 4096; jne bad; cmp ecx, number; jne bad; cmp qword [rdi], 0x4000; jne bad; lea rax, bad; OUT; bad: ud2
    code = bytes.fromhex("81fa00100000 7520 83f9") + bytes([number])
    code += bytes.fromhex("751b 48813f00400000 7512 488d050b000000 48c7c400d0ffff e76c 0f0b")
    guest = write_elf([Load(0, code.ljust(0x1000, b"\xcc"), executable=True)])
    config = SandboxConfiguration(guest_log_level=level)
    with UninitializedSandbox(guest, config) as uninitialized, uninitialized.evolve() as sandbox:
        assert sandbox.status is hyperlight.SandboxStatus.READY
    other = SandboxConfiguration(guest_log_level="info")
    with UninitializedSandbox(guest, other) as uninitialized, pytest.raises(hyperlight.InitializeError):
        uninitialized.evolve()


def test_hypervisor_is_present_where_dev_kvm_is() -> None:
    """B.1/21; this file's tests run only where /dev/kvm can be opened."""
    assert hyperlight.is_hypervisor_present()


def test_hypervisor_is_absent_where_dev_kvm_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """B.1/21."""
    monkeypatch.setattr(hyperlight, "KVM_PATH", str(tmp_path / "kvm"))
    asked_anew = hyperlight.is_hypervisor_present.__wrapped__
    assert not asked_anew()
    with UninitializedSandbox("simpleguest") as uninitialized:
        with pytest.raises(hyperlight.NoHypervisorFound, match="does not exist"):
            uninitialized.evolve()


# -- from a snapshot -----------------------------------------------------------------------

SNAPSHOT_SOURCES: dict[str, tuple[int, Callable[[], Snapshot]]] = {
    "defaults, B.1/11": (2, image),
    "16 MiB heap, B.1/12": (1, lambda: image(SandboxConfiguration(heap_size=16 * MIB))),
    "256 KiB scratch, B.1/13": (1, lambda: image(SandboxConfiguration(scratch_size=256 * KIB))),
    "64 KiB buffers, B.1/14": (
        1,
        lambda: image(SandboxConfiguration(input_data_size=64 * KIB, output_data_size=64 * KIB)),
    ),
    "everything large, B.1/15": (
        3,
        lambda: image(
            SandboxConfiguration(
                heap_size=32 * MIB,
                scratch_size=512 * KIB,
                input_data_size=128 * KIB,
                output_data_size=128 * KIB,
            )
        ),
    ),
    "from bytes, B.1/16": (1, lambda: image(guest=SIMPLEGUEST.read_bytes())),
}


@pytest.mark.parametrize("source", SNAPSHOT_SOURCES)
def test_sandboxes_start_from_the_snapshot_of_a_guest_that_never_ran(source: str) -> None:
    """B.1/11, B.1/12, B.1/13, B.1/14, B.1/15, B.1/16: each evolves, and has a state of its own."""
    count, make = SNAPSHOT_SOURCES[source]
    snapshot = make()
    assert not snapshot.is_initialized
    for number in range(1, count + 1):
        with MultiUseSandbox.from_snapshot(snapshot) as sandbox:
            assert echoes(sandbox)
            assert sandbox.call("AddToStatic", number, returns=int) == number


def test_sandboxes_of_one_snapshot_live_side_by_side() -> None:
    """B.1/11."""
    snapshot = image()
    with MultiUseSandbox.from_snapshot(snapshot) as one, MultiUseSandbox.from_snapshot(snapshot) as other:
        assert one.call("SetStatic", 1) == 1
        assert other.call("GetStatic") == 0


def test_host_function_of_a_sandbox_built_from_a_snapshot() -> None:
    """B.1/17: given at the start, or registered later."""
    functions = hyperlight.HostFunctions()
    functions.register("HostAdd", lambda left, right: left + right, (Int, Int), Int)
    with MultiUseSandbox.from_snapshot(image(), functions) as sandbox:
        assert sandbox.call("Add", 10, 20, returns=Int) == 30
    with MultiUseSandbox.from_snapshot(image()) as sandbox:
        sandbox.register("HostAdd", lambda left, right: left + right, (Int, Int), Int)
        assert sandbox.call("Add", 10, 20, returns=Int) == 30


def test_snapshot_keeps_init_data() -> None:
    """B.1/18."""
    with MultiUseSandbox.from_snapshot(image(init_data=b"blob")) as sandbox:
        assert sandbox.call("ReadInitData", returns=bytes) == b"blob"


@pytest.mark.parametrize("by_whom", BY_WHOM)
def test_initialised_snapshot_seeds_a_sandbox_without_initialising_again(by_whom: Any) -> None:
    """B.1/19: what the guest had in memory is there."""
    config = SandboxConfiguration(copy_on_write=by_whom)
    with UninitializedSandbox("simpleguest", config) as uninitialized, uninitialized.evolve() as first:
        first.call("SetStatic", 77)
        snapshot = first.snapshot()
    assert snapshot.is_initialized
    with MultiUseSandbox.from_snapshot(snapshot) as second:
        assert second.call("GetStatic") == 77
        assert echoes(second)


# -- threads, numbers, leaks ---------------------------------------------------------------


def test_sandboxes_are_created_evolved_and_used_on_different_threads() -> None:
    """B.1/10: ten of them; HostPrint works before and after."""
    printed: queue.SimpleQueue[str] = queue.SimpleQueue()

    def hear(text: str) -> Int:
        printed.put(text)
        return Int(len(text))

    created = [UninitializedSandbox("simpleguest") for _ in range(10)]
    for each in created:
        each.register("HostPrint", hear)
        functions = each._functions
        assert functions["HostPrint"].function("before") == 6
    with ThreadPoolExecutor(10) as evolvers:
        evolved = list(evolvers.map(UninitializedSandbox.evolve, created))
    with ThreadPoolExecutor(10) as users:
        lengths = list(users.map(lambda each: each.call("PrintOutput", "after", returns=int), evolved))
    for sandbox in evolved:
        sandbox.close()
    assert lengths == [5] * 10
    assert sorted(printed.get_nowait() for _ in range(20)) == ["after"] * 10 + ["before"] * 10


def test_200_sandboxes_in_10_threads() -> None:
    """B.1/23: each evolves and has its own static, which begins at zero."""

    def make_20(first: int) -> list[tuple[int, int]]:
        answers = []
        for number in range(first, first + 20):
            with UninitializedSandbox("simpleguest") as uninitialized, uninitialized.evolve() as sandbox:
                answers.append((sandbox.call("GetStatic"), sandbox.call("AddToStatic", number)))
        return answers

    with ThreadPoolExecutor(10) as threads:
        answers = [answer for part in threads.map(make_20, range(1, 200, 20)) for answer in part]
    assert answers == [(0, number) for number in range(1, 201)]


@functools.cache
def tiny_guest() -> bytes:
    """Return a guest that initialises at once and then triple-faults at every call."""
    code = bytes.fromhex("488d050b000000 48c7c400d0ffff e76c 0f0b 0f0b")
    return write_elf([Load(0, code.ljust(0x1000, b"\xcc"), executable=True)])


def use_and_close() -> None:
    with UninitializedSandbox(tiny_guest()) as uninitialized, uninitialized.evolve() as sandbox:
        sandbox.snapshot()


def drop_without_closing() -> None:
    UninitializedSandbox(tiny_guest()).evolve().snapshot()


def use_one_drop_one() -> None:
    use_and_close()
    drop_without_closing()


def drop_before_evolving() -> None:
    UninitializedSandbox(tiny_guest()).snapshot()


def fail_to_initialise() -> None:
    guest = write_elf([Load(0, b"\x0f\x0b".ljust(0x1000, b"\xcc"), executable=True)])
    with pytest.raises(hyperlight.InitializeError):
        UninitializedSandbox(guest).evolve()


def fail_in_a_call() -> None:
    sandbox = UninitializedSandbox(tiny_guest()).evolve()
    with pytest.raises(hyperlight.GuestFailure):
        sandbox.call("Anything")


@pytest.fixture
def mappings_and_resources() -> Iterator[Callable[[], tuple[int, ...]]]:
    """Give a way to count descriptors, KVM and memfd mappings, threads, and all mappings."""

    def count() -> tuple[int, ...]:
        gc.collect()
        return (*process_resources(), len(Path("/proc/self/maps").read_text().splitlines()))

    yield count


ALL_MAPPINGS_MAY_GROW_BY = 20
"""The allocator of the C library maps arenas of its own."""


@pytest.mark.parametrize(
    ("life", "times"),
    [
        (use_one_drop_one, 500),
        (drop_before_evolving, 100),
        (fail_to_initialise, 100),
        (fail_in_a_call, 100),
    ],
)
def test_sandboxes_leak_nothing(
    life: Callable[[], None], times: int, mappings_and_resources: Callable[[], tuple[int, ...]]
) -> None:
    """Issue 2, item 5: 1,000 created and dropped, with and without ``close()``; some in worse states."""
    life()
    *before, mappings_before = mappings_and_resources()
    for _ in range(rounds(times)):
        life()
    *after, mappings_after = mappings_and_resources()
    assert after == before
    assert mappings_after - mappings_before < ALL_MAPPINGS_MAY_GROW_BY


def test_dropped_sandbox_is_gone_without_the_garbage_collector() -> None:
    """No reference cycle keeps a VM alive until the next collection."""
    drop_without_closing()
    gc.collect()
    gc.disable()
    try:
        before = process_resources()
        drop_without_closing()
        fail_in_a_call()
        assert process_resources() == before
    finally:
        gc.enable()


def test_closing_in_another_thread_waits_for_the_call() -> None:
    inside, let_go = threading.Event(), threading.Event()

    def wait() -> Int:
        inside.set()
        let_go.wait()
        return Int(1)

    with UninitializedSandbox("simpleguest") as uninitialized:
        uninitialized.register("Wait", wait)
        sandbox = uninitialized.evolve()
    with ThreadPoolExecutor(2) as threads:
        call = threads.submit(sandbox.call, "TryCallHost", "Wait")
        inside.wait()
        closed = threads.submit(sandbox.close)
        let_go.set()
        assert call.result() == 1
        closed.result()
    with pytest.raises(hyperlight.SandboxClosed):
        sandbox.call("GetStatic")


def test_evolve_uses_the_uninitialised_sandbox_up() -> None:
    uninitialized = UninitializedSandbox(tiny_guest())
    uninitialized.evolve().close()
    for use in (uninitialized.evolve, uninitialized.snapshot):
        with pytest.raises(hyperlight.SandboxClosed):
            use()


def test_guest_file_may_vanish_once_the_sandbox_exists(tmp_path: Path) -> None:
    copy = tmp_path / "guest"
    copy.write_bytes(SIMPLEGUEST.read_bytes())
    with UninitializedSandbox(copy) as uninitialized:
        os.unlink(copy)
        with uninitialized.evolve() as sandbox:
            assert echoes(sandbox)
