"""The command line: what it prints, and one clear line and a non-zero status for each bad input."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, require

import hyperlight
from hyperlight import main

GUESTS = REPOSITORY / "guests" / "bin"


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process; return its status and what it printed."""
    try:
        status = main(list(arguments))
    except SystemExit as leaving:  # argparse, for --help and for usage errors
        status = int(leaving.code or 0)
    printed = capfd.readouterr()
    return int(status), printed.out, printed.err


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that has to fail; return the one line that says why."""
    status, out, err = run(capfd, *arguments)
    assert (status != 0, out) == (True, "")
    assert err.startswith("hyperlight: error: ") and err.count("\n") == 1, err
    return err


@require("kvm")
@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (["run", "hello", "World"], "Hello, World!\n"),
        (["run", "hello"], "Hello, World!\n"),
        (["call", "simpleguest", "Echo", "hello"], "hello\n"),
        (["call", "simpleguest", "Echo", "5:String"], "5\n"),
        (["call", "simpleguest", "Echo", "@@x"], "@x\n"),
        (["call", "simpleguest", "Add", "1", "41"], "42\n"),
        (["call", "simpleguest", "EchoLong", "5:Long"], "5\n"),
        (["call", "simpleguest", "EchoBool", "true"], "true\n"),
        (["call", "simpleguest", "EchoDouble", "1.5"], "1.5\n"),
        (["call", "simpleguest", "ReturnVoid"], ""),
    ],
    ids=" ".join,
)
def test_guests_answer(capfd: pytest.CaptureFixture[str], arguments: list[str], printed: str) -> None:
    """Issue 2, items 1 and 2."""
    assert run(capfd, *arguments) == (0, printed, "")


@require("kvm")
def test_file_travels_as_bytes(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"some bytes")
    assert run(capfd, "call", "simpleguest", "EchoBytes", f"@{tmp_path}/data")[:2] == (0, "some bytes")


@require("kvm")
def test_unknown_function_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert "has no function Nope" in refused(capfd, "call", "simpleguest", "Nope")


@require("kvm")
def test_timeout_stops_the_guest_and_says_where(capfd: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capfd, "call", "--timeout", "0.2", "simpleguest", "Spin")
    assert status == 124
    assert "did not finish within 0.2 s at 0x" in err and "spin+" in err


def changed(name: str, offset: int, data: bytes) -> bytes:
    """Return a prebuilt guest with some bytes replaced."""
    image = bytearray((GUESTS / name).read_bytes())
    image[offset : offset + len(data)] = data
    return bytes(image)


BAD_FILES = {
    "text": (b"just some text\n" * 100, "not an ELF"),
    "empty": (b"", "not an ELF"),
    "other machine": (changed("hello", 18, struct.pack("<H", 183)), "AArch64|machine|183"),
    "truncated": ((GUESTS / "hello").read_bytes()[:5000], "truncated|ends|beyond"),
    "32 bits": (changed("hello", 4, b"\1"), "64"),
    "release 0.13.0": (
        (GUESTS / "hello").read_bytes().replace(b"0.14.0\0", b"0.13.0\0"),
        r"built with hyperlight-guest-bin 0\.13\.0",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_guest_file(capfd: pytest.CaptureFixture[str], tmp_path: Path, kind: str) -> None:
    """Issue 2, item 4."""
    import re

    data, why = BAD_FILES[kind]
    (tmp_path / "guest").write_bytes(data)
    assert re.search(why, refused(capfd, "run", str(tmp_path / "guest")))


def test_dynamic_elf(capfd: pytest.CaptureFixture[str]) -> None:
    """Issue 2, item 4."""
    assert "-static-pie" in refused(capfd, "run", "/bin/ls")


def test_missing_file(capfd: pytest.CaptureFixture[str]) -> None:
    """Issue 2, item 4."""
    assert "No such file or directory" in refused(capfd, "run", "/no/such/guest")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["run", "--heap-size", "20G", "hello"], "exceeds maximum size allowed"),
        (["call", "simpleguest", "Echo", "5000000000:Int"], "between -2147483648 and 2147483647"),
        (["call", "simpleguest", "Echo", "99999999999999999999999"], "cannot be sent"),
        (["call", "simpleguest", "EchoBytes", "@/no/such/file"], "No such file"),
    ],
    ids=" ".join,
)
def test_bad_argument(capfd: pytest.CaptureFixture[str], arguments: list[str], why: str) -> None:
    """Issue 2, item 4."""
    assert why in refused(capfd, *arguments)


@pytest.mark.parametrize(
    ("path", "why"),
    [("/no/such/kvm", "does not exist"), ("forbidden", "may not be opened by you")],
)
def test_no_usable_kvm(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, why: str
) -> None:
    """Issue 2, item 4; a device that we may not open is one that belongs to nobody else's group."""
    monkeypatch.setattr(hyperlight, "KVM_PATH", path)
    if path == "forbidden":
        refusal = hyperlight.kvm_abi.KvmError("open", 13, "forbidden")

        def deny(*_: object) -> None:
            raise refusal

        monkeypatch.setattr(hyperlight.kvm_abi, "Kvm", deny)
    assert why in refused(capfd, "run", "hello")


def test_guest_text_cannot_reach_the_terminal_through_errors(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[31m\nb"
    assert "\x1b" not in refused(capfd, "run", str(path))


def test_help_teaches(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capfd, "--help")
    assert status == 0 and "exit status" in out
    for command in ("run", "call", "gdb", "inspect", "doctor", "build"):
        status, out, _ = run(capfd, command, "--help")
        assert status == 0 and "hyperlight " + command in out


def test_inspect_needs_no_kvm(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capfd, "inspect", "hello")
    assert status == 0
    assert "Hyperlight 0.14.0" in out and "page tables" in out


@require("kvm")
def test_doctor_finds_this_machine_healthy(capfd: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capfd, "doctor")
    assert status == 0 and "Guests can run here" in out


def test_importing_loads_no_elf_library() -> None:
    """Issue 2, item 6."""
    code = "import sys, hyperlight; sys.exit(any(name.startswith('elftools') for name in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
