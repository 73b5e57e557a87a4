"""Files that change under a mapping cannot hurt the host."""

from __future__ import annotations

import os
from pathlib import Path

from conftest import require

from hyperlight import UninitializedSandbox
from memory import PAGE_SIZE, SharedMemory


def test_file_cut_short_reads_as_zeros_and_kills_nobody(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 2 * PAGE_SIZE)
    with path.open("rb") as file:
        mapping = SharedMemory.from_fd(file.fileno(), 2 * PAGE_SIZE)
    with mapping:
        os.truncate(path, 10)
        assert mapping.read(0, PAGE_SIZE) == b"x" * 10 + bytes(PAGE_SIZE - 10)
        assert mapping.read(PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)
        assert mapping.read_u64(PAGE_SIZE) == mapping.read_u8(PAGE_SIZE) == 0
        assert mapping.read_u32(0) == int.from_bytes(b"xxxx", "little")


@require("kvm")
def test_restore_takes_mapped_files_away_and_leaves_the_sandbox_ready(tmp_path: Path) -> None:
    """B.9/170: to the snapshot before the mapping, and to the one after it."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * PAGE_SIZE)
    with UninitializedSandbox("simpleguest") as uninitialized, uninitialized.evolve() as sandbox:
        before = sandbox.snapshot()
        for snapshot_after in (True, False):
            sandbox.map_file_cow(path, 1 << 32)
            sandbox.restore(sandbox.snapshot() if snapshot_after else before)
            assert sandbox.call("Echo", "ready") == "ready"
