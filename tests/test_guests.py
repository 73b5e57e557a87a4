"""The prebuilt guests are what their sources say."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import KERNEL_GUESTS, REPOSITORY, require

from hyperlight import main

GUESTS = REPOSITORY / "guests"
SOURCES = {
    "hello": ["hello.c"],
    "simpleguest": ["simpleguest.c", "simpleguest_failures.c", "simpleguest_machine.c", "simpleguest_float.c"],
    "staticarray": ["staticarray.c"],
}
"""`hyperlight build` makes each prebuilt guest of these, in this order."""
PREBUILT = [
    *((guest, [], GUESTS / "bin") for guest in SOURCES),
    *((guest, ["--kernel"], KERNEL_GUESTS) for guest in ("hello", "simpleguest")),
]
"""Name, options, and where it is kept."""
COMPILER = "12.2.0"
"""The bytes depend on the compiler; this is the one that made them, of Debian 12."""


@pytest.fixture(autouse=True)
def without_musl(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prebuilt guests use nothing of it, and were built without its headers."""
    monkeypatch.setattr("hyperlight._MUSLS", ())


@require("gcc")
@pytest.mark.parametrize(("guest", "options", "place"), PREBUILT)
def test_prebuilt_guest_comes_out_of_its_sources(
    guest: str, options: list[str], place: Path, tmp_path: Path
) -> None:
    version = subprocess.run(["gcc", "-dumpfullversion"], capture_output=True, text=True, check=True).stdout.strip()
    built = tmp_path / guest
    sources = [str(GUESTS / name) for name in SOURCES[guest]]
    assert main(["build", *options, *sources, "-o", str(built)]) == 0
    if version != COMPILER:
        pytest.skip(f"gcc {version} builds it, but only gcc {COMPILER} gives the same bytes")
    assert built.read_bytes() == (place / guest).read_bytes()


def test_every_prebuilt_guest_has_its_sources_here() -> None:
    assert {(place / guest) for guest, _, place in PREBUILT} == {*(GUESTS / "bin").iterdir(), *KERNEL_GUESTS.iterdir()}


@require("gcc")
def test_bytes_do_not_depend_on_where_the_tree_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = tmp_path / "built here", tmp_path / "built elsewhere"
    assert main(["build", str(GUESTS / "hello.c"), "-o", str(here)]) == 0
    shutil.copytree(GUESTS, tmp_path / "elsewhere")
    monkeypatch.setattr("hyperlight._PREBUILT_GUESTS", (str(tmp_path / "elsewhere" / "bin"),))
    assert main(["build", str(tmp_path / "elsewhere" / "hello.c"), "-o", str(there)]) == 0
    assert here.read_bytes() == there.read_bytes()
