"""What guests log: how much they send, how RUST_LOG says it, and what becomes of a record."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import rawguest
from conftest import require

import hyperlight
import memory
from hyperlight import MultiUseSandbox, SandboxConfiguration, UninitializedSandbox
from memory import GuestLogData, GuestLogLevel

LEVELS = ("off", "error", "warn", "info", "debug", "trace")
SENT = [logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG, hyperlight.TRACE]
"""What the guest's LogEveryLevel sends, most severe first."""
LOG_PORT = 99


# -- how much a guest is told to send ------------------------------------------------------


@pytest.mark.parametrize(
    ("rust_log", "level"),
    [
        ("hyperlight_guest=trace,hyperlight_host=debug", "trace"),  # B.13/216
        ("hyperlight_guest=info", "info"),  # B.13/217
        ("hyperlight_host=debug", "debug"),  # B.13/218
        ("trace", "trace"),  # B.13/219
        ("hyperlight_guest=debug,hyperlight_guest=trace", "debug"),  # B.13/220
        ("info,hyperlight_host=error,hyperlight_guest=debug", "debug"),
        ("hyperlight_host=error,hyperlight_guest=debug,info", "debug"),
        ("hyperlight_guest=debug,hyperlight_host=error,info", "debug"),
        ("info,my_app=debug,other=trace", "info"),  # B.13/221
        ("my_app=debug,warn", "warn"),
        ("my_app=debug,other=trace", "error"),  # B.13/222
        ("nonsense", "error"),  # B.13/223
        ("hyperlight_guest=nonsense", "error"),
        ("=,=,=,,=", "error"),
        ("", "error"),  # B.13/224
        ("hyperlight_host=3", "info"),
        ("HYPERLIGHT=off", "error"),
        ("Off", "off"),
        (" hyperlight_guest = Warn ", "warn"),
        ("hyperlight_guest_bin::memory=debug", "debug"),
    ],
)
def test_level_that_rust_log_asks_for(rust_log: str, level: str) -> None:
    """B.13/216, B.13/217, B.13/218, B.13/219, B.13/220, B.13/221, B.13/222, B.13/223, B.13/224."""
    assert hyperlight.guest_log_level_from(rust_log) == LEVELS.index(level)


@pytest.mark.parametrize("number", range(6))
def test_levels_are_the_numbers_0_to_5(number: int) -> None:
    """B.13/225: the name, the number and the digit mean the same."""
    for spelled in (LEVELS[number], LEVELS[number].upper(), number, str(number)):
        assert SandboxConfiguration(guest_log_level=spelled).guest_log_level == number
    assert hyperlight.guest_log_level_from(str(number)) == number


def levels_of(caplog: pytest.LogCaptureFixture) -> list[int]:
    return [record.levelno for record in caplog.records if record.name == "hyperlight_guest"]


def log_every_level(config: SandboxConfiguration | None = None) -> None:
    with UninitializedSandbox("simpleguest", config) as uninitialized, uninitialized.evolve() as sandbox:
        sandbox.call("LogEveryLevel", "text")


@require("kvm")
@pytest.mark.parametrize("count", range(6))
def test_guest_sends_what_the_configuration_says(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """B.13/226: whatever RUST_LOG says."""
    monkeypatch.setenv("RUST_LOG", "trace")
    caplog.set_level(hyperlight.TRACE, "hyperlight_guest")
    log_every_level(SandboxConfiguration(guest_log_level=LEVELS[count]))
    assert levels_of(caplog) == SENT[:count]


@require("kvm")
@pytest.mark.parametrize("form", ["hyperlight_guest={}", "hyperlight_host={}", "{}"])
@pytest.mark.parametrize("count", range(6))
def test_guest_sends_what_rust_log_says(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, form: str, count: int
) -> None:
    """B.13/226: by guest target, host target and bare level."""
    monkeypatch.setenv("RUST_LOG", form.format(LEVELS[count]))
    caplog.set_level(hyperlight.TRACE, "hyperlight_guest")
    log_every_level()
    assert levels_of(caplog) == SENT[:count]


@require("kvm")
def test_guest_sends_only_errors_by_default(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B.13/226."""
    monkeypatch.delenv("RUST_LOG", raising=False)
    caplog.set_level(hyperlight.TRACE, "hyperlight_guest")
    log_every_level()
    assert levels_of(caplog) == [logging.ERROR]


# -- what becomes of a record --------------------------------------------------------------


@pytest.fixture(scope="module")
def parrot() -> Iterator[MultiUseSandbox]:
    """A guest that logs what it is told; only tests that do not poison it may share it."""
    with UninitializedSandbox(rawguest.parrot()) as uninitialized, uninitialized.evolve() as sandbox:
        yield sandbox


def log(sandbox: MultiUseSandbox, data: GuestLogData) -> None:
    buffer = rawguest.stack_with(memory.encode_guest_log_data(data))
    assert rawguest.tell(sandbox, buffer, port=LOG_PORT) == rawguest.ANSWER


def data_of(level: GuestLogLevel, **others: Any) -> GuestLogData:
    settings = {"message": "hello {} %s", "source": "a::module", "caller": "a_function", "source_file": "a.rs", "line": 17}
    return GuestLogData(level=level, **{**settings, **others})


@require("kvm")
@require("gcc")
@pytest.mark.parametrize(
    ("sent", "arrives"),
    [
        (GuestLogLevel.Trace, hyperlight.TRACE),
        (GuestLogLevel.Debug, logging.DEBUG),
        (GuestLogLevel.Information, logging.INFO),
        (GuestLogLevel.Warning, logging.WARNING),
        (GuestLogLevel.Error, logging.ERROR),
        (GuestLogLevel.Critical, logging.ERROR),
        (GuestLogLevel.None_, hyperlight.TRACE),
    ],
)
def test_record_arrives_with_its_level_and_origin(
    caplog: pytest.LogCaptureFixture, parrot: MultiUseSandbox, sent: GuestLogLevel, arrives: int
) -> None:
    """B.13/227: each of the seven levels; file, line, module, message."""
    caplog.set_level(hyperlight.TRACE, "hyperlight_guest")
    log(parrot, data_of(sent))
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("hyperlight_guest", arrives)
    assert (record.pathname, record.lineno) == ("a.rs", 17)
    assert (record.module, record.funcName) == ("a::module", "a_function")
    assert record.getMessage() == "hello {} %s"


@require("kvm")
@require("gcc")
def test_logger_that_is_off_gets_nothing(caplog: pytest.LogCaptureFixture, parrot: MultiUseSandbox) -> None:
    """B.13/227."""
    caplog.set_level(logging.CRITICAL + 1, "hyperlight_guest")
    for level in GuestLogLevel:
        log(parrot, data_of(level))
    assert not caplog.records


@require("kvm")
@require("gcc")
@pytest.mark.parametrize("text", ["", "x" * 500, "two\nlines", "\x1b[2J", "żółw", "%d %n"])
def test_text_of_a_guest_is_taken_as_it_is(
    caplog: pytest.LogCaptureFixture, parrot: MultiUseSandbox, text: str
) -> None:
    caplog.set_level(hyperlight.TRACE, "hyperlight_guest")
    log(parrot, data_of(GuestLogLevel.Error, message=text))
    assert [record.getMessage() for record in caplog.records] == [text]


@require("kvm")
@require("gcc")
def test_log_without_data_is_an_error_that_poisons() -> None:
    """B.13/227."""
    with UninitializedSandbox(rawguest.parrot()) as uninitialized, uninitialized.evolve() as sandbox:
        with pytest.raises(hyperlight.HandleIoError, match="Failed to read guest log data: "):
            rawguest.tell(sandbox, (8).to_bytes(8, "little"), port=LOG_PORT)
        assert sandbox.poisoned


@require("kvm")
def test_message_of_a_guest_of_this_sdk(caplog: pytest.LogCaptureFixture) -> None:
    """B.13/226."""
    caplog.set_level(hyperlight.TRACE, "hyperlight_guest")
    config = SandboxConfiguration(guest_log_level="info")
    with UninitializedSandbox("simpleguest", config) as uninitialized, uninitialized.evolve() as sandbox:
        sandbox.call("LogMessage", "the text", 3)
        sandbox.call("LogMessage", "too detailed", 4)
    (record,) = (record for record in caplog.records if record.name == "hyperlight_guest")
    assert record.levelno == logging.INFO
    assert "the text" in record.getMessage()
    assert record.filename == "simpleguest.c"
    assert record.lineno > 0
