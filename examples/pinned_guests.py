"""Find the guests that the examples use when none is named: those that this repository pins for its tests.

Usage::

    from pinned_guests import component, guest

    guest("js", "0.17.0")  # the path of the ELF, taken out of a wheel that pip downloads once

What this is not: needed where the examples' --guest and --component say what to use, outside a checkout for instance.

Sources: tests/wheels.py, which does the work and holds the SHA-256 of each file.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import functools
import runpy
from pathlib import Path
from typing import Any

from hyperlight import HyperlightError

__all__ = ["component", "guest"]

_WHEELS = Path(__file__).resolve().parent.parent / "tests" / "wheels.py"


def guest(engine: str, release: str) -> Path:
    """Return the path of the guest *engine* ("js" or "wasm") for Hyperlight *release*.

    Raises ``HyperlightError`` where it can neither be found in the cache nor fetched.
    """
    return _fetched("guest_elf", engine, release)


def component(release: str) -> Path:
    """Return the path of the Python component (.aot) for the "wasm" guest of *release*; raises as ``guest``."""
    return _fetched("python_component", release)


def _fetched(function: str, *arguments: str) -> Path:
    wheels = _wheels()
    try:
        return Path(wheels[function](*arguments))
    except (KeyError, wheels["WheelUnavailable"]) as error:
        raise HyperlightError(f"no guest: {error}") from error


@functools.cache
def _wheels() -> dict[str, Any]:
    if not _WHEELS.exists():
        raise HyperlightError(f"no guest: name one with --guest, for there is no {_WHEELS}")
    return runpy.run_path(str(_WHEELS))
