"""Real Hyperlight guests, taken unmodified out of the wheels in which others publish them.

    import wheels
    path = wheels.guest_elf("js", "0.14.0")     # the QuickJS guest, built for Hyperlight 0.14.0
    aot = wheels.python_component("0.14.0")     # the Python component for the "wasm" guest of that release

    $ python3 tests/wheels.py                   # fetch all of them, or say why that fails

A wheel is fetched by name through pip, as pip is configured on this machine. Only the guest is kept, in
``~/.cache/hyperlight/wheels`` ($XDG_CACHE_HOME counts) or ``$HYPERLIGHT_WHEEL_CACHE``, and only if its SHA-256
is the pinned one.
What this is not: an installer. Nothing from a wheel is imported or run on the host.

Sources: spec/guest-versions.md, sections 1 to 4.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "COMPONENTS",
    "GUESTS",
    "Pin",
    "WheelUnavailable",
    "fetch",
    "find_guest",
    "guest_elf",
    "python_component",
    "why_unavailable",
]

PIP_TIME_LIMIT_S = 600


class WheelUnavailable(Exception):
    """A pinned file is neither in the cache nor to be had through pip; ``reason`` is one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Pin(NamedTuple):
    """One file in one published wheel."""

    distribution: str
    version: str
    platform: str
    suffix: str  # of the wheel's only member that ends so
    sha256: str  # of the guest ELF in that member (.so), or of the member itself

    @property
    def file_name(self) -> str:
        """Name in the cache; the digest in it keeps files of older pins from being taken for this."""
        kind = ".elf" if self.suffix == ".so" else self.suffix
        return f"{self.distribution}-{self.version}-{self.sha256[:12]}{kind}"


def _guest(backend: str, version: str, glibc: str, sha256: str) -> Pin:
    return Pin(f"hyperlight-sandbox-backend-{backend}", version, f"manylinux_{glibc}_x86_64", ".so", sha256)


def _component(version: str, sha256: str) -> Pin:
    return Pin("hyperlight-sandbox-python-guest", version, "any", ".aot", sha256)


# fmt: off
GUESTS = {  # (engine, Hyperlight release that the guest was built for)
    ("js", "0.14.0"): _guest("hyperlight-js", "0.3.0", "2_34",
        "faafd054b84440271dbc8e05d8bca9ade90037eb968071793f597998e03fe438"),
    ("js", "0.15.0"): _guest("hyperlight-js", "0.5.0", "2_34",
        "2c8dfa45f45ecadbbeb6c54f2a7e3711d45435f9210ac9be8cdc0e9789a64d92"),
    ("js", "0.16.0"): _guest("hyperlight-js", "0.6.0", "2_28",
        "85b88a45d651f9833aea9a219f48dd8b3c59cace60c94517a2557116953b3674"),
    ("js", "0.17.0"): _guest("hyperlight-js", "0.8.0", "2_28",
        "130dc1dfec6d944d48d4ff15c8e42b6830cc42fb10d03da249fa12947e99ae9c"),
    ("wasm", "0.14.0"): _guest("wasm", "0.3.0", "2_34",
        "33d2920c325e5f07b402468b180cfd5dd90903775b7a510a9969b46f7af2304a"),
    ("wasm", "0.15.0"): _guest("wasm", "0.5.0", "2_34",
        "571b728c5788da7db3942537f237b6325e67b8dda6f176418e9d816848b699ed"),
    ("wasm", "0.16.0"): _guest("wasm", "0.6.0", "2_28",
        "0ce931f139798bcb438d1d603cd86c9bb3b9ed04e52ea7e2b6235f3c9d46ba56"),
    ("wasm", "0.17.0"): _guest("wasm", "0.8.0", "2_28",
        "af70258c087d94264046e16c5a807e199a46cf9c8ad90718b4c73501bc8b43bd"),
}
COMPONENTS = {  # Hyperlight release of the "wasm" guest with the wasmtime that the component was built by
    "0.14.0": _component("0.3.0", "5f4d6994664aad46a25f20631d0ed806e4f56aad229544e30cffa33b877e0970"),
    "0.17.0": _component("0.8.0", "6b9d9c3c5af71e4c3be5802844c35f7e63b709aeb82bdcf6de4d6e9e6d79d307"),
}
# fmt: on


def guest_elf(engine: str, release: str) -> Path:
    """Return the path of a guest ELF, fetched if need be; *engine* and *release* as in ``GUESTS``.

    Raises: KeyError for an unknown pair, WheelUnavailable when it cannot be fetched.
    """
    if (engine, release) not in GUESTS:
        known = ", ".join(map(" ".join, GUESTS))
        raise KeyError(f"no guest {engine!r} of {release!r}: one of {known}")
    return fetch(GUESTS[engine, release])


def python_component(release: str) -> Path:
    """Return the path of the Python component (.aot) for the "wasm" guest of *release*, as in ``COMPONENTS``.

    Raises: KeyError for an unknown release, WheelUnavailable when it cannot be fetched.
    """
    if release not in COMPONENTS:
        raise KeyError(f"no Python component for {release!r}: one of {', '.join(COMPONENTS)}")
    return fetch(COMPONENTS[release])


def why_unavailable() -> str | None:
    """Fetch everything that is pinned (at first 75 MB) and return None, or the reason why it fails."""
    try:
        for pin in (*GUESTS.values(), *COMPONENTS.values()):
            fetch(pin)
    except WheelUnavailable as error:
        return error.reason
    return None


def fetch(pin: Pin) -> Path:
    """Return the path of the pinned file in the cache, filling the cache if need be.

    Raises: WheelUnavailable when pip cannot get the wheel or the file in it is not the pinned one.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("HYPERLIGHT_WHEEL_CACHE") or caches / "hyperlight/wheels")
    path = cache / pin.file_name
    if path.exists():  # files come here whole and checked, by rename
        return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch.") as directory:
            partial = Path(directory, pin.file_name)
            partial.write_bytes(_extract(pin, _download(pin, Path(directory))))
            partial.replace(path)
    except OSError as error:
        raise WheelUnavailable(f"{cache}: {error.strerror or error}; set HYPERLIGHT_WHEEL_CACHE") from error
    return path


def _download(pin: Pin, directory: Path) -> Path:
    """Let pip put the wheel into *directory*; return its path."""
    requirement = f"{pin.distribution}=={pin.version}"
    selection = ["--no-deps", "--only-binary=:all:", "--python-version=3.11", f"--platform={pin.platform}"]
    command = [sys.executable, "-m", "pip", "download", "--retries=1", *selection, "--dest", str(directory)]
    command.append(requirement)
    try:
        pip = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PIP_TIME_LIMIT_S
        )
    except subprocess.TimeoutExpired as error:
        raise WheelUnavailable(f"{requirement}: pip did not end within {PIP_TIME_LIMIT_S} s") from error
    wheels = list(directory.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        last_line = (pip.stderr.strip() or "no wheel, and no word why").splitlines()[-1]
        raise WheelUnavailable(f"{requirement} cannot be downloaded: {last_line.removeprefix('ERROR: ')}")
    return wheels[0]


def _extract(pin: Pin, wheel: Path) -> bytes:
    """Return the pinned bytes from *wheel*, checked."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(pin.suffix)]
            data = archive.read(name)
        content = find_guest(data) if pin.suffix == ".so" else data
    except (ValueError, zipfile.BadZipFile) as error:
        raise WheelUnavailable(f"{wheel.name} is not as expected: {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != pin.sha256:
        raise WheelUnavailable(f"{wheel.name} holds another {pin.suffix} than the pinned: SHA-256 {digest}")
    return content


# -------------------------------------------------------- the guest within a shared object

_ELF64_LE = b"\x7fELF\x02\x01\x01"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
_ET_DYN, _EM_X86_64 = 3, 62
_VERSION_SECTION = b".note.hyperlight-version\0"


def find_guest(shared_object: bytes) -> bytes:
    """Return the only guest ELF that lies within *shared_object*, after its own ELF header.

    Raises: ValueError unless there is exactly one.
    Spec: spec/guest-versions.md, section 2.
    """
    guests = []
    offset = shared_object.find(_ELF64_LE, 1)
    while offset >= 0:
        if guest := _guest_at(shared_object, offset):
            guests.append(guest)
        offset = shared_object.find(_ELF64_LE, offset + (len(guest) if guest else 1))
    if len(guests) != 1:
        raise ValueError(f"{len(guests)} guest ELFs inside, not one")
    return guests[0]


def _guest_at(data: bytes, start: int) -> bytes | None:
    """Return the guest ELF that begins at offset *start*, or None when what begins there is none."""
    try:
        header = _HEADER.unpack_from(data, start)
        _, kind, machine, _, _, e_phoff, e_shoff, _, _, _, e_phnum, _, e_shnum, e_shstrndx = header
        segments = [_PROGRAM_HEADER.unpack_from(data, start + e_phoff + 56 * i) for i in range(e_phnum)]
        sections = [_SECTION_HEADER.unpack_from(data, start + e_shoff + 64 * i) for i in range(e_shnum)]
    except (struct.error, OverflowError):  # a table lies past the end
        return None
    ends = [p_offset + p_filesz for _, _, p_offset, _, _, p_filesz, _, _ in segments]
    size = max(e_shoff + 64 * e_shnum, *ends, 64)
    if (kind, machine) != (_ET_DYN, _EM_X86_64) or e_shstrndx >= e_shnum or start + size > len(data):
        return None
    elf = data[start : start + size]
    names_offset, names_size = sections[e_shstrndx][4:6]
    names = elf[names_offset : names_offset + names_size]
    return elf if any(names.startswith(_VERSION_SECTION, section[0]) for section in sections) else None


if __name__ == "__main__":
    sys.exit(why_unavailable())
