"""What this host must reach, measured in one run: each figure beside its floor in C, or beside what it is compared with.

    python3 tests/bench/targets.py [--seconds 3] [--json FILE] [--peer PYTHON]

Needs /dev/kvm and gcc. Samples of all sides are taken in turns. Up to three ratios are printed: of the medians, which the
target is about; of the first quartiles, which a busy machine disturbs less; and what bare.py needs, the least that Python
can do. The JavaScript call against the Rust host takes a
Python that has its wheel, as javascript_peer.py says; both run in the emulated machine.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

from bare import Bare  # noqa: E402
from floor import Floor  # noqa: E402

import hyperlight  # noqa: E402
from hyperlight import MultiUseSandbox, SandboxConfiguration, ULong, UninitializedSandbox  # noqa: E402

MIB = 1 << 20
DEFAULT, LARGE = SandboxConfiguration(), SandboxConfiguration(heap_size=256 * MIB, scratch_size=MIB)
LOOP_TURNS, MATRIX_ROWS, MATRIX_TRACE = 10**8, 256, 393199.0
WORK_TURNS = 2_000_000  # of a call in the throughput benchmark: about a millisecond


class Row(NamedTuple):
    """One line of the table."""

    what: str
    target: float
    ratio: float
    quiet: float | None
    """The ratio of the first quartiles."""
    figures: str
    bare: float | None = None
    """The ratio of what bare.py needs, of the medians."""
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the target is."""
        return self.ratio >= self.target if self.at_least else self.ratio <= self.target


class Times(NamedTuple):
    """All times of samplers that took turns, in nanoseconds and in order."""

    ours: list[int]
    other: list[int]
    bare: list[int]

    def row(self, what: str, target: float) -> Row:
        """Compare the two."""
        ours, other = hyperlight.Timing.of(self.ours), hyperlight.Timing.of(self.other)
        quiet = self.ours[len(self.ours) // 4] / self.other[len(self.other) // 4]
        figures = " against ".join(
            f"{hyperlight._readable_time(each.median_ns)} (spread {each.spread:.0%})" for each in (ours, other)
        )
        bare = hyperlight.Timing.of(self.bare).median_ns / other.median_ns if self.bare else None
        return Row(what, target, ours.median_ns / other.median_ns, quiet, figures, bare)


def compare(
    ours: hyperlight.Sampler, other: hyperlight.Sampler, seconds: float, bare: hyperlight.Sampler | None = None
) -> Times:
    """Take samples of all in turns, for so many seconds each."""
    times: dict[str, list[int]] = {"ours": [], "other": [], "bare": []}

    def keeping(name: str, sampler: hyperlight.Sampler) -> hyperlight.Sampler:
        def sample(count: int) -> list[int]:
            taken = sampler(count)
            times[name] += taken
            return taken

        return sample

    samplers = {"ours": keeping("ours", ours), "other": keeping("other", other)}
    if bare is not None:
        samplers["bare"] = keeping("bare", bare)
    hyperlight.measure(samplers, seconds, min(1.0, seconds / 3))
    return Times(*map(sorted, times.values()))


# ---- against the floor -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_one_processor() -> Iterator[None]:
    """Keep this thread, and the processes that it starts, on one processor: two often differ by more than what is compared."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def floor_rows(seconds: float) -> Iterator[Row]:
    """Compare what a host does with floor.c."""
    quick = hyperlight.BENCHMARKS
    with on_one_processor(), hyperlight._benchmark_sandbox(DEFAULT) as sandbox, Floor(sandbox) as floor:
        bare = Bare(sandbox)
        for what, target, name, operation in (
            ("call Echo", 1.25, "guest_calls/call", "call"),
            ("call with one host function", 1.35, "guest_calls/call_with_host_function", "call_host"),
            ("call + restore", 1.4, "guest_calls/call_with_restore", "call_restore"),
        ):
            with quick[name](DEFAULT) as sampler:
                yield compare(sampler, floor.sampler(operation), seconds, bare.sampler(operation)).row(what, target)
        snapshot, functions = sandbox.snapshot(), sandbox._functions

        def first_call() -> MultiUseSandbox:
            made = MultiUseSandbox.from_snapshot(snapshot, functions, DEFAULT)
            made.call("Echo", "hello\n", returns=str)
            return made

        ours = hyperlight.timed(first_call, after=MultiUseSandbox.close)
        times = compare(ours, floor.sampler("from_snapshot"), seconds, bare.sampler("from_snapshot"))
        yield times.row("sandbox from a snapshot, first call included", 1.3)
        create = hyperlight.timed(lambda: UninitializedSandbox(snapshot.elf, DEFAULT).evolve(), after=MultiUseSandbox.close)
        times = compare(create, floor.sampler("create"), seconds)
        yield times.row("create + evolve, default size, ELF already parsed", 1.5)


def interrupt_rows(seconds: float) -> Iterator[Row]:
    """Compare an interrupt with floor.c's: here the thread that kills has a processor of its own."""
    with hyperlight._benchmark_sandbox(DEFAULT) as sandbox, Floor(sandbox) as floor:
        bare = Bare(sandbox).sampler("interrupt")
        with hyperlight.BENCHMARKS["guest_calls/interrupt_latency"](DEFAULT) as sampler:
            yield compare(sampler, floor.sampler("interrupt"), seconds, bare).row("interrupt latency", 2.0)


# ---- sizes -----------------------------------------------------------------------------------------------------


def size_rows(seconds: float) -> Iterator[Row]:
    """Compare a 256 MiB heap with the default one."""
    create = hyperlight.BENCHMARKS["sandboxes/create_initialized"]
    with on_one_processor(), create(LARGE) as large, create(DEFAULT) as default:
        yield compare(large, default, seconds).row("256 MiB heap against the default: create", 3.0)
    with on_one_processor(), _restoring(LARGE) as large, _restoring(DEFAULT) as default:
        yield compare(large, default, seconds).row("256 MiB heap against the default: restore", 1.1)


@contextlib.contextmanager
def _restoring(config: SandboxConfiguration) -> Iterator[hyperlight.Sampler]:
    with hyperlight._benchmark_sandbox(config) as sandbox:
        snapshot = sandbox.snapshot()
        yield hyperlight.timed(
            lambda: sandbox.restore(snapshot), before=lambda: sandbox.call("Echo", "hello\n", returns=str)
        )


# ---- computing -------------------------------------------------------------------------------------------------


def compute_rows(seconds: float) -> Iterator[Row]:
    """Compare a guest's computing with the same C function, compiled with the same flags, in a process."""
    config = SandboxConfiguration(heap_size=8 * MIB)
    with on_one_processor(), hyperlight._benchmark_sandbox(config) as sandbox, Floor(sandbox) as floor:
        loop = hyperlight.timed(lambda: sandbox.call("SpinFor", ULong(LOOP_TURNS), returns=int))
        yield compare(loop, floor.sampler("loop", LOOP_TURNS), seconds).row("a loop of 10^8, against native", 1.05)
        matrix = hyperlight.timed(
            lambda: sandbox.call("MatrixProductTrace", MATRIX_ROWS, returns=float), after=_check_trace
        )
        times = compare(matrix, floor.sampler("matrix", MATRIX_ROWS), seconds)
        yield times.row("a 256 x 256 matrix product in double, against native", 1.05)


def _check_trace(trace: float) -> None:
    if trace != MATRIX_TRACE:
        raise hyperlight.HyperlightError(f"the trace is {trace}, not {MATRIX_TRACE}")


# ---- threads ---------------------------------------------------------------------------------------------------


def thread_rows(seconds: float) -> Iterator[Row]:
    """Compare four sandboxes on two threads with one on one, and two native loops with one, as a measure of the machine."""
    with contextlib.ExitStack() as undo:
        boxes = [undo.enter_context(hyperlight._benchmark_sandbox(DEFAULT)) for _ in range(4)]
        floors = [undo.enter_context(Floor(box)) for box in boxes[:2]]
        native = [_native_work(floor) for floor in floors]
        calls = [_guest_work(box) for box in boxes]
        gains, machine = [], []
        for _ in range(max(3, int(seconds * 4))):
            one = _throughput([calls[:1]])
            two = _throughput([calls[:2], calls[2:]])
            gains.append(two / one)
            machine.append(_throughput([native[:1], native[1:]]) / _throughput([native[:1]]))
    gains.sort()
    machine.sort()
    middle = len(gains) // 2
    figures = f"two native processes against one: {machine[middle]:.2f}, at best {machine[-1]:.2f}"
    yield Row("four sandboxes on two threads against one on one", 1.8, gains[middle], gains[-1], figures, at_least=True)


def _guest_work(sandbox: MultiUseSandbox) -> Callable[[], None]:
    """Return a call of about a millisecond."""
    return lambda: sandbox.call("SpinFor", ULong(WORK_TURNS), returns=int)


def _native_work(floor: Floor) -> Callable[[], None]:
    """Return as much work in a process of its own."""
    sampler = floor.sampler("loop", WORK_TURNS)
    return lambda: sampler(1) and None


def _throughput(work: list[list[Callable[[], None]]], window_s: float = 0.25) -> float:
    """Return how many calls a second so many threads make; each calls its own in turn."""
    counts = [0] * len(work)
    start = threading.Barrier(len(work) + 1)

    def go_on(number: int) -> None:
        start.wait()
        end = time.perf_counter() + window_s
        while time.perf_counter() < end:
            for call in work[number]:
                call()
                counts[number] += 1

    threads = [threading.Thread(target=go_on, args=(number,)) for number in range(len(work))]
    for thread in threads:
        thread.start()
    start.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begin)


# ---- memory ----------------------------------------------------------------------------------------------------


def memory_rows() -> Iterator[Row]:
    """Measure what one more sandbox of a shared snapshot takes, with a heap of 64 MiB."""
    config = SandboxConfiguration(heap_size=64 * MIB)
    with hyperlight._benchmark_sandbox(config) as sandbox, contextlib.ExitStack() as undo:
        snapshot, functions = sandbox.snapshot(), sandbox._functions
        before = 0
        growth = []
        for _ in range(9):
            made = undo.enter_context(MultiUseSandbox.from_snapshot(snapshot, functions, config))
            made.call("Echo", "hello\n", returns=str)
            now = _pss()
            growth.append(now - before)
            before = now
    growth = sorted(growth[1:])  # the first growth is the process itself
    median = growth[len(growth) // 2] / MIB
    figures = f"{median * 1024:.0f} KiB (PSS), at most {growth[-1] / 1024:.0f} KiB"
    yield Row("MiB of one more sandbox from a shared snapshot", 1.0, median, None, figures)


def _pss() -> int:
    """Return this process's proportional set size in bytes."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line Pss:")


# ---- JavaScript, against the Rust host -------------------------------------------------------------------------


def javascript_rows(python: str) -> Iterator[Row]:
    """Run javascript_peer.py, and read what it prints."""
    command = [HERE.parent / "run-in-kvm-amd", "--timeout", "500", python, HERE / "javascript_peer.py"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    for what, ratio, share in re.findall(r"^(.*): ratio ([\d.]+), (.*)$", printed, re.MULTILINE):
        yield Row(f"JavaScript, {what}, against Rust", 1.2, float(ratio), None, share)


# ---- the table -------------------------------------------------------------------------------------------------


def show(row: Row) -> str:
    """Return a line of the table."""
    bound = f"{'>=' if row.at_least else '<='} {row.target:g}"
    quiet, bare = ("" if ratio is None else f"{ratio:.2f}" for ratio in (row.quiet, row.bare))
    met = "met" if row.met else "NOT MET"
    return f"{row.what:<52} {bound:>7}  {row.ratio:>6.2f}  {quiet:>6}  {bare:>6}  {met:<7}  {row.figures}"


def main() -> int:
    """Print the table; the exit status is 1 where a target is not met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each side of each comparison (3)")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--peer", metavar="PYTHON", help="one that has the Rust host's wheel: compare JavaScript calls, too")
    arguments = parser.parse_args()
    header = f"{'what':<52} {'target':>7}  {'ratio':>6}  {'quiet':>6}  {'bare':>6}"
    print(header)
    rows: list[Row] = []
    parts: tuple[Callable[[], Iterator[Row]], ...] = (
        lambda: floor_rows(arguments.seconds),
        lambda: interrupt_rows(arguments.seconds),
        lambda: size_rows(arguments.seconds),
        lambda: compute_rows(arguments.seconds),
        lambda: thread_rows(arguments.seconds),
        memory_rows,
        lambda: javascript_rows(arguments.peer) if arguments.peer else iter(()),
    )
    for part in parts:
        for row in part():
            rows.append(row)
            print(show(row), flush=True)
    if arguments.json:
        results: list[Mapping[str, object]] = [{**row._asdict(), "met": row.met} for row in rows]
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
