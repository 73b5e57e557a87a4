"""The README's commands and examples do what it says they do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, require

README = (REPOSITORY / "README.md").read_text()


def run(*command: str, directory: Path) -> str:
    """Run *command* with the repository's modules, and return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@require("kvm")
@pytest.mark.parametrize("example", blocks("python"), ids=lambda text: text.splitlines()[0])
def test_python_example_prints_what_its_comments_say(example: str, tmp_path: Path) -> None:
    said = re.findall(r"print\(.*\)  # ([^:\n]+)", example)
    assert said
    assert run(sys.executable, "-c", example, directory=tmp_path).split() == said


@require("kvm")
@require("gcc")
def test_own_guest_builds_and_answers(tmp_path: Path) -> None:
    (source,) = blocks("c")
    (tmp_path / "answer.c").write_text(source)
    commands = re.findall(r"^    hyperlight ((?:build|call|inspect) .*)$", README, re.MULTILINE)
    printed = [run(sys.executable, "-m", "hyperlight", *each.split(), directory=tmp_path) for each in commands]
    assert len(commands) == 3
    assert printed[:2] == ["", "42\n"]
    assert "Hyperlight 0.14.0" in printed[2]


def test_first_commands_are_the_ones_that_ci_runs() -> None:
    first = re.findall(r"^    (python3 -m pip .*)$", README, re.MULTILINE)
    script = (REPOSITORY / ".ci" / "run").read_text()
    assert len(first) == 2
    assert all(command in script for command in first)


# -- the guide for guests ------------------------------------------------------------------------


@require("kvm")
@require("gcc")
def test_guide_for_guests_builds_what_it_shows(tmp_path: Path) -> None:
    guide = (REPOSITORY / "docs" / "guests.md").read_text()
    (source,) = re.findall(r"^```c\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    (tmp_path / "mean.c").write_text(source)
    commands = re.findall(r"^    \$ hyperlight (.*)$", guide, re.MULTILINE)
    printed = [run(sys.executable, "-m", "hyperlight", *each.split(), directory=tmp_path) for each in commands]
    assert printed == ["", "1.5\n"]
