"""The benchmarks measure what they say; how fast that is, no test asks."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, require

import hyperlight
import memory
from hyperlight import HyperlightError, Timing, main

sys.path.append(str(REPOSITORY / "tests" / "bench"))

import bare
import floor
import suite


@require("kvm")
def test_bench_prints_saves_and_compares(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved = tmp_path / "before.json"
    assert main(["bench", "--seconds", "0.001", "--json", str(saved)]) == 0
    first = capsys.readouterr().out
    assert set(json.loads(saved.read_text())["benchmarks"]) == set(hyperlight.BENCHMARKS)
    assert main(["bench", "--seconds", "0.001", "--compare", str(saved)]) == 0
    second = capsys.readouterr().out
    for name in hyperlight.BENCHMARKS:
        assert name in first and name in second
    assert "%" in second.splitlines()[1].split()[-1]


def test_a_timing_sums_up() -> None:
    timing = Timing.of([5, 1, 2, 3, 4])
    assert (timing.median_ns, timing.samples, timing.spread) == (3, 5, pytest.approx(2 / 3))
    assert Timing.of(list(range(101))).p95_ns == 95


def test_only_the_action_is_timed_and_results_are_disposed_of_once() -> None:
    log: list[str] = []
    sampler = hyperlight.timed(lambda: log.append("act") or "result", before=lambda: log.append("before"), after=log.append)
    assert len(sampler(2)) == 2
    assert log == ["before", "act", "before", "act", "result", "result"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"benchmarks": {"a": {}}}'])
def test_a_file_of_no_benchmarks_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "not.json"
    path.write_text(content)
    with pytest.raises(HyperlightError, match="no benchmarks"):
        hyperlight.load_benchmarks(path)


def test_the_suite_has_all_benchmarks_that_apply() -> None:
    names = set(suite.benchmarks())
    assert len(names) == 52  # 49 of 0.14 without the Rust guest's 24K_in_8K_out, and main's sandbox_from_snapshot/4
    assert {"sandboxes/create_initialized_and_drop/large", "shared_memory/copy_from_slice/64MB"} <= names


@require("kvm")
@require("gcc")
def test_the_floor_does_all_that_it_is_asked_for() -> None:
    with hyperlight._benchmark_sandbox(hyperlight.SandboxConfiguration()) as sandbox, floor.Floor(sandbox) as program:
        for operation in floor.OPERATIONS:
            times = program.sampler(operation, 16)(2)
            assert len(times) == 2 and min(times) > 0, operation


BARE_OPERATIONS = ("call", "call_host", "call_restore", "from_snapshot", "interrupt")


@require("kvm")
@require("gcc")
def test_the_bare_host_gets_the_answers_that_the_library_gets() -> None:
    with hyperlight._benchmark_sandbox(hyperlight.SandboxConfiguration()) as sandbox:
        host = bare.Bare(sandbox)
        output = sandbox._guest._ram.output
        for operation, talk in (("call", host._echo), ("call_host", host._add)):
            host.sampler(operation)(2)
            assert output.is_empty
            assert output._view[8 : 8 + len(talk.result)] == talk.result
        for operation in BARE_OPERATIONS:
            times = host.sampler(operation)(2)
            assert len(times) == 2 and min(times) > 0, operation
        assert sandbox.call("Echo", "as ever", returns=str) == "as ever"
        made = host._from_snapshot()()
        answer = made.outer + memory.PAGE_SIZE + sandbox._guest.snapshot.layout.input_data_size + 8
        assert ctypes.string_at(answer, len(host._echo.result)) == host._echo.result
        host._close(made)
