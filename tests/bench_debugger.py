"""Measure what a debugger costs a guest call that meets no breakpoint: issue 4 allows 10 %.

    python3 tests/bench_debugger.py [GUEST]

Three sandboxes take turns, so that whatever else the machine does hits all of them alike: one without a debugger, one
that nobody has connected to, and one with a connected debugger that has said "continue". Prints the median time of
a call in each, and the ratio to the first; exits with 1 if a ratio is above the limit. Not a test: times are
no reason for a test to fail.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gdb_rsp import encode
from hyperlight import DebugInfo, MultiUseSandbox, SandboxConfiguration, UninitializedSandbox

LIMIT = 1.10
ROUNDS, CALLS = 300, 20


def sandbox_with(guest: str, undo: contextlib.ExitStack, info: DebugInfo | None) -> MultiUseSandbox:
    """Start a sandbox, which ends with *undo*."""
    config = SandboxConfiguration(guest_debug_info=info)
    return undo.enter_context(undo.enter_context(UninitializedSandbox(guest, config)).evolve())


def let_run(address: str, undo: contextlib.ExitStack) -> None:
    """Connect to a sandbox as a debugger, and let it go on."""
    host, _, port = address.rpartition(":")
    debugger = undo.enter_context(socket.create_connection((host, int(port))))
    debugger.sendall(encode(b"QStartNoAckMode") + encode(b"vCont;c"))


def seconds_of(sandbox: MultiUseSandbox) -> float:
    """Return the time of one call, on average over a few."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        sandbox.call("GetStatic")
    return (time.perf_counter() - begin) / CALLS


def main(guest: str = "simpleguest") -> int:
    """Print the three medians."""
    with contextlib.ExitStack() as undo:
        sandboxes = {
            "no debugger": sandbox_with(guest, undo, None),
            "nobody connected": sandbox_with(guest, undo, DebugInfo(wait=False)),
            "connected, running": sandbox_with(guest, undo, DebugInfo(announce=lambda address: let_run(address, undo))),
        }
        samples: dict[str, list[float]] = {name: [] for name in sandboxes}
        for _ in range(ROUNDS):
            for name, sandbox in sandboxes.items():
                samples[name].append(seconds_of(sandbox))
    medians = {name: statistics.median(times) for name, times in samples.items()}
    base = medians["no debugger"]
    for name, median in medians.items():
        print(f"{name:20} {median * 1e6:8.1f} us  x{median / base:.3f}")
    return int(max(medians.values()) > base * LIMIT)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
