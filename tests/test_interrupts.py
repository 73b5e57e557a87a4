"""InterruptHandle.kill(): ends the call in progress on its sandbox, and never any other."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import tinyguest
from conftest import require
from tinyguest import ECHO, MEET_AND_SPIN, MEET_FOR_EVER, MEET_ONCE, SPIN, WORK, sandbox_meeting, snapshot_of

from hyperlight import (
    ExecutionCanceledByHost,
    HyperlightError,
    Long,
    MultiUseSandbox,
    PoisonedSandbox,
    SandboxConfiguration,
    Snapshot,
    metrics,
)

pytestmark = [require("kvm"), require("gcc")]


@pytest.fixture(params=[False, True], ids=["cpl0", "cpl3"])
def snapshot(request: pytest.FixtureRequest) -> Snapshot:
    """Run a test where KVM may emulate the guest, and where the processor always runs it."""
    return snapshot_of(request.param)


@pytest.fixture
def helper() -> Iterator[ThreadPoolExecutor]:
    """One more thread, which the test waits for."""
    with ThreadPoolExecutor(1) as executor:
        yield executor


def echoes(sandbox: MultiUseSandbox) -> bool:
    return bool(sandbox.call(ECHO, Long(7)) == 7)


# -- one call ------------------------------------------------------------------------------


def test_kill_during_a_host_call_ends_the_call_after_it(snapshot: Snapshot, helper: ThreadPoolExecutor) -> None:
    """B.8/150: the host function runs to its end, the guest is not entered again; restore clears."""
    entered, killed = threading.Event(), threading.Event()
    steps = []

    def meet() -> None:
        entered.set()
        assert killed.wait(60)
        steps.append("the host function returns")

    with sandbox_meeting(snapshot, meet) as sandbox:
        handle = sandbox.interrupt_handle()

        def kill() -> bool:
            assert entered.wait(60)
            has_killed = handle.kill()
            steps.append("kill returned")
            killed.set()
            return has_killed

        killer = helper.submit(kill)
        with pytest.raises(ExecutionCanceledByHost, match="^Execution was cancelled by the host.$"):
            sandbox.call(MEET_FOR_EVER)
        assert killer.result()
        assert steps == ["kill returned", "the host function returns"]  # and it is not called a second time
        assert sandbox.poisoned
        with pytest.raises(PoisonedSandbox):
            echoes(sandbox)
        sandbox.restore(snapshot)
        assert echoes(sandbox)


def test_host_function_may_kill_the_call_that_it_serves(snapshot: Snapshot) -> None:
    handles = []
    with sandbox_meeting(snapshot, lambda: handles[0].kill()) as sandbox:
        handles.append(sandbox.interrupt_handle())
        with pytest.raises(ExecutionCanceledByHost):
            sandbox.call(MEET_ONCE)
        sandbox.restore(snapshot)
        assert echoes(sandbox)


def test_endless_guest_is_cancelled_and_the_handle_outlives_the_sandbox(
    snapshot: Snapshot, helper: ThreadPoolExecutor
) -> None:
    """B.8/151."""
    spinning = threading.Event()
    before = metrics.guest_cancellations.value()
    with sandbox_meeting(snapshot, spinning.set) as sandbox:
        handle = sandbox.interrupt_handle()
        killer = helper.submit(lambda: spinning.wait(60) and handle.kill())
        with pytest.raises(ExecutionCanceledByHost) as failure:
            sandbox.call(MEET_AND_SPIN)
        assert killer.result()
        assert metrics.guest_cancellations.value() == before + 1
        assert tinyguest.CODE.start <= failure.value.registers["rip"] < tinyguest.CODE.stop
        sandbox.restore(snapshot)
        assert echoes(sandbox)
        assert not handle.dropped()
    assert handle.dropped()
    assert not handle.kill()


def test_kill_in_advance_has_no_effect(snapshot: Snapshot) -> None:
    """B.8/152: it says so, and neither the next call nor the one after notices."""
    with sandbox_meeting(snapshot) as sandbox:
        handle = sandbox.interrupt_handle()
        assert not handle.kill()
        assert echoes(sandbox)
        assert not handle.kill()
        assert not handle.kill()
        assert sandbox.call(MEET_ONCE) == 1
        assert echoes(sandbox)
        sandbox.restore(snapshot)
        assert not handle.kill()
        assert echoes(sandbox)


def test_guest_that_spams_a_host_function_is_cancelled(snapshot: Snapshot, helper: ThreadPoolExecutor) -> None:
    """B.8/157."""
    calls = itertools.count()
    busy = threading.Event()

    def meet() -> None:
        if next(calls) == 100:
            busy.set()

    with sandbox_meeting(snapshot, meet) as sandbox:
        handle = sandbox.interrupt_handle()
        killer = helper.submit(lambda: busy.wait(60) and handle.kill())
        with pytest.raises(ExecutionCanceledByHost):
            sandbox.call(MEET_FOR_EVER)
        assert killer.result()
        assert next(calls) > 100


# -- the targeted sandbox, and no other ----------------------------------------------------


class Trio:
    """Three sandboxes that take turns on one thread; only the second is ever the target."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.first, self.target, self.last = (sandbox_meeting(snapshot) for _ in range(3))
        self.cancelled = self.completed = 0

    def round(self) -> None:
        assert echoes(self.first)
        try:
            assert self.target.call(WORK, Long(100_000)) == 100_000
            self.completed += 1
        except ExecutionCanceledByHost:
            self.cancelled += 1
            self.target.restore(self.snapshot)
        assert echoes(self.last)

    def __enter__(self) -> Trio:
        return self

    def __exit__(self, *exception: object) -> None:
        for sandbox in (self.first, self.target, self.last):
            sandbox.close()


ROUNDS = 500


def test_only_the_targeted_sandbox_of_a_thread_is_cancelled(snapshot: Snapshot, helper: ThreadPoolExecutor) -> None:
    """B.8/153: one kill in each of 500 rounds, at any moment of the round."""
    start = threading.Barrier(2)

    def kill_once_a_round(kill: Callable[[], bool]) -> int:
        return sum(kill() for _ in range(ROUNDS) if start.wait(60) >= 0)

    with Trio(snapshot) as trio:
        killer = helper.submit(kill_once_a_round, trio.target.interrupt_handle().kill)
        for _ in range(ROUNDS):
            start.wait(60)
            trio.round()
        assert trio.cancelled <= killer.result()
        assert trio.cancelled + trio.completed == ROUNDS


def test_only_the_targeted_sandbox_is_cancelled_by_a_free_running_killer(
    snapshot: Snapshot, helper: ThreadPoolExecutor
) -> None:
    """B.8/154."""
    done = threading.Event()

    def kill_all_the_time(kill: Callable[[], bool]) -> int:
        return sum(kill() for _ in iter(done.is_set, True))

    with Trio(snapshot) as trio:
        killer = helper.submit(kill_all_the_time, trio.target.interrupt_handle().kill)
        try:
            for _ in range(ROUNDS):
                trio.round()
        finally:
            done.set()
        assert trio.cancelled <= killer.result()
        assert trio.cancelled + trio.completed == ROUNDS
        assert echoes(trio.target)


def test_sandbox_that_moved_to_another_thread_is_killed_there(snapshot: Snapshot, helper: ThreadPoolExecutor) -> None:
    """B.8/155: both sandboxes began on this thread; a kill hits its own target where it runs now."""
    moved_spins, left_spins = threading.Event(), threading.Event()
    with sandbox_meeting(snapshot, moved_spins.set) as moved, sandbox_meeting(snapshot, left_spins.set) as left:
        assert echoes(moved) and echoes(left)
        kill_moved, kill_left = moved.interrupt_handle().kill, left.interrupt_handle().kill

        def kill_both() -> tuple[bool, bool, bool]:
            assert moved_spins.wait(60) and left_spins.wait(60)
            first = kill_moved()
            assert isinstance(call_that_moved.exception(), ExecutionCanceledByHost)
            left_is_alive = left.interrupt_handle()._thread == this_thread
            return first, left_is_alive, kill_left()

        this_thread = threading.get_ident()
        with ThreadPoolExecutor(1) as other:
            call_that_moved = other.submit(moved.call, MEET_AND_SPIN)
            killer = helper.submit(kill_both)
            with pytest.raises(ExecutionCanceledByHost):
                left.call(MEET_AND_SPIN)
        assert killer.result() == (True, True, True)
        for sandbox in (moved, left):
            sandbox.restore(snapshot)
            assert echoes(sandbox)


# -- the signal ----------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 5])
def test_call_that_is_entered_again_at_once_is_cancelled_anew(
    snapshot: Snapshot, helper: ThreadPoolExecutor, offset: int
) -> None:
    """B.8/156: three times, each by its own kill; there is no retry whose delay could matter."""
    spinning: threading.Barrier = threading.Barrier(2)
    config = SandboxConfiguration(interrupt_vcpu_sigrtmin_offset=offset)

    def kill_three_times(kill: Callable[[], bool]) -> list[bool]:
        return [kill() for _ in range(3) if spinning.wait(60) >= 0]

    with sandbox_meeting(snapshot, lambda: spinning.wait(60), config) as sandbox:
        killer = helper.submit(kill_three_times, sandbox.interrupt_handle().kill)
        for _ in range(3):
            with pytest.raises(ExecutionCanceledByHost):
                sandbox.call(MEET_AND_SPIN)
            sandbox.restore(snapshot)
        assert killer.result() == [True] * 3
        assert echoes(sandbox)


@pytest.mark.parametrize("offset", [-1, 31, 1000])
def test_signal_that_does_not_exist_is_refused(offset: int) -> None:
    with pytest.raises(HyperlightError, match="SIGRTMIN"):
        SandboxConfiguration(interrupt_vcpu_sigrtmin_offset=offset)


def test_many_killers_of_one_call_agree(snapshot: Snapshot) -> None:
    """Each of eight threads hits the call in progress; what they leave behind hits nothing."""
    killers = 8
    spinning = threading.Barrier(killers + 1)
    with sandbox_meeting(snapshot, lambda: spinning.wait(60)) as sandbox, ThreadPoolExecutor(killers) as pool:
        kill = sandbox.interrupt_handle().kill
        for _ in range(20):
            results = [pool.submit(lambda: spinning.wait(60) >= 0 and kill()) for _ in range(killers)]
            with pytest.raises(ExecutionCanceledByHost):
                sandbox.call(MEET_AND_SPIN)
            outcomes = [result.result() for result in results]  # all of them: a late one may hit what follows
            assert any(outcomes)
            sandbox.restore(snapshot)
            assert echoes(sandbox)


def test_close_waits_for_the_call_that_another_thread_kills(snapshot: Snapshot, helper: ThreadPoolExecutor) -> None:
    spinning = threading.Event()
    sandbox = sandbox_meeting(snapshot, spinning.set)
    call = helper.submit(sandbox.call, MEET_AND_SPIN)
    assert spinning.wait(60)
    assert sandbox.interrupt_handle().kill()
    sandbox.close()
    assert isinstance(call.exception(), ExecutionCanceledByHost)
    assert sandbox.interrupt_handle().dropped()


def test_spin_without_a_host_call_is_cancelled(snapshot: Snapshot, helper: ThreadPoolExecutor) -> None:
    """The first kill that finds the call in progress ends it, whether the guest was entered or not."""
    with sandbox_meeting(snapshot) as sandbox:
        kill = sandbox.interrupt_handle().kill
        killer = helper.submit(lambda: any(iter(kill, object())))
        with pytest.raises(ExecutionCanceledByHost):
            sandbox.call(SPIN)
        assert killer.result()
