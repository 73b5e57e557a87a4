"""Metrics, and the log levels that decide what a guest says (acceptance.md B.13; features.md A.13)."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import rawguest
from conftest import require

import hyperlight
import memory
from hyperlight import Histogram, Metrics, Observation, SandboxConfiguration, UninitializedSandbox, guest_log_level_from
from memory import GuestLogData, GuestLogLevel

SAMPLE = re.compile(
    r'(?P<name>[a-z_]+)(?:\{(?P<labels>(?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*"(?:,(?=[a-z]))?)+)\})? (?P<value>\S+)'
)
"""A line of Prometheus' text format: docs/instrumenting/exposition_formats.md, version 0.0.4."""


def samples(text: str) -> dict[str, float]:
    """Return the samples of an exposition, having checked every line of it."""
    assert text.endswith("\n")
    found: dict[str, float] = {}
    announced = set()
    for line in text.splitlines():
        if comment := re.fullmatch(r"# (HELP|TYPE) ([a-z_]+) (.+)", line):
            announced.add(comment[2])
            continue
        match = SAMPLE.fullmatch(line)
        assert match, line
        assert re.sub(r"_(bucket|sum|count)$", "", match["name"]) in announced
        key = line.rpartition(" ")[0]
        assert key not in found
        found[key] = float(match["value"])
    return found


# -- metrics, without a guest ---------------------------------------------------------------


def test_counters_count_by_label() -> None:
    metrics = Metrics()
    metrics.guest_errors.increment(code="4")
    metrics.guest_errors.increment(code="4")
    metrics.guest_errors.increment(code="17")
    metrics.guest_cancellations.increment()
    assert metrics.guest_errors.value(code="4") == 2
    assert metrics.guest_errors.value(code="5") == 0
    shown = samples(metrics.render())
    assert shown['guest_errors_total{code="4"}'] == 2
    assert shown['guest_errors_total{code="17"}'] == 1
    assert shown["guest_cancellations_total"] == 1
    assert shown["erroneous_vcpu_kicks_total"] == 0


def test_histograms_are_cumulative_with_inclusive_bounds() -> None:
    metrics = Metrics()
    for seconds in (0.001, 0.0011, 3.0, 100.0):
        metrics.guest_call_duration.observe(seconds, function_name="f")
    shown = samples(metrics.render())
    name = "guest_call_duration_seconds"

    def bucket(bound: str) -> float:
        return shown[f'{name}_bucket{{function_name="f",le="{bound}"}}']

    bounds = ("0.0005", "0.001", "0.0025", "2.5", "5.0", "10.0", "+Inf")
    assert [bucket(each) for each in bounds] == [0, 1, 2, 2, 3, 3, 4]
    assert shown[f'{name}_count{{function_name="f"}}'] == 4 == metrics.guest_call_duration.count(function_name="f")
    assert shown[f'{name}_sum{{function_name="f"}}'] == pytest.approx(103.0021)
    assert list(Histogram.BOUNDS) == sorted(set(Histogram.BOUNDS))


def test_a_function_name_can_hold_anything() -> None:
    metrics = Metrics()
    metrics.host_call_duration.observe(1, function_name='a"b\\c\nd{},=é')
    key = r'host_call_duration_seconds_count{function_name="a\"b\\c\nd{},=é"}'
    assert samples(metrics.render())[key] == 1


def test_names_without_end_do_not_fill_the_memory() -> None:
    metrics = Metrics()
    for number in range(Histogram.MAX_SERIES + 50):
        metrics.guest_call_duration.observe(1, function_name=f"{number}" + "x" * 1000)
    counts = {key: value for key, value in samples(metrics.render()).items() if "_count" in key}
    assert len(counts) == Histogram.MAX_SERIES + 1
    assert counts['guest_call_duration_seconds_count{function_name="<other>"}'] == 50
    assert max(map(len, counts)) < 200


def test_a_subscriber_sees_every_observation_until_it_leaves() -> None:
    metrics, seen = Metrics(), []
    leave = metrics.subscribe(seen.append)
    metrics.guest_errors.increment(code="4")
    metrics.guest_call_duration.observe(0.25, function_name="f")
    leave()
    metrics.guest_cancellations.increment()
    assert seen == [
        Observation("guest_errors_total", "counter", 1, {"code": "4"}),
        Observation("guest_call_duration_seconds", "histogram", 0.25, {"function_name": "f"}),
    ]


def test_a_subscriber_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    metrics, seen = Metrics(), []

    def fail(_: Observation) -> None:
        raise RuntimeError("my mistake")

    metrics.subscribe(fail)
    metrics.subscribe(seen.append)
    metrics.guest_cancellations.increment()
    assert len(seen) == 1 == metrics.guest_cancellations.value()
    assert "my mistake" in caplog.text


def test_no_count_is_lost_between_threads() -> None:
    metrics = Metrics()

    def work() -> None:
        for number in range(1000):
            metrics.guest_errors.increment(code=str(number % 7))
            metrics.guest_call_duration.observe(0.1, function_name="f")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(metrics.guest_errors.value(code=str(code)) for code in range(7)) == 8000
    assert metrics.guest_call_duration.count(function_name="f") == 8000


# -- metrics of sandboxes -------------------------------------------------------------------


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metrics]:
    fresh = Metrics()
    monkeypatch.setattr(hyperlight, "metrics", fresh)
    yield fresh


@require("kvm")
def test_cancellations_and_durations_are_emitted(metrics: Metrics) -> None:
    """B.13/231."""
    metrics.durations = True
    uninitialized = UninitializedSandbox("simpleguest")
    uninitialized.register("HostPrint", lambda text: len(text))
    with uninitialized.evolve() as sandbox:
        sandbox.call("PrintOutput", "some text")
        kill = sandbox.interrupt_handle().kill
        killer = threading.Thread(target=lambda: any(iter(kill, True)))  # until there is a call to kill
        killer.start()
        with pytest.raises(hyperlight.ExecutionCanceledByHost):
            sandbox.call("Spin")
        killer.join()
    assert metrics.guest_cancellations.value() == 1
    assert metrics.guest_call_duration.count(function_name="PrintOutput") == 1
    assert metrics.guest_call_duration.count(function_name="Spin") == 1
    assert metrics.host_call_duration.count(function_name="HostPrint") == 1
    assert samples(metrics.render())['guest_call_duration_seconds_sum{function_name="PrintOutput"}'] > 0


@require("kvm")
def test_durations_are_measured_only_on_request(metrics: Metrics) -> None:
    with UninitializedSandbox("simpleguest").evolve() as sandbox:
        sandbox.call("Echo", "x")
    assert not any("duration" in key for key in samples(metrics.render()))


@require("kvm")
def test_guest_errors_are_counted_by_code_and_nothing_else_is(metrics: Metrics) -> None:
    """B.13/232."""
    with UninitializedSandbox("simpleguest").evolve() as sandbox:
        with pytest.raises(hyperlight.GuestError):
            sandbox.call("NoSuchFunction")
        with pytest.raises(hyperlight.ReturnValueConversionFailure):
            sandbox.call("Echo", "x", returns=bytes)
        for _ in range(2):
            with pytest.raises(hyperlight.GuestError):
                sandbox.call("ReturnError", 15, "text")
        with pytest.raises(hyperlight.GuestAborted):
            sandbox.call("GuestAbortWithCode", 13)
    shown = samples(metrics.render())
    errors = {key: value for key, value in shown.items() if "guest_errors" in key}
    assert errors == {'guest_errors_total{code="4"}': 1, 'guest_errors_total{code="15"}': 2}
    assert shown["guest_cancellations_total"] == 0


@require("kvm")
def test_the_names_of_host_functions_that_do_not_exist_are_not_kept(metrics: Metrics) -> None:
    """A guest chooses them."""
    metrics.durations = True
    with UninitializedSandbox("simpleguest").evolve() as sandbox, pytest.raises(hyperlight.GuestError):
        sandbox.call("TryCallHost", "invented")
    assert "invented" not in metrics.render()


# -- log levels -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rust_log", "level"),
    [
        ("hyperlight_guest=trace,hyperlight_host=debug", 5),  # B.13/216
        ("hyperlight_guest=info", 3),  # B.13/217
        ("hyperlight_host=debug", 4),  # B.13/218
        ("trace", 5),  # B.13/219
        ("hyperlight_guest=debug,hyperlight_host=trace,info", 4),  # B.13/220
        ("info,hyperlight_guest=debug,hyperlight_host=trace", 4),  # B.13/220
        ("hyperlight_host=trace,info,hyperlight_guest=debug,hyperlight_guest=off", 4),  # B.13/220
        ("other=trace,warn,another=info", 2),  # B.13/221
        ("other=trace,another=debug", 1),  # B.13/222
        ("hyperlight_guest=loud", 1),  # B.13/223
        ("nonsense", 1),  # B.13/223
        ("=,==,,", 1),  # B.13/223
        ("", 1),  # B.13/224
    ],
)
def test_rust_log_names_the_level(rust_log: str, level: int) -> None:
    assert guest_log_level_from(rust_log) == level


@pytest.mark.parametrize("number", range(6))
def test_levels_have_the_numbers_of_the_abi(number: int) -> None:
    """B.13/225."""
    name = ("off", "error", "warn", "info", "debug", "trace")[number]
    for spelled in (name, name.upper(), number, str(number)):
        assert SandboxConfiguration(guest_log_level=spelled).guest_log_level == number
    assert guest_log_level_from(name) == number


@pytest.mark.parametrize("level", ["loud", "", 6, -1])
def test_other_levels_are_refused(level: Any) -> None:
    with pytest.raises(hyperlight.HyperlightError, match="log level is one of off, error"):
        SandboxConfiguration(guest_log_level=level)


@require("kvm")
@pytest.mark.parametrize(
    ("rust_log", "count"),
    [("hyperlight_guest=debug", 4), ("hyperlight_host=warn", 2), ("trace", 5), ("", 1), ("off", 0)],
)
def test_the_environment_decides_what_a_guest_sends(
    rust_log: str, count: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B.13/226."""
    caplog.set_level(hyperlight.TRACE, "hyperlight_guest")
    monkeypatch.setenv("RUST_LOG", rust_log)
    with UninitializedSandbox("simpleguest").evolve() as sandbox:
        caplog.clear()
        sandbox.call("LogEveryLevel", "text")
    assert sum(record.name == "hyperlight_guest" for record in caplog.records) == count


LEVELS = {
    GuestLogLevel.Trace: hyperlight.TRACE,
    GuestLogLevel.Debug: logging.DEBUG,
    GuestLogLevel.Information: logging.INFO,
    GuestLogLevel.Warning: logging.WARNING,
    GuestLogLevel.Error: logging.ERROR,
    GuestLogLevel.Critical: logging.ERROR,
    GuestLogLevel.None_: hyperlight.TRACE,
}


@require("kvm")
@require("gcc")
@pytest.mark.parametrize(("level", "expected"), LEVELS.items())
def test_a_log_record_has_all_that_the_guest_said(
    level: GuestLogLevel, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    """B.13/227."""
    caplog.set_level(hyperlight.TRACE, "hyperlight_guest")
    data = GuestLogData("100 % done", "the module", level, "caller", "file.c", 42)
    with UninitializedSandbox(rawguest.parrot()).evolve() as sandbox:
        buffer = rawguest.stack_with(memory.encode_guest_log_data(data))
        rawguest.tell(sandbox, buffer, port=99)
        caplog.set_level(logging.CRITICAL, "hyperlight_guest")
        rawguest.tell(sandbox, buffer, port=99)
    (record,) = [each for each in caplog.records if each.name == "hyperlight_guest"]
    assert (record.levelno, record.getMessage(), record.pathname) == (expected, "100 % done", "file.c")
    assert (record.lineno, record.module, record.funcName) == (42, "the module", "caller")


@require("kvm")
@require("gcc")
def test_a_log_port_without_a_record_is_an_error() -> None:
    """B.13/227."""
    empty = (8).to_bytes(8, "little")
    with UninitializedSandbox(rawguest.parrot()).evolve() as sandbox:
        with pytest.raises(hyperlight.HandleIoError, match="Failed to read guest log data"):
            rawguest.tell(sandbox, empty, port=99)
        assert sandbox.poisoned
