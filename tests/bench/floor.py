"""The floor of a benchmark: the same work done by floor.c, on the guest image of a sandbox of this process.

    with hyperlight's benchmark sandbox as sandbox, Floor(sandbox) as floor:
        floor.sampler("call")(100)    # the times of 100 calls, in nanoseconds

The C program is built by gcc when it is first wanted. It maps the very memory files that hold the sandbox's
snapshots, and sends the very messages that this host sends: they are recorded here.

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import subprocess
import tempfile
import unittest.mock
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hyperlight
import kvm_abi
import memory
from hyperlight import MultiUseSandbox, Snapshot

HERE = Path(__file__).resolve().parent
GUESTS = HERE.parent.parent / "guests"
OPERATIONS = (
    *("create", "call", "call_host", "call_restore", "restore", "from_snapshot", "interrupt"),
    *("loop", "matrix"),
)
"""In the order of `enum operation` in floor.c."""


class FloorError(Exception):
    """The C program cannot be built, or gave up: it says why on standard error."""


@functools.cache
def program() -> Path:
    """Build floor.c, with the flags that guests are compiled with, and return where it lies until this process ends."""
    directory = tempfile.TemporaryDirectory(prefix="hyperlight-floor-")
    program.directory = directory  # type: ignore[attr-defined]  # to be removed with this process
    output = Path(directory.name) / "floor"
    flags = [flag for flag in hyperlight._COMMON_FLAGS if flag not in ("-fPIE", "-fvisibility=hidden")]
    command = ["gcc", *flags, "-Wall", "-Wextra", "-pthread", "-I", str(GUESTS), str(HERE / "floor.c"), "-o", str(output)]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise FloorError(f"floor.c cannot be built: {error}") from error
    return output


class Floor:
    """The C program, at work on the image of *sandbox*, a simpleguest with ``HostAdd``."""

    def __init__(self, sandbox: MultiUseSandbox, fresh: Snapshot | None = None) -> None:
        """*fresh* is the image before the guest's initialisation, for "create"."""
        snapshot = sandbox.snapshot()
        fresh = fresh or hyperlight.UninitializedSandbox("simpleguest", sandbox._config).snapshot()
        job, descriptors = _job(sandbox, snapshot, fresh)
        descriptor = os.memfd_create("floor-job")
        os.write(descriptor, job)
        try:
            self._process = subprocess.Popen(
                [program(), str(descriptor)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[descriptor, *descriptors],
            )
        finally:
            os.close(descriptor)
        (size,) = self._take(1)
        if size != _JOB_SIZE:
            raise FloorError(f"struct job has {size} bytes in floor.c, {_JOB_SIZE} here")

    def sampler(self, operation: str, size: int = 0) -> Callable[[int], list[int]]:
        """Return a sampler of one of OPERATIONS; *size* counts the turns of "loop" and the rows of "matrix"."""
        number = OPERATIONS.index(operation)

        def sample(count: int) -> list[int]:
            assert self._process.stdin is not None
            self._process.stdin.write(struct.pack("<3Q", number, count, size))
            self._process.stdin.flush()
            return self._take(count)

        return sample

    def _take(self, count: int) -> list[int]:
        assert self._process.stdout is not None
        data = self._process.stdout.read(8 * count)
        if len(data) != 8 * count:
            raise FloorError(f"floor ended with status {self._process.wait()}")
        return list(struct.unpack(f"<{count}Q", data))

    def close(self) -> None:
        """End the program."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def __enter__(self) -> Floor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


# ---- the job: what floor.c reads. Its structs are spelled here in the same order -------------------------------

_MAX_WORDS = 8
_IMAGE = struct.Struct(
    f"<10Q{2 * _MAX_WORDS}Q"
    f"{2 * ctypes.sizeof(kvm_abi.kvm_regs)}s{ctypes.sizeof(kvm_abi.kvm_sregs)}s{ctypes.sizeof(kvm_abi.kvm_xcrs)}s"
)
_HEADER = struct.Struct("<4Q")
_CONVERSATION = struct.Struct("<8Q")
_JOB_SIZE = _HEADER.size + 2 * _IMAGE.size + 3 * _CONVERSATION.size


class _Conversation(NamedTuple):
    """The messages of one call, b"" for those that it has not."""

    call: bytes
    request: bytes
    answer: bytes
    result: bytes


class _Blobs:
    """The bytes behind the structs of the job."""

    def __init__(self, begin: int) -> None:
        self._begin = begin
        self.data = bytearray()

    def add(self, data: bytes) -> tuple[int, int]:
        """Append *data* and return where in the job it begins, and its size."""
        self.data += bytes(-len(self.data) % 64)
        begin = self._begin + len(self.data)
        self.data += data
        return begin, len(data)


def _job(sandbox: MultiUseSandbox, ready: Snapshot, fresh: Snapshot) -> tuple[bytes, list[int]]:
    """Return the job and the file descriptors that it names."""
    blobs = _Blobs(-(-_JOB_SIZE // 64) * 64)
    sandbox.restore(ready)  # so that the guest's next entry is the first after a restore
    entries = sandbox._guest._entry_registers, sandbox._guest._next_entry_registers
    talks = [
        recorded(lambda: sandbox.call("Echo", "hello\n", returns=str)),
        recorded(lambda: sandbox.call("Add", 1, 41, returns=hyperlight.Int)),
        spin(),
    ]
    cpuid, _ = blobs.add(bytes(hyperlight._guest_cpuid()))
    filters = int(sandbox._config.guest_msrs is not None)
    signal_number = hyperlight.signal.SIGRTMIN + sandbox._config.interrupt_vcpu_sigrtmin_offset
    structs = [
        _HEADER.pack(int(ready.elf.privilege.resets_fpu), filters, cpuid, signal_number),
        _image(fresh, _first_entry(fresh), bytes(hyperlight._initial_sregs(fresh.layout.pt_base_gpa))),
        _image(ready, b"".join(entries), _restored_sregs(ready)),
        *(_CONVERSATION.pack(*(number for part in talk for number in blobs.add(part))) for talk in talks),
    ]
    job = b"".join(structs)
    job += bytes(-len(job) % 64)
    return job + blobs.data, [descriptor for each in (ready, fresh) if (descriptor := each.memory.fileno()) is not None]


def _image(snapshot: Snapshot, entries: bytes, sregs: bytes) -> bytes:
    layout = snapshot.layout
    words = [each for pair in _recorded_words(snapshot) for each in pair]
    return _IMAGE.pack(
        snapshot.memory.fileno(),
        *(layout.snapshot_size, layout.memory_size, layout.pt_size),
        *(layout.scratch_size, layout.scratch_base_gpa, layout.page_table_scratch_offset),
        *(layout.input_data_size, layout.output_data_size, int(snapshot.copy_on_write == "host")),
        *words, *[0] * (2 * _MAX_WORDS - len(words)),
        entries, sregs, snapshot.platform.xcrs,
    )  # fmt: skip


def _recorded_words(snapshot: Snapshot) -> list[tuple[int, int]]:
    """Return (offset, value) of the words that the host writes into scratch, but for the two stack pointers."""
    ram = hyperlight._Ram(snapshot)
    size = snapshot.layout.scratch_size
    top = ram.scratch.read(size - 64, 64)
    ram.close()
    return [(size - 64 + offset, value) for (value,), offset in zip(struct.iter_unpack("<Q", top), range(0, 64, 8), strict=True) if value]


def _first_entry(snapshot: Snapshot) -> bytes:
    registers = hyperlight._VirtualMachine.pack(
        rip=snapshot.entry, rsp=snapshot.stack_top, rdi=snapshot.layout.peb_gpa, rdx=memory.PAGE_SIZE, rcx=1
    )
    return registers * 2


def _restored_sregs(snapshot: Snapshot) -> bytes:
    assert snapshot.sregs is not None
    sregs = kvm_abi.kvm_sregs.from_buffer_copy(snapshot.sregs)
    sregs.cr3 = snapshot.layout.pt_base_gpa
    return bytes(sregs)


def recorded(call: Callable[[], object]) -> _Conversation:
    """Make a call and return the messages that went to and fro."""
    sent: list[bytes] = []
    received: list[bytes] = []
    stack = memory.IoStack
    replace, push, pop = stack.replace, stack.push, stack.pop

    def recording_pop(stack: memory.IoStack) -> bytes:
        received.append(pop(stack))
        return received[-1]

    with unittest.mock.patch.multiple(stack, replace=_noting(sent, replace), push=_noting(sent, push), pop=recording_pop):
        call()
    return _conversation(sent, received)


def _noting(sent: list[bytes], put: Callable[[memory.IoStack, bytes], None]) -> Callable[[memory.IoStack, bytes], None]:
    def recording_put(stack: memory.IoStack, data: bytes) -> None:
        sent.append(data)
        put(stack, data)

    return recording_put


def _conversation(sent: Sequence[bytes], received: Sequence[bytes]) -> _Conversation:
    if len(received) == 1:
        return _Conversation(sent[0], b"", b"", received[0])
    return _Conversation(sent[0], received[0], sent[1], received[1])


def spin() -> _Conversation:
    parameters: list[Any] = []
    call = memory.encode_function_call(
        "Spin", parameters, memory.FunctionCallType.Guest, hyperlight.ReturnType.Void
    )
    return _Conversation(call, b"", b"", b"")
