"""The same JavaScript call by this host and by the Rust host, in one process and in turns.

    python3 -m venv peer && peer/bin/pip install hyperlight-sandbox-backend-hyperlight-js==0.3.0 pyelftools
    tests/run-in-kvm-amd --timeout 500 peer/bin/python tests/bench/javascript_peer.py

The Rust host and its guest are those of the wheel, release 0.14.0. They need a KVM that does not emulate CPL 0: where there
is none, the emulated machine. Python runs some 25 times slower in there, natively compiled Rust too: so the share of the
time that this host spends outside KVM_RUN is printed beside the ratio.

Sources: spec/guest-programs.md, 1.6.
SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "examples")]

from javascript import JavaScript  # noqa: E402
from pinned_guests import guest  # noqa: E402

import hyperlight  # noqa: E402
import kvm_abi  # noqa: E402

MIB = 1 << 20
SIZES = hyperlight.SandboxConfiguration(heap_size=25 * MIB, scratch_size=35 * MIB)
"""As the Rust host's JavaScript backend has them."""
HANDLER = """
const AsyncFunction = (async () => {}).constructor;
async function handler(code) { await new AsyncFunction(code)(); return {stderr: "", exit_code: 0}; }
export { handler };
"""
CALLS = {
    "one line of output": "console.log(1 + 1)",
    "100,000 turns of a loop": "let sum = 0; for (let i = 0; i < 100000; i++) sum += i; console.log(sum)",
}


def main() -> int:
    """Print a line for each call: both times, the ratio, and this host's share outside the guest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each side of each comparison (20)")
    arguments = parser.parse_args()
    from hyperlight_sandbox_backend_hyperlight_js import JSSandbox

    rust = JSSandbox(heap_size="25Mi", stack_size="35Mi")
    printed: list[str] = []
    with JavaScript(guest("js", "0.14.0"), output=printed.append, config=SIZES) as ours:
        ours.register("run", HANDLER)
        for what, code in CALLS.items():
            printed.clear()
            result = ours.call("run", code)
            theirs = rust.run(code)
            if result["exit_code"] or theirs.exit_code or "".join(printed) != theirs.stdout:
                raise SystemExit(f"{what}: {printed} is not {theirs.stdout!r}, {theirs.stderr!r}")
            samplers = {
                "ours": hyperlight.timed(lambda code=code: ours.call("run", code)),
                "rust": hyperlight.timed(lambda code=code: rust.run(code)),
            }
            share = _share_outside(ours, samplers["ours"])
            timings = hyperlight.measure(samplers, arguments.seconds, 2.0)
            print(f"{what}: ratio {timings['ours'].median_ns / timings['rust'].median_ns:.2f}, "
                  f"{share:.0%} of ours outside KVM_RUN")  # fmt: skip
            print(hyperlight.benchmark_table(timings), flush=True)
    return 0


def _share_outside(ours: JavaScript, sampler: hyperlight.Sampler, count: int = 20) -> float:
    """Return which part of its time *sampler* spends outside KVM_RUN. Timing that takes time, too: not in what is compared."""
    vcpu, inside = ours.sandbox._guest.vm.vcpu, []
    run = kvm_abi.Vcpu.run

    def timed_run() -> int:
        begin = time.perf_counter_ns()
        try:
            return run(vcpu)
        finally:
            inside.append(time.perf_counter_ns() - begin)

    vcpu.run = timed_run
    try:
        begin = time.perf_counter_ns()
        sampler(count)
        return 1 - sum(inside) / (time.perf_counter_ns() - begin)
    finally:
        del vcpu.run


if __name__ == "__main__":
    sys.exit(main())
