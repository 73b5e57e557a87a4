"""List the lines of the acceptance list that no test carries.

    python3 tests/acceptance.py [ACCEPTANCE.MD]

A test names the lines that it pins in its text as ``B.5/94`` or, for several, ``B.4/70-78``. Lines that
cannot apply to this project stand in the table of tests/README.md, with the reason. Prints one line for
each that has neither, and exits with 1 if there are any.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SPECIFICATION = TESTS.parent.parent / "shared" / "spec" / "acceptance.md"
PARTS = (*range(1, 14), *range(15, 19))
"""B.14 is the debugger's, B.19 and B.21 are out of scope."""


def wanted(text: str) -> dict[int, str]:
    """Return the lines tagged C or G of the parts that count, by number."""
    lines = {}
    part = 0
    for line in text.splitlines():
        if heading := re.match(r"## B\.(\d+) ", line):
            part = int(heading[1])
        item = re.match(r"- \*\*(\d+)\*\* (\S+) (.*)", line)
        if item and part in PARTS and set(item[2].split("/")) & {"C", "G"}:
            lines[int(item[1])] = f"B.{part}/{item[1]} {item[3]}"
    return lines


def carried(text: str) -> set[int]:
    """Return the numbers that a test file, or the table, names."""
    numbers: set[int] = set()
    for first, last in re.findall(r"B\.\d+/(\d+)(?:-(\d+))?", text):
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def missing(specification: str) -> list[str]:
    """Return the lines that neither a test nor the table names."""
    files = [*TESTS.glob("test_*.py"), TESTS / "README.md"]
    numbers = set().union(*(carried(file.read_text()) for file in files))
    return [line for number, line in wanted(specification).items() if number not in numbers]


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else SPECIFICATION
    lines = missing(path.read_text())
    print("\n".join(lines) or "every line has its test")
    sys.exit(bool(lines))
