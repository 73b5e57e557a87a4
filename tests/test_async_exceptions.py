"""Ctrl-C at every point of every operation: afterwards the sandbox is ready, poisoned or closed, and works as such.

CPython delivers a signal, or an exception that another thread sends, where a Python function begins and where
one in C returns (and at jumps back). A profile function is called at the same points, so that raising from one at
the first, the second, the third ... of them tries all there are, without a clock and without luck.
"""

from __future__ import annotations

import gc
import itertools
import logging
import random
import resource
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from conftest import process_resources, require, rounds
from tinyguest import ADD, ECHO, MEET_AND_SPIN, MEET_ONCE, SPIN, sandbox_meeting, snapshot_of, tiny_guest

import hyperlight
from hyperlight import (
    ExecutionCanceledByHost,
    GuestFailure,
    Long,
    MultiUseSandbox,
    SandboxConfiguration,
    SandboxStatus,
    Snapshot,
    UninitializedSandbox,
)

pytestmark = [
    require("kvm"),
    require("gcc"),
    # A file that is interrupted between its birth and its first name complains when it goes, and so does a generator.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Interrupted(BaseException):
    """What Ctrl-C raises, but nobody else does."""


def interrupt() -> None:
    raise Interrupted


def disturbed_at(point: int, operation: Callable[[], object], disturb: Callable[[], object]) -> bool:
    """Run *operation*, call *disturb* at the *point*-th opportunity, and return whether there was one."""
    passed = 0

    def count(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal passed
        if event in ("call", "c_return") and not is_in_finalizer(frame):
            passed += 1
            if passed == point:
                sys.setprofile(None)
                disturb()

    try:
        sys.setprofile(count)
        operation()
    finally:
        sys.setprofile(None)
    return passed >= point


def is_in_finalizer(frame: FrameType | None) -> bool:
    """Whether CPython would swallow an exception here: out of finalizers and callbacks of weak references."""
    while frame is not None:
        is_callback = frame.f_code is weakref.finalize.__call__.__code__ and frame.f_locals["_"] is not None
        if is_callback or frame.f_code.co_name in ("__del__", "_remove"):
            return True
        frame = frame.f_back
    return False


def interrupt_everywhere(
    operation: Callable[[], object], check: Callable[[], object] = lambda: None, *, may_lose: int = 0, step: int = 1
) -> None:
    """Run *operation* as often as it takes to interrupt it everywhere, each time followed by *check*.

    With a *step*, only every so many-th opportunity is taken; on an emulated processor, every 20th of those.

    All together may lose *may_lose* descriptors and as many mappings: those that were interrupted between what
    the kernel did and the line that takes notice. Nothing that is written in Python can do better.
    """
    step *= 20 // rounds(20)
    gc.collect()
    before = process_resources()
    for point in itertools.count(1, step):
        try:
            was_disturbed = disturbed_at(point, operation, interrupt)
        except Interrupted:
            was_disturbed = True
        check()
        if not was_disturbed:
            break
    assert point > 10
    gc.collect()
    lost = [now - then for now, then in zip(process_resources(), before, strict=True)]
    looks = 1  # at the map of its pages, as a sandbox that was restored may do, or not yet: by a descriptor of its own
    assert -looks <= lost[0] <= may_lose and 0 <= lost[1] <= may_lose and lost[2] == 0


@pytest.fixture(scope="module", autouse=True)
def guests() -> None:
    """Keep the snapshots that all tests share out of what one test leaves behind."""
    for user_mode in (False, True):
        snapshot_of(user_mode)


@pytest.fixture(autouse=True)
def no_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep `logging` out: its handlers take their lock before a ``try``, and one that stays taken stops later tests."""
    for name in ("hyperlight", "hyperlight_guest"):
        monkeypatch.setattr(logging.getLogger(name), "disabled", True)


@pytest.fixture
def other_thread() -> Iterator[ThreadPoolExecutor]:
    """A thread that is not the one which was interrupted: what that did not let go of, this one does not get."""
    with ThreadPoolExecutor(1) as executor:
        executor.submit(int).result()
        yield executor


class Subject:
    """A sandbox whose counter tells what has happened to it."""

    def __init__(self, snapshot: Snapshot, other_thread: ThreadPoolExecutor) -> None:
        self.snapshot = snapshot
        self.sandbox = sandbox_meeting(snapshot)
        self.other_thread = other_thread
        self.value = 0
        self.steps: tuple[int, ...] = (0,)
        """By how much an interrupted operation may have changed the counter."""

    def add(self) -> None:
        self.sandbox.call(ADD, Long(1000))

    def check(self) -> None:
        """The sandbox is free, ready with its counter as it was or as it should be, or to be restored."""
        assert not self.sandbox.interrupt_handle().kill()
        self.value = self.other_thread.submit(self.usable_counter).result(60)

    def usable_counter(self) -> int:
        if self.sandbox.poisoned:
            self.restore()
        assert self.sandbox.status is SandboxStatus.READY
        counter = int(self.sandbox.call(ADD, Long(1)))
        assert counter - 1 - self.value in self.steps
        return counter

    def restore(self) -> None:
        self.sandbox.restore(self.snapshot)
        self.value = 0


@pytest.fixture(params=[True], ids=["cpl3"])
def subject(request: pytest.FixtureRequest, other_thread: ThreadPoolExecutor) -> Iterator[Subject]:
    subject = Subject(snapshot_of(request.param), other_thread)
    with subject.sandbox:
        subject.restore()  # the first one opens the map of pages, which then stays open
        yield subject


@pytest.mark.parametrize("subject", [False, True], ids=["cpl0", "cpl3"], indirect=True)
def test_call(subject: Subject) -> None:
    subject.steps = (0, 1000)
    interrupt_everywhere(subject.add, subject.check)


def test_call_with_a_host_function(subject: Subject) -> None:
    def meet() -> None:
        assert subject.sandbox.call(MEET_ONCE) == 1

    interrupt_everywhere(meet, subject.check)


@pytest.mark.parametrize("subject", [False], ids=["cpl0"], indirect=True)
def test_failing_call(subject: Subject) -> None:
    def fail() -> None:
        with pytest.raises(GuestFailure):
            subject.sandbox.call("?")

    interrupt_everywhere(fail, subject.check)


def test_restore_of_what_the_sandbox_came_from(subject: Subject) -> None:
    def add_and_restore() -> None:
        subject.add()
        subject.sandbox.restore(subject.snapshot)
        assert subject.sandbox.snapshot() is subject.snapshot
        subject.value = 0

    subject.steps = (0, 1000, -subject.value)
    interrupt_everywhere(add_and_restore, lambda: (subject.check(), subject.restore()))


class Turns:
    """Snapshots that take turns in one sandbox: other memory, another guest, another privilege each time."""

    def __init__(self, subject: Subject) -> None:
        subject.add()
        self.subject = subject
        values = [(0, subject.snapshot), (1000, subject.sandbox.snapshot()), (0, snapshot_of(False))]
        self._turns = itertools.cycle(values)
        self._next()

    def _next(self) -> None:
        self.value, self.snapshot = next(self._turns)

    def restore(self) -> None:
        self.subject.sandbox.restore(self.snapshot)
        assert self.subject.sandbox.snapshot() is self.snapshot

    def check(self) -> None:
        assert not self.subject.sandbox.interrupt_handle().kill()
        self.subject.other_thread.submit(self._check_counter).result(60)
        self._next()

    def _check_counter(self) -> None:
        sandbox = self.subject.sandbox
        if sandbox.poisoned:
            self.restore()
        assert sandbox.call(ADD, Long(1)) in (1, 1001, 2, 1002)  # the second pair where nothing has happened yet
        self.restore()
        assert sandbox.call(ADD, Long(1)) == self.value + 1


def test_restore_of_another_snapshot(subject: Subject) -> None:
    turns = Turns(subject)
    interrupt_everywhere(turns.restore, turns.check, may_lose=8, step=2)


def test_restore_of_so_many_pages_that_they_are_discarded() -> None:
    config = SandboxConfiguration(heap_size=4 << 20, scratch_size=16 << 20)
    with UninitializedSandbox("simpleguest", config).evolve() as sandbox:
        snapshot = sandbox.snapshot()

        def check() -> None:
            sandbox.restore(snapshot)
            assert sandbox.call("Echo", "as ever", returns=str) == "as ever"
            sandbox.call("CallMalloc", 2 << 20, returns=int)

        check()
        interrupt_everywhere(lambda: sandbox.restore(snapshot), check, may_lose=2)


def test_core_dump_right_after_a_restore(subject: Subject, tmp_path: Path) -> None:
    """A restore leaves registers to the next entry; whoever wants them before must not lose them."""
    turns = Turns(subject)

    def restore_and_dump() -> None:
        turns.restore()
        assert subject.sandbox.generate_crashdump_to_dir(tmp_path)

    interrupt_everywhere(restore_and_dump, turns.check, may_lose=20, step=7)


def test_snapshot(subject: Subject) -> None:
    def take() -> None:
        subject.add()
        subject.sandbox.snapshot()

    def check() -> None:
        subject.check()
        with MultiUseSandbox.from_snapshot(subject.sandbox.snapshot(), subject.sandbox._functions) as other:
            assert other.call(ADD, Long(1)) == subject.value + 1

    subject.steps = (0, 1000)
    interrupt_everywhere(take, check, may_lose=4 * 2, step=3)  # of two memory files, a new and a cached one


def test_mapping_a_file(subject: Subject, tmp_path: Path) -> None:
    """Whatever a VM has is known: the same place can be mapped again after a restore, and the file is let go of."""
    file, place = tmp_path / "file", 0x1_0000_0000
    file.write_bytes(b"content")

    def map_file() -> None:
        subject.sandbox.map_file_cow(file, place)

    def check() -> None:
        for _ in range(2):
            subject.other_thread.submit(subject.restore).result(60)
            guest = subject.sandbox._guest
            assert [gpa for gpa, _, _ in guest._ram.slots()] == list(guest.vm._slots)
            subject.check()
            map_file()
        subject.restore()
        subject.check()

    interrupt_everywhere(map_file, check, may_lose=8)
    assert Path("/proc/self/maps").read_text().count(str(file)) <= 2


def test_registering_a_host_function(subject: Subject) -> None:
    interrupt_everywhere(lambda: subject.sandbox.register("New", lambda: None, (), None), subject.check)


def test_close(other_thread: ThreadPoolExecutor) -> None:
    """What an interrupted close leaves, the next one takes."""
    subjects = [sandbox_meeting(snapshot_of(True))]

    def close() -> None:
        subjects[0].close()

    def check() -> None:
        other_thread.submit(close).result(60)
        assert subjects[0].interrupt_handle().dropped()
        with pytest.raises(hyperlight.SandboxClosed):
            subjects[0].call(ECHO, Long(1))
        subjects[0] = sandbox_meeting(snapshot_of(True))

    interrupt_everywhere(close, check, may_lose=8)
    close()


def test_creation_from_a_snapshot() -> None:
    interrupt_everywhere(lambda: sandbox_meeting(snapshot_of(True)).close(), may_lose=12, step=5)


def test_creation_from_an_elf() -> None:
    guest = tiny_guest(user_mode=True)

    def create() -> None:
        with UninitializedSandbox(guest) as uninitialized, uninitialized.evolve() as sandbox:
            assert sandbox.call(ECHO, Long(5)) == 5

    create()
    interrupt_everywhere(create, may_lose=12, step=17)


# -- signals whose handlers do something -----------------------------------------------------


def test_handler_of_a_signal_may_kill_at_any_point_of_a_call(subject: Subject) -> None:
    """The usual way to limit a call's time: SIGALRM's handler kills, in the thread whose call it ends."""
    kill = subject.sandbox.interrupt_handle().kill
    killed = 0
    for point in itertools.count(1):
        answers: list[bool] = []
        try:
            if not disturbed_at(point, subject.add, lambda: answers.append(kill())):  # noqa: B023
                break
            subject.value += 1000
        except ExecutionCanceledByHost:
            assert answers == [True]
            killed += 1
        subject.check()
    assert killed > 1


@pytest.mark.parametrize("is_again", [False, True], ids=["raises", "kills"])
def test_kill_that_a_signal_interrupts(subject: Subject, is_again: bool) -> None:
    """The handler may kill as well; where it raises, a second kill does what the first left undone."""
    spinning = threading.Event()

    def kill_disturbed(point: int) -> bool:
        """Return whether `kill` was disturbed at *point*."""
        assert spinning.wait(60)
        spinning.clear()
        try:
            return disturbed_at(point, kill, kill if is_again else interrupt)
        except Interrupted:
            kill()
            return True

    with sandbox_meeting(subject.snapshot, spinning.set) as sandbox:
        kill = sandbox.interrupt_handle().kill
        for point in itertools.count(1):
            killer = subject.other_thread.submit(kill_disturbed, point)
            with pytest.raises(ExecutionCanceledByHost):
                sandbox.call(MEET_AND_SPIN)
            sandbox.restore(subject.snapshot)
            if not killer.result():
                break
    assert point > 3


def test_kill_without_a_signal_to_spare_says_so_and_can_be_repeated(subject: Subject) -> None:
    spinning = threading.Event()
    limits = resource.getrlimit(resource.RLIMIT_SIGPENDING)

    def kill() -> tuple[str, bool]:
        assert spinning.wait(60)
        refusal = ""
        resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, limits[1]))
        try:
            handle.kill()
        except hyperlight.HyperlightError as error:
            refusal = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_SIGPENDING, limits)
        return refusal, handle.kill()

    with sandbox_meeting(subject.snapshot, spinning.set) as sandbox:
        handle = sandbox.interrupt_handle()
        killer = subject.other_thread.submit(kill)
        with pytest.raises(ExecutionCanceledByHost):
            sandbox.call(MEET_AND_SPIN)
        refusal, is_killed = killer.result()
    assert "RLIMIT_SIGPENDING" in refusal
    assert is_killed


def test_real_signals_at_random_moments(subject: Subject) -> None:
    """An alarm whose handler raises, during whatever comes: also in the kernel, where no profile function gets.

    It repeats, for the endless guest: an alarm in a finalizer is swallowed, and one between the interpreter's last
    look at signals and KVM_RUN is noticed at the next exit or signal.
    """
    choices = random.Random(3)

    def work() -> None:
        for _ in range(5):
            subject.add()
        choices.choice([subject.sandbox.snapshot, subject.restore, lambda: subject.sandbox.call(SPIN)])()

    def raise_interrupted(_number: int, _frame: FrameType | None) -> None:
        raise Interrupted

    previous = signal.signal(signal.SIGALRM, raise_interrupted)
    interruptions = 0
    try:
        for _ in range(rounds(500)):
            try:
                signal.setitimer(signal.ITIMER_REAL, choices.uniform(1e-5, 5e-3), 1)
                work()
                signal.setitimer(signal.ITIMER_REAL, 0)
                subject.restore()
            except Interrupted:
                interruptions += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            subject.other_thread.submit(subject.restore).result(60)
            subject.check()
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert interruptions > rounds(100)
