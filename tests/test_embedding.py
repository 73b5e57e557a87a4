"""What a program does around its sandboxes: threads that block signals, handlers, recursion, garbage, exit."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import pytest
from conftest import REPOSITORY, require, rounds
from tinyguest import ADD, ECHO, MEET_AND_SPIN, MEET_ONCE, WORK, sandbox_meeting, snapshot_of

from hyperlight import (
    ExecutionCanceledByHost,
    GuestFunctionCallAlreadyInProgress,
    HyperlightError,
    Long,
    MultiUseSandbox,
    PoisonedSandbox,
    SandboxClosed,
    SandboxStatus,
    Snapshot,
)

pytestmark = [require("kvm"), require("gcc")]


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return snapshot_of(True)


@pytest.fixture
def sandbox(snapshot: Snapshot) -> Iterator[MultiUseSandbox]:
    with sandbox_meeting(snapshot) as fresh:
        yield fresh


# -- threads -------------------------------------------------------------------------------


def test_kill_reaches_a_thread_that_blocks_all_signals(snapshot: Snapshot) -> None:
    """Programs block them in their workers, so that handlers run in the main thread."""
    spinning = threading.Event()

    def call_for_ever() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        with pytest.raises(ExecutionCanceledByHost):
            sandbox.call(MEET_AND_SPIN)

    with sandbox_meeting(snapshot, spinning.set) as sandbox, ThreadPoolExecutor(1) as worker:
        calling = worker.submit(call_for_ever)
        assert spinning.wait(60)
        assert sandbox.interrupt_handle().kill()
        calling.result()


def test_close_among_calls_of_other_threads(snapshot: Snapshot) -> None:
    """Every call has its answer or is refused; that all of them close the sandbox makes no difference."""
    threads = 10

    def call_until_closed(start: threading.Barrier, sandbox: MultiUseSandbox) -> int:
        start.wait(60)
        for answered in range(5):
            try:
                assert sandbox.call(ECHO, Long(answered + 1)) == answered + 1
            except SandboxClosed:
                return answered
        sandbox.close()
        return 5

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds(50)):
            start, sandbox = threading.Barrier(threads), sandbox_meeting(snapshot)
            counts = [pool.submit(call_until_closed, start, sandbox) for _ in range(threads)]
            assert 5 in [count.result() for count in counts]
            with pytest.raises(SandboxClosed):
                sandbox.call(ECHO, Long(1))


def test_everything_at_once_on_one_sandbox(snapshot: Snapshot) -> None:
    """Eight threads call, kill, snapshot, restore, map and dump at random: refusals are all that may come of it."""
    threads, steps = 8, rounds(300)
    with sandbox_meeting(snapshot) as sandbox:
        taken = [snapshot]

        def add() -> None:
            with contextlib.suppress(PoisonedSandbox, ExecutionCanceledByHost):
                sandbox.call(ADD, Long(1))

        def work() -> None:
            with contextlib.suppress(PoisonedSandbox, ExecutionCanceledByHost):
                assert sandbox.call(WORK, Long(100_000)) == 100_000

        def take() -> None:
            with contextlib.suppress(PoisonedSandbox):
                taken.append(sandbox.snapshot())

        def map_file() -> None:
            with contextlib.suppress(PoisonedSandbox, HyperlightError):
                sandbox.map_file_cow(__file__, 0x1_0000_0000)

        uses: list[Callable[[], object]] = [add, add, work, take, map_file, sandbox.interrupt_handle().kill]

        def use_all(seed: int) -> None:
            choices = random.Random(seed)
            uses_and_restore = [*uses, lambda: sandbox.restore(choices.choice(taken))]
            for _ in range(steps):
                choices.choice(uses_and_restore)()

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(use_all, range(threads)))
        sandbox.restore(snapshot)
        assert sandbox.call(ADD, Long(1)) == 1


def test_garbage_with_sandboxes_is_collected_on_any_thread(snapshot: Snapshot, no_leaks: None) -> None:
    """Cycles that hold sandboxes go whenever any thread's collector comes by, in the middle of another's call."""

    class Owner:
        def __init__(self) -> None:
            self.sandbox = sandbox_meeting(snapshot, self.meet)

        def meet(self) -> None:
            pass

    def litter(number: int) -> None:
        for count in range(10):
            owner = Owner()
            assert owner.sandbox.call(MEET_ONCE) == 1
            assert owner.sandbox.call(ECHO, Long(number + count + 1)) == number + count + 1

    thresholds = gc.get_threshold()
    gc.set_threshold(50, 2, 2)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(litter, range(rounds(20))))
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()


# -- host functions ------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["close", "restore", "snapshot", "kill", "drop"])
def test_host_function_does_what_it_likes_with_another_sandbox(snapshot: Snapshot, use: str) -> None:
    others = [sandbox_meeting(snapshot)]
    uses: dict[str, Callable[[], object]] = {
        "close": others[0].close,
        "restore": lambda: others[0].restore(snapshot),
        "snapshot": lambda: others[0].snapshot(),
        "kill": others[0].interrupt_handle().kill,
        "drop": others.clear,
    }
    with sandbox_meeting(snapshot, uses.pop(use)) as sandbox:
        del uses
        assert sandbox.call(MEET_ONCE) == 1
        assert sandbox.call(ECHO, Long(9)) == 9
    for other in others:
        other.close()


def test_host_functions_call_through_30_sandboxes(snapshot: Snapshot) -> None:
    """Each asks the next; the last asks the first, which refuses, and so it goes back all the way."""
    count = 30
    sandboxes: list[MultiUseSandbox] = []
    refusals = []

    def ask(number: int) -> None:
        try:
            assert sandboxes[(number + 1) % count].call(MEET_ONCE) == 1
        except GuestFunctionCallAlreadyInProgress as refusal:
            refusals.append(refusal)

    with contextlib.ExitStack() as undo:
        for number in range(count):
            sandboxes.append(undo.enter_context(sandbox_meeting(snapshot, lambda number=number: ask(number))))
        assert sandboxes[0].call(MEET_ONCE) == 1
        assert len(refusals) == 1
        assert all(sandbox.call(ECHO, Long(3)) == 3 for sandbox in sandboxes)


@pytest.mark.parametrize("name", [ECHO, MEET_ONCE])
def test_recursion_that_ends_somewhere_in_a_call(snapshot: Snapshot, name: str) -> None:
    """At every depth of the library in turn, down to the last frame."""
    arguments = (Long(1),) if name == ECHO else ()
    outcomes = set()

    def go_down(sandbox: MultiUseSandbox, frames: int) -> None:
        if frames > 0:
            go_down(sandbox, frames - 1)
        else:
            sandbox.call(name, *arguments)

    with sandbox_meeting(snapshot) as sandbox, ThreadPoolExecutor(1) as other_thread:
        sandbox.call(name, *arguments)
        limit = sys.getrecursionlimit()
        for frames in range(limit - 200, limit):
            try:
                go_down(sandbox, frames)
            except (RecursionError, ctypes.ArgumentError) as error:  # ctypes puts its own around what its arguments raise
                assert "RecursionError" in repr(error)
                outcomes.add(sandbox.status)
            except HyperlightError as error:  # it came in a host function's frame, which is the guest's to handle
                outcomes.add(type(error))
            assert not sandbox.interrupt_handle().kill()
            other_thread.submit(sandbox.restore, snapshot).result(60)
            assert sandbox.call(ADD, Long(1)) == 1
    assert {SandboxStatus.READY, SandboxStatus.POISONED} <= outcomes


# -- signals -------------------------------------------------------------------------------


def test_handler_of_a_signal_may_use_another_sandbox_and_not_the_interrupted_one(snapshot: Snapshot) -> None:
    refused = []
    with sandbox_meeting(snapshot) as busy, sandbox_meeting(snapshot) as other:

        def handle(_number: int, _frame: FrameType | None) -> None:
            nonlocal count
            count += 1
            assert other.call(ADD, Long(1)) == count
            try:
                busy.call(ECHO, Long(1))
            except GuestFunctionCallAlreadyInProgress:
                refused.append(count)
            signal.setitimer(signal.ITIMER_REAL, 0.001)  # the next, now that this one is done

        count = 0
        previous = signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        try:
            for _ in range(20):
                assert busy.call(WORK, Long(20_000_000)) == 20_000_000
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert refused
        assert busy.status is SandboxStatus.READY
        assert other.call(ADD, Long(1)) == count + 1


# -- the end of the process ----------------------------------------------------------------

PRELUDE = """
import atexit, sys, threading
sys.path[:0] = [{repository!r}, {tests!r}]
import hyperlight
from tinyguest import *
met = threading.Event()
sandbox = sandbox_meeting(snapshot_of(True), met.set)

def call_for_ever():
    try:
        sandbox.call(MEET_AND_SPIN)
    except hyperlight.ExecutionCanceledByHost:
        print("canceled", flush=True)

def start(daemon):
    threading.Thread(target=call_for_ever, daemon=daemon).start()
    met.wait()
"""
EXITS = {
    "a daemon's guest runs": ("start(True)", 0, ""),
    "a daemon's guest runs, and sys.exit": ("start(True); sys.exit(3)", 3, ""),
    "a daemon's guest runs, and an error": ("start(True); raise SystemExit('bye')", 1, ""),
    "a daemon is in a host function": (
        "sandbox = sandbox_meeting(snapshot_of(True), lambda: (met.set(), threading.Event().wait())); start(True)",
        0,
        "",
    ),
    "the last thread's guest is killed at exit": (
        "threading._register_atexit(sandbox.interrupt_handle().kill); start(False)",
        0,
        "canceled\n",
    ),
    "nothing was ever closed": ("everything = [sandbox_meeting(snapshot_of(True)) for _ in range(20)]", 0, ""),
    "a call from atexit": ("atexit.register(lambda: print(sandbox.call(ECHO, hyperlight.Long(4))))", 0, "4\n"),
    "a sandbox in a cycle": ("sandbox.me = sandbox; del sandbox", 0, ""),
    "a debugger could come": (
        "config = hyperlight.SandboxConfiguration(guest_debug_info=hyperlight.DebugInfo(wait=False))\n"
        "debugged = sandbox_meeting(snapshot_of(True), config=config)",
        0,
        "",
    ),
    "a debugger could come to a daemon's guest": (
        "config = hyperlight.SandboxConfiguration(guest_debug_info=hyperlight.DebugInfo(wait=False))\n"
        "sandbox = sandbox_meeting(snapshot_of(True), met.set, config); start(True)",
        0,
        "",
    ),
    "a timer ticks": ("sandbox = sandbox_meeting(snapshot_of(True), config=hyperlight.SandboxConfiguration(hardware_timer=True))", 0, ""),
}


@pytest.mark.parametrize("name", EXITS)
def test_process_ends_whatever_its_sandboxes_do(name: str) -> None:
    """At once, without a word, and with the status that it wants."""
    code, status, output = EXITS[name]
    prelude = PRELUDE.format(repository=str(REPOSITORY), tests=str(REPOSITORY / "tests"))
    command = [sys.executable, "-X", "dev", "-c", prelude + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (status, output)
    assert done.stderr in ("", "bye\n")
