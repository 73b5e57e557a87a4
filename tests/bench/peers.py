"""What else one might run untrusted code in, measured in the same run: wasmtime, and a fresh Python process.

    python3 -m venv peers && peers/bin/pip install wasmtime pyelftools
    peers/bin/python tests/bench/peers.py [--seconds 3]

Without wasmtime its lines are left out, and that is said. A comparison of orders of magnitude: neither does the same thing.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import hyperlight

ADD = '(module (func (export "add") (param i32 i32) (result i32) local.get 0 local.get 1 i32.add))'


def wasmtime_samplers() -> dict[str, hyperlight.Sampler]:
    """Return samplers of a call into wasmtime and of an instantiation; the module is compiled already."""
    try:
        import wasmtime
    except ImportError:
        print("wasmtime is not installed: pip install wasmtime")
        return {}
    engine = wasmtime.Engine()
    module = wasmtime.Module(engine, ADD)
    store = wasmtime.Store(engine)
    add = wasmtime.Instance(store, module, []).exports(store)["add"]

    def instantiate_and_call() -> None:
        fresh = wasmtime.Store(engine)
        wasmtime.Instance(fresh, module, []).exports(fresh)["add"](fresh, 1, 41)

    return {
        "wasmtime: call": hyperlight.timed(lambda: add(store, 1, 41)),
        "wasmtime: instantiate and call": hyperlight.timed(instantiate_and_call),
    }


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each (3)")
    arguments = parser.parse_args()
    config = hyperlight.SandboxConfiguration()
    with contextlib.ExitStack() as undo:
        samplers = {
            name: undo.enter_context(hyperlight.BENCHMARKS[name](config))
            for name in ("guest_calls/call", "guest_calls/call_with_restore", "sandboxes/sandbox_from_snapshot")
        }
        samplers |= wasmtime_samplers()
        process = [sys.executable, "-I", "-S", "-c", "print('hello')"]
        samplers["a fresh Python process"] = hyperlight.timed(
            lambda: subprocess.run(process, check=True, capture_output=True)
        )
        print(hyperlight.benchmark_table(hyperlight.measure(samplers, arguments.seconds, 1.0)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
