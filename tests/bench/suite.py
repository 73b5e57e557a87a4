"""The full set of benchmarks: those of 0.14's benches/benchmarks.rs by their names and sizes, and some of main's.

    python3 tests/bench/suite.py                                   all of them; some 20 minutes
    python3 tests/bench/suite.py --seconds 0.5 guest_calls         those whose name has guest_calls in it
    python3 tests/bench/suite.py --json now.json --compare before.json

Prints median, 95th percentile and spread (the distance of the quartiles as a part of the median). The clock is
time.perf_counter_ns; Python's cyclic garbage collector is off during samples. `hyperlight bench` runs a few of these.

Sources: spec/performance.md, E.3.
SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

import hyperlight  # noqa: E402
import memory  # noqa: E402
from hyperlight import (  # noqa: E402
    Double,
    Float,
    Long,
    MultiUseSandbox,
    SandboxConfiguration,
    UInt,
    ULong,
    UninitializedSandbox,
)

Benchmark = Callable[[], contextlib.AbstractContextManager[hyperlight.Sampler]]
MIB = 1 << 20

SIZES = {
    "default": SandboxConfiguration(),
    "small": SandboxConfiguration(heap_size=8 * MIB),
    "medium": SandboxConfiguration(heap_size=64 * MIB, scratch_size=0x50000),
    "large": SandboxConfiguration(heap_size=256 * MIB, scratch_size=0x100000),
}


# ---- sandboxes -------------------------------------------------------------------------------------------------


def _new(config: SandboxConfiguration) -> UninitializedSandbox:
    return UninitializedSandbox("simpleguest", config)


@contextlib.contextmanager
def create_uninitialized(config: SandboxConfiguration) -> Iterator[hyperlight.Sampler]:
    yield hyperlight.timed(lambda: _new(config), after=UninitializedSandbox.close)


@contextlib.contextmanager
def create_uninitialized_and_drop(config: SandboxConfiguration) -> Iterator[hyperlight.Sampler]:
    yield hyperlight.timed(lambda: _new(config).close())


@contextlib.contextmanager
def create_initialized_and_drop(config: SandboxConfiguration) -> Iterator[hyperlight.Sampler]:
    yield hyperlight.timed(lambda: _new(config).evolve().close())


# ---- calls -----------------------------------------------------------------------------------------------------


def _echo(sandbox: MultiUseSandbox) -> None:
    sandbox.call("Echo", "hello\n", returns=str)


@contextlib.contextmanager
def different_thread() -> Iterator[hyperlight.Sampler]:
    """A call in a thread other than the one that the vCPU was last used by; only the call is timed."""
    with hyperlight._benchmark_sandbox(SIZES["default"]) as sandbox:
        call = hyperlight.timed(lambda: _echo(sandbox))

        def sample_once() -> int:
            _echo(sandbox)
            times: list[int] = []
            thread = threading.Thread(target=lambda: times.extend(call(1)))
            thread.start()
            thread.join()
            return times[0]

        yield lambda count: [sample_once() for _ in range(count)]


# ---- snapshots -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def snapshot_create(config: SandboxConfiguration) -> Iterator[hyperlight.Sampler]:
    with hyperlight._benchmark_sandbox(config) as sandbox:
        yield hyperlight.timed(sandbox.snapshot, before=lambda: _echo(sandbox))


@contextlib.contextmanager
def snapshot_restore(config: SandboxConfiguration) -> Iterator[hyperlight.Sampler]:
    with hyperlight._benchmark_sandbox(config) as sandbox:
        snapshot = sandbox.snapshot()
        yield hyperlight.timed(lambda: sandbox.restore(snapshot), before=lambda: _echo(sandbox))


# ---- large parameters, and the encoding of messages ------------------------------------------------------------


@contextlib.contextmanager
def guest_call_with_large_parameters() -> Iterator[hyperlight.Sampler]:
    config = SandboxConfiguration(input_data_size=101 * MIB, heap_size=750 * MIB, scratch_size=304 * MIB)
    blob, text = bytes(50 * MIB), "a" * (50 * MIB)
    with hyperlight._benchmark_sandbox(config) as sandbox:
        yield hyperlight.timed(lambda: sandbox.call("LargeParameters", blob, text, returns=None))


_LARGE_CALL = (
    *(bytes(10 * MIB), bytes(10 * MIB), "a" * (10 * MIB), "a" * (10 * MIB)),
    *(hyperlight.Int(42), UInt(100), Long(1000), ULong(2000), Float(521521.53), Double(432.53), True),
)


def _serialized() -> bytes:
    return memory.encode_guest_call("TestFunction", _LARGE_CALL, hyperlight.ReturnType.Int)


@contextlib.contextmanager
def serialize_function_call() -> Iterator[hyperlight.Sampler]:
    yield hyperlight.timed(_serialized)


@contextlib.contextmanager
def deserialize_function_call() -> Iterator[hyperlight.Sampler]:
    message = _serialized()
    yield hyperlight.timed(lambda: memory.decode_function_call(message))


@contextlib.contextmanager
def in_24k_out_8k() -> Iterator[hyperlight.Sampler]:
    payload = bytes(24 * 1024)
    with hyperlight._benchmark_sandbox(SandboxConfiguration(input_data_size=25 * 1024)) as sandbox:
        yield hyperlight.timed(lambda: sandbox.call("24K_in_8K_out", payload, returns=bytes))


# ---- shared memory ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def shared_memory(operation: str, size: int) -> Iterator[hyperlight.Sampler]:
    data = bytes(size)
    with memory.SharedMemory.anonymous(size) as shared:
        actions: dict[str, Callable[[], Any]] = {
            "fill": lambda: shared.fill(0, size, 0xAA),
            "copy_to_slice": lambda: shared.read(0, size),
            "copy_from_slice": lambda: shared.write(0, data),
        }
        yield hyperlight.timed(actions[operation])


# ---- the list --------------------------------------------------------------------------------------------------


def benchmarks() -> Mapping[str, Benchmark]:
    """Return all benchmarks by name, in the order of 0.14's."""
    quick = hyperlight.BENCHMARKS
    by_size: dict[str, Callable[[SandboxConfiguration], contextlib.AbstractContextManager[hyperlight.Sampler]]] = {
        "sandboxes/create_uninitialized": create_uninitialized,
        "sandboxes/create_uninitialized_and_drop": create_uninitialized_and_drop,
        "sandboxes/create_initialized": quick["sandboxes/create_initialized"],
        "sandboxes/create_initialized_and_drop": create_initialized_and_drop,
        "sandboxes/sandbox_from_snapshot": quick["sandboxes/sandbox_from_snapshot"],
        "guest_calls/call": quick["guest_calls/call"],
        "guest_calls/call_with_restore": quick["guest_calls/call_with_restore"],
        "guest_calls/call_with_host_function": quick["guest_calls/call_with_host_function"],
        "snapshots/create": snapshot_create,
        "snapshots/restore": snapshot_restore,
    }
    interrupt = quick["guest_calls/interrupt_latency"]
    found: dict[str, Benchmark] = {
        f"{name}/{size}": functools.partial(benchmark, config)
        for name, benchmark in by_size.items()
        for size, config in SIZES.items()
    }
    found |= {
        "guest_calls/different_thread": different_thread,
        "guest_calls/interrupt_latency": functools.partial(interrupt, SIZES["default"]),
        "guest_functions_with_large_parameters/guest_call_with_large_parameters": guest_call_with_large_parameters,
        "function_call_serialization/serialize_function_call": serialize_function_call,
        "function_call_serialization/deserialize_function_call": deserialize_function_call,
        "sample_workloads/24K_in_8K_out_c": in_24k_out_8k,
    }
    for operation in ("fill", "copy_to_slice", "copy_from_slice"):
        for size in (1, 64):
            found[f"shared_memory/{operation}/{size}MB"] = functools.partial(shared_memory, operation, size * MIB)
    return found


def main() -> int:
    """Run the benchmarks that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a part of the names of those to run (all)")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each, after a warm-up (5)")
    parser.add_argument("--warm-up", type=float, default=3.0, metavar="SECONDS", help="for each (3)")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--compare", metavar="FILE", help="show the change against an earlier --json FILE")
    arguments = parser.parse_args()
    earlier = hyperlight.load_benchmarks(arguments.compare) if arguments.compare else None
    chosen = {
        name: benchmark
        for name, benchmark in benchmarks().items()
        if not arguments.names or any(part in name for part in arguments.names)
    }
    timings: dict[str, hyperlight.Timing] = {}
    for name, benchmark in chosen.items():
        if os.isatty(2):
            print(f"\r\x1b[K{name}", end="", file=sys.stderr, flush=True)
        with benchmark() as sampler:
            timings |= hyperlight.measure({name: sampler}, arguments.seconds, arguments.warm_up)
    if os.isatty(2):
        print("\r\x1b[K", end="", file=sys.stderr)
    print(hyperlight.benchmark_table(timings, earlier))
    if arguments.json:
        hyperlight.save_benchmarks(arguments.json, timings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
