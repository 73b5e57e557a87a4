"""List the lines of the acceptance lists that no test carries.

    python3 tests/acceptance.py [SPECIFICATION.MD]...

A test names the lines that it pins in its text as ``B.5/94`` or, for several, ``B.4/70-78``; ``F.13/2`` is a line of the
debugger's own list, all of which must have tests. Lines that
cannot apply to this project stand in the table of tests/README.md, with the reason. Prints one line for
each that has neither, and for each name that is no line's, and exits with 1 if there are any.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SPECIFICATIONS = [TESTS.parent.parent / "shared" / "spec" / name for name in ("acceptance.md", "rsp.md")]
PARTS = {f"B.{number}" for number in range(1, 19)}
"""B.19 and B.21 are out of scope."""
DEBUGGER = "F.13"


def listed(text: str) -> dict[tuple[str, int], str]:
    """Return the lines of the lists, each with its tag if it has one, by part and number."""
    lines = {}
    part = ""
    for line in text.splitlines():
        if line.startswith("## "):
            part = line.split()[1]
        elif item := re.match(r"- \*\*(\d+)\*\* (.*)" if part != DEBUGGER else r"(\d+)\. (.*)", line):
            lines[part, int(item[1])] = item[2]
    return lines


def is_wanted(part: str, line: str) -> bool:
    """Whether a line must have a test: it is the debugger's, or tagged C or G in one of the parts that count."""
    tags = line.split(" ", 1)[0].split("/")
    return part == DEBUGGER or (part in PARTS and bool({"C", "G"} & set(tags)))


def carried(text: str) -> set[tuple[str, int]]:
    """Return the part and number of each line that a test file, or the table, names."""
    names: set[tuple[str, int]] = set()
    for part, first, last in re.findall(r"\b([BF]\.\d+)/(\d+)(?:-(\d+))?", text):
        names |= {(part, number) for number in range(int(first), int(last or first) + 1)}
    return names


def problems(specification: str) -> list[str]:
    """Return the lines that neither a test nor the table names, and the names that are no line's."""
    lines = listed(specification)
    files = {*TESTS.glob("test_*.py"), TESTS / "README.md"} - {TESTS / "test_acceptance.py"}  # it names them to test this
    names = set().union(*(carried(file.read_text()) for file in files))
    untested = [place for place, line in lines.items() if is_wanted(place[0], line) and place not in names]
    unknown = sorted(names - lines.keys())
    return [
        *(f"{part}/{number} has no test: {lines[part, number]}" for part, number in untested),
        *(f"{part}/{number} is named by a test, but is no line of the list" for part, number in unknown),
    ]


if __name__ == "__main__":
    paths = [Path(name) for name in sys.argv[1:]] or SPECIFICATIONS
    found = problems("\n".join(path.read_text() for path in paths))
    print("\n".join(found) or "every line has its test")
    sys.exit(bool(found))
