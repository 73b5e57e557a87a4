"""Every line of the acceptance list that must have a test has one, or a reason in the tests' README."""

from __future__ import annotations

import acceptance
import pytest

SOME_LIST = """
## B.4 Pointers

- **7** C `one` - a rule.
- **8** R `two` - about Rust.
- **9** C/G `three` - another rule.

## B.14 GDB

- **10** G `four` - the debugger's.

## 5. Something else

1. This is no line.

## F.13 The debugger's own list

1. A rule of the debugger.
"""


def test_every_line_has_its_test() -> None:
    for path in acceptance.SPECIFICATIONS:
        if not path.exists():
            pytest.skip(f"the lists are not part of the project: {path} does not exist")
    assert acceptance.problems("\n".join(path.read_text() for path in acceptance.SPECIFICATIONS)) == []


def test_lines_and_names_are_found() -> None:
    lines = acceptance.listed(SOME_LIST)
    assert list(lines) == [("B.4", 7), ("B.4", 8), ("B.4", 9), ("B.14", 10), ("F.13", 1)]
    assert [number for (part, number), line in lines.items() if acceptance.is_wanted(part, line)] == [7, 9, 10, 1]
    named = {("B.4", 7), ("B.5", 10), ("B.5", 11), ("B.5", 12), ("F.13", 2)}
    assert acceptance.carried("B.4/7, B.5/10-12 and B.6, F.13/2") == named


def test_what_is_wrong_is_told() -> None:
    """In a list of two lines: this project's tests name neither, and many that are not in it."""
    found = acceptance.problems("## B.4 X\n- **1** C `never named` - a rule.\n- **2** R `nor this` - no rule.\n")
    assert found[0] == "B.4/1 has no test: C `never named` - a rule."
    assert "B.9/162 is named by a test, but is no line of the list" in found
    assert all("is named by a test" in line for line in found[1:])
