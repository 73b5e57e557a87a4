"""fork(): a sandbox stays with the process that made it; a snapshot goes with both."""

from __future__ import annotations

import gc
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import require
from tinyguest import ADD, ECHO, MEET_AND_SPIN, MEET_ONCE, sandbox_meeting, snapshot_of, tiny_guest

import hyperlight
from hyperlight import (
    DebugInfo,
    ExecutionCanceledByHost,
    HyperlightError,
    Long,
    MultiUseSandbox,
    SandboxClosed,
    SandboxConfiguration,
    UninitializedSandbox,
)

pytestmark = [
    require("kvm"),
    require("gcc"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),  # that threads and fork() go ill together
]


TIMED = SandboxConfiguration(hardware_timer=True)


def in_child(function: Callable[[], Any]) -> Any:
    """Fork, and return what *function* returns in the child; fail where it raises, or is not done in a minute."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        report(writer, function)
    os.close(writer)
    with open(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with status {status:#x}"
    result = pickle.loads(data)
    if isinstance(result, BaseException):
        raise result
    return result


def report(writer: int, function: Callable[[], Any]) -> None:
    """Write what *function* returns, or raises, and end the process, whatever happens."""
    signal.alarm(60)
    try:
        try:
            result = function()
        except BaseException as error:
            result = AssertionError(f"in the child: {error!r}")
        os.write(writer, pickle.dumps(result))
        os._exit(0)
    finally:
        os._exit(1)


@pytest.fixture
def sandbox() -> Iterator[MultiUseSandbox]:
    with sandbox_meeting(snapshot_of(True)) as fresh:
        assert fresh.call(ADD, Long(1)) == 1
        yield fresh


def kvm_descriptors() -> list[str]:
    """Return what this process has open of KVM, or mapped."""
    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if is_open(fd)]
    with open("/proc/self/maps") as maps:
        names += [line.split()[-1] for line in maps]
    return sorted(name for name in names if "kvm" in name)


def is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def refusal_of(use: Callable[[], object]) -> str:
    with pytest.raises(SandboxClosed) as caught:
        use()
    return str(caught.value)


def test_child_cannot_use_its_parents_sandbox() -> None:
    """Nor does it keep anything of it, least of all the page through which the vCPU gets its registers."""
    gc.collect()
    before = kvm_descriptors()

    def use() -> list[str]:
        assert kvm_descriptors() == before
        assert not sandbox.interrupt_handle().kill()
        assert sandbox.interrupt_handle().dropped()
        uses = [lambda: sandbox.call(ECHO, Long(1)), lambda: sandbox.restore(snapshot), sandbox.snapshot]
        refusals = [refusal_of(each) for each in uses]
        sandbox.close()
        return refusals

    with sandbox_meeting(snapshot_of(True)) as sandbox:
        assert sandbox.call(ADD, Long(1)) == 1
        snapshot = sandbox.snapshot()
        assert len(kvm_descriptors()) > len(before)
        assert all("forked" in refusal for refusal in in_child(use))
        assert sandbox.call(ADD, Long(1)) == 2
        sandbox.restore(snapshot)
        assert sandbox.call(ADD, Long(1)) == 2


def test_children_start_from_their_parents_snapshot(sandbox: MultiUseSandbox) -> None:
    """As servers do that fork their workers."""
    snapshot, functions = sandbox.snapshot(), sandbox._functions

    def work() -> list[int]:
        with MultiUseSandbox.from_snapshot(snapshot, functions) as own:
            counts = [own.call(ADD, Long(1)) for _ in range(3)]
            own.restore(snapshot)
            return [*counts, own.call(ADD, Long(1)), own.call(MEET_ONCE)]

    for _ in range(3):
        assert in_child(work) == [2, 3, 4, 2, 1]
    assert sandbox.call(ADD, Long(1)) == 2


def test_sandbox_that_has_no_vm_yet_may_evolve_on_both_sides() -> None:
    with UninitializedSandbox(tiny_guest(user_mode=True)) as uninitialized:

        def evolve() -> int:
            with uninitialized.evolve() as evolved:
                return int(evolved.call(ECHO, Long(5)))

        assert in_child(evolve) == 5
        assert evolve() == 5


def test_fork_while_another_thread_is_in_a_call(sandbox: MultiUseSandbox) -> None:
    """The child has the lock of a thread that it does not have, and the page of a vCPU that runs."""
    spinning = threading.Event()
    with sandbox_meeting(snapshot_of(True), spinning.set) as busy, ThreadPoolExecutor(1) as thread:
        call = thread.submit(busy.call, MEET_AND_SPIN)
        assert spinning.wait(60)

        def use() -> bool:
            busy.close()
            sandbox.close()
            refusal_of(lambda: busy.call(ECHO, Long(1)))
            return busy.interrupt_handle().kill()

        assert in_child(use) is False
        assert not call.done()
        assert busy.interrupt_handle().kill()
        assert isinstance(call.exception(), ExecutionCanceledByHost)
        busy.restore(snapshot_of(True))
        assert busy.call(ECHO, Long(3)) == 3


def test_host_function_that_forks() -> None:
    """The child comes back from it into a call that is its parent's: an error, and the parent gets its answer."""
    children: list[int] = []
    outcome: list[str] = []
    reader, writer = os.pipe()

    with sandbox_meeting(snapshot_of(True), lambda: children.append(os.fork())) as sandbox:
        try:
            answer = sandbox.call(MEET_ONCE)
        except BaseException as error:
            outcome.append(type(error).__name__ if isinstance(error, HyperlightError) else repr(error))
        if children == [0]:
            report(writer, lambda: (outcome, refusal_of(lambda: sandbox.call(ECHO, Long(1)))))
        os.close(writer)
        with open(reader, "rb") as pipe:
            (failure,), refusal = pickle.loads(pipe.read())
        assert os.waitpid(children[0], 0)[1] == 0
        assert not outcome
        assert answer == 1
        assert failure == "HyperlightError"
        assert "forked" in refusal
        assert sandbox.call(ECHO, Long(1)) == 1


@pytest.mark.parametrize("config", [SandboxConfiguration(guest_debug_info=DebugInfo(wait=False)), TIMED], ids=["debugger", "timer"])
def test_debugger_and_timer_stay_with_the_parent(config: SandboxConfiguration) -> None:
    """Both have threads, which the child lacks, and descriptors, which it must not use."""
    with sandbox_meeting(snapshot_of(True), config=config) as sandbox:

        def use() -> str:
            sandbox.close()
            return refusal_of(lambda: sandbox.call(ECHO, Long(1)))

        assert "forked" in in_child(use)
        assert sandbox.call(ECHO, Long(1)) == 1


def test_no_lock_of_another_thread_is_held_in_a_child(sandbox: MultiUseSandbox) -> None:
    """Metrics and dumps of all sandboxes work, whatever was going on at the moment of the fork."""
    counter = hyperlight.metrics.erroneous_vcpu_kicks
    locked, forked = threading.Event(), threading.Event()

    def hold() -> None:
        with counter._lock, hyperlight._live_sandboxes_lock, sandbox.interrupt_handle()._lock:
            locked.set()
            assert forked.wait(60)

    def use() -> bool:
        assert hyperlight.dump_all_sandboxes() == []
        sandbox.interrupt_handle().kill()
        counter.increment()
        return "erroneous" in hyperlight.metrics.render()

    with ThreadPoolExecutor(1) as thread:
        holding = thread.submit(hold)
        assert locked.wait(60)
        try:
            assert in_child(use)
        finally:
            forked.set()
        holding.result()
    assert sandbox.call(ECHO, Long(1)) == 1
