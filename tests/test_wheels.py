"""The fixture that fetches real guests: what it accepts, what it refuses, and that the pins hold."""

from __future__ import annotations

import hashlib
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import wheels
from conftest import require
from hypothesis import given
from hypothesis import strategies as st

NAMES = b"\0.shstrtab\0.note.hyperlight-version\0"


def tiny_guest(*, kind: int = 3, machine: int = 62, names: bytes = NAMES) -> bytes:
    """An ELF file of section headers only: none, the names, the version note."""
    names_offset = 64
    table_offset = names_offset + len(names)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\x02\x01\x01", kind, machine, 1, 0, 0, table_offset, 0, 64, 56, 0, 64, 3, 1),
    )
    string_table = (1, 3, 0, 0, names_offset, len(names), 0, 0, 1, 0)
    sections = [(0,) * 10, string_table, (11, 7, 0, 0, 0, 0, 0, 0, 1, 0)]
    return header + names + b"".join(struct.pack("<IIQQQQIIQQ", *section) for section in sections)


def shared_object(*inside: bytes) -> bytes:
    embedded = b"".join(b"\x7fELF noise" + part for part in inside)
    return b"\x7fELF\x02\x01\x01 the outer file " + embedded + b"tail"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that knows only the wheels in the directory returned."""
    for variable, value in {
        "HYPERLIGHT_WHEEL_CACHE": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }.items():
        monkeypatch.setenv(variable, value)
    return tmp_path


def publish(directory: Path, members: dict[str, bytes]) -> None:
    """Put a wheel named thing 1.0 into *directory*."""
    metadata = {
        "thing-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n",
        "thing-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "thing-1.0.dist-info/RECORD": b"",
    }
    with zipfile.ZipFile(directory / "thing-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in {**members, **metadata}.items():
            wheel.writestr(name, content)


def pin(content: bytes, suffix: str = ".so") -> wheels.Pin:
    return wheels.Pin("thing", "1.0", "any", suffix, hashlib.sha256(content).hexdigest())


def test_the_guest_within_a_shared_object_is_found_to_its_last_byte() -> None:
    assert wheels.find_guest(shared_object(tiny_guest())) == tiny_guest()


@pytest.mark.parametrize(
    "inside",
    [
        (),
        (tiny_guest(kind=2),),
        (tiny_guest(machine=183),),
        (tiny_guest(names=b"\0.shstrtab\0.note.hyperlight-versions\0"),),
        (tiny_guest()[:-40],),
        (tiny_guest(), tiny_guest()),
    ],
    ids=["nothing", "not PIE", "other machine", "no version note", "cut off", "two of them"],
)
def test_anything_but_one_guest_is_refused(inside: tuple[bytes, ...]) -> None:
    with pytest.raises(ValueError, match=f"{2 if len(inside) == 2 else 0} guest ELFs inside, not one"):
        wheels.find_guest(shared_object(*inside))


@given(st.binary(max_size=64), st.integers(16, 63), st.integers(0, 2**64 - 1))
def test_a_damaged_elf_header_gives_a_guest_or_a_value_error(tail: bytes, offset: int, value: int) -> None:
    guest = bytearray(tiny_guest() + bytes(8))
    struct.pack_into("<Q", guest, offset, value)
    try:
        found = wheels.find_guest(shared_object(bytes(guest), tail))
    except ValueError:
        return
    assert found.startswith(b"\x7fELF")


def test_a_published_guest_is_fetched_once_and_then_served_from_the_cache(offline: Path) -> None:
    publish(offline, {"thing/native.so": shared_object(tiny_guest())})
    path = wheels.fetch(pin(tiny_guest()))
    assert path.read_bytes() == tiny_guest()
    (offline / "thing-1.0-py3-none-any.whl").unlink()
    assert wheels.fetch(pin(tiny_guest())) == path
    assert list(path.parent.iterdir()) == [path]


def test_the_cache_lies_among_the_users(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(offline, {"thing/native.so": shared_object(tiny_guest())})
    monkeypatch.delenv("HYPERLIGHT_WHEEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(offline / "caches"))
    assert wheels.fetch(pin(tiny_guest())).parent == offline / "caches/hyperlight/wheels"


def test_a_component_is_kept_as_it_is(offline: Path) -> None:
    publish(offline, {"thing/component.aot": b"ahead of time", "thing/component.wasm": b"just in time"})
    assert wheels.fetch(pin(b"ahead of time", ".aot")).read_bytes() == b"ahead of time"


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"thing/native.so": shared_object(tiny_guest() + b"!")}, "holds another .so than the pinned"),
        ({"thing/native.so": b"no ELF"}, "0 guest ELFs inside"),
        ({}, "is not as expected"),
    ],
    ids=["another guest", "no guest", "no shared object"],
)
def test_a_wheel_with_other_content_is_refused_and_leaves_nothing(
    offline: Path, members: dict[str, bytes], complaint: str
) -> None:
    publish(offline, members)
    with pytest.raises(wheels.WheelUnavailable, match=complaint):
        wheels.fetch(pin(b"what was expected"))
    assert list((offline / "cache").iterdir()) == []


def test_without_a_source_the_reason_names_the_wheel_in_one_line(offline: Path) -> None:
    with pytest.raises(wheels.WheelUnavailable) as caught:
        wheels.guest_elf("js", "0.14.0")
    requirement = "hyperlight-sandbox-backend-hyperlight-js==0.3.0"
    assert caught.value.reason.startswith(f"{requirement} cannot be downloaded: ")
    assert "\n" not in caught.value.reason
    command = subprocess.run([sys.executable, wheels.__file__], capture_output=True, text=True, timeout=100)
    assert (command.returncode, command.stdout, command.stderr) == (1, "", f"{caught.value.reason}\n")


def test_a_cache_that_cannot_be_written_is_named(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (offline / "file").touch()
    monkeypatch.setenv("HYPERLIGHT_WHEEL_CACHE", str(offline / "file/cache"))
    with pytest.raises(wheels.WheelUnavailable, match="file/cache: Not a directory; set HYPERLIGHT"):
        wheels.guest_elf("js", "0.14.0")


def test_an_unknown_guest_is_answered_with_those_known() -> None:
    with pytest.raises(KeyError, match=re.escape("no guest 'js' of '0.13.0': one of js 0.14.0, js 0.15.0,")):
        wheels.guest_elf("js", "0.13.0")
    with pytest.raises(KeyError, match=re.escape("one of 0.14.0, 0.17.0")):
        wheels.python_component("0.15.0")


# Spec: spec/guest-versions.md, section 2, second table: (bytes, first 12 digits of the SHA-256, e_entry).
PUBLISHED = {
    ("js", "0.14.0"): (1865432, "faafd054b844", 0x14F5C0),
    ("js", "0.15.0"): (2003344, "2c8dfa45f45e", 0x167800),
    ("js", "0.16.0"): (2070072, "85b88a45d651", 0x93BF0),
    ("js", "0.17.0"): (2069896, "130dc1dfec6d", 0x93B70),
    ("wasm", "0.14.0"): (2361760, "33d2920c325e", 0x16B0C0),
    ("wasm", "0.15.0"): (2368120, "571b728c5788", 0xFC880),
    ("wasm", "0.16.0"): (2366128, "0ce931f13979", 0xFC2D0),
    ("wasm", "0.17.0"): (2366664, "af70258c087d", 0xFC2C0),
}


def test_the_pins_are_the_published_guests() -> None:
    assert {key: wheel.sha256[:12] for key, wheel in wheels.GUESTS.items()} == {
        key: digest for key, (_, digest, _) in PUBLISHED.items()
    }


@require("wheels")
@pytest.mark.parametrize(("engine", "release"), PUBLISHED, ids=" ".join)
def test_a_real_guest_is_what_the_specification_describes(engine: str, release: str) -> None:
    size, digest, entry = PUBLISHED[engine, release]
    elf = wheels.guest_elf(engine, release).read_bytes()
    assert (len(elf), hashlib.sha256(elf).hexdigest()[:12]) == (size, digest)
    assert struct.unpack_from("<Q", elf, 24) == (entry,)
    note = struct.pack("<III", 11, 7, 1) + b"Hyperlight\0\0" + release.encode() + b"\0\0"
    assert elf.count(note) == 1


@require("wheels")
@pytest.mark.parametrize("release", wheels.COMPONENTS)
def test_a_component_was_built_by_the_wasmtime_of_its_guest(release: str) -> None:
    """Spec: spec/guest-programs.md, 2.3; the versions are those of spec/guest-versions.md, section 1."""
    wasmtime = {"0.14.0": b"36.0.6", "0.17.0": b"36.0.14"}[release]
    component = wheels.python_component(release).read_bytes()
    assert component.startswith(b"\x7fELF")
    assert b"x86_64-unknown-none" in component
    assert wasmtime in component
    assert wasmtime in wheels.guest_elf("wasm", release).read_bytes()
