"""Run untrusted code in a micro-VM: the Hyperlight host, release 0.14.0, in pure Python.

Usage::

    from hyperlight import Int, UninitializedSandbox

    with UninitializedSandbox("simpleguest") as uninitialized:
        uninitialized.register("HostAdd", lambda a, b: a + b)
        with uninitialized.evolve() as sandbox:
            print(sandbox.call("Echo", "hi", returns=str))
            before = sandbox.snapshot()
            print(sandbox.call("Add", 1, 41, returns=Int))
            sandbox.restore(before)

A guest is an ELF that owns nothing but memory and one virtual CPU: no kernel, no devices. The host
calls functions in it and offers it functions in return; everything the guest says is checked before
it is used. Life cycle: ``UninitializedSandbox`` (memory laid out, no VM yet) → ``evolve()`` (the VM
runs the guest's own initialisation) → ``MultiUseSandbox`` (calls, snapshots, restores) → ``close()``.

What this is not: a machine monitor for operating systems (no devices, no firmware, one vCPU), nor a
boundary for host functions: what you register, the guest may call.

Sources: spec/abi.md (what host and guest say to each other), spec/features.md (what the host does),
Documentation/virt/kvm/api.rst of the Linux kernel (what KVM does).
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import bisect
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import enum
import errno
import functools
import inspect
import io
import itertools
import logging
import operator
import os
import re
import signal
import stat
import struct
import sys
import threading
import time
import typing
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Concatenate, Literal, ParamSpec, TypeVar

import kvm_abi
import memory
from kvm_abi import Cap, Cr0, Cr4, Efer, KvmExit, Rflags
from memory import (
    BASE_ADDRESS,
    PAGE_SIZE,
    BoundsCheckFailed,
    Double,
    ElfError,
    ErrorCode,
    Float,
    GuestBinVersionMismatch,
    GuestElf,
    GuestLogLevel,
    HyperlightError,
    Int,
    InvalidFlatBuffer,
    IoStackError,
    IoStackFull,
    LayoutError,
    Long,
    MemoryRegionFlags,
    MemoryRequestTooBig,
    MemoryRequestTooSmall,
    MmapFailed,
    PageTableError,
    ParameterType,
    PhysicalFault,
    ReturnType,
    SandboxMemoryLayout,
    SharedMemory,
    TranslationFault,
    UInt,
    ULong,
    ValueRangeError,
)

if typing.TYPE_CHECKING:
    import argparse  # imported by `main` when the command line needs it
    import subprocess

    import gdb_rsp  # imported when a debugger is wanted

__version__ = "0.14.0"

__all__ = [
    "TRACE",
    "BoundsCheckFailed",
    "CoreDump",
    "CoreSegment",
    "Counter",
    "CrashDumpError",
    "DebugInfo",
    "DebugServerError",
    "Double",
    "ElfError",
    "EmulationFailure",
    "EndedByDebugger",
    "ErrorCode",
    "ExecutionCanceledByHost",
    "Float",
    "GuestAborted",
    "GuestBinVersionMismatch",
    "GuestBinaryNotFound",
    "GuestElf",
    "GuestEnvironment",
    "GuestError",
    "GuestFailure",
    "GuestFunctionCallAlreadyInProgress",
    "HandleIoError",
    "Histogram",
    "HostFunction",
    "HostFunctionNotFound",
    "HostFunctions",
    "HyperlightError",
    "HyperlightVmError",
    "InitializeError",
    "Int",
    "InterruptHandle",
    "InvalidFlatBuffer",
    "InvalidPort",
    "IoStackError",
    "IoStackFull",
    "KvmError",
    "LayoutError",
    "Long",
    "MapRegionError",
    "MemoryAccessViolation",
    "MemoryEvent",
    "MemoryProfile",
    "MemoryRegionFlags",
    "MemoryRequestTooBig",
    "MemoryRequestTooSmall",
    "Metrics",
    "MmapFailed",
    "MmioReadUnmapped",
    "MmioWriteUnmapped",
    "MsrError",
    "MultiUseSandbox",
    "NoHypervisorFound",
    "Observation",
    "PageTableError",
    "ParameterType",
    "ParameterValueConversionFailure",
    "PhysicalFault",
    "PlatformState",
    "PoisonedSandbox",
    "ReturnType",
    "ReturnValueConversionFailure",
    "SandboxClosed",
    "SandboxConfiguration",
    "SandboxMemoryLayout",
    "SandboxStatus",
    "SharedMemory",
    "Snapshot",
    "SnapshotHostFunctionMismatch",
    "SnapshotMismatch",
    "TraceRecord",
    "TraceRecorder",
    "TranslationFault",
    "UInt",
    "ULong",
    "UnexpectedNoOfArguments",
    "UnexpectedVmExit",
    "UninitializedSandbox",
    "UnrecoverableSandbox",
    "ValueRangeError",
    "WireType",
    "cpl0_is_emulated",
    "dump_all_sandboxes",
    "find_guest",
    "guest_log_level_from",
    "is_hypervisor_present",
    "metrics",
]

KVM_PATH = "/dev/kvm"
TRACE = 5
"""The ``logging`` level below DEBUG that guest records of level Trace get."""

_logger = logging.getLogger("hyperlight")
_guest_logger = logging.getLogger("hyperlight_guest")
_logger.addHandler(logging.NullHandler())

StrPath = typing.Union[str, "os.PathLike[str]"]
_P = ParamSpec("_P")
_R = TypeVar("_R")

# ======================================================================================
# Errors
# ======================================================================================


class NoHypervisorFound(HyperlightError):
    """There is no usable KVM here; the message says what to do about it."""


class KvmError(HyperlightError, OSError):
    """The kernel refused an ioctl. ``ioctl`` is its name, ``errno`` the reason."""

    def __init__(self, error: kvm_abi.KvmError) -> None:
        super().__init__(error.errno, str(error))
        self.ioctl = error.ioctl

    def __str__(self) -> str:
        return str(self.strerror)


class GuestBinaryNotFound(HyperlightError, OSError):
    """The guest's file cannot be read. ``filename`` and ``errno`` are those of the attempt."""

    def __str__(self) -> str:
        return f"GuestBinary not found: '{self.filename}': {self.strerror} (os error {self.errno})"


class GuestError(HyperlightError):
    """A guest function answered with an error; the sandbox stays usable (abi.md 11.1).

    ``code`` is an ``ErrorCode``, ``message`` the guest's text. Where a host function's exception led
    to it, that exception is the ``__cause__``.
    """

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"Guest error occurred {self.code.name}: {self.message}"


class ReturnValueConversionFailure(HyperlightError, TypeError):
    """The guest returned a value of another type than the caller asked for."""


class UnexpectedNoOfArguments(HyperlightError, TypeError):
    """A function was called with the wrong number of arguments."""


class ParameterValueConversionFailure(HyperlightError, TypeError):
    """A parameter is not of the type that the function declared."""


class HostFunctionNotFound(HyperlightError, LookupError):
    """The guest called a host function that nobody registered. ``name`` is what it asked for."""

    def __init__(self, name: str) -> None:
        super().__init__(f"HostFunction {name} was not found")
        self.name = name


class GuestFunctionCallAlreadyInProgress(HyperlightError):
    """A host function used the very sandbox whose guest is waiting for it."""

    def __init__(self) -> None:
        super().__init__(
            "this sandbox is waiting for the host function that uses it: return first, "
            "or give the host function a sandbox of its own"
        )


class SandboxClosed(HyperlightError):
    """The sandbox was closed, or consumed by ``evolve()``."""


class PoisonedSandbox(HyperlightError):
    """The last call left the guest in an unknown state: ``restore()`` a snapshot first."""

    def __init__(self) -> None:
        super().__init__("The sandbox was poisoned: restore a snapshot before using it again")


class UnrecoverableSandbox(HyperlightError):
    """A restore failed while memory was being replaced; the sandbox can only be closed."""

    def __init__(self) -> None:
        super().__init__("The sandbox is unrecoverable: a restore failed half-way; close it and make another")


class SnapshotHostFunctionMismatch(HyperlightError):
    """The snapshot's guest may call host functions that this sandbox lacks or types differently."""


class SnapshotMismatch(HyperlightError):
    """The snapshot does not fit this sandbox; nothing was touched."""


class MapRegionError(HyperlightError, ValueError):
    """A file or region cannot be mapped there; the message says why."""


class GuestFailure(HyperlightError):
    """The guest's run ended badly and the sandbox is poisoned.

    ``registers`` holds the vCPU's general registers by name (``rip`` among them), or {} where they
    could not be read. ``core_dump`` is the path of the core dump that was written for it, or None;
    ``core_dump_failure`` is what went wrong where one should have been.
    """

    core_dump: str | None = None
    core_dump_failure: Exception | None = None
    _registers: Mapping[str, int] | bytes = {}  # by name, or kvm_regs: many a failure is not looked at so closely

    @property
    def registers(self) -> Mapping[str, int]:
        """The vCPU's general registers by name."""
        registers = self._registers
        if isinstance(registers, bytes):
            registers = self._registers = _named(registers)
        return registers

    @registers.setter
    def registers(self, registers: Mapping[str, int]) -> None:
        self._registers = registers


class ExecutionCanceledByHost(GuestFailure):
    """``InterruptHandle.kill()`` ended the call."""

    def __init__(self) -> None:
        super().__init__("Execution was cancelled by the host.")


class GuestAborted(GuestFailure):
    """The guest gave up through port 102 (abi.md 8.2): an abort, a panic or a CPU exception.

    ``code`` is an ``ErrorCode`` value (0..254), ``message`` the guest's text. For a CPU exception,
    ``vector``, ``instruction`` (gva), ``address`` (gva, of a page fault) and ``error_code`` are set
    and ``registers`` are those of the interrupted code; otherwise they are None. ``frame`` (gva) is where
    the guest saved those registers.
    """

    vector: int | None = None
    frame: int | None = None
    instruction: int | None = None
    address: int | None = None
    error_code: int | None = None

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"Guest aborted: {self.code} {self.message}"


class MemoryAccessViolation(GuestFailure):
    """The guest used mapped memory in a way that its flags do not allow (abi.md 17).

    ``address`` is a gpa, ``tried`` and ``flags`` are ``MemoryRegionFlags``.
    """

    def __init__(self, address: int, tried: MemoryRegionFlags, flags: MemoryRegionFlags) -> None:
        super().__init__(
            f"Memory Access Violation at address {address:#x} of type {tried}, "
            f"but memory is marked as {flags}"
        )
        self.address = address
        self.tried = tried
        self.flags = flags


class HyperlightVmError(GuestFailure):
    """The virtual machine stopped in a way that no guest should. ``detail`` says how."""

    stage = "Dispatch guest call error: Failed to run vm"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail

    def __str__(self) -> str:
        return f"Internal Hyperlight VM error: {self.stage}: {self.detail}"


class InitializeError(HyperlightVmError):
    """The guest's own initialisation failed; there is no sandbox. The ``__cause__`` says more."""

    stage = "Initialize error"


class MmioReadUnmapped(HyperlightVmError):
    """The guest read a guest-physical address where there is no memory. ``gpa`` is that address."""

    def __init__(self, gpa: int) -> None:
        super().__init__(f"MMIO READ access to unmapped address {gpa:#x}")
        self.gpa = gpa


class MmioWriteUnmapped(HyperlightVmError):
    """The guest wrote a guest-physical address without writable memory. ``gpa`` is that address."""

    def __init__(self, gpa: int) -> None:
        super().__init__(f"MMIO WRITE access to unmapped address {gpa:#x}")
        self.gpa = gpa


class UnexpectedVmExit(HyperlightVmError):
    """KVM left the guest for a reason that has no meaning in the ABI (a triple fault, an IN ...)."""

    def __init__(self, what: str) -> None:
        super().__init__(f"Unexpected VM exit: {what}")


class EmulationFailure(UnexpectedVmExit):
    """This KVM emulates guest code and cannot do an instruction.

    ``instruction`` holds its bytes as far as KVM reports them, ``rip`` its address (gva). *emulates_cpl0*:
    it emulates all code at CPL 0, and not only what touches addresses without memory.
    """

    def __init__(self, instruction: bytes, rip: int, *, emulates_cpl0: bool) -> None:
        shown = instruction.hex(" ") or "unknown"
        advice = (
            ". This KVM emulates code at CPL 0, without SSE, AVX and x87: run a user-mode guest here, or this one "
            "on a KVM with hardware virtualisation ('hyperlight doctor' tells)"
        )
        super().__init__(
            f"KVM cannot emulate the instruction at {rip:#x} (bytes {shown})"
            f"{advice if emulates_cpl0 else ', which touches an address without memory'}"
        )
        self.instruction = instruction
        self.rip = rip


class HandleIoError(HyperlightVmError):
    """What the guest asked for through a port cannot be done."""

    def __init__(self, detail: str) -> None:
        super().__init__(f"IO handling error: {detail}")


class InvalidPort(HandleIoError):
    """The guest wrote to a port that means nothing here. ``port`` is its number."""

    def __init__(self, port: int) -> None:
        super().__init__(f"Invalid outb port: Invalid OutBAction value: {port}")
        self.port = port


# ======================================================================================
# Configuration
# ======================================================================================

_MIN_IO_BUFFER_SIZE = 0x2000
_DEFAULT_HEAP_SIZE = 0x20000


@dataclasses.dataclass(frozen=True)
class SandboxConfiguration:
    """Sizes and options of a sandbox; sizes in bytes, defaults and minima of 0.14 (abi.md 2).

    ``input_data_size``, ``output_data_size``: the two message buffers; below 0x2000 is raised to it.
    ``heap_size``: 0 means the default of 128 KiB. ``scratch_size``: page tables, stack and, with
    ``copy_on_write="guest"``, every page the guest writes; a multiple of 4096.
    ``copy_on_write``: "guest" is 0.14's way (the guest's page-fault handler copies into scratch),
    "host" lets this machine's kernel copy at the first write; no guest can tell.
    ``guest_log_level``: the most detailed level that the guest sends, "off", "error", "warn", "info",
    "debug", "trace" or 0 to 5; None asks ``RUST_LOG``.
    ``interrupt_vcpu_sigrtmin_offset``: the signal SIGRTMIN + offset wakes the vCPU's thread.
    ``guest_debug_info``: where a debugger can connect; None: nowhere.
    ``guest_core_dump``: whether a failed run, other than a cancelled one, leaves a core dump; a path says yes,
    and where to. None: only where ``$HYPERLIGHT_CORE_DUMP_DIR`` is set, because a host that runs many guests,
    or guests that it does not trust, would fill its disk. False: ``generate_crashdump()`` writes nothing either.
    ``trace``: called with a ``TraceRecord`` for each call, host call and exit, and for what a guest with tracing
    built in reports at log level "trace"; a ``TraceRecorder`` makes a file of them. ``memory_profile``: called with a
    ``MemoryEvent`` for each allocation that a guest built for it reports; a ``MemoryProfile`` adds them up.
    ``hardware_timer``: interrupt controllers, and a timer that the guest sets through port 107 (abi.md 6.6). The guest
    must then end its runs by port 108: HLT waits for an interrupt.
    ``guest_msrs``: the model-specific registers that the guest may read and write, at most 16; snapshots hold them.
    Any other access is a general protection fault in the guest, where KVM has a filter. None: no filter, as in
    0.14; what the guest writes to an MSR then survives a restore.

    Raises ``LayoutError`` for a size that is not a whole number and ``HyperlightError`` for an
    option out of range. Whether the sizes fit together is checked when a sandbox is made.
    """

    input_data_size: int = 0x4000
    output_data_size: int = 0x4000
    heap_size: int = _DEFAULT_HEAP_SIZE
    scratch_size: int = 0x48000
    copy_on_write: Literal["guest", "host"] = "host"
    executable_heap: bool = False
    guest_log_level: int | str | None = None
    interrupt_vcpu_sigrtmin_offset: int = 0
    guest_debug_info: DebugInfo | None = None
    guest_core_dump: bool | StrPath | None = None
    trace: Callable[[TraceRecord], None] | None = None
    memory_profile: Callable[[MemoryEvent], None] | None = None
    hardware_timer: bool = False
    guest_msrs: Sequence[int] | None = ()

    def __post_init__(self) -> None:
        for name in ("input_data_size", "output_data_size", "heap_size", "scratch_size"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise LayoutError(f"{name} must be a number of bytes, 0 or more, not {size!r}")
        set_field = functools.partial(object.__setattr__, self)  # the dataclass is frozen
        set_field("input_data_size", max(self.input_data_size, _MIN_IO_BUFFER_SIZE))
        set_field("output_data_size", max(self.output_data_size, _MIN_IO_BUFFER_SIZE))
        set_field("heap_size", self.heap_size or _DEFAULT_HEAP_SIZE)
        if self.copy_on_write not in ("guest", "host"):
            raise HyperlightError(f'copy_on_write must be "guest" or "host", not {self.copy_on_write!r}')
        if not 0 <= self.interrupt_vcpu_sigrtmin_offset <= signal.SIGRTMAX - signal.SIGRTMIN:
            raise HyperlightError(
                f"Invalid SIGRTMIN offset: {self.interrupt_vcpu_sigrtmin_offset}. "
                "It exceeds the maximum real-time signal number."
            )
        if self.guest_log_level is not None:
            set_field("guest_log_level", _guest_log_level(self.guest_log_level))
        set_field("guest_msrs", _checked_msrs(self.guest_msrs))


@dataclasses.dataclass(frozen=True)
class GuestEnvironment:
    """A guest together with its init data: a blob that the guest finds in its memory (abi.md 3).

    ``guest`` is a path, the name of a guest that came with this library, the ELF's bytes, or what
    ``GuestElf.parse`` made of them: then no file is read again.
    ``init_data_flags`` are the guest's rights; pages are always readable.
    """

    guest: StrPath | bytes | GuestElf
    init_data: bytes = b""
    init_data_flags: MemoryRegionFlags = MemoryRegionFlags.READ


_GUEST_LOG_LEVELS = ("off", "error", "warn", "info", "debug", "trace")


def _guest_log_level(level: int | str) -> int:
    text = str(level).strip().lower()
    if text in _GUEST_LOG_LEVELS:
        return _GUEST_LOG_LEVELS.index(text)
    if text in tuple("012345"):
        return int(text)
    names = ", ".join(_GUEST_LOG_LEVELS)
    raise HyperlightError(f"a guest's log level is one of {names} or 0 to 5, not {level!r}")


def guest_log_level_from(rust_log: str) -> int:
    """Return the guest's log level, 0 (off) to 5 (trace), that a ``RUST_LOG`` text asks for (abi.md 2)."""
    parts = [part.strip() for part in rust_log.split(",")]
    targets = [part.split("=", 1) for part in parts if "=" in part]
    wanted = [level for target, level in targets if "hyperlight_guest" in target]
    wanted += [level for target, level in targets if "hyperlight_host" in target]
    wanted += [part for part in parts if "=" not in part]
    try:
        return _guest_log_level(wanted[0] if wanted else "error")
    except HyperlightError:
        return _guest_log_level("error")


def find_guest(guest: StrPath) -> str:
    """Return the path of *guest*: a file, or else the name of a guest that came with this library.

    Raises ``GuestBinaryNotFound`` where it is neither.
    """
    path = os.fspath(guest)
    if "\0" not in path and not os.path.exists(path) and os.sep not in path:
        for directory in _PREBUILT_GUESTS:
            if os.path.isfile(prebuilt := os.path.join(directory, path)):
                return prebuilt
    return path


_HERE = os.path.dirname(os.path.abspath(__file__))
_PREBUILT_GUESTS = (  # in a checkout or a vendored copy; where pip puts them
    os.path.join(_HERE, "guests", "bin"),
    os.path.join(_HERE, "hyperlight_guests", "bin"),
)


_BYTES = (bytes, bytearray, memoryview)


def _read_guest(guest: StrPath | bytes | GuestElf) -> GuestElf:
    if isinstance(guest, GuestElf):
        return guest
    if isinstance(guest, _BYTES):
        return GuestElf.parse(bytes(guest))
    path = find_guest(guest)
    try:
        path = os.path.realpath(path, strict=True)
        with _open_regular_file(path) as file:
            data = file.read()
    except OSError as error:
        raise GuestBinaryNotFound(error.errno, error.strerror, path) from error
    except ValueError as error:  # a NUL in the path
        raise GuestBinaryNotFound(errno.EINVAL, str(error), path) from error
    return _parsed(path, data)


_PARSED_LIMIT = 4
_parsed_guests: dict[str, GuestElf] = {}


def _parsed(path: str, data: bytes) -> GuestElf:
    """Parse the ELF *data* of the file at *path*, unless the file was the same when it was last parsed."""
    elf = _parsed_guests.get(path)
    if elf is None or elf.data != data:
        elf = GuestElf.parse(data, path=path)
        if len(_parsed_guests) >= _PARSED_LIMIT:
            _parsed_guests.clear()
        _parsed_guests[path] = elf
    return elf


def _open_regular_file(path: StrPath) -> io.BufferedReader:
    """Open the file at *path*. Raises only ``OSError``, also for a path that cannot be one."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return open(path, "rb")
    except ValueError as error:  # a NUL in the path
        raise OSError(errno.EINVAL, str(error)) from error


# ======================================================================================
# Types on the wire, and the functions that a host offers
# ======================================================================================

_RETURN_TYPE_OF = {kind: ReturnType[kind.name] for kind in ParameterType}
_PARAMETER_TYPE_OF = {returned: kind for kind, returned in _RETURN_TYPE_OF.items()}


@dataclasses.dataclass(frozen=True)
class WireType:
    """What a Python annotation means on the wire: the types it accepts, and the one it asks for."""

    name: str
    accepts: frozenset[ParameterType]
    """As an argument."""
    returns: frozenset[ReturnType]
    """As a result."""
    asks_for: ReturnType
    """What a call tells the guest to expect."""

    @classmethod
    def of(cls, name: str, *kinds: ParameterType) -> WireType:
        """Make the type that takes and returns any of *kinds*, and asks for the first."""
        returns = [_RETURN_TYPE_OF[kind] for kind in kinds]
        return cls(name, frozenset(kinds), frozenset(returns), returns[0])


_VOID = WireType("Void", frozenset(), frozenset({ReturnType.Void}), ReturnType.Void)
_ANYTHING = WireType("Any", frozenset(ParameterType), frozenset(ReturnType), ReturnType.Int)

_WIRE_TYPES: dict[Any, WireType] = {
    Int: WireType.of("Int", ParameterType.Int),
    UInt: WireType.of("UInt", ParameterType.UInt),
    Long: WireType.of("Long", ParameterType.Long),
    ULong: WireType.of("ULong", ParameterType.ULong),
    Float: WireType.of("Float", ParameterType.Float),
    Double: WireType.of("Double", ParameterType.Double),
    int: WireType.of("int", ParameterType.Int, ParameterType.UInt, ParameterType.Long, ParameterType.ULong),
    float: WireType.of("float", ParameterType.Double, ParameterType.Float),
    str: WireType.of("String", ParameterType.String),
    bool: WireType.of("Bool", ParameterType.Bool),
    bytes: WireType.of("VecBytes", ParameterType.VecBytes),
    None: _VOID,
    type(None): _VOID,
    Any: _ANYTHING,
    inspect.Parameter.empty: _ANYTHING,
}


def _wire_type(annotation: Any) -> WireType:
    try:
        return _WIRE_TYPES[annotation]
    except (KeyError, TypeError):  # TypeError: an unhashable annotation
        raise HyperlightError(
            f"{annotation!r} is not a type that can travel: use Int, UInt, Long, ULong, Float, Double, "
            "int, float, str, bool, bytes, or None as a return type"
        ) from None


@dataclasses.dataclass(frozen=True)
class HostFunction:
    """A Python function that guests may call, with the wire types of its parameters and result.

    ``parameters`` is None where the function takes any number of anything.
    """

    name: str
    function: Callable[..., Any]
    parameters: tuple[WireType, ...] | None
    returns: WireType

    MAX_PARAMETERS: ClassVar[int] = 32

    @classmethod
    def of(
        cls,
        name: str,
        function: Callable[..., Any],
        parameters: Sequence[Any] | None = None,
        returns: Any = inspect.Parameter.empty,
    ) -> HostFunction:
        """Take the types from *parameters* and *returns* where given, else from the annotations.

        What has no annotation accepts any type and returns what the guest expects. Raises
        ``HyperlightError`` for a type that cannot travel or more than 32 parameters.
        """
        if not isinstance(name, str) or not name:
            raise HyperlightError(f"a host function needs a name, not {name!r}")
        if not callable(function):
            raise HyperlightError(f"{name}: {function!r} is not callable")
        annotated, annotated_return = _annotations(name, function)
        if parameters is not None:
            annotated = list(parameters)
        if returns is inspect.Parameter.empty:
            returns = annotated_return
        if annotated is not None and len(annotated) > cls.MAX_PARAMETERS:
            raise HyperlightError(f"{name} has {len(annotated)} parameters; a host function has at most 32")
        types = None if annotated is None else tuple(_wire_type(each) for each in annotated)
        if types is not None and _VOID in types:
            raise HyperlightError(f"{name}: None is a type to return, not one of a parameter")
        return cls(name, function, types, _wire_type(returns))

    @functools.cached_property
    def signature(self) -> tuple[tuple[str, ...] | None, str]:
        """The names of the parameter types (None: any number of any) and of the return type."""
        names = None if self.parameters is None else tuple(each.name for each in self.parameters)
        return names, self.returns.name

    def call(self, arguments: Sequence[tuple[ParameterType, Any]], expected: ReturnType) -> bytes:
        """Call the function with decoded *arguments* and encode its result as the guest *expected*.

        Raises whatever the function raises, and ``UnexpectedNoOfArguments`` or
        ``ParameterValueConversionFailure`` before it is called.
        """
        if (parameters := self.parameters) is None:
            values = [value for _, value in arguments]
        else:
            values = []
            if len(arguments) != len(parameters):
                raise UnexpectedNoOfArguments(
                    "The number of arguments to the function is wrong: "
                    f"got {len(arguments)} expected {len(parameters)}"
                )
            for (kind, value), declared in zip(arguments, parameters):  # noqa: B905 - slower, and seen to above
                if kind not in declared.accepts:
                    raise _not_convertible(kind, value, declared)
                values.append(value)
        result = self.function(*values)
        only_one = len(self.returns.returns) == 1
        return_type = self.returns.asks_for if only_one else self._return_type(result, expected)
        return memory.encode_return_value(return_type, result)

    def _return_type(self, result: Any, expected: ReturnType) -> ReturnType:
        """Choose the wire type of *result*: of several that are possible, the expected one."""
        if result is None and self.returns is _ANYTHING:
            return ReturnType.Void
        natural = memory.wire_type_of(result)
        for family in (_WIRE_TYPES[int], _WIRE_TYPES[float]):
            if natural in family.accepts and expected in family.returns:
                return expected
        return _RETURN_TYPE_OF[natural]


def _annotations(name: str, function: Callable[..., Any]) -> tuple[list[Any] | None, Any]:
    """Return the annotations of *function*'s positional parameters (None: any number) and result."""
    try:
        signature = inspect.signature(function, eval_str=True)
    except ValueError:  # a builtin without a signature
        return None, inspect.Parameter.empty
    except (NameError, TypeError, SyntaxError) as error:
        raise HyperlightError(f"{name}: its annotations cannot be read: {error}") from error
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None, signature.return_annotation
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    annotations = [each.annotation for each in signature.parameters.values() if each.kind in positional]
    return annotations, signature.return_annotation


class HostFunctions(Mapping[str, HostFunction]):
    """The functions that a host offers, by name; independent of any sandbox.

    A new set holds ``HostPrint``, which writes to standard output; ``HostFunctions.empty()`` holds
    nothing. Registering a name again replaces it.
    """

    def __init__(self) -> None:
        self._functions = {"HostPrint": _host_print()}

    @classmethod
    def empty(cls) -> HostFunctions:
        """Return a set without even ``HostPrint``."""
        functions = cls()
        functions._functions.clear()
        return functions

    def register(
        self,
        name: str,
        function: Callable[..., Any],
        parameters: Sequence[Any] | None = None,
        returns: Any = inspect.Parameter.empty,
    ) -> None:
        """Offer *function* to guests under *name*; see ``HostFunction.of`` for the types."""
        self._functions[name] = HostFunction.of(name, function, parameters, returns)

    def __getitem__(self, name: str) -> HostFunction:
        return self._functions[name]

    def get(self, name: str, default: Any = None) -> Any:  # Mapping's own takes three steps, in every host call
        """Return the function *name*, or *default*."""
        return self._functions.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)

    def copy(self) -> HostFunctions:
        """Return a set with the same functions that can be changed on its own."""
        functions = HostFunctions.empty()
        functions._functions.update(self._functions)
        return functions


@functools.cache
def _host_print() -> HostFunction:
    return HostFunction.of("HostPrint", _print_to_stdout)


def _print_to_stdout(text: str) -> Int:
    """Print as 0.14's HostPrint does: green on a terminal; return the length in bytes."""
    green = sys.stdout.isatty()
    sys.stdout.write(f"\x1b[32m{text}\x1b[0m" if green else text)
    sys.stdout.flush()
    return Int(len(text.encode()))


# ======================================================================================
# Sandboxes
# ======================================================================================


class UninitializedSandbox:
    """A guest whose memory is laid out and whose own initialisation has not run; there is no VM yet.

    *guest* is a path, the name of a guest that came with this library ("hello"), the ELF's bytes or a
    ``GuestEnvironment``. Raises ``GuestBinaryNotFound``, ``ElfError``, ``GuestBinVersionMismatch``,
    ``MemoryRequestTooBig`` or ``MemoryRequestTooSmall``.
    """

    def __init__(
        self, guest: StrPath | bytes | GuestElf | GuestEnvironment, config: SandboxConfiguration | None = None
    ) -> None:
        environment = guest if isinstance(guest, GuestEnvironment) else GuestEnvironment(guest)
        self._config = config or SandboxConfiguration()
        self._snapshot: Snapshot | None = _image_of(environment, self._config)
        self._functions = HostFunctions()
        self._files: list[_FileMapping] = []
        self._interrupt = InterruptHandle(signal.SIGRTMIN + self._config.interrupt_vcpu_sigrtmin_offset)

    def register(
        self,
        name: str,
        function: Callable[..., Any],
        parameters: Sequence[Any] | None = None,
        returns: Any = inspect.Parameter.empty,
    ) -> None:
        """Offer *function* to the guest under *name*, replacing what had that name.

        Types come from *parameters* (0 to 32 of them) and *returns*, or from the function's annotations.
        """
        self._functions.register(name, function, parameters, returns)

    def map_file_cow(self, path: StrPath, gpa: int, label: str | None = None) -> int:
        """Show the file at *path* to the guest at *gpa* from its initialisation on.

        As ``MultiUseSandbox.map_file_cow``, for at most 32 files.
        """
        layout = self.layout
        if len(self._files) >= _FileMapping.MAX_PENDING:
            raise MapRegionError(f"at most {_FileMapping.MAX_PENDING} files can be mapped before evolve()")
        taken = [
            (BASE_ADDRESS, BASE_ADDRESS + layout.snapshot_size),
            (layout.scratch_base_gpa, layout.scratch_base_gpa + layout.scratch_size),
            *((file.gpa, file.gpa + file.size) for file in self._files),
        ]
        with contextlib.ExitStack() as undo:
            file = undo.enter_context(_FileMapping(path, gpa, label))
            _check_region(gpa, file.size, taken)
            undo.pop_all()
        self._files.append(file)
        return file.size

    def interrupt_handle(self) -> InterruptHandle:
        """Return the handle of this sandbox and the one it evolves into: it can end initialisation, too."""
        return self._interrupt

    def snapshot(self) -> Snapshot:
        """Return the guest as it is before its initialisation; ``from_snapshot`` starts from there."""
        if self._snapshot is None:
            raise SandboxClosed("this sandbox was closed or evolved")
        return self._snapshot

    def evolve(self) -> MultiUseSandbox:
        """Create the VM, run the guest's initialisation and return the sandbox that takes calls.

        This object is used up, whether or not it succeeds. Raises ``NoHypervisorFound``,
        ``InitializeError`` (cause chained), ``KvmError``.
        """
        snapshot = self.snapshot()
        self._snapshot = None
        files, self._files = self._files, []
        with contextlib.ExitStack() as undo:
            for file in files:
                undo.enter_context(file)
            return MultiUseSandbox(
                snapshot, self._functions, self._config, _files=files, _interrupt=self._interrupt
            )

    @property
    def layout(self) -> SandboxMemoryLayout:
        """Where everything lies in guest memory."""
        return self.snapshot().layout

    def shared_mem_size(self) -> int:
        """Return the bytes of guest-physical memory in use from 0x1000 up; map files beyond."""
        return self.layout.snapshot_size

    def close(self) -> None:
        """Release the memory; harmless after ``evolve()``."""
        self._snapshot = None
        while self._files:
            self._files.pop().close()

    def __enter__(self) -> UninitializedSandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<UninitializedSandbox {self._snapshot!r}>"


class SandboxStatus(enum.Enum):
    """What can be done with a sandbox."""

    READY = "ready"
    """Everything."""
    POISONED = "poisoned"
    """``restore()``, interrupt handles, core dumps and ``close()``."""
    UNRECOVERABLE = "unrecoverable"
    """``close()`` only."""


_READY, _POISONED = SandboxStatus.READY, SandboxStatus.POISONED
"""Members of an enum are slow to look up: that calls Python code."""

def _one_at_a_time(
    method: Callable[Concatenate[MultiUseSandbox, _P], _R],
) -> Callable[Concatenate[MultiUseSandbox, _P], _R]:
    """Let one thread at a time into *method* and its like; what leaves a guest half-way poisons its sandbox.

    Ctrl-C, like whatever a thread can be sent, comes where a Python function begins or a C function has returned,
    and may come anywhere: so nothing is called between taking the lock and the ``try``, nor in ``finally``
    before the lock is free again. A context manager in Python, or a generator, could not promise that.
    """

    @functools.wraps(method)
    def exclusively(self: MultiUseSandbox, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        thread = threading.get_ident()
        if self._user == thread:
            raise GuestFunctionCallAlreadyInProgress
        try:
            with self._lock:
                self._user = thread
                try:
                    return method(self, *args, **kwargs)
                except kvm_abi.KvmError as error:
                    raise KvmError(error) from error
                finally:
                    if not self._guest.at_rest and self._status is _READY:
                        self._status = _POISONED
                    self._user = None
        finally:
            if self._guest.debugger is not None:
                self._guest.debugger.server.released()

    return exclusively


class MultiUseSandbox:
    """A running guest: call its functions, take and restore snapshots, map files, interrupt it.

    Made by ``UninitializedSandbox.evolve()`` or ``MultiUseSandbox.from_snapshot()``. Any thread may use it,
    one at a time: a second thread waits. A host function that uses the sandbox whose guest is waiting
    for it gets ``GuestFunctionCallAlreadyInProgress``.

    After a fork, the sandbox is the parent's alone: in the child it is closed. Snapshots are for both.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        host_functions: HostFunctions | None = None,
        config: SandboxConfiguration | None = None,
        *,
        _files: Sequence[_FileMapping] = (),
        _interrupt: InterruptHandle | None = None,
    ) -> None:
        self._functions = host_functions.copy() if host_functions is not None else HostFunctions()
        self._config = config or SandboxConfiguration()
        snapshot._check_host_functions(self._functions)
        self._lock = threading.Lock()
        self._user: int | None = None  # the thread that holds the lock
        self._status = SandboxStatus.READY
        self._closed = ""  # or why
        self._snapshot = snapshot if snapshot.is_initialized else None
        self._fitting: Snapshot | None = None  # that was found to fit, as long as nothing changes that
        interrupt = _interrupt or InterruptHandle(signal.SIGRTMIN + self._config.interrupt_vcpu_sigrtmin_offset)
        try:
            self._guest = _Guest(snapshot, self._functions, interrupt, self._config)
        except kvm_abi.KvmError as error:
            raise KvmError(error) from error
        try:
            with _live_sandboxes_lock:
                _live_sandboxes.add(self)
            self._start(_files)
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_snapshot(
        cls,
        snapshot: Snapshot,
        host_functions: HostFunctions | None = None,
        config: SandboxConfiguration | None = None,
    ) -> MultiUseSandbox:
        """Build a sandbox from *snapshot* without loading an ELF.

        A snapshot of an initialised sandbox is entered where it left off, without running guest
        initialisation; *config*'s sizes are ignored, its options honoured. Raises
        ``SnapshotHostFunctionMismatch`` where *host_functions* does not cover what the snapshot's
        sandbox offered; otherwise as ``evolve()``.
        """
        return cls(snapshot, host_functions, config)

    @_one_at_a_time
    def _start(self, files: Sequence[_FileMapping]) -> None:
        """Bring the guest to where it takes calls."""
        self._guest.core_dumps = self._config.guest_core_dump
        self._guest.observe(self._config.trace, self._config.memory_profile)
        if self._config.guest_debug_info is not None:
            self._guest.debugger = _Debugger(self, self._guest, self._config.guest_debug_info)
        for file in files:
            self._guest.map_file(file)
        if not self._guest.snapshot.is_initialized:
            self._guest.initialise(_effective_log_level(self._config))

    def _disconnect(self) -> None:
        """Let go of the debugger; not with the lock held, which its thread may want."""
        if self._guest.debugger is not None:
            self._guest.debugger.close()

    # -- calls -------------------------------------------------------------------------

    def call(self, name: str, /, *args: Any, returns: Any = Any) -> Any:
        """Call the guest function *name* and return its value; what the guest changed, stays.

        An argument travels as its wrapper says (``Int(5)``, ``ULong(5)``, ``Float(1.5)``...), a plain
        ``int`` as Int where it fits and else Long, ``float`` as Double, ``str``, ``bool``, ``bytes`` as
        themselves. *returns* is a wrapper, ``int``, ``float``, ``str``, ``bool``, ``bytes`` or None; left
        out, whatever the guest returns is returned.

        Raises ``ValueRangeError`` for an argument that fits no wire type, before anything is sent;
        ``GuestError`` where the function answers with an error and ``ReturnValueConversionFailure``
        for a result of another type (the sandbox stays usable); a ``GuestFailure`` where the run ends
        badly (the sandbox is poisoned); ``PoisonedSandbox``.
        """
        returned = _wire_type(returns)
        return self._call(name, memory.encode_guest_call(name, args, returned.asks_for), returned)

    def function(self, name: str, parameters: Sequence[Any] = (), returns: Any = None) -> Callable[..., Any]:
        """Return a callable for the guest function *name* with the types given, as ctypes users expect.

        ``sandbox.function("Add", (Int, Int), Int)(1, 41)`` is 42. Raises ``UnexpectedNoOfArguments``
        when it is called with another number of arguments, and as ``call``.
        """
        declared = [_wire_type(each) for each in parameters]
        returned = _wire_type(returns)

        def guest_function(*args: Any) -> Any:
            if len(args) != len(declared):
                raise UnexpectedNoOfArguments(f"{name} takes {len(declared)} arguments, not {len(args)}")
            typed = [(_type_for(value, wire), value) for value, wire in zip(args, declared, strict=True)]
            message = memory.encode_function_call(name, typed, memory.FunctionCallType.Guest, returned.asks_for)
            return self._call(name, message, returned)

        guest_function.__name__ = guest_function.__qualname__ = name
        return guest_function

    def _call(self, name: str, message: bytes, returns: WireType) -> Any:
        """Send the encoded call of *name* and return the value that comes back, which must be one of *returns*.

        What `_one_at_a_time` does is written out here: every call comes this way, and a wrapper would add 2 %.
        """
        thread = threading.get_ident()
        if self._user == thread:
            raise GuestFunctionCallAlreadyInProgress
        guest = self._guest
        try:
            with self._lock:
                self._user = thread
                try:
                    if self._closed or self._status is not _READY:
                        self._check_usable()
                    self._snapshot = None
                    result = memory.decode_function_call_result(guest.dispatch(name, message))
                    if type(result) is memory.ReturnValue and result.type in returns.returns:
                        return result.value
                    raise _unwelcome(result, returns, guest.host_failure)
                except ExecutionCanceledByHost:
                    metrics.guest_cancellations.increment()
                    raise
                except kvm_abi.KvmError as error:
                    raise KvmError(error) from error
                finally:
                    guest.host_failure = None
                    if not guest.at_rest and self._status is _READY:
                        self._status = _POISONED
                    self._user = None
        finally:
            if guest.debugger is not None:
                guest.debugger.server.released()

    # -- host functions ----------------------------------------------------------------

    @_one_at_a_time
    def register(
        self,
        name: str,
        function: Callable[..., Any],
        parameters: Sequence[Any] | None = None,
        returns: Any = inspect.Parameter.empty,
    ) -> None:
        """Offer *function* to the guest from now on; see ``UninitializedSandbox.register``."""
        self._check_usable()
        self._functions.register(name, function, parameters, returns)
        self._snapshot = self._fitting = None

    # -- snapshots ---------------------------------------------------------------------

    @_one_at_a_time
    def snapshot(self) -> Snapshot:
        """Return the guest's state as it is now; the same object until a call or a mapping changes it.

        Raises ``PoisonedSandbox``; ``MemoryRequestTooSmall`` where its page tables would not fit into
        scratch; ``PageTableError`` where the guest's page tables make no sense.
        """
        self._check_usable()
        if self._snapshot is None:
            self._snapshot = self._guest.capture()
        return self._snapshot

    @_one_at_a_time
    def restore(self, snapshot: Snapshot) -> None:
        """Put the guest back to *snapshot*, its own or another sandbox's; a poisoned sandbox is ready again.

        Mapped regions and files are unmapped (what the guest had mapped of them is in the snapshot). Raises
        ``SnapshotMismatch``, ``SnapshotHostFunctionMismatch`` or ``MmapFailed`` before anything is touched;
        ``KvmError`` for what may be tried again, the sandbox being poisoned; ``UnrecoverableSandbox``.
        """
        self._check_usable(poisoned_too=True)
        if snapshot is not self._fitting:
            self._check_fit(snapshot)
        ram = self._guest.ram_for(snapshot)
        self._snapshot = None
        try:
            self._guest.restore(ram)
        except _MemoryLost as error:
            self._status = SandboxStatus.UNRECOVERABLE
            raise UnrecoverableSandbox from error.__cause__
        self._snapshot = snapshot
        self._status = _READY

    def _check_fit(self, snapshot: Snapshot) -> None:
        """Raise where *snapshot* cannot be restored here; remember one that can."""
        snapshot._check_host_functions(self._functions)
        if not snapshot.is_initialized:
            raise SnapshotMismatch("the snapshot's guest has not run yet: use from_snapshot")
        self._guest.vm.platform.check(snapshot.platform)
        self._fitting = snapshot

    # -- mappings ----------------------------------------------------------------------

    @_one_at_a_time
    def map_region(self, gpa: int, region: SharedMemory, flags: MemoryRegionFlags) -> None:
        """Show *region* to the guest at guest-physical *gpa*, without entering it into page tables.

        It is the guest's until ``restore()`` or ``close()``, even if *region* is closed before. *flags* may not
        have WRITE. Raises ``MapRegionError`` for an unaligned or overlapping range.
        """
        self._check_usable()
        if MemoryRegionFlags.WRITE in flags:
            raise MapRegionError("TODO: Writable mappings not yet supported")
        self._guest.map_region(gpa, region, flags)
        self._snapshot = None

    @_one_at_a_time
    def map_file_cow(self, path: StrPath, gpa: int, label: str | None = None) -> int:
        """Show the file at *path* to the guest at guest-physical *gpa*, read-only and executable.

        Returns the mapped size: the file's, rounded up to whole pages (zeros behind its end). The guest
        enters it into its page tables itself; a write is a ``MemoryAccessViolation``. *label* is
        checked as 0.14 does and not otherwise used. Raises ``MapRegionError``.
        """
        self._check_usable()
        with _FileMapping(path, gpa, label) as file:
            self._guest.map_file(file)
        self._snapshot = None
        return file.size

    # -- core dumps --------------------------------------------------------------------

    def generate_crashdump(self) -> str | None:
        """Write the guest's memory and registers as a core file for gdb and return its path.

        None where the configuration switches core dumps off. Works on a poisoned sandbox too: after a CPU
        exception the registers are the interrupted code's. A call in another thread is waited for. See
        ``CoreDump.save`` for the directory. Raises ``CrashDumpError``.
        """
        return self._dump(None)

    def generate_crashdump_to_dir(self, directory: StrPath) -> str | None:
        """As ``generate_crashdump``, into *directory*."""
        return self._dump(directory)

    @_one_at_a_time
    def _dump(self, directory: StrPath | None) -> str | None:
        self._check_usable(poisoned_too=True)
        return self._guest.dump(directory)

    def _dump_unless_busy(self, directory: StrPath | None) -> str | None:
        if not self._try_acquire():
            raise CrashDumpError("a thread is using it")
        try:
            if self._closed or self._status is SandboxStatus.UNRECOVERABLE:
                return None
            with _kvm_errors_in_tree():
                return self._guest.dump(directory)
        finally:
            self._give_back()
            if self._guest.debugger is not None:
                self._guest.debugger.server.released()

    # -- state -------------------------------------------------------------------------

    @property
    def status(self) -> SandboxStatus:
        """Whether the sandbox is ready, poisoned or beyond recovery."""
        return self._status

    @property
    def poisoned(self) -> bool:
        """Whether calls are refused until a restore."""
        return self._status is SandboxStatus.POISONED

    @property
    def layout(self) -> SandboxMemoryLayout:
        """Where everything lies in guest memory."""
        return self._guest.snapshot.layout

    def interrupt_handle(self) -> InterruptHandle:
        """Return the handle with which any thread can end a guest call; it may outlive the sandbox."""
        return self._guest.interrupt

    def close(self) -> None:
        """Release the VM and its memory; a call in another thread is waited for. Idempotent."""
        if not self._closed and self._user != threading.get_ident():
            self._disconnect()
        self._release()

    @_one_at_a_time
    def _release(self) -> None:
        self._closed = self._closed or "the sandbox is closed"
        self._snapshot = None
        self._guest.close()

    def _disown(self) -> None:
        """Let go of everything in a forked child, whatever the threads that are not there any more were doing.

        The vCPU's page is shared with the parent, whose guest would run with what the child put there.
        """
        self._closed = "the sandbox belongs to the process that was forked: start another from a snapshot"
        self._lock, self._user = threading.Lock(), None
        self._guest.disown()
        self._release()

    def __enter__(self) -> MultiUseSandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self._status.value
        return f"<MultiUseSandbox {state}: {self._guest.snapshot!r}>"

    # -- one user at a time ------------------------------------------------------------

    def _try_acquire(self) -> bool:
        """Take the sandbox for this thread, if nobody uses it."""
        if not self._lock.acquire(blocking=False):
            return False
        self._user = threading.get_ident()
        self._snapshot = None  # the debugger may change the guest
        return True

    def _give_back(self) -> None:
        self._user = None
        self._lock.release()

    def _check_usable(self, *, poisoned_too: bool = False) -> None:
        if self._closed:
            raise SandboxClosed(self._closed)
        if self._status is _READY:
            return
        if self._status is SandboxStatus.UNRECOVERABLE:
            raise UnrecoverableSandbox
        if not poisoned_too:
            raise PoisonedSandbox


@contextlib.contextmanager
def _kvm_errors_in_tree() -> Iterator[None]:
    """Turn what the kernel refuses into an error under ``HyperlightError``."""
    try:
        yield
    except kvm_abi.KvmError as error:
        raise KvmError(error) from error


def _type_for(value: Any, declared: WireType) -> ParameterType:
    """Choose the wire type for *value* under a declared type; the encoder checks that it fits."""
    if len(declared.accepts) == 1:
        return next(iter(declared.accepts))
    natural = memory.wire_type_of(value)
    if natural not in declared.accepts:
        raise _not_convertible(natural, value, declared)
    return natural


def _not_convertible(kind: ParameterType, value: Any, declared: WireType) -> ParameterValueConversionFailure:
    spelled = memory.spell_parameter(kind, value)
    return ParameterValueConversionFailure(
        f'Failed To Convert Parameter Value {spelled} to "{declared.name}"'
    )


def _unwelcome(
    result: memory.ReturnValue | memory.GuestErrorResult, returns: WireType, host_failure: BaseException | None
) -> HyperlightError:
    """Return the error for what a guest function chose to answer: its own, or the wrong type."""
    if isinstance(result, memory.GuestErrorResult):
        metrics.guest_errors.increment(code=str(int(result.code)))
        error = GuestError(result.code, result.message)
        error.__cause__ = host_failure if result.code == ErrorCode.HostFunctionError else None
        error.__suppress_context__ = True
        return error
    spelled = _spell_result(result)
    return ReturnValueConversionFailure(f'Failed To Convert Return Value {spelled} to "{returns.name}"')


def _spell_result(result: memory.ReturnValue) -> str:
    kind = _PARAMETER_TYPE_OF.get(result.type)
    return "Void" if kind is None else memory.spell_parameter(kind, result.value)


def _effective_log_level(config: SandboxConfiguration) -> int:
    if config.guest_log_level is not None:
        return int(config.guest_log_level)
    return guest_log_level_from(os.environ.get("RUST_LOG", ""))


class _FileMapping:
    """A file that a guest may see at *gpa*: opened and checked, and closed again if nobody takes it."""

    FLAGS: ClassVar[MemoryRegionFlags] = MemoryRegionFlags.READ | MemoryRegionFlags.EXECUTE
    MAX_PENDING: ClassVar[int] = 32
    MAX_LABEL_SIZE: ClassVar[int] = 63

    def __init__(self, path: StrPath, gpa: int, label: str | None) -> None:
        if gpa % PAGE_SIZE:
            raise MapRegionError(f"the guest base {gpa:#x} is no multiple of the page size, {PAGE_SIZE:#x}")
        if label is not None and ("\0" in label or len(label.encode("utf-8", "surrogatepass")) > self.MAX_LABEL_SIZE):
            raise MapRegionError(f"a label has at most {self.MAX_LABEL_SIZE} bytes and no NUL: {label!r}")
        self.gpa = gpa
        self._is_taken = False
        try:
            with _open_regular_file(path) as file:
                file_size = os.fstat(file.fileno()).st_size
                if file_size == 0:
                    raise MapRegionError(f"{os.fspath(path)} is empty: there is nothing to map")
                self.size = memory.page_up(file_size)
                self.mapping = SharedMemory.from_fd(file.fileno(), self.size)
        except OSError as error:
            if isinstance(error, HyperlightError):
                raise
            raise MapRegionError(f"{os.fspath(path)} cannot be mapped: {error.strerror}") from error

    def take(self) -> SharedMemory:
        """Hand the mapping over; closing it is the taker's business from then on."""
        self._is_taken = True
        return self.mapping

    def close(self) -> None:
        """Unmap the file, unless it was taken."""
        if not self._is_taken:
            self.mapping.close()

    def __enter__(self) -> _FileMapping:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check_region(gpa: int, size: int, taken: Sequence[tuple[int, int]]) -> None:
    """Raise ``MapRegionError`` where *size* bytes at *gpa* cannot go, or overlap a (start, end) that is *taken*."""
    if gpa % PAGE_SIZE:
        raise MapRegionError(f"Region is not page-aligned: {gpa:#x} is no multiple of {PAGE_SIZE:#x}")
    if not 0 <= gpa <= gpa + size - 1 <= memory.MAX_GPA:
        raise MapRegionError(f"[{gpa:#x}, {gpa + size:#x}) is not in the guest's 36-bit physical space")
    for start, end in taken:
        if gpa < end and start < gpa + size:
            raise MapRegionError(f"[{gpa:#x}, {gpa + size:#x}) overlaps [{start:#x}, {end:#x}), in use")
    if gpa == 0:
        raise MapRegionError("the page at 0 stays unmapped")


class InterruptHandle:
    """Ends a guest call from any thread; outlives the sandbox.

    ``immediate_exit`` in the kvm_run page closes the window in which a signal would land just before
    KVM_RUN, so one signal is enough. It is sent only while the lock is held and a call is in progress: a stale
    kick can hit no other call (design.md 4).

    A thread that has made a call does not block that signal any more, whatever mask it inherited.
    """

    def __init__(self, signal_number: int) -> None:
        self._lock = threading.RLock()  # Python's handler of another signal may interrupt its holder, and kill
        self._signal = signal_number
        self._thread: int | None = None  # that of the call in progress
        self._canceled = False
        self._has_signaled = False
        self._dropped = False
        self._page: memoryview | None = None
        _install_kick_handler(signal_number)

    def kill(self) -> bool:
        """End the call in progress with ``ExecutionCanceledByHost``; return whether there was one.

        During a host function, the guest is not entered again once the function returns. Without a call
        in progress nothing happens, then or later.
        """
        with self._lock:
            if self._thread is None:
                return False
            self._canceled = True
            self._kick()
            return True

    def dropped(self) -> bool:
        """Return whether the sandbox has been closed."""
        return self._dropped

    def _attach(self, page: memoryview) -> None:
        """Take the kvm_run page of the vCPU to interrupt."""
        self._page = page

    def _detach(self) -> None:
        self._dropped, self._page = True, None

    def _disown(self) -> None:
        self._lock, self._thread = threading.RLock(), None

    def _nudge(self) -> None:
        """Make the vCPU's thread leave the guest, or not enter it, without ending the call."""
        with self._lock:
            if self._thread is not None:
                self._kick()

    def _acknowledge(self) -> None:
        """Let the guest be entered again after `_nudge`, unless the call is to end."""
        with self._lock:
            if self._page is not None and not self._canceled:
                self._page[_IMMEDIATE_EXIT] = 0

    def _kick(self) -> None:
        assert self._page is not None and self._thread is not None
        if self._page[_IMMEDIATE_EXIT] and self._has_signaled:  # one does it; more would fill the kernel's queue
            return
        self._has_signaled = False
        self._page[_IMMEDIATE_EXIT] = 1
        try:
            signal.pthread_kill(self._thread, self._signal)
        except OSError as error:
            raise HyperlightError(
                f"the guest's thread cannot be sent a signal: {error.strerror} (see RLIMIT_SIGPENDING); "
                "the call ends when the guest next needs the host"
            ) from error
        self._has_signaled = True

    def _begin(self) -> None:
        """A call begins in this thread; `_run` tells of its end.

        Needs no lock, in this order: `kill` looks at the thread first.
        """
        assert self._page is not None
        if self._signal not in _unblocked.signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {self._signal})
            _unblocked.signals |= {self._signal}
        self._page[_IMMEDIATE_EXIT] = 0  # a kick that came with the end of the last call
        self._canceled = False
        self._thread = threading.get_ident()


class _Unblocked(threading.local):
    """The signals that a thread is known not to block."""

    signals: frozenset[int] = frozenset()


_unblocked = _Unblocked()


def _install_kick_handler(signal_number: int) -> None:
    """Make *signal_number* do nothing but end a system call with EINTR, in every thread.

    The handler must be C: Python's own run later, and only in the main thread. ``abs`` is one, it
    takes an int, touches nothing and is in every libc.
    """
    if kvm_abi.libc.sigaction(signal_number, _harmless_action(), None) != 0:
        number = ctypes.get_errno()
        raise HyperlightError(f"sigaction({signal_number}) failed: {os.strerror(number)}")


@functools.cache
def _harmless_action() -> object:
    """Return a reference to the struct sigaction, which it keeps. It has no SA_RESTART."""
    return ctypes.byref(_Sigaction(handler=ctypes.cast(kvm_abi.libc.abs, ctypes.c_void_p)))


class _Sigaction(ctypes.Structure):
    """struct sigaction of the C library on x86-64 Linux."""

    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


# ======================================================================================
# Snapshots
# ======================================================================================


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """A guest at rest: its memory, and where to enter it. Any number of sandboxes can start from one.

    The memory is sealed: it cannot change any more. It holds ``layout.memory_size`` bytes for
    guest-physical 0x1000 and up, then the page tables. Without ``sregs`` the guest has not run yet.
    """

    layout: SandboxMemoryLayout
    memory: SharedMemory
    elf: GuestElf
    copy_on_write: Literal["guest", "host"]
    entry: int
    """gva to enter: the ELF's entry point, or the dispatch function once initialised."""
    stack_top: int
    """rsp at each entry (gva)."""
    sregs: bytes | None = None
    """kvm_sregs of the initialised guest."""
    signatures: Mapping[str, tuple[tuple[str, ...] | None, str]] = dataclasses.field(default_factory=dict)
    """The host functions that the sandbox offered, with the names of their types."""
    generation: int = 0
    """How many snapshots were taken on the way from the ELF to this one."""
    platform: PlatformState = dataclasses.field(default_factory=lambda: PlatformState())
    """MSRs and interrupt controllers."""

    @property
    def is_initialized(self) -> bool:
        """Whether the guest's own initialisation has run."""
        return self.sregs is not None

    @functools.cached_property
    def _scratch_top(self) -> bytes:
        """The end of scratch as the guest expects it (abi.md 5.3; guest-versions.md 5)."""
        layout, elf = self.layout, self.elf
        words = {
            memory.SCRATCH_TOP_SIZE: layout.scratch_size,
            memory.SCRATCH_TOP_ALLOCATOR: layout.first_free_gpa,
        }
        if elf.version not in (None, "0.14.0"):
            words[memory.SCRATCH_TOP_SNAPSHOT_PT_BASE] = layout.pt_base_gpa
            words[memory.SCRATCH_TOP_GENERATION] = self.generation
        elif elf.privilege.user_mode:
            words[memory.SCRATCH_TOP_IMAGE_END] = BASE_ADDRESS + layout.snapshot_size
        top = bytearray(max(words))
        for distance, value in words.items():
            struct.pack_into("<Q", top, len(top) - distance, value)
        return bytes(top)

    def _check_host_functions(self, offered: HostFunctions) -> None:
        differences = []
        for name, signature in self.signatures.items():
            if (function := offered.get(name)) is None:
                differences.append(f"{name} is missing")
            elif function.signature != signature:
                differences.append(f"{name} is {function.signature}, was {signature}")
        if differences:
            raise SnapshotHostFunctionMismatch(
                f"the snapshot's guest may call host functions that differ here: {'; '.join(differences)}"
            )

    def __repr__(self) -> str:
        guest = os.path.basename(self.elf.path) if self.elf.path else "<unknown>"
        state = f"generation {self.generation}" if self.is_initialized else "not initialized"
        return f"<Snapshot of {guest}, {self.layout.snapshot_size // 1024} KiB, {state}>"


def _sregs_of(snapshot: Snapshot) -> kvm_abi.kvm_sregs:
    """Return the special registers with which *snapshot*'s guest is entered."""
    if snapshot.sregs is None:
        return _initial_sregs(snapshot.layout.pt_base_gpa)
    sregs = kvm_abi.kvm_sregs.from_buffer_copy(snapshot.sregs)
    sregs.cr3 = snapshot.layout.pt_base_gpa
    return sregs


def _image_of(environment: GuestEnvironment, config: SandboxConfiguration) -> Snapshot:
    """Lay a guest out in memory as it is before its first instruction (abi.md 1.3, 5.2)."""
    elf = _read_guest(environment.guest)
    layout = SandboxMemoryLayout(
        code_size=elf.code_size,
        heap_size=config.heap_size,
        init_data_size=len(environment.init_data),
        init_data_flags=environment.init_data_flags,
        input_data_size=config.input_data_size,
        output_data_size=config.output_data_size,
        scratch_size=config.scratch_size,
        heap_executable=config.executable_heap,
    )
    layout.check()
    is_unlike_others = isinstance(environment.guest, _BYTES) or environment.init_data
    lay_out = _lay_out if is_unlike_others else _lay_out_once
    return lay_out(elf, layout, config.copy_on_write, bytes(environment.init_data))


def _lay_out(
    elf: GuestElf, layout: SandboxMemoryLayout, copy_on_write: Literal["guest", "host"], init_data: bytes
) -> Snapshot:
    tables = memory.build_page_tables(
        layout,
        memory.image_leaves(layout, elf.privilege),
        copy_on_write=copy_on_write,
        user_io=elf.privilege.user_mode,
    )
    layout = layout.with_pt_size(len(tables))
    pieces: list[tuple[int, bytes | bytearray]] = [
        (0, elf.load()),
        (layout.peb_offset, layout.peb_bytes()),
        (layout.init_data_offset, init_data),
        (layout.memory_size, tables),
    ]
    return Snapshot(
        layout=layout,
        memory=SharedMemory.sealed(layout.snapshot_size, pieces),
        elf=elf,
        copy_on_write=copy_on_write,
        entry=BASE_ADDRESS + elf.entry,
        stack_top=elf.exception_stack_top_gva - 8,
    )


_lay_out_once = functools.lru_cache(maxsize=_PARSED_LIMIT)(_lay_out)
"""Nobody can change an image: all sandboxes of a guest, with the same sizes, can start from one.

The last few are kept, with their descriptors.
"""


# ======================================================================================
# The guest: its memories, its VM, and the conversation through ports and buffers
# ======================================================================================


class _Ram:
    """The two memories of a guest, made from a snapshot: the image and scratch (abi.md 1.3, 1.4).

    The page tables at their place in scratch are a private mapping of the snapshot's: a reset drops
    what the guest changed and copies nothing.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        layout = snapshot.layout
        self.snapshot = snapshot
        self.translations_are_stale = True
        """Whether a VM may hold translations of tables that are here no more: cleared by who flushes them."""
        self._both = memory.AdjacentMemories(layout.scratch_size, snapshot.memory)
        try:
            self.scratch, self.image = self._both.scratch, self._both.image
            tables = layout.page_table_scratch_offset
            self.scratch.overlay(tables, snapshot.memory, layout.memory_size, layout.pt_size)
            self._tables = tables, tables + layout.pt_size
            self.input = memory.IoStack(self.scratch, 0, layout.input_data_size)
            self.output = memory.IoStack(self.scratch, layout.input_data_size, layout.output_data_size)
            self._harmless: memory.ChangedPages | None = None  # which are no page tables
            for offset in (0, layout.input_data_size):
                self._both.preset(offset, memory.EMPTY_IO_STACK.to_bytes(8, "little"))
            self._both.preset(layout.scratch_size - len(snapshot._scratch_top), snapshot._scratch_top)
        except BaseException:
            self.close()
            raise

    def reset(self) -> None:
        """Put both memories back to the snapshot.

        Pages are written over in place only where just the guest's kernel part can have edited page tables, and
        has not: a VM that shadows them does not see what the host writes (spec/kvm-hosts.md 2.9), and holds on
        to translations of pages that are not taken away.
        """
        changed = self._both.changed() if self.snapshot.elf.privilege.user_mode else None
        if changed is not None and changed is not self._harmless and not changed.touch(*self._tables):
            self._harmless = changed
        if changed is None or changed is not self._harmless:
            self.translations_are_stale = True
            self.discard()
        else:
            self._both.revert(changed)

    def discard(self) -> None:
        """Drop what the guest changed, whatever it is."""
        self._both.discard()

    def slots(self) -> list[tuple[int, SharedMemory, bool]]:
        """Return (gpa, mapping, writable by the guest) of both."""
        layout, host_copies = self.snapshot.layout, self.snapshot.copy_on_write == "host"
        return [(BASE_ADDRESS, self.image, host_copies), (layout.scratch_base_gpa, self.scratch, True)]

    def physical_view(self) -> memory.GuestMemory:
        """Return the guest-physical address space that holds both."""
        view = memory.GuestMemory()
        for gpa, mapping, _ in self.slots():
            view.add(gpa, mapping, _ALL_RIGHTS)
        return view

    def close(self) -> None:
        """Unmap both memories."""
        self._both.close()


_ALL_RIGHTS = MemoryRegionFlags.READ | MemoryRegionFlags.WRITE | MemoryRegionFlags.EXECUTE


def _text_of(error: Exception) -> str:
    """Return what *error* says, whatever its class does to be shown."""
    try:
        return str(error) or type(error).__name__
    except Exception:
        return type(error).__name__


class _MemoryLost(Exception):
    """Replacing a VM's memory failed half-way; the cause is chained."""


_PIT_PORTS = range(0x40, 0x44)
"""Where a guest that programs the interrupt controllers may write to a timer that is not there (abi.md 6.6)."""


class _Port(enum.IntEnum):
    """What a guest says by an OUT (abi.md 8)."""

    LOG = 99
    CALL_FUNCTION = 101
    ABORT = 102
    DEBUG_PRINT = 103
    TRACE_BATCH = 104
    TRACE_MEMORY_ALLOC = 105
    TRACE_MEMORY_FREE = 106
    PV_TIMER_CONFIG = 107
    HALT = 108


class _Guest:
    """A guest in its VM. Not locked: the sandbox sees to it that one thread at a time is here."""

    def __init__(
        self,
        snapshot: Snapshot,
        functions: HostFunctions,
        interrupt: InterruptHandle,
        config: SandboxConfiguration,
    ) -> None:
        self.functions = functions
        self.interrupt = interrupt
        self.debugger: _Debugger | None = None
        self.activity = "idle"
        """What the guest is doing, in words."""
        self.at_rest = True
        """Not in the middle of anything: not of a call, nor of a change to its memory or registers."""
        self.core_dumps: bool | StrPath | None = None
        """``SandboxConfiguration.guest_core_dump``."""
        self._fault: tuple[int, Mapping[str, int]] | None = None
        """Where the guest saved what the last exception interrupted (gva), and those registers."""
        self._tracer: _Tracer | None = None
        self._memory_profile: Callable[[MemoryEvent], None] | None = None
        self._ports = self._PORTS
        self._first = snapshot
        self._generation = snapshot.generation
        self._begin_again: Callable[[], None] | None = None
        self._abort_bytes = bytearray()
        self._entry_registers = self._next_entry_registers = b""
        self.host_failure: BaseException | None = None
        self._reset_to: Snapshot | None = None  # that the VM is prepared for
        self._regions: dict[int, tuple[SharedMemory, MemoryRegionFlags]] = {}
        self._files: list[SharedMemory] = []
        self._physical: memory.GuestMemory | None = None  # until somebody asks
        self._shown: _Ram | None = None
        """What is all the memory of the VM, for sure."""
        msrs = _checked_msrs(config.guest_msrs)
        self._adopt(_Ram(snapshot))
        try:
            self.vm = _VirtualMachine(self._ram.slots(), _sregs_of(snapshot), timer=config.hardware_timer, msrs=msrs)
        except BaseException:
            self._ram.close()
            raise
        try:
            self.vm.platform.check(snapshot.platform)
            if snapshot.is_initialized:
                self.vm.platform.restore(snapshot.platform)
                self._set_entry(snapshot.entry, snapshot.stack_top)
                self._enter_restored()
        except BaseException:
            self.vm.close()
            self._ram.close()
            raise
        if config.hardware_timer:
            self._ports = {**self._ports, **self._TIMER_PORTS}
        interrupt._attach(self.vm.page)
        self.vm.before_close(interrupt._detach)

    def close(self) -> None:
        """Release the VM, its memories and the files mapped into it."""
        self.interrupt._detach()
        self.vm.close()
        self._ram.close()
        self._close_files()
        self._regions.clear()
        self._physical = memory.GuestMemory()

    @property
    def physical(self) -> memory.GuestMemory:
        """The guest-physical address space."""
        if self._physical is None:
            self._physical = self._ram.physical_view()
        return self._physical

    def disown(self) -> None:
        """Forget what has threads or locks: this is a forked child, and they are its parent's."""
        self.debugger = None
        self.interrupt._disown()
        if self.vm.platform.timer is not None:
            self.vm.platform.timer.disown()

    def observe(
        self, trace: Callable[[TraceRecord], None] | None, memory_profile: Callable[[MemoryEvent], None] | None
    ) -> None:
        """Tell those who asked what the guest does, and let it use the ports for that."""
        if trace is not None:
            self._tracer = _Tracer(trace, self.vm.vcpu)
            self._ports = {**self._ports, **self._TRACING_PORTS}
        if memory_profile is not None:
            self._memory_profile = memory_profile
            self._ports = {**self._ports, **self._PROFILING_PORTS}

    # -- entering ----------------------------------------------------------------------

    def initialise(self, log_level: int) -> None:
        """Run the guest's own initialisation; afterwards it takes calls (abi.md 7.1).

        Raises ``InitializeError`` with the cause chained.
        """
        self._begin_again = functools.partial(self._begin_initialise, log_level)
        self._begin_again()
        self.activity = "in the guest's initialisation"
        try:
            self._run()
        except GuestFailure as failure:
            detail = failure.detail if isinstance(failure, HyperlightVmError) else str(failure)
            error = InitializeError(detail)
            error.registers = failure.registers
            error.core_dump, error.core_dump_failure = failure.core_dump, failure.core_dump_failure
            raise error from failure
        finally:
            self._rest()
        halted = self.vm.registers()
        if halted["rsp"] % 16:
            raise InitializeError(
                f"Guest initialised stack pointer to architecturally invalid value: {halted['rsp']}"
            )
        self._set_entry(halted["rax"], halted["rsp"])
        if self.debugger is not None:
            self._first = self.capture()

    def _begin_initialise(self, log_level: int) -> None:
        snapshot = self.snapshot
        seed = int.from_bytes(os.urandom(8), "little")
        entry = _VirtualMachine.pack(
            rip=snapshot.entry,
            rsp=snapshot.stack_top,
            rdi=snapshot.layout.peb_gpa,
            rsi=seed,
            rdx=PAGE_SIZE,
            rcx=log_level,
        )
        self.vm.load(entry)

    def dispatch(self, name: str, message: bytes) -> bytes:
        """Send the encoded call of *name* into the guest, run it, and return the encoded result (abi.md 7.2).

        Raises a ``GuestFailure`` where the run ends badly, and ``IoStackError`` where the message or
        the result is the trouble, not the guest.
        """
        self.at_rest = False
        try:
            self._begin_call(message)
        except IoStackError:  # and nothing was sent
            self.at_rest = True
            raise
        self.activity = name
        if self.debugger is not None:
            self._begin_again = functools.partial(self._begin_call, message)
        begin = time.perf_counter_ns() if metrics.durations else 0
        has_halted = False
        try:
            self._run()
            has_halted = True
            return self._ram.output.pop()
        except BaseException:
            self._drain()
            raise
        finally:
            if self._abort_bytes:
                self._abort_bytes.clear()
            self._entry_registers = self._next_entry_registers
            self.activity, self._begin_again, self.at_rest = "idle", None, has_halted
            if begin:
                metrics.guest_call_duration.observe((time.perf_counter_ns() - begin) / 1e9, function_name=name)

    def _begin_call(self, message: bytes) -> None:
        self._ram.input.replace(message)
        self.vm.load(self._entry_registers)
        if self._resets_fpu_for_guest:
            self.vm.reset_fpu()

    def _rest(self) -> None:
        self.activity = "idle"
        self._begin_again = None

    def start_again(self) -> None:
        """Go back to the first state that the debugger saw, and to the beginning of the call in progress."""
        self._abort_bytes.clear()
        self._fault = None
        if self._first.is_initialized:
            self.restore(self.ram_for(self._first))
        else:
            self._ram.reset()
            self.vm.load_sregs(_sregs_of(self.snapshot))
        if self._begin_again is not None:
            self.at_rest = False
            self._begin_again()

    def _set_entry(self, rip: int, rsp: int) -> None:
        """Prepare the registers of the calls to come."""
        self._reset_to = None  # which are those of the first after a restore, too
        self._entry, self._stack_top = rip, rsp
        self._entry_registers = self._next_entry_registers = _VirtualMachine.pack(rip=rip, rsp=rsp)
        flush = 0 if self.snapshot.elf.privilege.user_mode else Rflags.ZF
        self._restored_registers = bytearray(
            _VirtualMachine.pack(rip=rip, rsp=rsp, rflags=_RFLAGS_AT_ENTRY | flush)
        )

    def _enter_restored(self) -> None:
        """Have the next call be the first after a restore, which is to flush the TLB (abi.md 6.4).

        Not so in user mode, where that costs an exception: the VM's own reset has flushed it.
        """
        self._restored_registers[_RDI] = self._request_seed()
        self._entry_registers = bytes(self._restored_registers)

    def _request_seed(self) -> bytes:
        """Have a restored guest seed its random numbers anew, where it can; return rdi for the next call.

        Otherwise all sandboxes of one snapshot would draw the same numbers. Guests of 0.17 look for the
        request near the end of scratch (guest-versions.md 5), those of this SDK in rdi.
        """
        request = os.urandom(4) + b"\1\0\0\0"
        elf = self.snapshot.elf
        if elf.version == "0.17.0":
            self._ram.scratch.write(self._ram.scratch.size - memory.SCRATCH_TOP_RNG_SEED, request)
        return request if elf.privilege.takes_seed else bytes(8)

    def _drain(self) -> None:
        self._ram.output.drain()
        self._ram.input.drain()

    # -- the run loop ------------------------------------------------------------------

    def _run(self) -> None:
        """Run the guest until it halts, serving its ports on the way.

        Raises a ``GuestFailure`` for every other end, with the vCPU's registers in it.
        """
        self.host_failure = self._fault = None
        interrupt, debugger, tracer = self.interrupt, self.debugger, self._tracer
        try:
            interrupt._begin()
            if debugger is not None:
                debugger.entered()
            if tracer is not None:
                tracer.entered()
            while True:
                try:
                    self._serve_until_halt()
                    return
                except GuestFailure as failure:
                    if not self._explain(failure):
                        raise
                except kvm_abi.KvmError as error:
                    refusal = HyperlightVmError(f"vCPU run failed: {error}")
                    if not self._explain(refusal):
                        raise refusal from error
        finally:
            try:
                if self.vm.platform.timer is not None:
                    self.vm.platform.timer.stop()
                if tracer is not None:
                    tracer.left(self.activity)
                if debugger is not None:
                    debugger.left()
            finally:  # here and not in a function, which Ctrl-C could keep from beginning
                with interrupt._lock:
                    interrupt._thread = None

    def _serve_until_halt(self) -> None:
        vm, ports, debugger = self.vm, self._ports, self.debugger
        run, page, exit_reason, exit_io = vm.vcpu.run, vm.page, vm.exit_reason, vm.exit_io
        if (tracer := self._tracer) is not None:
            run = lambda: tracer.run(self.physical)  # noqa: E731
        while True:
            if interrupted := run():
                self._on_interruption(interrupted)
                continue
            reason = exit_reason[0]
            if reason == _EXIT_IO:
                if (access := exit_io[0]) == _HALT_OUT:  # how most calls end
                    return
                if access == _CALL_OUT:  # what most others are
                    self._on_host_call()
                    if debugger is not None:
                        debugger.served_port()
                    continue
                direction, size, port, count, data_offset = _IO_EXIT.unpack_from(page, _EXIT_OFFSET)
                if direction == _OUT:
                    if port == _HALT:
                        return
                    if (serve := ports.get(port)) is None:
                        raise InvalidPort(port)
                    serve(self, int.from_bytes(page[data_offset : data_offset + min(size * count, 4)], "little"))
                    if debugger is not None:
                        debugger.served_port()
                    continue
            elif reason == KvmExit.HLT:
                return
            elif reason in (KvmExit.X86_RDMSR, KvmExit.X86_WRMSR):
                vm.platform.refuse_msr()
                continue
            if debugger is None or not debugger.exited():
                raise self._failure_of_exit()

    def _on_interruption(self, number: int) -> None:
        """Deal with a KVM_RUN that a signal ended: cancelled, or to be tried again."""
        if number == errno.EINTR:
            if self.interrupt._canceled:
                raise ExecutionCanceledByHost
            if self.debugger is None or not self.debugger.interrupted():
                metrics.erroneous_vcpu_kicks.increment()

    def _failure_of_exit(self) -> GuestFailure:
        """Turn an exit that ends the run into its error (abi.md 7.4)."""
        kvm_run = self.vm.vcpu.kvm_run
        reason = kvm_run.exit_reason
        if reason == KvmExit.MMIO:
            gpa, tried = kvm_run.mmio.phys_addr, MemoryRegionFlags.READ
            if kvm_run.mmio.is_write:
                tried = MemoryRegionFlags.WRITE
            for start, (mapping, flags) in self._regions.items():
                if start <= gpa < start + mapping.size and tried not in flags:
                    return MemoryAccessViolation(gpa, tried, flags)
            return MmioWriteUnmapped(gpa) if tried is MemoryRegionFlags.WRITE else MmioReadUnmapped(gpa)
        if reason == KvmExit.INTERNAL_ERROR and kvm_run.internal.suberror == kvm_abi.InternalError.EMULATION:
            rip, emulated = self.vm.registers()["rip"], cpl0_is_emulated()
            return EmulationFailure(kvm_abi.failed_instruction(kvm_run), rip, emulates_cpl0=emulated)
        return UnexpectedVmExit(kvm_abi.describe_exit(kvm_run))

    def _explain(self, failure: GuestFailure) -> bool:
        """Attach what is known about the moment of *failure*; return whether a debugger has undone it."""
        try:  # noqa: SIM105 - a context manager takes as long as the ioctl, where nothing is in the caches
            failure._registers = self.vm.packed_registers()
        except kvm_abi.KvmError:
            pass
        if isinstance(failure, (ExecutionCanceledByHost, EndedByDebugger)):
            return False
        if isinstance(failure, GuestAborted):
            self._explain_exception(failure)
            if self.host_failure is not None:
                failure.__cause__ = self.host_failure
        if isinstance(failure, GuestAborted) and failure.frame is not None:
            self._fault = failure.frame, failure.registers  # not the failure: its traceback leads back here
        if _dumps_by_itself(self.core_dumps):
            self._attach_core_dump(failure)
        return self.debugger is not None and self.debugger.crashed(failure)

    def _explain_exception(self, failure: GuestAborted) -> None:
        """Read a CPU exception's text, and the registers that the guest saved (abi.md 11.4)."""
        if failure.code != ErrorCode.GuestError or (match := re.search(_EXCEPTION_TEXT, failure.message)) is None:
            return
        failure.vector = int(match["vector"])
        failure.instruction = int(match["rip"], 16)
        failure.address = int(match["cr2"], 16) if failure.vector == kvm_abi.Vector.PF else None
        failure.error_code = int(match["error_code"], 16)
        failure.frame = int(match["frame"], 16)
        with contextlib.suppress(HyperlightError, kvm_abi.KvmError):
            cr3 = self.vm.vcpu.get_sregs().cr3
            registers = failure.frame + _FRAME_REGISTERS_OFFSET
            values = _FRAME.unpack(self.physical.read_virt(cr3, registers, _FRAME.size))
            failure.registers = dict(zip(_FRAME_NAMES, values, strict=True))

    # -- core dumps (abi.md 14) --------------------------------------------------------

    def dump(self, directory: StrPath | None) -> str | None:
        """Write a core dump and return its path, or None where the configuration forbids it."""
        if self.core_dumps is False:
            return None
        configured = None if isinstance(self.core_dumps, bool) else self.core_dumps
        with contextlib.ExitStack() as undo:
            if self.debugger is not None:
                undo.enter_context(self.debugger.target.without_breakpoints())
            return self.core_dump().save(directory or configured)

    def core_dump(self) -> CoreDump:
        """Return the guest as it is now or, after a CPU exception, as the exception found it."""
        vcpu, elf = self.vm.vcpu, self.snapshot.elf
        sregs = self.vm.sregs()
        cr3 = sregs.cr3 if sregs.cr0 & Cr0.PG else self.snapshot.layout.pt_base_gpa  # a triple fault resets both
        registers, fxsave = self.vm.registers() | _segment_registers(sregs), None
        if self._fault is not None:
            frame, interrupted = self._fault
            with contextlib.suppress(HyperlightError):  # a wild frame: then as the vCPU stands
                fxsave, selectors = self._saved_by_exception(cr3, frame)
                registers |= {**selectors, **interrupted}
        return CoreDump(
            segments=_core_segments(self.physical, cr3),
            registers=registers,
            xsave=_core_xsave(bytes(vcpu.get_xsave()), vcpu.get_xcrs().xcrs[0].value, fxsave),
            entry=BASE_ADDRESS + elf.entry,
            path=elf.path,
        )

    def _saved_by_exception(self, cr3: int, frame: int) -> tuple[bytes, dict[str, int]]:
        """Return the FXSAVE image and the data selectors of the code that an exception interrupted."""
        data = self.physical.read_virt(cr3, frame, _FRAME_REGISTERS_OFFSET)
        selectors = struct.unpack_from("<4Q", data)
        return data[32:], {name: value & 0xFFFF for name, value in zip(_FRAME_SELECTORS, selectors, strict=True)}

    def _attach_core_dump(self, failure: GuestFailure) -> None:
        """Dump the guest for *failure*; what goes wrong with that is attached too, never raised."""
        try:
            failure.core_dump = self.dump(None)
            note = f"core dump: {failure.core_dump}"
        except Exception as error:  # whatever it is, the failure itself is what the user must see
            failure.core_dump_failure = error
            note = f"there is no core dump: {error}"
            _logger.error("%s: %s", failure, note)
        if sys.version_info >= (3, 11):
            failure.add_note(note)

    # -- ports (abi.md 8) --------------------------------------------------------------

    def _on_log(self, _value: int) -> None:
        try:
            record = memory.decode_guest_log_data(self._ram.output.pop())
        except HyperlightError as error:
            raise HandleIoError(f"Failed to read guest log data: {error}") from error
        _emit(record)

    def _on_host_call(self, _value: int = 0) -> None:
        try:
            call = memory.decode_function_call(self._ram.output.pop())
        except HyperlightError as error:
            raise HandleIoError(f"Failed to read host function call: {error}") from error
        answer = self._answer(call)
        try:
            self._ram.input.push(answer)
        except IoStackError as error:
            raise HandleIoError(f"Failed to write the response of {call.name}: {error}") from error

    def _answer(self, call: memory.FunctionCall) -> bytes:
        """Call the host function that the guest asks for; an exception in it is the guest's to handle."""
        try:
            function: HostFunction | None = self.functions.get(call.name)
            if function is None:
                raise HostFunctionNotFound(call.name)
            if not metrics.durations and self._tracer is None:
                return function.call(call.parameters, call.return_type)
            begin = time.perf_counter_ns()
            try:
                return function.call(call.parameters, call.return_type)
            finally:
                self._report_host_call(call.name, begin)
        except Exception as error:
            self.host_failure = error
            text = _text_of(error)[:_MAX_ERROR_TEXT]
            return memory.encode_guest_error(
                ErrorCode.HostFunctionError, text.encode("utf-8", "replace").decode()
            )

    def _report_host_call(self, name: str, begin_ns: int) -> None:
        """Count and trace a host call that ends now."""
        if metrics.durations:
            metrics.host_call_duration.observe((time.perf_counter_ns() - begin_ns) / 1e9, function_name=name)
        if self._tracer is not None:
            self._tracer.record("call-to-host", name, begin_ns)

    def _on_memory_event(self, kind: Literal["alloc", "free"]) -> None:
        """Take the size in RAX and the address in RCX (abi.md 15.2)."""
        registers, layout = self.vm.registers(), self.snapshot.layout
        code = range(BASE_ADDRESS, BASE_ADDRESS + layout.code_size)
        stack = _call_stack(self.physical, self.vm.vcpu.get_sregs().cr3, registers, code)
        assert self._memory_profile is not None  # or the ports would not be there
        _call_observer(self._memory_profile, MemoryEvent(kind, registers["rcx"], registers["rax"], stack))

    def _on_timer(self, period_us: int) -> None:
        """Set the timer, if the guest wrote all four bytes of a period (abi.md 8.6)."""
        assert self.vm.platform.timer is not None  # or the port would not be there
        if self.vm.vcpu.kvm_run.io.size * self.vm.vcpu.kvm_run.io.count >= 4:
            self.vm.platform.timer.set(period_us)

    def _on_abort(self, value: int) -> None:
        """Collect up to three bytes of ``code [exception] message 0xFF`` (abi.md 8.2)."""
        count, *payload = value.to_bytes(4, "little")
        for byte in payload[:count]:
            if byte == _ABORT_END:
                raise _abort_of(bytes(self._abort_bytes))
            if len(self._abort_bytes) >= _MAX_ABORT_SIZE:
                raise GuestAborted(0, "Guest abort buffer overflowed")
            self._abort_bytes.append(byte)

    def _on_debug_print(self, value: int) -> None:
        if value > sys.maxunicode or 0xD800 <= value < 0xE000:
            raise HandleIoError(f"Invalid character for debug print: {value}")
        sys.stderr.write(chr(value))

    _PORTS: ClassVar[dict[int, Callable[[_Guest, int], None]]] = {
        _Port.LOG: _on_log,
        _Port.CALL_FUNCTION: _on_host_call,
        _Port.ABORT: _on_abort,
        _Port.DEBUG_PRINT: _on_debug_print,
    }
    _TIMER_PORTS: ClassVar[dict[int, Callable[[_Guest, int], None]]] = {
        _Port.PV_TIMER_CONFIG: _on_timer,
        **dict.fromkeys(_PIT_PORTS, lambda _guest, _value: None),
    }
    _TRACING_PORTS: ClassVar[dict[int, Callable[[_Guest, int], None]]] = {
        _Port.TRACE_BATCH: lambda _guest, _value: None,  # what it says is in registers, as at any exit
    }
    _PROFILING_PORTS: ClassVar[dict[int, Callable[[_Guest, int], None]]] = {
        _Port.TRACE_MEMORY_ALLOC: lambda guest, _value: guest._on_memory_event("alloc"),
        _Port.TRACE_MEMORY_FREE: lambda guest, _value: guest._on_memory_event("free"),
    }

    # -- mappings ----------------------------------------------------------------------

    def map_region(self, gpa: int, mapping: SharedMemory, flags: MemoryRegionFlags) -> None:
        """Show *mapping* to the guest at *gpa*. Raises ``MapRegionError``."""
        _check_region(gpa, mapping.size, [(region.gpa, region.end) for region in self.physical.regions()])
        self._shown, self.at_rest = None, False
        try:
            self.vm.map(gpa, mapping, writable=False)
        except kvm_abi.KvmError:
            self.at_rest = True
            raise
        self.physical.add(gpa, mapping, flags, holds_tables=False)
        self._regions[gpa] = (mapping, flags)
        self.at_rest = True

    def map_file(self, file: _FileMapping) -> None:
        """Show *file* to the guest and own its mapping from then on. Raises ``MapRegionError``."""
        self.map_region(file.gpa, file.mapping, file.FLAGS)
        self._files.append(file.take())

    def _close_files(self) -> None:
        while self._files:
            self._files[-1].close()
            self._files.pop()

    # -- snapshot and restore ----------------------------------------------------------

    def capture(self) -> Snapshot:
        """Copy the guest's live pages into a compact image with page tables of its own (abi.md 5.7)."""
        old = self.snapshot
        self._generation += 1
        sregs = self.vm.sregs()
        leaves = [leaf for leaf in self.physical.walk(sregs.cr3) if _is_captured(leaf, old.layout)]
        moved, spans = _compact(leaves, self.physical)
        memory_size = sum(size for _, size in spans)
        layout = dataclasses.replace(old.layout, image_size=memory_size, pt_size=0)
        tables = memory.build_page_tables(
            layout, moved, copy_on_write=old.copy_on_write, user_io=old.elf.privilege.user_mode
        )
        layout = layout.with_pt_size(len(tables))
        pieces = itertools.chain(_contents(spans, self.physical), [(memory_size, tables)])
        return dataclasses.replace(
            old,
            layout=layout,
            memory=SharedMemory.sealed(layout.snapshot_size, pieces),
            entry=self._entry,
            stack_top=self._stack_top,
            sregs=bytes(sregs),
            signatures={name: function.signature for name, function in self.functions.items()},
            generation=self._generation,
            platform=self.vm.platform.capture(),
        )

    def ram_for(self, snapshot: Snapshot) -> _Ram:
        """Return memories that hold *snapshot*: the VM's own, or new ones.

        All of a restore that can fail for lack of memory: nothing is touched yet.
        """
        return self._ram if snapshot is self.snapshot else _Ram(snapshot)

    def restore(self, ram: _Ram) -> None:
        """Put memory, mappings and vCPU back to the snapshot for which ``ram_for`` returned *ram* (abi.md 5.8).

        Raises ``_MemoryLost`` where the VM may be left without its memory.
        """
        self.at_rest = False
        if ram is self._ram:
            ram.reset()
        if ram is not self._shown:
            self._show(ram)
        self._generation = ram.snapshot.generation
        self._reset(ram.snapshot)
        self.at_rest = True

    def _show(self, ram: _Ram) -> None:
        """Make *ram* all the memory of the VM; what an interrupted call left undone, the next one does."""
        self._shown = None
        self.vm.unmap_all_but([*self._ram.slots(), *ram.slots()])
        try:
            self.vm.unmap_all_but(ram.slots())
            for slot in ram.slots():
                self.vm.map(*slot)
        except kvm_abi.KvmError as error:
            raise _MemoryLost from error
        self._regions.clear()
        self._close_files()
        if ram is not self._ram:
            self._ram.close()
        self._adopt(ram)

    def _adopt(self, ram: _Ram) -> None:
        """Take *ram*, which is all that the VM has, as the guest's."""
        self._ram, self.snapshot, self._physical = ram, ram.snapshot, None
        self._resets_fpu_for_guest = not ram.snapshot.elf.privilege.resets_fpu
        self._shown = ram

    def _reset(self, snapshot: Snapshot) -> None:
        """Put the vCPU where *snapshot*, of an initialised guest, left it."""
        self._fault = None
        if snapshot is not self._reset_to:
            self.vm.platform.check(snapshot.platform)
            self._reset_to = None  # until all of it is there
            self.vm.prepare_reset(_sregs_of(snapshot), snapshot.platform)
            self._set_entry(snapshot.entry, snapshot.stack_top)
            self._reset_to = snapshot
        self.vm.reset(self._ram.translations_are_stale)
        self._ram.translations_are_stale = False
        if self.debugger is not None:  # which may look before the next call sets them
            self.vm.load(_VirtualMachine.pack(rip=0, rsp=0))
        self._enter_restored()


# Members of an enum are slow to look up, and these are on the path of every exit.
_EXIT_IO, _OUT, _HALT = int(KvmExit.IO), int(kvm_abi.IoDirection.OUT), int(_Port.HALT)
_IO_EXIT = struct.Struct("<BBHIQ")
"""kvm_run.io: direction, size, port, count, data_offset."""
_HALT_OUT, _CALL_OUT = (
    int.from_bytes(struct.pack("<BBHI", _OUT, 4, port, 1), "little") for port in (_HALT, _Port.CALL_FUNCTION)
)
"""The first 8 bytes of that where the guest halts, or calls the host, by an OUT of 32 bits."""
_EXIT_OFFSET = kvm_abi.kvm_run.io.offset
_IMMEDIATE_EXIT = kvm_abi.kvm_run.immediate_exit.offset
_RDI = slice(kvm_abi.kvm_regs.rdi.offset, kvm_abi.kvm_regs.rdi.offset + 8)

_ABORT_END = 0xFF
_MAX_ABORT_SIZE = 1024
_MAX_ERROR_TEXT = 1024
"""Characters of a host exception's text that a guest gets to see: its input buffer is small."""

_EXCEPTION_TEXT = (
    r"(?i)Exception vector: (?P<vector>\d{1,3})\n"
    r"Faulting Instruction: 0x(?P<rip>[0-9a-f]{1,16})\n"
    r"Bytes At Faulting Instruction: [^\n]*\n"
    r"Page Fault Address: 0x(?P<cr2>[0-9a-f]{1,16})\n"
    r"Error code: 0x(?P<error_code>[0-9a-f]{1,16})\n"
    r"Stack Pointer: 0x(?P<frame>[0-9a-f]{1,16})"
)
"""What a guest's exception handler says (abi.md 11.4)."""
_FRAME_NAMES = (
    *("r15", "r14", "r13", "r12", "r11", "r10", "r9", "r8"),
    *("rbp", "rdi", "rsi", "rdx", "rcx", "rbx", "rax"),
    *("padding", "error_code", "rip", "cs", "rflags", "rsp", "ss"),
)
_FRAME = struct.Struct(f"<{len(_FRAME_NAMES)}Q")
_FRAME_REGISTERS_OFFSET = 0x220
_FRAME_SELECTORS = ("ds", "gs", "fs", "es")


def _abort_of(stream: bytes) -> GuestAborted:
    """Decode a finished abort stream: ``code [exception] message`` (abi.md 8.2)."""
    code = stream[0] if stream else 0
    exception = _EXCEPTION_NAMES.get(stream[1]) if len(stream) > 1 else None
    if exception is not None:
        return GuestAborted(code, f"Exception: {exception} | {stream[2:].decode('utf-8', 'replace')}")
    return GuestAborted(code, stream[1:].decode("utf-8", "replace"))


# fmt: off
_EXCEPTION_NAMES = dict(enumerate((
    "DivideByZero", "Debug", "NonMaskableInterrupt", "Breakpoint", "Overflow", "BoundRangeExceeded",
    "InvalidOpcode", "DeviceNotAvailable", "DoubleFault", "CoprocessorSegmentOverrun", "InvalidTSS",
    "SegmentNotPresent", "StackSegmentFault", "GeneralProtectionFault", "PageFault", "Reserved",
    "X87FloatingPointException", "AlignmentCheck", "MachineCheck", "SIMDFloatingPointException",
    "VirtualizationException",
))) | {30: "SecurityException"}
# fmt: on
"""Names of the CPU's exceptions by vector (abi.md 11.3)."""


def _emit(data: memory.GuestLogData) -> None:
    """Hand a guest's log record to ``logging`` as logger ``hyperlight_guest`` (abi.md 8.1)."""
    level = _LOGGING_LEVELS[data.level]
    if _guest_logger.isEnabledFor(level):
        record = _guest_logger.makeRecord(
            _guest_logger.name, level, data.source_file, data.line, "%s", (data.message,), None, data.caller
        )
        record.module = data.source
        _guest_logger.handle(record)


_LOGGING_LEVELS = {
    GuestLogLevel.Trace: TRACE,
    GuestLogLevel.Debug: logging.DEBUG,
    GuestLogLevel.Information: logging.INFO,
    GuestLogLevel.Warning: logging.WARNING,
    GuestLogLevel.Error: logging.ERROR,
    GuestLogLevel.Critical: logging.ERROR,
    GuestLogLevel.None_: TRACE,
}


# -- what a snapshot holds -----------------------------------------------------------------


def _is_captured(leaf: memory.Leaf, layout: SandboxMemoryLayout) -> bool:
    """Whether a snapshot keeps *leaf*: not the scratch map, not the window for page tables (abi.md 5.7)."""
    in_scratch_map = leaf.gva >= layout.scratch_base_gva
    in_table_window = memory.SNAPSHOT_PT_GVA_MIN <= leaf.gva <= memory.SNAPSHOT_PT_GVA_MAX
    return not in_scratch_map and not in_table_window


def _compact(
    leaves: Sequence[memory.Leaf], physical: memory.GuestMemory
) -> tuple[list[memory.Leaf], list[tuple[int, int]]]:
    """Move *leaves* together, from 0x1000 up, keeping aliases aliases.

    Returns the leaves with their new gpas, and the old (gpa, size) spans in the order of their new place.
    What lies in no memory of the guest is dropped.
    """
    backed = [part for leaf in leaves for part in _backed_parts(leaf, physical)]
    spans: list[list[int]] = []
    for start, end in sorted((leaf.gpa, leaf.gpa + leaf.page_count * PAGE_SIZE) for leaf in backed):
        if spans and start <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([start, end])
    starts = [start for start, _ in spans]
    places = list(itertools.accumulate((end - start for start, end in spans), initial=BASE_ADDRESS))
    moved = []
    for leaf in backed:
        span = bisect.bisect_right(starts, leaf.gpa) - 1
        moved.append(leaf._replace(gpa=places[span] + leaf.gpa - starts[span]))
    return moved, [(start, end - start) for start, end in spans]


def _backed_parts(leaf: memory.Leaf, physical: memory.GuestMemory) -> Iterator[memory.Leaf]:
    """Yield the parts of *leaf* that lie in the guest's memory, each inside one region."""
    end = leaf.gpa + leaf.page_count * PAGE_SIZE
    for region in physical.regions():
        first, last = max(leaf.gpa, region.gpa), min(end, region.end)
        if first < last:
            offset = first - leaf.gpa
            yield leaf._replace(gva=leaf.gva + offset, gpa=first, page_count=(last - first) // PAGE_SIZE)


def _contents(
    spans: Sequence[tuple[int, int]], physical: memory.GuestMemory
) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) of what is not zero in the *spans*, placed one after another."""
    place = 0
    for start, size in spans:
        for region in physical.regions():
            first, last = max(start, region.gpa), min(start + size, region.end)
            if first < last:
                for offset, length in region.mapping.populated(first - region.gpa, last - first):
                    gpa = region.gpa + offset
                    yield place + gpa - start, region.mapping.read(offset, length)
        place += size


# ======================================================================================
# Metrics
# ======================================================================================


class Observation(typing.NamedTuple):
    """One change of a metric, as ``Metrics.subscribe`` hands it on."""

    metric: str
    kind: Literal["counter", "histogram"]
    value: float
    """What a counter grows by; seconds."""
    labels: Mapping[str, str]


class _Metric:
    """A metric with a series for each combination of label values; any thread may use it.

    Label values come from guests and callers: beyond ``MAX_SERIES`` combinations all others count as
    ``OTHER``, and what is longer than ``MAX_LABEL`` characters is cut.
    """

    kind: ClassVar[Literal["counter", "histogram"]]
    MAX_SERIES: ClassVar[int] = 256
    MAX_LABEL: ClassVar[int] = 128
    OTHER: ClassVar[str] = "<other>"

    def __init__(
        self,
        name: str,
        help_text: str,
        labels: tuple[str, ...],
        emit: Callable[[_Metric, float, tuple[str, ...]], None],
    ) -> None:
        self.name = name
        self.help_text = help_text
        self.labels = labels
        self._emit = emit
        self._lock = threading.RLock()  # a signal's handler may count, too
        self._series: dict[tuple[str, ...], list[float]] = {} if labels else {(): self._new_series()}

    def render(self) -> Iterator[str]:
        """Yield the lines of Prometheus' text format."""
        yield f"# HELP {self.name} {_escape_help(self.help_text)}"
        yield f"# TYPE {self.name} {self.kind}"
        with self._lock:
            snapshot = {key: list(series) for key, series in self._series.items()}
        for key, series in snapshot.items():
            yield from self._render_series([*zip(self.labels, key, strict=True)], series)

    def _new_series(self) -> list[float]:
        raise NotImplementedError

    def _render_series(self, labels: list[tuple[str, str]], series: list[float]) -> Iterator[str]:
        raise NotImplementedError

    def _key(self, labels: Mapping[str, str]) -> tuple[str, ...]:
        return tuple([labels[name][: self.MAX_LABEL] for name in self.labels])

    def _find(self, labels: Mapping[str, str]) -> tuple[tuple[str, ...], list[float]]:
        """Return the series to change, with its key; the caller holds the lock."""
        key = self._key(labels)
        if (series := self._series.get(key)) is not None:
            return key, series
        if len(self._series) >= self.MAX_SERIES:
            key = (self.OTHER,) * len(key)
        return key, self._series.setdefault(key, self._new_series())


class Counter(_Metric):
    """A count that only grows."""

    kind = "counter"

    def increment(self, **labels: str) -> None:
        """Add one to the count for *labels*."""
        with self._lock:
            key, series = self._find(labels)
            series[0] += 1
        self._emit(self, 1, key)

    def value(self, **labels: str) -> int:
        """Return the count for exactly *labels*."""
        return int(self._series.get(self._key(labels), (0,))[0])

    def _new_series(self) -> list[float]:
        return [0]

    def _render_series(self, labels: list[tuple[str, str]], series: list[float]) -> Iterator[str]:
        yield f"{self.name}{_spell_labels(labels)} {int(series[0])}"


class Histogram(_Metric):
    """How often a duration was how long. A series is: the count for each bound, the count beyond, the sum."""

    kind = "histogram"
    BOUNDS: ClassVar[tuple[float, ...]] = (
        *(0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01),
        *(0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
    )
    """Seconds, inclusive."""

    def observe(self, seconds: float, **labels: str) -> None:
        """Count one duration for *labels*."""
        with self._lock:
            key, series = self._find(labels)
            series[bisect.bisect_left(self.BOUNDS, seconds)] += 1
            series[-1] += seconds
        self._emit(self, seconds, key)

    def count(self, **labels: str) -> int:
        """Return how many durations were counted for exactly *labels*."""
        return int(sum(self._series.get(self._key(labels), [0])[:-1]))

    def _new_series(self) -> list[float]:
        return [0] * (len(self.BOUNDS) + 1) + [0.0]

    def _render_series(self, labels: list[tuple[str, str]], series: list[float]) -> Iterator[str]:
        *counts, total = series
        bounds = (*(repr(bound) for bound in self.BOUNDS), "+Inf")
        for bound, count in zip(bounds, itertools.accumulate(counts), strict=True):
            yield f"{self.name}_bucket{_spell_labels([*labels, ('le', bound)])} {int(count)}"
        yield f"{self.name}_sum{_spell_labels(labels)} {total!r}"
        yield f"{self.name}_count{_spell_labels(labels)} {int(sum(counts))}"


class Metrics:
    """What this process's sandboxes have counted, under the names of 0.14 (features.md A.13).

    ``metrics.durations = True`` also measures how long calls take, which costs two looks at a clock each.
    """

    def __init__(self) -> None:
        self.durations = False
        self._subscribers: tuple[Callable[[Observation], None], ...] = ()
        emit = self._emit
        self.guest_errors = Counter("guest_errors_total", "Errors that guest functions returned", ("code",), emit)
        self.guest_cancellations = Counter("guest_cancellations_total", "Guest calls that were cancelled", (), emit)
        self.erroneous_vcpu_kicks = Counter(
            "erroneous_vcpu_kicks_total", "Signals that interrupted a guest without a reason", (), emit
        )
        self.guest_call_duration = Histogram("guest_call_duration_seconds", "Guest calls", _BY_FUNCTION, emit)
        self.host_call_duration = Histogram("host_call_duration_seconds", "Host calls", _BY_FUNCTION, emit)

    def render(self) -> str:
        """Return all metrics in Prometheus' text format, version 0.0.4."""
        return "".join(f"{line}\n" for metric in self._all() for line in metric.render())

    def _all(self) -> tuple[_Metric, ...]:
        counters = (self.guest_errors, self.guest_cancellations, self.erroneous_vcpu_kicks)
        return (*counters, self.guest_call_duration, self.host_call_duration)

    def _renew_locks(self) -> None:
        for metric in self._all():
            metric._lock = threading.RLock()

    def subscribe(self, callback: Callable[[Observation], None]) -> Callable[[], None]:
        """Call *callback* with every ``Observation`` from now on, on the thread that makes it.

        Returns the function that ends it. What *callback* raises is logged and goes no further.
        """
        self._subscribers += (callback,)

        def unsubscribe() -> None:
            self._subscribers = tuple(each for each in self._subscribers if each is not callback)

        return unsubscribe

    def _emit(self, metric: _Metric, value: float, key: tuple[str, ...]) -> None:
        for callback in self._subscribers:
            labels = dict(zip(metric.labels, key, strict=True))
            _call_observer(callback, Observation(metric.name, metric.kind, value, labels))


_BY_FUNCTION = ("function_name",)


def _call_observer(callback: Callable[[Any], None], observed: Any) -> None:
    """Call what a user wants to be called: its mistakes must not end a guest's run."""
    try:
        callback(observed)
    except Exception:
        _logger.exception("%r failed for %r", callback, observed)


def _spell_labels(labels: Sequence[tuple[str, str]]) -> str:
    spelled = ",".join(f'{name}="{_escape_label(value)}"' for name, value in labels)
    return f"{{{spelled}}}" if labels else ""


def _escape_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _escape_label(value: str) -> str:
    return _escape_help(value).replace('"', '\\"')


metrics = Metrics()


# ======================================================================================
# Tracing: what a sandbox did, and when
# ======================================================================================


class TraceRecord(typing.NamedTuple):
    """A span of time, or a moment (``end_ns`` is None), in the life of a sandbox.

    ``category`` is "call-to-guest", "call-to-host", "vcpu" (KVM_RUN, until its exit), "guest" (a span that
    the guest reports) or "guest-event". Times are those of ``time.perf_counter_ns``; ``sandbox`` tells
    sandboxes apart; ``id`` and ``parent`` are the guest's numbers for its spans, 0 for none.
    """

    category: str
    name: str
    begin_ns: int
    end_ns: int | None
    fields: Mapping[str, str]
    sandbox: int
    id: int = 0
    parent: int = 0


class TraceRecorder:
    """Keeps trace records for a file: ``SandboxConfiguration(trace=TraceRecorder())``.

    Several sandboxes may share one. Of more than *max_records*, or of records with more than *max_text*
    characters of names and fields, which are a guest's, the first are kept, and ``dropped`` says how many were not.
    """

    def __init__(self, max_records: int = 200_000, max_text: int = 32 << 20) -> None:
        self.max_records = max_records
        self.max_text = max_text
        self.records: list[TraceRecord] = []
        self.dropped = 0
        self._text = 0

    def __call__(self, record: TraceRecord) -> None:
        """Keep *record*."""
        text = self._text + len(record.name) + _text_of_fields(record.fields.items())
        if len(self.records) < self.max_records and text <= self.max_text:
            self._text = text
            self.records.append(record)
        else:
            self.dropped += 1

    def write_chrome_trace(self, path: StrPath) -> None:
        """Write the records as JSON for Perfetto (ui.perfetto.dev) and Chrome (chrome://tracing).

        The process is this one; each sandbox has a thread for the host's view and one for the guest's own spans.
        """
        import json

        events = [event for record in self.records for event in _chrome_events(record)]
        for sandbox in sorted({record.sandbox for record in self.records}):
            events += _chrome_names(sandbox)
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": events, "otherData": {"dropped": str(self.dropped)}}, file)


def _text_of_fields(fields: Iterable[tuple[str, str]]) -> int:
    """Count the characters of *fields*."""
    return sum([len(key) + len(value) for key, value in fields])


def _chrome_names(sandbox: int) -> Iterator[dict[str, Any]]:
    for thread, name in enumerate((f"sandbox {sandbox}", f"sandbox {sandbox}, the guest's spans"), 2 * sandbox):
        common = {"ph": "M", "pid": os.getpid(), "tid": thread, "name": "thread_name"}
        yield {**common, "args": {"name": name}}


def _chrome_events(record: TraceRecord) -> Iterator[dict[str, Any]]:
    """Spell *record* in the Trace Event Format; times are microseconds."""
    event: dict[str, Any] = {
        "name": record.name,
        "cat": record.category,
        "pid": os.getpid(),
        "tid": 2 * record.sandbox + record.category.startswith("guest"),
        "ts": record.begin_ns / 1000,
        "args": dict(record.fields),
    }
    if record.end_ns is None:
        yield {**event, "ph": "i", "s": "t"}
    else:
        yield {**event, "ph": "X", "dur": (record.end_ns - record.begin_ns) / 1000}


@dataclasses.dataclass
class _OpenSpan:
    event: memory.OpenSpan
    begin_ns: int
    fields: dict[str, str]
    text: int
    """Characters, those of fields that were replaced included."""


class _Tracer:
    """Tells a callback what one sandbox does: host calls, exits, and the spans that its guest reports.

    A guest's batch comes in registers at any exit (abi.md 15.1). Nothing in it can fail the run: what
    makes no sense is logged and left out; there is a limit to the spans that stay open.
    """

    MAX_OPEN: ClassVar[int] = 1024
    MAX_FIELDS: ClassVar[int] = 64
    MAX_OPEN_TEXT: ClassVar[int] = 1 << 20
    """Characters of all open spans."""
    _numbers = itertools.count(1)

    def __init__(self, callback: Callable[[TraceRecord], None], vcpu: kvm_abi.Vcpu) -> None:
        self._callback = callback
        self._vcpu = vcpu
        self._sandbox = next(self._numbers)
        self._open: dict[int, _OpenSpan] = {}
        self._open_text = 0
        self._entered_ns = 0
        self._guest_start: int | None = None  # the guest's time stamp counter at that moment

    def record(self, category: str, name: str, begin_ns: int, **fields: str) -> None:
        """Report a span that ends now."""
        self._emit(category, name, begin_ns, time.perf_counter_ns(), fields)

    def entered(self) -> None:
        """The guest is about to be entered for a new run."""
        self._entered_ns = time.perf_counter_ns()
        self._guest_start = None

    def left(self, name: str) -> None:
        """The run for the call of *name* is over: spans that the guest left open end here."""
        for span in reversed(self._open.values()):
            span.fields["unfinished"] = "true"
            self._close(span, time.perf_counter_ns())
        self._open.clear()
        self._open_text = 0
        self.record("call-to-guest", name, self._entered_ns)

    def run(self, physical: memory.GuestMemory) -> int:
        """Do what ``Vcpu.run`` does, report it, and take the batch that the guest may have left."""
        begin = time.perf_counter_ns()
        interrupted = self._vcpu.run()
        exit_name = "interrupted" if interrupted else _exit_name(self._vcpu.kvm_run)
        self.record("vcpu", "KVM_RUN", begin, exit=exit_name)
        if not interrupted:
            self._take_batch(physical)
        return interrupted

    def _take_batch(self, physical: memory.GuestMemory) -> None:
        regs = self._vcpu.get_regs()
        if regs.r8 != _Port.TRACE_BATCH:
            return
        try:
            if not 1 <= regs.r10 <= _MAX_TRACE_BATCH:
                raise memory.InvalidFlatBuffer(f"trace batch of {regs.r10} bytes, not 1 to {_MAX_TRACE_BATCH}")
            data = physical.read_virt(self._vcpu.get_sregs().cr3, regs.r9, regs.r10)
            for event in memory.decode_trace_batch(data):
                self._take(event)
        except HyperlightError as error:
            _logger.warning("the guest's trace data is left out: %s", error)

    def _take(self, event: memory.TraceEvent) -> None:
        if isinstance(event, memory.GuestStart):
            self._guest_start = event.tsc
        elif isinstance(event, memory.OpenSpan):
            self._open_span(event)
        elif isinstance(event, memory.LogEvent):
            fields = dict(event.fields[: self.MAX_FIELDS])
            self._emit("guest-event", event.name, self._time_of(event.tsc), None, fields, 0, event.parent_id)
        elif (span := self._open.get(event.id)) is None:
            _logger.warning("the guest's trace mentions span %d, which is not open", event.id)
        elif isinstance(event, memory.CloseSpan):
            self._close(span, self._time_of(event.tsc))
            del self._open[event.id]
            self._open_text -= span.text
        else:
            self._edit(span, event.fields[: max(0, self.MAX_FIELDS - len(span.fields))])

    def _open_span(self, event: memory.OpenSpan) -> None:
        begin = self._time_of(event.tsc)
        fields = dict(event.fields[: self.MAX_FIELDS])
        text = len(event.name) + len(event.target) + _text_of_fields(fields.items())
        if event.id in self._open or len(self._open) >= self.MAX_OPEN or self._open_text + text > self.MAX_OPEN_TEXT:
            _logger.warning("the guest's span %d, %s, is left out", event.id, event.name)
            return
        self._open_text += text
        self._open[event.id] = _OpenSpan(event._replace(fields=()), begin, fields, text)

    def _edit(self, span: _OpenSpan, fields: Sequence[memory.KeyValue]) -> None:
        text = _text_of_fields(fields)
        if self._open_text + text > self.MAX_OPEN_TEXT:
            _logger.warning("fields of the guest's span %d, %s, are left out", span.event.id, span.event.name)
            return
        self._open_text += text
        span.text += text
        span.fields.update(fields)

    def _close(self, span: _OpenSpan, end_ns: int) -> None:
        event = span.event
        fields = {"target": event.target, **span.fields}
        self._emit("guest", event.name, span.begin_ns, max(end_ns, span.begin_ns), fields, event.id, event.parent or 0)

    def _emit(
        self, category: str, name: str, begin: int, end: int | None, fields: Mapping[str, str], *ids: int
    ) -> None:
        _call_observer(self._callback, TraceRecord(category, name, begin, end, fields, self._sandbox, *ids))

    def _time_of(self, tsc: int) -> int:
        """Convert a guest's time stamp to the host's clock: between its entry and now, whatever it says.

        Raises ``HyperlightError`` before the guest has said where its clock started.
        """
        if self._guest_start is None:
            raise HyperlightError("an event came before GuestStart")
        elapsed = (tsc - self._guest_start) * 1_000_000 // self._tsc_khz
        return min(max(self._entered_ns + elapsed, self._entered_ns), time.perf_counter_ns())

    @functools.cached_property
    def _tsc_khz(self) -> int:
        """How fast the guest's time stamp counter runs: as KVM knows, else measured."""
        with contextlib.suppress(kvm_abi.KvmError):
            if khz := self._vcpu.get_tsc_khz():
                return khz
        return _measured_tsc_khz(self._vcpu)


_MAX_TRACE_BATCH = 4096
"""Bytes."""


def _exit_name(kvm_run: kvm_abi.kvm_run) -> str:
    if kvm_run.exit_reason == KvmExit.IO and kvm_run.io.port in _Port._value2member_map_:
        return f"port {_Port(kvm_run.io.port).name}"
    return kvm_abi.describe_exit(kvm_run)


def _measured_tsc_khz(vcpu: kvm_abi.Vcpu, period_s: float = 0.01) -> int:
    readings: list[tuple[int, int]] = []
    for pause_s in (period_s, 0):
        readings.append((time.perf_counter_ns(), vcpu.get_msrs([kvm_abi.Msr.IA32_TSC])[kvm_abi.Msr.IA32_TSC]))
        time.sleep(pause_s)
    (begin_ns, begin), (end_ns, end) = readings
    return max(1, (end - begin) * 1_000_000 // (end_ns - begin_ns))


# ======================================================================================
# Memory profile: what a guest allocates
# ======================================================================================


class MemoryEvent(typing.NamedTuple):
    """A guest allocated or freed ``size`` bytes at ``address`` (gva); both are the guest's word.

    ``stack`` holds gvas of code: where the guest is, then the return addresses, the innermost first.
    """

    kind: Literal["alloc", "free"]
    address: int
    size: int
    stack: tuple[int, ...]


@dataclasses.dataclass
class _Site:
    live_bytes: int = 0
    live_count: int = 0
    total_count: int = 0


class MemoryProfile:
    """Adds up what guests allocate: ``SandboxConfiguration(memory_profile=MemoryProfile())``.

    A guest reports its allocations only if it was built to (ports 105 and 106, abi.md 15.2). At most
    ``MAX_TRACKED`` blocks and call sites are remembered; ``untracked`` counts the rest.
    """

    MAX_TRACKED: ClassVar[int] = 100_000

    def __init__(self) -> None:
        self.live_bytes = 0
        self.peak_bytes = 0
        self.untracked = 0
        self.sites: dict[int, _Site] = {}
        """By the address that the allocating function returns to."""
        self._blocks: dict[int, tuple[int, _Site]] = {}

    def __call__(self, event: MemoryEvent) -> None:
        """Take *event* into account."""
        if event.kind == "free":
            self._free(event.address)
            return
        caller = event.stack[1] if len(event.stack) > 1 else event.stack[0] if event.stack else 0
        if len(self._blocks) >= self.MAX_TRACKED or len(self.sites) >= self.MAX_TRACKED:
            self.untracked += 1
            return
        self._free(event.address)  # one that the guest did not report
        site = self.sites.setdefault(caller, _Site())
        site.live_bytes += event.size
        site.live_count += 1
        site.total_count += 1
        self._blocks[event.address] = (event.size, site)
        self.live_bytes += event.size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _free(self, address: int) -> None:
        size, site = self._blocks.pop(address, (0, None))
        if site is not None:
            site.live_bytes -= size
            site.live_count -= 1
            self.live_bytes -= size

    def report(self, elf: GuestElf | None = None, top: int = 20) -> str:
        """Return a table of the *top* call sites by live bytes, with the names that *elf* knows."""
        lines = [f"{self.live_bytes} bytes live, {self.peak_bytes} at the peak, {self.untracked} blocks untracked"]
        by_size = sorted(self.sites.items(), key=lambda item: -item[1].live_bytes)
        for address, site in by_size[:top]:
            where = f"{address:#x}" if elf is None else _named_address(elf, address)
            lines.append(f"{site.live_bytes:12} bytes in {site.live_count} of {site.total_count} blocks  {where}")
        return "\n".join(lines)


_MAX_STACK_DEPTH = 32


def _call_stack(physical: memory.GuestMemory, cr3: int, registers: Mapping[str, int], code: range) -> tuple[int, ...]:
    """Return rip and the return addresses in *code* that the chain of frame pointers leads to.

    The chain is a guest's word: it must ascend, and ends where it does not or where there is no memory.
    """
    stack, frame = [registers["rip"]], registers["rbp"]
    with contextlib.suppress(HyperlightError):
        while len(stack) < _MAX_STACK_DEPTH:
            above, return_address = struct.unpack("<2Q", physical.read_virt(cr3, frame, 16))
            if return_address not in code:
                break
            stack.append(return_address)
            if above <= frame:
                break
            frame = above
    return tuple(stack)


# ======================================================================================
# Beyond memory and a vCPU: the timer, and who may touch model-specific registers
# ======================================================================================


class MsrError(HyperlightError, ValueError):
    """``SandboxConfiguration.guest_msrs`` asks for what this KVM, or any, cannot do."""


_MAX_GUEST_MSRS = 16
_BASE_MSRS = (kvm_abi.Msr.FS_BASE, kvm_abi.Msr.GS_BASE, kvm_abi.Msr.KERNEL_GS_BASE)
"""Every guest has these: it can change them without WRMSR, so that a restore must put them back anyway."""
_MSR_WINDOW = 0x3000
"""MSRs that one range of a filter can cover: KVM_MSR_FILTER_MAX_BITMAP_SIZE in bits."""
_X2APIC_MSRS = range(0x800, 0x900)
"""KVM filters no access to these, so they can be neither denied nor allowed."""


def _checked_msrs(indices: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the indices without repetitions. Raises ``MsrError``."""
    if indices is None:
        return None
    unique = tuple(dict.fromkeys(indices))
    if len(unique) > _MAX_GUEST_MSRS:
        raise MsrError(f"guest_msrs has {len(unique)} registers; a guest can have at most {_MAX_GUEST_MSRS}")
    for index in unique:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 1 << 32:
            raise MsrError(f"an MSR is a number of 32 bits, not {index!r}")
        if index in _X2APIC_MSRS:
            raise MsrError(f"MSR {index:#x} belongs to the x2APIC, which guests do not have")
    return unique


@functools.lru_cache(maxsize=16)
def _filtering(allowed: tuple[int, ...]) -> list[kvm_abi.PreparedIoctl]:
    """Return what makes a VM deny all MSRs but those *allowed*, and say so. Raises as `_msr_filter`."""
    reports = kvm_abi.kvm_enable_cap(cap=Cap.X86_USER_SPACE_MSR, args=(int(kvm_abi.MsrExitReason.FILTER),))
    return [
        kvm_abi.PreparedIoctl(kvm_abi.KVM_ENABLE_CAP, reports),
        kvm_abi.PreparedIoctl(kvm_abi.KVM_X86_SET_MSR_FILTER, _msr_filter(allowed)),
    ]


def _msr_filter(allowed: tuple[int, ...]) -> kvm_abi.kvm_msr_filter:
    """Return the filter that denies all MSRs but those *allowed*. Raises ``MsrError`` where they are too far apart."""
    windows: list[list[int]] = []
    for index in sorted(set(allowed)):
        if not windows or index - windows[-1][0] >= _MSR_WINDOW:
            windows.append([])
        windows[-1].append(index)
    if len(windows) > kvm_abi.KVM_MSR_FILTER_MAX_RANGES:
        raise MsrError("guest_msrs are too far apart for a filter of KVM: leave one out")
    msr_filter = kvm_abi.kvm_msr_filter(flags=kvm_abi.MsrFilterDefault.DENY)
    for entry, window in zip(msr_filter.ranges, windows, strict=False):
        bits = sum(1 << (index - window[0]) for index in window)
        entry.flags = kvm_abi.MsrFilterAccess.READ | kvm_abi.MsrFilterAccess.WRITE
        entry.base, entry.nmsrs = window[0], bits.bit_length()
        size = (bits.bit_length() + 63) // 64 * 8  # KVM reads whole words
        entry.bitmap = (ctypes.c_uint8 * size)(*bits.to_bytes(size, "little"))
    return msr_filter


class PlatformState(typing.NamedTuple):
    """What a snapshot keeps of a platform: MSRs by index, kvm_xcrs, and the interrupt controllers, if there are any.

    What is empty, or not named, goes back to the initial state of the sandbox restored into.
    """

    msrs: Mapping[int, int] = {}
    interrupts: tuple[bytes, ...] = ()
    xcrs: bytes = b""


_MAX_INITIAL_STATES = 16
_initial_states: dict[tuple[int, ...], PlatformState] = {}
"""What a fresh vCPU holds, by the MSRs asked for: the same in all VMs of a process without interrupt controllers."""


class _Platform:
    """The MSR filter of a VM and, if wanted, its interrupt controllers with the timer (features.md A.15, C.4).

    A guest's access to an MSR that was not declared is a #GP in the guest. What it cannot change need not be
    restored: a snapshot holds the declared ones and KERNEL_GS_BASE (FS and GS base are among the special registers).
    XCR0, which a guest sets to have AVX, goes with them. The time stamp counter is no state: time does not go back.
    """

    def __init__(self, vm: kvm_abi.Vm, *, timer: bool, msrs: tuple[int, ...] | None) -> None:
        """To be made after the memory slots, which are slow to set with an irqchip, and before the vCPU."""
        self._vm = vm
        self._captured = (kvm_abi.Msr.KERNEL_GS_BASE, *(msrs or ()))
        self._refused: set[int] = set()
        can_filter = _kvm_features().filters_msrs
        if msrs and not can_filter:
            raise MsrError("guest_msrs needs a KVM with a filter for MSRs, in Linux since 5.10")
        self._filtering = _filtering((*_BASE_MSRS, *msrs)) if msrs is not None and can_filter else []
        self.timer = _Timer(vm) if timer else None

    def attach(self, vcpu: kvm_abi.Vcpu) -> None:
        """Take the VM's new vCPU, in the state that a restore goes back to where a snapshot says nothing.

        The filter comes only now: KVM waits for a grace period of its readers then, and it waits for some
        milliseconds if the last one, for the memory slots, is not yet 25 us ago (srcutree.exp_holdoff).
        """
        self._vcpu = vcpu
        kvm_abi.make_ioctls(self._vm.fd, self._filtering)
        if (initial := _initial_states.get(self._captured)) is not None and self.timer is None:
            self._initial = initial
            return
        try:
            self._initial = self.capture()
        except kvm_abi.KvmError as error:
            raise MsrError(f"this KVM does not have all of guest_msrs: {error}") from error
        if self.timer is None and len(_initial_states) < _MAX_INITIAL_STATES:
            _initial_states[self._captured] = self._initial

    def capture(self) -> PlatformState:
        """Return what a snapshot has to keep."""
        interrupts: tuple[bytes, ...] = ()
        if self.timer is not None:
            chips = (bytes(self._vm.get_irqchip(chip)) for chip in kvm_abi.Irqchip)
            interrupts = (*chips, bytes(self._vcpu.get_lapic()))
        return PlatformState(self._vcpu.get_msrs(self._captured), interrupts, bytes(self._vcpu.get_xcrs()))

    def check(self, state: PlatformState) -> None:
        """Raise ``SnapshotMismatch`` where *state* is not one that this platform can take."""
        for index in state.msrs:
            if index not in self._captured:
                raise SnapshotMismatch(f"the snapshot's guest had MSR {index:#x}, which guest_msrs does not name here")
        if state.interrupts and list(map(len, state.interrupts)) != list(map(len, self._initial.interrupts)):
            raise SnapshotMismatch("the snapshot's guest had a timer: use SandboxConfiguration(hardware_timer=True)")

    def restore(self, state: PlatformState) -> None:
        """Put a fresh vCPU to *state*, which was checked."""
        initial = self._initial
        if (state.xcrs or initial.xcrs, {**initial.msrs, **state.msrs}) != (initial.xcrs, initial.msrs):
            kvm_abi.make_ioctls(self._vcpu.fd, self.prepare_reset(state))
        self._interrupts = state.interrupts
        self.restore_interrupts()

    def prepare_reset(self, state: PlatformState) -> list[kvm_abi.PreparedIoctl]:
        """Return what puts the vCPU back to *state*, which was checked, but for `restore_interrupts`."""
        self._interrupts = state.interrupts
        msrs = {**self._initial.msrs, **state.msrs}
        return _platform_resets(state.xcrs or self._initial.xcrs, tuple(msrs.items()))

    def restore_interrupts(self) -> None:
        """Put the interrupt controllers back, if there are any, to the state last prepared; after the registers."""
        if self.timer is None:
            return
        *chips, lapic = self._interrupts or self._initial.interrupts
        for chip in chips:
            self._vm.set_irqchip(kvm_abi.kvm_irqchip.from_buffer_copy(chip))
        self._vcpu.set_lapic(kvm_abi.kvm_lapic_state.from_buffer_copy(lapic))
        self._vcpu.set_vcpu_events(kvm_abi.kvm_vcpu_events())
        self._vcpu.set_mp_state(kvm_abi.kvm_mp_state(mp_state=kvm_abi.MpState.RUNNABLE))  # not waiting in a HLT

    def refuse_msr(self) -> None:
        """Answer the access that the filter stopped: the guest gets its #GP, the user a line in the log."""
        msr = self._vcpu.kvm_run.msr
        msr.error = 1
        if msr.index not in self._refused and len(self._refused) < _MAX_GUEST_MSRS:
            self._refused.add(msr.index)
            advice = f"SandboxConfiguration(guest_msrs=({msr.index:#x},)) lets it"
            _logger.warning("the guest may not touch MSR %#x: general protection fault; %s", msr.index, advice)

    def close(self) -> None:
        """Stop the timer and release it."""
        if self.timer is not None:
            self.timer.close()


@functools.lru_cache(maxsize=16)
def _platform_resets(xcrs: bytes, msrs: tuple[tuple[int, int], ...]) -> list[kvm_abi.PreparedIoctl]:
    listed = kvm_abi.msrs(dict(msrs))
    return [
        kvm_abi.PreparedIoctl(kvm_abi.KVM_SET_XCRS, kvm_abi.kvm_xcrs.from_buffer_copy(xcrs)),
        kvm_abi.PreparedIoctl(kvm_abi.KVM_SET_MSRS, listed, least=listed.nmsrs),
    ]


class _Timer:
    """Raises interrupt line 0 of the irqchip once a period (abi.md 8.6). The vCPU's thread sets it.

    While it runs, a thread of the host sleeps and writes to an eventfd; KVM does the rest.
    """

    MIN_PERIOD_US: ClassVar[int] = 100
    MAX_PERIOD_US: ClassVar[int] = 10_000_000

    def __init__(self, vm: kvm_abi.Vm) -> None:
        vm.create_irqchip()
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            vm.irqfd(self._eventfd, 0)
        except BaseException:
            self.close()
            raise

    def set(self, period_us: int) -> None:
        """Tick every *period_us* microseconds, 100 to 10,000,000, the first time after one period; 0: stop."""
        self.stop()
        if period_us:
            period_s = self.clamp(period_us) / 1e6
            self._stop = threading.Event()
            arguments = (self._eventfd, self._stop, period_s)
            self._thread = threading.Thread(target=_tick, args=arguments, name="hyperlight timer", daemon=True)
            self._thread.start()

    @classmethod
    def clamp(cls, period_us: int) -> int:
        """Return the period that a guest gets for one that it asks for."""
        return min(max(period_us, cls.MIN_PERIOD_US), cls.MAX_PERIOD_US)

    def stop(self) -> None:
        """Tick no more."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None

    def disown(self) -> None:
        """Forget the thread, which is a parent's."""
        self._thread = None

    def close(self) -> None:
        """Stop, and close the eventfd."""
        self.stop()
        os.close(self._eventfd)


def _tick(eventfd: int, stop: threading.Event, period_s: float) -> None:
    """Write to *eventfd* once a period until *stop*; ticks that come too late are left out."""
    due = time.monotonic() + period_s
    while not stop.wait(max(0.0, due - time.monotonic())):
        with contextlib.suppress(BlockingIOError):  # the counter is full: KVM has not taken a tick for ages
            os.eventfd_write(eventfd, 1)
        due = max(due + period_s, time.monotonic())


# ======================================================================================
# The virtual machine: one VM, one vCPU, its memory slots
# ======================================================================================


_RFLAGS_AT_ENTRY = 2
"""Bit 1 of rflags is always set."""


@dataclasses.dataclass
class _Slot:
    """A memory slot of a VM. It exists before KVM knows of it and until KVM has forgotten it.

    So whatever interrupts a change, even Ctrl-C, a VM never has memory that the host has given away.
    """

    number: int
    mapping: SharedMemory
    memory: object
    """What keeps it mapped, also when its owner closes it too early."""
    is_certain: bool = False


def _close_all(closers: list[Callable[[], object]]) -> None:
    """Close what was opened, the last first; what one of them raises comes out when all are closed."""
    try:
        while closers:
            closers.pop()()
    finally:
        if closers:
            _close_all(closers)


class _VirtualMachine:
    """A KVM VM with one vCPU, as the ABI wants it (abi.md 6). ``page`` is its kvm_run page."""

    def __init__(
        self,
        slots: Sequence[tuple[int, SharedMemory, bool]],
        sregs: kvm_abi.kvm_sregs,
        *,
        timer: bool = False,
        msrs: tuple[int, ...] | None = None,
    ) -> None:
        self._slots: dict[int, _Slot] = {}
        self._loaded = b""  # the registers in the kvm_run page
        self._closers: list[Callable[[], object]] = []
        self._finalizer = weakref.finalize(self, _close_all, self._closers)
        self._finalizer.atexit = False  # the kernel does it; a daemon thread may still run a guest
        try:
            self._create(slots, sregs, timer, msrs)
        except BaseException:
            self.close()
            raise

    def _create(
        self,
        slots: Sequence[tuple[int, SharedMemory, bool]],
        sregs: kvm_abi.kvm_sregs,
        timer: bool,
        msrs: tuple[int, ...] | None,
    ) -> None:
        features = _kvm_features()
        with _open_kvm() as kvm:
            self._vm = _uninterrupted(kvm.create_vm)
        self._closers.append(self._vm.close)
        for slot in slots:
            self.map(*slot)
        self.platform = _Platform(self._vm, timer=timer, msrs=msrs)
        self._closers.append(self.platform.close)
        self.vcpu = _uninterrupted(lambda: self._vm.create_vcpu(0))
        self._closers.append(self.vcpu.close)
        self.vcpu.set_cpuid2(_guest_cpuid())
        self._syncs_registers = bool(features.sync_regs & _REGS)
        self._syncs_state = features.sync_regs & _SREGS_EVENTS == _SREGS_EVENTS and not timer  # whose state comes after
        self.page = self.vcpu.page[:]  # views of its own: they would keep the VM alive beyond its close
        self.exit_reason = self.page[_EXIT_REASON : _EXIT_REASON + 4].cast("I")
        self.exit_io = self.page[_EXIT_OFFSET : _EXIT_OFFSET + 8].cast("Q")
        self._closers += self.page.release, self.exit_reason.release, self.exit_io.release
        if self._syncs_state:
            self._load_state(_state_of(sregs), _cr8_of(sregs))
        else:
            self.vcpu.set_sregs(sregs)
        self.platform.attach(self.vcpu)

    def before_close(self, step: Callable[[], object]) -> None:
        """Have *step* done when the VM is closed, before all else."""
        self._closers.append(step)

    def close(self) -> None:
        """Close the vCPU and the VM, as happens when the last reference goes."""
        self._finalizer()
        self._slots.clear()

    # -- memory slots --

    def map(self, gpa: int, mapping: SharedMemory, writable: bool) -> None:
        """Put *mapping* at *gpa* for the guest to read, execute and, if *writable*, write; unless it is there."""
        if gpa in self._slots:
            return
        number = min({*range(len(self._slots) + 1)} - {slot.number for slot in self._slots.values()})
        flags = 0 if writable else int(kvm_abi.MemFlag.READONLY)
        slot = self._slots[gpa] = _Slot(number, mapping, mapping.hold())
        try:
            mapping.with_hva(functools.partial(self._vm.set_user_memory_region, number, flags, gpa, mapping.size))
        except kvm_abi.KvmError:
            del self._slots[gpa]
            raise
        slot.is_certain = True

    def unmap_all_but(self, slots: Sequence[tuple[int, SharedMemory, bool]]) -> None:
        """Take away every mapping that is not one of *slots*, or may not be there."""
        kept = [mapping for _, mapping, _ in slots]
        for gpa, slot in list(self._slots.items()):
            if not slot.is_certain or not any(slot.mapping is mapping for mapping in kept):
                self._unmap(gpa, slot)

    def _unmap(self, gpa: int, slot: _Slot) -> None:
        was_certain, slot.is_certain = slot.is_certain, False
        try:
            self._vm.set_user_memory_region(slot.number, kvm_abi.MemFlag(0), gpa, 0, 0)
        except kvm_abi.KvmError as error:
            if was_certain or error.errno != errno.EINVAL:  # which is what it says where there is nothing
                raise
        del self._slots[gpa]

    # -- registers --

    @staticmethod
    def pack(rip: int, rsp: int, *, rflags: int = _RFLAGS_AT_ENTRY, **others: int) -> bytes:
        """Return kvm_regs with the registers named and zero in all others."""
        return _REGISTERS.pack(*{**_NO_REGISTERS, "rip": rip, "rsp": rsp, "rflags": rflags, **others}.values())

    def load(self, registers: bytes) -> None:
        """Set the general registers, given as kvm_regs, at the next entry."""
        if self._syncs_registers:
            if registers is not self._loaded:  # KVM never writes there: what it once was given, stays
                self.page[_SYNC_REGS : _SYNC_REGS + len(registers)] = registers
                self._loaded = registers
            self.page[_DIRTY_REGS] |= _REGS
        else:
            self.vcpu.set_regs(kvm_abi.kvm_regs.from_buffer_copy(registers))

    def settle(self) -> None:
        """Set now what waits for the next entry: a debugger is about to look at it, or to change it."""
        if self.page[_DIRTY_REGS] & _SREGS_EVENTS:
            self._set_state()
        if self.page[_DIRTY_REGS]:
            regs = self.page[_SYNC_REGS : _SYNC_REGS + ctypes.sizeof(kvm_abi.kvm_regs)]
            self.vcpu.set_regs(kvm_abi.kvm_regs.from_buffer_copy(regs))
            self.page[_DIRTY_REGS] = 0

    def registers(self) -> dict[str, int]:
        """Return the general registers by name."""
        return _named(self.packed_registers())

    def packed_registers(self) -> bytes:
        """Return the general registers as kvm_regs."""
        registers, get_registers = self._read_registers
        kvm_abi.make_ioctls(self.vcpu.fd, get_registers)
        return bytes(registers)

    @functools.cached_property
    def _read_registers(self) -> tuple[kvm_abi.kvm_regs, list[kvm_abi.PreparedIoctl]]:
        registers = kvm_abi.kvm_regs()
        return registers, [kvm_abi.PreparedIoctl(kvm_abi.KVM_GET_REGS, registers)]

    def load_sregs(self, sregs: kvm_abi.kvm_sregs) -> None:
        """Set the special registers, and drop whatever translations KVM holds.

        Host writes to page tables are not seen by a guest that runs on shadow page tables; toggling
        CR0.WP makes KVM build new ones (spec/kvm-hosts.md 2.9), and costs one ioctl.
        """
        sregs.cr0 ^= kvm_abi.Cr0.WP
        self.vcpu.set_sregs(sregs)
        sregs.cr0 ^= kvm_abi.Cr0.WP
        self.vcpu.set_sregs(sregs)

    def prepare_reset(self, sregs: kvm_abi.kvm_sregs, platform: PlatformState) -> None:
        """Prepare `reset` to put every register that a guest can change back (abi.md 6.5), with *sregs* as given."""
        toggled = kvm_abi.kvm_sregs.from_buffer_copy(sregs)
        toggled.cr0 ^= Cr0.WP
        self._resets = [
            kvm_abi.PreparedIoctl(kvm_abi.KVM_SET_DEBUGREGS, kvm_abi.kvm_debugregs()),
            kvm_abi.PreparedIoctl(kvm_abi.KVM_SET_XSAVE, _initial_xsave()),
            *self.platform.prepare_reset(platform),
        ]
        self._flushing_resets = [kvm_abi.PreparedIoctl(kvm_abi.KVM_SET_SREGS, toggled), *self._resets]  # see load_sregs
        self._reset_state, self._reset_cr8 = _state_of(sregs), _cr8_of(sregs)

    def reset(self, flush: bool) -> None:
        """Put every register back, as prepared, and *flush* the translations that KVM holds, if it has to be.

        Special registers and events go with the next entry, where they can.
        An ioctl on a vCPU costs as much as a dozen of them would: KVM loads and puts the vCPU each time.
        """
        if not self._exit_is_complete():
            self._complete_exit()
        kvm_abi.make_ioctls(self.vcpu.fd, self._flushing_resets if flush else self._resets)
        self._load_state(self._reset_state, self._reset_cr8)
        if not self._syncs_state:
            self.load(self.pack(rip=0, rsp=0))
            self._set_state()
            self.platform.restore_interrupts()

    def _load_state(self, state: bytes, cr8: bytes) -> None:
        """Set special registers and events at the next entry."""
        self.page[_SYNC_SREGS : _SYNC_SREGS + len(state)] = state
        self.page[_CR8 : _CR8 + 8] = cr8  # which each entry takes from here, over what was set before
        self.page[_DIRTY_REGS] |= _SREGS_EVENTS

    def sregs(self) -> kvm_abi.kvm_sregs:
        """Return the special registers."""
        if self.page[_DIRTY_REGS] & _SREGS_EVENTS:
            self._set_state()
        return self.vcpu.get_sregs()

    def _set_state(self) -> None:
        """Set the special registers and events that wait in the kvm_run page for the next entry."""
        events = self.page[_SYNC_EVENTS : _SYNC_EVENTS + ctypes.sizeof(kvm_abi.kvm_vcpu_events)]
        self.vcpu.set_vcpu_events(kvm_abi.kvm_vcpu_events.from_buffer_copy(events))
        self.vcpu.set_sregs(kvm_abi.kvm_sregs.from_buffer_copy(self.page[_SYNC_SREGS:_SYNC_EVENTS]))
        self.page[_DIRTY_REGS] &= _REGS  # last: what is interrupted before is done again

    def _exit_is_complete(self) -> bool:
        """Whether the last exit left nothing to KVM: the guest halted, or wrote to a port."""
        reason = self.exit_reason[0]
        return self.exit_io[0] & 0xFF == _OUT if reason == _EXIT_IO else reason == KvmExit.HLT

    def _complete_exit(self) -> None:
        """Let KVM finish the guest's access that the last exit was about.

        It would do so at the next entry, over the registers that were set since (api.rst, KVM_RUN): a read of
        unmapped memory writes its register and moves RIP. An access may take several exits, of 8 bytes each.
        """
        self.page[_IMMEDIATE_EXIT] = 1
        try:
            for _ in range(_MAX_EXITS_OF_AN_ACCESS):
                if self.vcpu.run():
                    break
        finally:
            self.page[_IMMEDIATE_EXIT] = 0

    def reset_fpu(self) -> None:
        """Put x87 and SSE registers back, as at each call (abi.md 6.4)."""
        self.vcpu.set_fpu(_INITIAL_FPU)


def _state_of(sregs: kvm_abi.kvm_sregs) -> bytes:
    """Return *sregs* as the kvm_run page has them, and no exception on its way into the guest."""
    return bytes(sregs) + bytes(kvm_abi.kvm_vcpu_events())


def _cr8_of(sregs: kvm_abi.kvm_sregs) -> bytes:
    return int(sregs.cr8).to_bytes(8, "little")


_EXIT_REASON = kvm_abi.kvm_run.exit_reason.offset
_DIRTY_REGS = kvm_abi.kvm_run.kvm_dirty_regs.offset
_CR8 = kvm_abi.kvm_run.cr8.offset
_REGS = int(kvm_abi.SyncRegs.REGS)
_SREGS_EVENTS = int(kvm_abi.SyncRegs.SREGS | kvm_abi.SyncRegs.EVENTS)
_SYNC_REGS = kvm_abi.kvm_run.s.offset
_SYNC_SREGS = _SYNC_REGS + kvm_abi.kvm_sync_regs.sregs.offset
_SYNC_EVENTS = _SYNC_REGS + kvm_abi.kvm_sync_regs.events.offset

_NO_REGISTERS = {name: 0 for name, *_ in kvm_abi.kvm_regs._fields_}
_REGISTERS = struct.Struct(f"<{len(_NO_REGISTERS)}Q")
"""kvm_regs."""


def _named(registers: bytes) -> dict[str, int]:
    return dict(zip(_NO_REGISTERS, _REGISTERS.unpack(registers), strict=True))


_MAX_EXITS_OF_AN_ACCESS = 16

_INITIAL_FPU = kvm_abi.kvm_fpu(fcw=0x37F, mxcsr=0x1F80)


def _uninterrupted(create: Callable[[], _Made]) -> _Made:
    """Call *create* again for as long as a signal, such as one meant for a guest, interrupts it."""
    while True:
        try:
            return create()
        except kvm_abi.KvmError as error:
            if error.errno != errno.EINTR:
                raise


_Made = TypeVar("_Made")


def _initial_xsave() -> kvm_abi.kvm_xsave:
    """Return the state of x87, SSE, AVX and all the rest as after a reset (abi.md 6.5)."""
    xsave = kvm_abi.kvm_xsave()
    xsave.region[0] = 0x37F
    xsave.region[6] = 0x1F80
    xsave.region[128] = 0b11  # XSTATE_BV: x87 and SSE hold the values above
    return xsave


def _initial_sregs(cr3: int) -> kvm_abi.kvm_sregs:
    """Return long mode at CPL 0 with paging on and no descriptor tables (abi.md 6.2)."""
    sregs = kvm_abi.kvm_sregs.from_buffer_copy(_long_mode())
    sregs.cr3 = cr3
    return sregs


@functools.cache
def _long_mode() -> kvm_abi.kvm_sregs:
    sregs = kvm_abi.kvm_sregs()
    sregs.cs.type, sregs.cs.s, sregs.cs.present, sregs.cs.l = 0xB, 1, 1, 1
    sregs.tr.limit, sregs.tr.type, sregs.tr.present = 0xFFFF, 0xB, 1
    sregs.cr0 = Cr0.PE | Cr0.MP | Cr0.ET | Cr0.NE | Cr0.WP | Cr0.AM | Cr0.PG
    sregs.cr4 = Cr4.PAE | Cr4.OSFXSR | Cr4.OSXMMEXCPT
    sregs.efer = Efer.SCE | Efer.LME | Efer.LMA | Efer.NX
    return sregs


@functools.cache
def _guest_cpuid() -> kvm_abi.kvm_cpuid2:
    """Return KVM's CPUID with 36 physical address bits: otherwise PTEs into scratch may fault (abi.md 6.1).

    Asked once for the process: it costs as much as creating a vCPU.
    """
    with _open_kvm() as kvm:
        cpuid = kvm.supported_cpuid()
    for entry in cpuid.entries:
        if entry.function == 0x8000_0008:
            entry.eax = entry.eax & ~0xFF | memory.MAX_GPA.bit_length()
    return cpuid


def _open_kvm() -> kvm_abi.Kvm:
    """Open KVM. Raises ``NoHypervisorFound``, which says what to do."""
    try:
        kvm = kvm_abi.Kvm(KVM_PATH)
    except kvm_abi.KvmError as error:
        raise NoHypervisorFound(_why_no_kvm(error)) from error
    version = kvm.api_version()
    if version != kvm_abi.KVM_API_VERSION or not kvm.check_extension(Cap.USER_MEMORY):
        kvm.close()
        raise NoHypervisorFound(f"{KVM_PATH} speaks version {version} of the KVM API; this host needs 12")
    return kvm


def _why_no_kvm(error: OSError) -> str:
    if os.uname().machine != "x86_64":
        return f"No Hypervisor was found for Sandbox: it runs on x86-64, this machine is {os.uname().machine}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"No Hypervisor was found for Sandbox: {KVM_PATH} may not be opened by you; {_how_to_be_let_in()}"
    if error.errno == errno.ENOENT:
        return (
            f"No Hypervisor was found for Sandbox: {KVM_PATH} does not exist; load the module (modprobe "
            "kvm_intel or kvm_amd), or switch on virtualisation in the firmware (in a VM: nested one)"
        )
    return f"No Hypervisor was found for Sandbox: {error}"


def _how_to_be_let_in() -> str:
    """Say what lets a user open the device: joining its group, if its group may."""
    with contextlib.suppress(OSError, KeyError):
        import grp

        device = os.stat(KVM_PATH)
        if device.st_gid != 0 and device.st_mode & 0o060 == 0o060:
            group = grp.getgrgid(device.st_gid).gr_name
            return f"join the group that may: sudo usermod -aG {group} $USER, and log in again"
    return (
        f"nor by any group: sudo chgrp kvm {KVM_PATH}; sudo chmod 660 {KVM_PATH}; "
        "sudo usermod -aG kvm $USER; log in again"
    )


class _KvmFeatures(typing.NamedTuple):
    """What KVM has that a host can do without."""

    sync_regs: int
    """SyncRegs: the registers that a vCPU takes from its kvm_run page."""
    filters_msrs: bool


@functools.cache
def _kvm_features() -> _KvmFeatures:
    """Ask KVM what it has; once for the process."""
    with _open_kvm() as kvm:
        filters_msrs = bool(kvm.check_extension(Cap.X86_MSR_FILTER) and kvm.check_extension(Cap.X86_USER_SPACE_MSR))
        return _KvmFeatures(kvm.check_extension(Cap.SYNC_REGS), filters_msrs)


@functools.cache
def is_hypervisor_present() -> bool:
    """Whether KVM can be used here; asked once for the process."""
    try:
        _open_kvm().close()
    except NoHypervisorFound:
        return False
    return True


@functools.cache
def cpl0_is_emulated() -> bool:
    """Whether this KVM emulates guest code at CPL 0, so that kernel-mode guests are slow and have no SSE.

    Probed by running one SSE instruction at CPL 0 (spec/kvm-hosts.md 1); asked once for the process.
    """
    xorps_hlt = bytes.fromhex("0f57c0 f4")
    layout = SandboxMemoryLayout(code_size=PAGE_SIZE, heap_size=PAGE_SIZE)
    with contextlib.ExitStack() as undo:
        ram = undo.enter_context(SharedMemory.anonymous(layout.scratch_size))
        base = layout.scratch_base_gpa
        tables = memory.PageTableBuilder(base)
        code_offset = layout.scratch_size - PAGE_SIZE
        tables.map(BASE_ADDRESS, base + code_offset, PAGE_SIZE, writable=False, executable=True)
        ram.write(0, tables.to_bytes())
        ram.write(code_offset, xorps_hlt)
        vm = _VirtualMachine([(base, ram, True)], _initial_sregs(base))
        undo.callback(vm.close)
        vm.load(vm.pack(rip=BASE_ADDRESS, rsp=0))
        return vm.vcpu.run() == 0 and vm.exit_reason[0] == KvmExit.INTERNAL_ERROR


# ======================================================================================
# Core dumps
# ======================================================================================


class CrashDumpError(HyperlightError):
    """A core dump cannot be made; the message says why."""


class CoreSegment(typing.NamedTuple):
    """Guest-virtual memory: ``size`` bytes at ``gva``, which are at ``offset`` of ``mapping``."""

    gva: int
    size: int
    flags: MemoryRegionFlags
    mapping: SharedMemory
    offset: int

    def continues_in(self, other: CoreSegment) -> bool:
        """Whether *other* begins where this one ends, with the same flags."""
        return other == self._replace(gva=self.gva + self.size, offset=self.offset + self.size, size=other.size)


@dataclasses.dataclass(frozen=True)
class CoreDump:
    """A guest at one moment, to be written as an ELF64 core file that gdb reads (abi.md 14).

    ``registers`` are named as in ``REGISTERS``, those left out are 0; ``xsave`` is the XSAVE area, empty for
    none; ``entry`` the gva of the ELF's entry point, from which gdb learns where the guest was loaded;
    ``path`` the guest's file.
    """

    segments: Sequence[CoreSegment]
    registers: Mapping[str, int]
    xsave: bytes = b""
    entry: int = 0
    path: str | None = None

    REGISTERS: ClassVar[tuple[str, ...]] = (
        *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8"),
        *("rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip", "cs", "rflags", "rsp", "ss"),
        *("fs_base", "gs_base", "ds", "es", "fs", "gs"),
    )
    """In the order of NT_PRSTATUS."""

    def save(self, directory: StrPath | None = None) -> str:
        """Write ``hl_core_<local time>.elf`` and return its path; the file is there whole or not at all.

        It goes into *directory*, else ``$HYPERLIGHT_CORE_DUMP_DIR``, else the system's temporary directory,
        which also stands in, with a warning, for one that does not exist. Only its owner may read it. Raises
        ``CrashDumpError``.
        """
        where = _core_dump_directory(directory)
        try:
            with _new_core_file(where) as (file, path):
                self.write(file)
        except OSError as error:
            raise CrashDumpError(f"cannot write a core dump to {where}: {error.strerror}") from error
        _logger.error("Core dump created successfully: %s", path)
        return path

    def write(self, file: typing.BinaryIO) -> None:
        """Write to *file*, empty and open for writing; pages of zeros become holes.

        Raises ``CrashDumpError`` where there is no memory to dump.
        """
        if not self.segments:
            raise CrashDumpError("the guest has no memory to dump: its page tables lead nowhere")
        notes = self._notes()
        notes_offset = _EHDR.size + _PHDR.size * (1 + len(self.segments))
        place = contents = memory.page_up(notes_offset + len(notes))
        headers = [_PHDR.pack(_PT_NOTE, 0, notes_offset, 0, 0, len(notes), len(notes), 1)]
        for segment in self.segments:
            rights = sum(bit for flag, bit in _SEGMENT_RIGHTS if flag in segment.flags)
            size = segment.size
            headers.append(_PHDR.pack(_PT_LOAD, rights, place, segment.gva, 0, size, size, PAGE_SIZE))
            place += size
        file.write(_ehdr(len(headers)) + b"".join(headers) + notes)
        self._write_contents(file, contents)
        file.truncate(place)

    def _write_contents(self, file: typing.BinaryIO, place: int) -> None:
        for segment in self.segments:
            for offset, size in segment.mapping.populated(segment.offset, segment.size):
                file.seek(place + offset - segment.offset)
                file.write(segment.mapping.read(offset, size))
            place += segment.size

    def _notes(self) -> bytes:
        path = b"<unknown>" if self.path is None else os.fsencode(self.path)
        registers = (self.registers.get(name, 0) for name in self.REGISTERS)
        notes = [
            _note(b"CORE", _NT_PRPSINFO, _PRPSINFO.pack(1, os.path.basename(path), path)),
            _note(b"CORE", _NT_PRSTATUS, _PRSTATUS.pack(1, *registers, 1)),
            _note(b"LINUX", _NT_X86_XSTATE, self.xsave) if self.xsave else b"",
            _note(b"CORE", _NT_SIGINFO, bytes(128)),
            _note(b"CORE", _NT_AUXV, _AUXV.pack(_AT_ENTRY, self.entry, _AT_NULL, 0)),
        ]
        return b"".join(notes)


def dump_all_sandboxes(directory: StrPath | None = None) -> list[str]:
    """Write a core dump of every sandbox of this process and return the paths.

    A sandbox that is in use by a thread, or whose dump fails, is logged and left out: nothing is waited for.
    """
    with _live_sandboxes_lock:
        sandboxes = list(_live_sandboxes)
    paths = []
    for sandbox in sandboxes:
        try:
            path = sandbox._dump_unless_busy(directory)
        except HyperlightError as error:
            _logger.warning("%r was not dumped: %s", sandbox, error)
        else:
            paths += [path] if path else []
    return paths


_live_sandboxes: weakref.WeakSet[MultiUseSandbox] = weakref.WeakSet()
_live_sandboxes_lock = threading.RLock()  # a signal's handler may want dumps


def _start_afresh() -> None:
    """After a fork, in the child: what is shared with the parent is let go, and no lock is held."""
    global _live_sandboxes_lock
    _live_sandboxes_lock = threading.RLock()
    metrics._renew_locks()
    for sandbox in list(_live_sandboxes):
        sandbox._disown()


os.register_at_fork(after_in_child=_start_afresh)

_CORE_DUMP_DIR = "HYPERLIGHT_CORE_DUMP_DIR"
_DUMPED_PAGES_PER_GUEST_PAGE = 4
"""A guest can map a page as often as it likes; a dump holds at most this many times the guest's memory."""
_MAX_CORE_SEGMENTS = 0xFFFD  # e_phnum: one for the notes, and 0xFFFF has another meaning

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_PRPSINFO = struct.Struct("<24xI12x16s80s")  # pid, name, command line (elf.h, linux/elfcore.h)
_PRSTATUS = struct.Struct("<32xI76x27QI4x")  # pid, registers, whether there is FPU state
_AUXV = struct.Struct("<4Q")
_ET_CORE, _EM_X86_64, _PT_LOAD, _PT_NOTE, _AT_NULL, _AT_ENTRY = 4, 62, 1, 4, 0, 9
_NT_PRSTATUS, _NT_PRPSINFO, _NT_AUXV, _NT_X86_XSTATE, _NT_SIGINFO = 1, 3, 6, 0x202, 0x53494749
_SEGMENT_RIGHTS = ((MemoryRegionFlags.READ, 4), (MemoryRegionFlags.WRITE, 2), (MemoryRegionFlags.EXECUTE, 1))


def _ehdr(header_count: int) -> bytes:
    ident = b"\x7fELF\x02\x01\x01"  # 64 bits, little-endian, version 1
    sizes = (_EHDR.size, _PHDR.size, header_count, 0, 0, 0)
    return _EHDR.pack(ident, _ET_CORE, _EM_X86_64, 1, 0, _EHDR.size, 0, 0, *sizes)


def _note(name: bytes, kind: int, content: bytes) -> bytes:
    return struct.pack("<III8s", len(name) + 1, len(content), kind, name) + content


# -- where to --


def _core_dump_directory(wanted: StrPath | None) -> str:
    """Return the first of *wanted*, ``$HYPERLIGHT_CORE_DUMP_DIR`` and the temporary directory."""
    import tempfile  # it is seldom needed, and costs as much as half of this module

    directory = os.fspath(wanted or os.environ.get(_CORE_DUMP_DIR) or tempfile.gettempdir())
    if not os.path.isdir(directory):
        _logger.warning("%s is no directory: core dumps go to %s", directory, tempfile.gettempdir())
        return tempfile.gettempdir()
    return directory


def _dumps_by_itself(setting: bool | StrPath | None) -> bool:
    """Whether a failed run is dumped: as *setting* says, or None where the environment names a directory."""
    return bool(os.environ.get(_CORE_DUMP_DIR)) if setting is None else bool(setting)


@contextlib.contextmanager
def _new_core_file(directory: str) -> Iterator[tuple[typing.BinaryIO, str]]:
    """Open a file that gets its name when all went well, and is removed again otherwise."""
    now = datetime.datetime.now()
    for step in itertools.count():  # a name that another dump took: the next millisecond's
        moment = now + datetime.timedelta(milliseconds=step)
        name = f"hl_core_{moment:%Y%m%d_T%H%M%S}.{moment.microsecond // 1000:03}.elf"
        path = os.path.join(directory, name)
        try:
            fd = os.open(path + ".partial", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        with contextlib.ExitStack() as undo:
            undo.callback(_remove_if_there, path + ".partial")  # Ctrl-C may come right after the rename
            with open(fd, "wb") as file:
                if os.path.lexists(path):
                    continue
                yield file, path
            os.rename(path + ".partial", path)
            undo.pop_all()
            return


def _remove_if_there(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


# -- what of --


def _core_segments(physical: memory.GuestMemory, cr3: int) -> list[CoreSegment]:
    """Return what the page tables under *cr3* map of the guest's memory, by ascending gva.

    Tables are a guest's word: what is too much, or makes no sense, ends the list with a warning.
    """
    segments: list[CoreSegment] = []
    budget = _DUMPED_PAGES_PER_GUEST_PAGE * sum(region.size for region in physical.regions()) // PAGE_SIZE
    try:
        for leaf in physical.walk(cr3, skip_large_pages=True):
            parts = list(_backed_parts(leaf, physical))
            budget -= max(1, sum(part.page_count for part in parts))  # what leads nowhere costs time as well
            if budget < 0 or len(segments) >= _MAX_CORE_SEGMENTS:
                _logger.warning("the core dump ends at %#x: the guest maps its memory too often", leaf.gva)
                break
            for part in parts:
                _append_segment(segments, part, physical)
    except memory.PageTableError as error:
        _logger.warning("the core dump is incomplete: %s", error)
    return segments


def _append_segment(segments: list[CoreSegment], part: memory.Leaf, physical: memory.GuestMemory) -> None:
    """Add *part* to the last segment where it continues that, else as one more."""
    resolved = physical.resolve(part.gpa)
    assert resolved is not None  # _backed_parts sees to it
    flags = MemoryRegionFlags.READ
    if part.writable and not part.copy_on_write:
        flags |= MemoryRegionFlags.WRITE
    if part.executable:
        flags |= MemoryRegionFlags.EXECUTE
    added = CoreSegment(part.gva, part.page_count * PAGE_SIZE, flags, *resolved)
    if segments and segments[-1].continues_in(added):
        last = segments.pop()
        added = last._replace(size=last.size + added.size)
    segments.append(added)


def _segment_registers(sregs: kvm_abi.kvm_sregs) -> dict[str, int]:
    selectors = {name: getattr(sregs, name).selector for name in ("cs", "ss", "ds", "es", "fs", "gs")}
    return {**selectors, "fs_base": sregs.fs.base, "gs_base": sregs.gs.base}


_FXSAVE_SIZE = 416
"""Bytes of an FXSAVE image that hold registers; the rest is reserved, or software's."""
_XCR0_OFFSET = 464
"""Where the kernel's own core files, and so gdb, have XCR0 in an XSAVE area (arch/x86/include/asm/user.h)."""
_XSTATE_BV_OFFSET = 512
_X87_AND_SSE = 0b11


def _core_xsave(xsave: bytes, xcr0: int, fxsave: bytes | None) -> bytes:
    """Return the XSAVE area for a dump: its XCR0 filled in, x87 and SSE taken from *fxsave* if given.

    XCR0 names what the guest enabled and what is in use: a KVM may let a guest use more than it enabled.
    """
    area = bytearray(xsave)
    (in_use,) = struct.unpack_from("<Q", area, _XSTATE_BV_OFFSET)
    if fxsave is not None:
        area[:_FXSAVE_SIZE] = fxsave[:_FXSAVE_SIZE]
        in_use |= _X87_AND_SSE
    struct.pack_into("<Q", area, _XSTATE_BV_OFFSET, in_use)
    struct.pack_into("<Q", area, _XCR0_OFFSET, xcr0 | in_use | _X87_AND_SSE)
    return bytes(area)


# ======================================================================================
# Debugging: the guest as gdb_rsp.py sees it
# ======================================================================================


@dataclasses.dataclass(frozen=True)
class DebugInfo:
    """How a debugger reaches a sandbox: ``SandboxConfiguration(guest_debug_info=DebugInfo())``.

    ``listen`` is ``HOST:PORT`` (port 0 takes a free one), ``unix:PATH`` or ``stdio``; there is no
    authentication, so loopback is the default. ``announce`` is called with the actual address. With ``wait``
    the guest does not begin its initialisation before a debugger is there, for ``wait_timeout_s`` seconds
    at most (None: for ever). Spec: rsp.md.
    """

    listen: str = "127.0.0.1:0"
    wait: bool = True
    wait_timeout_s: float | None = None
    announce: Callable[[str], None] | None = None


class DebugServerError(HyperlightError, OSError):
    """The debugger's address cannot be listened on."""


class EndedByDebugger(GuestFailure):
    """The debugger killed the guest."""

    def __init__(self) -> None:
        super().__init__("The debugger ended the guest call.")


class _Debugger:
    """Run control: tells the debug server what the guest's thread does, and does what it answers.

    All KVM ioctls stay on the thread that holds the sandbox; the server's own thread can only
    interrupt it, or take the sandbox's lock while no call is in progress (design.md 5).
    """

    def __init__(self, sandbox: MultiUseSandbox, guest: _Guest, info: DebugInfo) -> None:
        import gdb_rsp

        self._rsp = gdb_rsp
        self._guest = guest
        self._was_asked = False  # the server, in this run
        self.target = _DebugTarget(sandbox, guest)
        if not self.target.hardware_access():
            _logger.warning("this KVM emulates CPL 0: debuggers get no hardware breakpoints and no watchpoints")
        try:
            self.server = gdb_rsp.DebugServer(self.target, info.listen)
        except gdb_rsp.RspError as error:
            code = error.errno if isinstance(error, OSError) else errno.EINVAL
            raise DebugServerError(code, f"no debugger can reach {info.listen}: {error}") from error
        try:
            if info.announce is not None:
                info.announce(self.server.address)
            if info.wait and not self.server.wait_for_client(info.wait_timeout_s):
                _logger.warning("no debugger came to %s: the guest runs without", self.server.address)
        except BaseException:  # Ctrl-C while nobody comes, for example
            self.server.close()
            raise

    # -- what the run loop calls --

    def entered(self) -> None:
        """A run begins: memory and registers are ready."""
        if self.server.is_needed or self.target.is_armed:  # else a call costs what it costs without a debugger
            self._go(self.server.entered)

    def left(self) -> None:
        """The run is over, one way or another."""
        if self._was_asked:
            self._was_asked = False
            self.server.left()
            self.target.leave()

    def interrupted(self) -> bool:
        """KVM_RUN was interrupted: let the debugger speak if it wants to; return whether it did."""
        self._guest.interrupt._acknowledge()
        if not self.server.attention:
            return False
        self.target.lift_traps()
        self._go(self.server.attend)
        return True

    def exited(self) -> bool:
        """KVM left the guest: report it if it is a stop; return whether it was one."""
        self.target.note_exit()
        stop = self.target.stop_of_exit()
        if stop is None:
            return False
        if self.target.looks_for_handlers:
            self.target.prepare(step=False)
        else:
            self._go(functools.partial(self.server.stopped, stop))
        return True

    def served_port(self) -> None:
        """An OUT was served; where a step over it would not be noticed, it is reported here."""
        self.target.note_exit()
        if self.target.steps_end_at_exits:
            self._go(functools.partial(self.server.stopped, self.target.stepped()))

    def crashed(self, failure: GuestFailure) -> bool:
        """Show the guest as it was when it failed, until the debugger lets it go.

        Return whether the debugger has put it back to an earlier state, from which it is to go on.
        """
        stop = self._rsp.Stop(_signal_of(failure))
        self._was_asked = True
        self.target.show_crash(failure)
        action = self._rsp.Resume.STEP
        while self.target.has_crashed and action is self._rsp.Resume.STEP:
            action = self.server.stopped(stop)  # there is no next instruction: the same stop again
        if self.target.has_crashed:
            return False
        self._go(lambda: action)
        return True

    def close(self) -> None:
        """Tell the debugger that the guest is gone, and stop serving."""
        self.server.close()

    def _go(self, ask: Callable[[], gdb_rsp.Resume]) -> None:
        """Arrange for the guest to go on as the debugger wants."""
        self._was_asked = True
        self._guest.interrupt._acknowledge()  # before the server looks: a nudge that comes after must stay
        action = ask()
        if action is self._rsp.Resume.KILL:
            action = self.server.exited(signal=_SIGKILL)  # waits for gdb's "run", if it can come
        if action is self._rsp.Resume.KILL:
            raise EndedByDebugger
        if self._guest.interrupt._canceled:  # while the guest stood still: a restart may have undone the kick
            raise ExecutionCanceledByHost
        self.target.prepare(step=action is self._rsp.Resume.STEP)


def _signal_of(failure: GuestFailure) -> int:
    """Choose the signal that gdb shows for *failure*."""
    if isinstance(failure, GuestAborted):
        if failure.vector is None:
            return _SIGSEGV if failure.code == ErrorCode.MallocFailed else _SIGABRT  # no stack left, mostly
        return _SIGNAL_OF_VECTOR.get(failure.vector, _SIGSEGV)
    return _SIGILL if isinstance(failure, EmulationFailure) else _SIGSEGV


_SIGILL, _SIGTRAP, _SIGABRT, _SIGFPE, _SIGKILL, _SIGBUS, _SIGSEGV = 4, 5, 6, 8, 9, 10, 11  # as gdb counts
_SIGNAL_OF_VECTOR: dict[int, int] = {
    **dict.fromkeys((kvm_abi.Vector.DE, kvm_abi.Vector.MF, kvm_abi.Vector.XM), _SIGFPE),
    **dict.fromkeys((kvm_abi.Vector.DB, kvm_abi.Vector.BP), _SIGTRAP),
    kvm_abi.Vector.UD: _SIGILL,
    kvm_abi.Vector.AC: _SIGBUS,
}


def _refusable(method: Callable[Concatenate[_DebugTarget, _P], _R]) -> Callable[Concatenate[_DebugTarget, _P], _R]:
    """Answer a request of the debugger that KVM or the guest's memory does not allow with an error reply."""

    @functools.wraps(method)
    def checked(self: _DebugTarget, /, *arguments: _P.args, **named: _P.kwargs) -> _R:
        try:
            return method(self, *arguments, **named)
        except (HyperlightError, kvm_abi.KvmError, OverflowError) as error:  # the last: a value too wide for its field
            raise self._rsp.TargetError(str(error), errno.EINVAL) from error

    return checked


class _DebugTarget:
    """The machine under the debugger: its registers, memory and breakpoints (``gdb_rsp.Target``).

    Debug events reach the host in one of two ways. Where KVM reports them, KVM_SET_GUEST_DEBUG does the
    work. Where it emulates CPL 0 (spec/kvm-hosts.md 2.7), an int3 or a trap at CPL 3 goes to the guest's own
    IDT; so while the guest runs, the first byte of those two handlers is an int3 as well, which KVM
    refuses to emulate: that is the stop, and the frame on the stack is the interrupted code. A guest that has
    no handlers yet, at its very beginning, is single-stepped through its CPL 0 until it has.
    """

    def __init__(self, sandbox: MultiUseSandbox, guest: _Guest) -> None:
        import gdb_rsp

        self._rsp = gdb_rsp
        self._sandbox = sandbox
        self._guest = guest
        self._reports_events = not cpl0_is_emulated()
        self._hardware: list[gdb_rsp.HardwareBreakpoint] = []
        self._armed: tuple[Any, ...] = ()
        self._patches: dict[int, tuple[SharedMemory, int, int]] = {}
        self._traps: dict[int, int] = {}
        self._trap_patches: list[int] = []
        self._stepping = False
        self._seeking = False  # steps that nobody asked for, until the guest's handlers are there
        self._trap_flag = False  # RFLAGS.TF is set, by us
        self._crash: GuestFailure | None = None
        self._own_trap: tuple[int, int] | None = None  # the guest's own int3 or #DB that was reported: vector, rip
        self._own_handler: tuple[kvm_abi.kvm_regs, kvm_abi.kvm_sregs] | None = None  # where its own int3 had led
        self._checkpoint: _Checkpoint | None = None
        self._exits: collections.deque[bytes] = collections.deque(maxlen=_NOTED_EXITS)

    @property
    def _vcpu(self) -> kvm_abi.Vcpu:
        """The vCPU, with all registers in it, not some still on the way."""
        self._guest.vm.settle()
        return self._guest.vm.vcpu

    # -- the lock (gdb_rsp.Idle) --

    def try_acquire(self) -> bool:
        """Take the sandbox if no thread uses it."""
        return self._sandbox._try_acquire()

    def release(self) -> None:
        """Give the sandbox back."""
        self._sandbox._give_back()

    def interrupt(self) -> None:
        """Make the guest's thread look at what the debugger wants."""
        try:
            self._guest.interrupt._nudge()
        except HyperlightError as error:  # no signal: then at the guest's next exit
            _logger.warning("a debugger has to wait: %s", error)

    # -- run control, for _Debugger --

    @property
    def is_armed(self) -> bool:
        """Whether `prepare` has something to take back from before."""
        return self._trap_flag or self._armed not in _NOTHING_ARMED

    def prepare(self, *, step: bool) -> None:
        """Arm debug registers, single step and traps for the next entry."""
        self._stepping, self._seeking = step, False
        if self._reports_events or not (step or self._patches or self._trap_flag):
            self._set_guest_debug(step)
            return
        self._enter_own_handler()
        at_cpl3 = self._vcpu.get_sregs().cs.dpl == 3
        self._set_traps()
        if not at_cpl3 and self._vcpu.get_regs().rip in self._trap_patches:
            self.lift_traps()
            self._seeking, self._trap_flag = not step, False  # one step, to where a trap does not stop it at once
            self._set_guest_debug(True)
            return
        is_user_mode = self._guest.snapshot.elf.privilege.user_mode
        self._seeking = is_user_mode and not (at_cpl3 or step or self._traps)
        self._set_guest_debug(not at_cpl3 and (step or self._seeking))
        self._trap_flag = step and at_cpl3
        if at_cpl3:
            self._change_rflags(set_bits=Rflags.TF if step else 0, clear_bits=0 if step else Rflags.TF)

    def leave(self) -> None:
        """Take the traps out: the run is over, and snapshots must not see them."""
        self.lift_traps()
        self._crash = self._own_trap = None
        self._stepping = self._seeking = False

    @property
    def looks_for_handlers(self) -> bool:
        """Whether the last stop is none: a guest without handlers for CPL 3 goes on step by step until it has some."""
        return self._seeking and self._vcpu.kvm_run.exit_reason == KvmExit.DEBUG

    @property
    def steps_end_at_exits(self) -> bool:
        """Whether a step over an OUT ends at its exit: where CPL 0 is emulated, RIP is past it by then."""
        return self._stepping and not self._reports_events

    def stepped(self) -> gdb_rsp.Stop:
        """Return the stop of a step that ended outside the guest."""
        self.lift_traps()
        return self._rsp.Stop(_SIGTRAP, self._rsp.Reason.STEP)

    def stop_of_exit(self) -> gdb_rsp.Stop | None:
        """Return the stop that the last exit is, or None: then it is the run loop's."""
        kvm_run = self._vcpu.kvm_run
        self.lift_traps()
        if kvm_run.exit_reason == KvmExit.DEBUG:
            return self._stop_of_debug_exit(kvm_run.debug.arch)
        if kvm_abi.failed_instruction(kvm_run)[:1] != _INT3:
            return None
        regs = self._vcpu.get_regs()
        vector = {handler: vector for vector, handler in self._traps.items()}.get(regs.rip)
        if vector is not None and (stop := self._leave_handler(vector, regs)) is not None:
            return stop
        return self._rsp.Stop(_SIGTRAP, self._rsp.Reason.BREAKPOINT) if regs.rip in self._patches else None

    def note_exit(self) -> None:
        """Remember the last exit for ``monitor exits``."""
        self._exits.append(bytes(self._guest.vm.page[:_NOTED_SIZE]))

    def show_crash(self, failure: GuestFailure) -> None:
        """Show the registers of the code that failed, not those of the handler that reported it."""
        self._crash = failure
        self.lift_traps()

    @property
    def has_crashed(self) -> bool:
        """Whether a crash is shown, and the debugger has not put the guest back to before it."""
        return self._crash is not None

    def _stop_of_debug_exit(self, arch: Any) -> gdb_rsp.Stop:
        reasons = self._rsp.Reason
        rip = self._vcpu.get_regs().rip
        if arch.exception == kvm_abi.Vector.BP:
            if rip in self._patches:
                return self._rsp.Stop(_SIGTRAP, reasons.BREAKPOINT)
            self._own_trap = arch.exception, rip
            return self._rsp.Stop(_SIGTRAP)
        for slot in range(len(self._hardware)):
            if arch.dr6 >> slot & 1:
                return self._rsp.Stop(_SIGTRAP, reasons.HARDWARE, slot)
        if self._stepping or self._seeking:
            return self._rsp.Stop(_SIGTRAP, reasons.STEP)
        self._own_trap = arch.exception, rip
        return self._rsp.Stop(_SIGTRAP)

    def _set_guest_debug(self, step: bool) -> None:
        control = _REPORT_ALL
        if step:
            control |= kvm_abi.GuestDebug.SINGLESTEP
        if self._own_trap is not None:  # the guest's handler gets it once the debugger has seen it
            control |= self._injection_of(*self._own_trap)
            self._own_trap = None
        wanted = (control, tuple(self._hardware))
        if wanted == self._armed and not step:  # KVM forgets a step when RIP is set
            return
        debug = kvm_abi.kvm_guest_debug(control=control)
        for slot, breakpoint_ in enumerate(self._hardware):
            debug.arch.debugreg[slot] = breakpoint_.address
            debug.arch.debugreg[7] |= self._dr7_of(slot, breakpoint_)
        self._vcpu.set_guest_debug(debug)
        self._armed = wanted

    def _injection_of(self, vector: int, rip: int) -> kvm_abi.GuestDebug:
        """Return the flag that hands a trap to the guest, unless the debugger has sent it elsewhere."""
        flags = kvm_abi.GuestDebug
        if self._vcpu.get_regs().rip != rip:
            return flags(0)
        return flags.INJECT_BP if vector == kvm_abi.Vector.BP else flags.INJECT_DB

    def _dr7_of(self, slot: int, breakpoint_: gdb_rsp.HardwareBreakpoint) -> int:
        """Return DR7's bits for one debug register (AMD64 APM volume 2, 13.1.1.4)."""
        access = self._rsp.Access
        kind = {access.EXECUTE: 0b00, access.WRITE: 0b01, access.ACCESS: 0b11}[breakpoint_.access]
        length = {1: 0b00, 2: 0b01, 8: 0b10, 4: 0b11}[breakpoint_.size]
        return 1 << 2 * slot | (kind | length << 2) << (16 + 4 * slot)

    def _change_rflags(self, *, set_bits: int, clear_bits: int) -> None:
        regs = self._vcpu.get_regs()
        regs.rflags = regs.rflags & ~clear_bits | set_bits
        self._vcpu.set_regs(regs)

    # -- traps in the guest's handlers, where KVM reports nothing --

    def _set_traps(self) -> None:
        self._traps.clear()
        idt = self._vcpu.get_sregs().idt
        for vector in (kvm_abi.Vector.DB, kvm_abi.Vector.BP):
            if idt.limit < vector * _GATE.size + _GATE.size - 1:
                continue
            with contextlib.suppress(HyperlightError, self._rsp.TargetError):
                gate = self._guest.physical.read_virt(self._cr3(), idt.base + vector * _GATE.size, _GATE.size)
                low, _, _, flags, middle, high, _ = _GATE.unpack(gate)
                if flags & _GATE_PRESENT:
                    handler = low | middle << 16 | high << 32
                    if handler not in self._patches:  # else the debugger has a breakpoint there
                        self._patch(handler)
                        self._trap_patches.append(handler)
                    self._traps[vector] = handler

    def lift_traps(self) -> None:
        """Put the handlers' own bytes back; which handlers they were stays known."""
        while self._trap_patches:
            self._unpatch(self._trap_patches.pop())

    def _leave_handler(self, vector: int, regs: kvm_abi.kvm_regs) -> gdb_rsp.Stop | None:
        """Go back from a handler's first instruction to the code that it interrupted.

        None if no CPU has pushed what lies on the stack: the guest has jumped there. And if the debugger has a
        breakpoint there, and none where the handler came from.
        """
        try:
            frame = self._guest.physical.read_virt(self._cr3(), regs.rsp, _INTERRUPT_FRAME.size)
        except HyperlightError:
            return None
        rip, cs, rflags, rsp, ss = _INTERRUPT_FRAME.unpack(frame)
        if cs > 0xFFFF or ss > 0xFFFF:
            return None
        is_step = vector == kvm_abi.Vector.DB
        reason = self._rsp.Reason.STEP if is_step else self._rsp.Reason.OTHER
        if not is_step and rip - 1 in self._patches:
            rip, reason = rip - 1, self._rsp.Reason.BREAKPOINT
        elif regs.rip in self._patches and not (is_step and self._trap_flag):
            return None
        sregs = self._vcpu.get_sregs()
        if reason is self._rsp.Reason.OTHER:
            self._own_trap = vector, rip
            self._own_handler = kvm_abi.kvm_regs.from_buffer_copy(regs), kvm_abi.kvm_sregs.from_buffer_copy(sregs)
        regs.rip, regs.rsp, regs.rflags = rip, rsp, rflags & ~Rflags.TF
        dpl = cs & 3
        sregs.cs = kvm_abi.kvm_segment(
            selector=cs, limit=0xFFFFFFFF, type=0xB, present=1, dpl=dpl, s=1, l=1, g=1
        )
        sregs.ss = kvm_abi.kvm_segment(
            selector=ss, limit=0xFFFFFFFF, type=0x3, present=1, dpl=dpl, s=1, db=1, g=1
        )
        self._vcpu.set_sregs(sregs)
        self._vcpu.set_regs(regs)
        return self._rsp.Stop(_SIGTRAP, reason)

    def _enter_own_handler(self) -> None:
        """Go where the guest's own int3 had led, unless the debugger has sent it elsewhere."""
        trap, handler = self._own_trap, self._own_handler
        self._own_trap = self._own_handler = None
        regs = self._vcpu.get_regs()
        if trap is not None and handler is not None and regs.rip == trap[1]:
            regs.rip, regs.rsp, regs.rflags = handler[0].rip, handler[0].rsp, handler[0].rflags
            self._vcpu.set_sregs(handler[1])
            self._vcpu.set_regs(regs)

    # -- registers (gdb_rsp.Target) --

    @_refusable
    def read_registers(self, names: Sequence[str]) -> Mapping[str, int]:
        """Return the registers named, from the crashed code where the guest has crashed."""
        known: dict[str, int] = {}
        wanted = set(names)
        for group, read in self._register_groups().items():
            if wanted & group:
                known |= read()
        if self._crash is not None and isinstance(self._crash, GuestAborted):
            known |= {_GDB_NAMES.get(name, name): value for name, value in self._crash.registers.items()}
        return {name: known[name] for name in names if name in known}

    @_refusable
    def write_registers(self, values: Mapping[str, int]) -> None:
        """Set the registers named, and leave every other one as it is."""
        self._refuse_after_crash("registers")
        unknown = set(values)
        for group, write in (
            (_GENERAL_NAMES, self._write_general),
            (_SYSTEM_NAMES, self._write_system),
            (_XSAVE_NAMES, self._write_xsave),
            (_DEBUG_NAMES, self._write_debug),
        ):
            if chosen := {name: value for name, value in values.items() if name in group}:
                write(chosen)
                unknown -= set(chosen)
        if unknown:
            raise self._rsp.TargetError(f"{', '.join(sorted(unknown))} cannot be written", errno.EPERM)

    def _register_groups(self) -> dict[frozenset[str], Callable[[], dict[str, int]]]:
        return {
            _GENERAL_NAMES: self._read_general,
            _SYSTEM_NAMES: self._read_system,
            _XSAVE_NAMES: self._read_xsave,
            _DEBUG_NAMES: self._read_debug,
            _MSR_NAMES: self._read_msrs,
        }

    def _read_general(self) -> dict[str, int]:
        self._guest.vm.settle()
        return {_GDB_NAMES.get(name, name): value for name, value in self._guest.vm.registers().items()}

    def _write_general(self, values: Mapping[str, int]) -> None:
        regs = self._vcpu.get_regs()
        for name, value in values.items():
            setattr(regs, _KVM_NAMES.get(name, name), value)
        self._vcpu.set_regs(regs)

    def _read_system(self) -> dict[str, int]:
        sregs = self._vcpu.get_sregs()
        return {name: operator.attrgetter(path)(sregs) for name, path in _SREGS_PATHS.items()}

    def _write_system(self, values: Mapping[str, int]) -> None:
        sregs = self._vcpu.get_sregs()
        for name, value in values.items():
            owner, _, field = _SREGS_PATHS[name].rpartition(".")
            setattr(operator.attrgetter(owner)(sregs) if owner else sregs, field, value)
        self._vcpu.set_sregs(sregs)

    def _read_xsave(self) -> dict[str, int]:
        area = bytes(self._vcpu.get_xsave().region)
        values = {
            name: int.from_bytes(area[offset : offset + size], "little")
            for name, (offset, size) in _XSAVE_FIELDS.items()
        }
        values["ftag"] = _full_tags(area)
        if not self._has_avx():
            values = {name: value for name, value in values.items() if not name.startswith("ymm")}
        return values

    def _write_xsave(self, values: Mapping[str, int]) -> None:
        xsave = self._vcpu.get_xsave()
        area = bytearray(bytes(xsave.region))
        for name, value in values.items():
            if name == "ftag":
                area[4] = sum(1 << index for index in range(8) if value >> 2 * index & 3 != 3)
                continue
            offset, size = _XSAVE_FIELDS[name]
            area[offset : offset + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
        area[_XSTATE_BV] |= 0b011 | (0b100 if any(name.startswith("ymm") for name in values) else 0)
        ctypes.memmove(ctypes.addressof(xsave.region), bytes(area), len(area))
        self._vcpu.set_xsave(xsave)

    def _has_avx(self) -> bool:
        """Whether the guest may use AVX. Not whether it has enabled it: it may do so with the debugger connected."""
        leaf = (entry for entry in _guest_cpuid().entries if entry.function == _XSAVE_LEAF and entry.index == 0)
        return any(entry.eax & 0b100 for entry in leaf)

    def _read_debug(self) -> dict[str, int]:
        registers = self._vcpu.get_debugregs()
        return {
            **{f"dr{index}": registers.db[index] for index in range(4)},
            "dr6": registers.dr6,
            "dr7": registers.dr7,
        }

    def _write_debug(self, values: Mapping[str, int]) -> None:
        registers = self._vcpu.get_debugregs()
        for name, value in values.items():
            if name in ("dr6", "dr7"):
                setattr(registers, name, value)
            else:
                registers.db[int(name[2])] = value
        self._vcpu.set_debugregs(registers)

    def _read_msrs(self) -> dict[str, int]:
        with contextlib.suppress(kvm_abi.KvmError):
            values = self._vcpu.get_msrs(_MSRS.values())
            return {name: values[index] for name, index in _MSRS.items()}
        return {}

    def _refuse_after_crash(self, what: str) -> None:
        if self._crash is not None:
            raise self._rsp.TargetError(f"the guest has crashed: its {what} can only be read", errno.EPERM)

    # -- memory (gdb_rsp.Target, PhysicalMemory) --

    @_refusable
    def read_memory(self, address: int, size: int) -> bytes:
        """Return up to *size* bytes at a gva, at most to the end of its page."""
        mapping, offset, count = self._place(address, size)
        return mapping.read(offset, count)

    @_refusable
    def write_memory(self, address: int, data: bytes) -> None:
        """Write at a gva, whatever the guest's rights; mapped files and regions are refused."""
        self._refuse_after_crash("memory")
        pieces, position = [], 0
        while position < len(data):
            mapping, offset, count = self._place(address + position, len(data) - position, writing=True)
            pieces.append((mapping, offset, data[position : position + count]))
            position += count
        for mapping, offset, piece in pieces:
            mapping.write(offset, piece)

    @_refusable
    def read_physical(self, address: int, size: int) -> bytes:
        """Return up to *size* bytes at a gpa, at most to the end of its region."""
        for region in self._guest.physical.regions():
            if region.gpa <= address < region.end:
                return region.mapping.read(address - region.gpa, min(size, region.end - address))
        raise self._rsp.TargetFault(address, "there is no memory at this guest-physical address")

    @_refusable
    def write_physical(self, address: int, data: bytes) -> None:
        """Write at a gpa."""
        self._refuse_after_crash("memory")
        self._guest.physical.write_phys(address, data)

    def _place(self, gva: int, size: int, *, writing: bool = False) -> tuple[SharedMemory, int, int]:
        """Return where a gva lies, and how many of *size* bytes lie in the same page."""
        gva &= 0xFFFF_FFFF_FFFF_FFFF
        try:
            gpa = self._guest.physical.translate(self._cr3(), gva).gpa
        except HyperlightError as error:
            raise self._rsp.TargetFault(gva, str(error)) from error
        count = min(size, PAGE_SIZE - gva % PAGE_SIZE)
        for region in self._guest.physical.regions():
            if region.gpa <= gpa < region.end:
                if writing and not region.holds_tables:
                    raise self._rsp.TargetFault(gva, "mapped files and regions are read-only")
                return region.mapping, gpa - region.gpa, count
        raise self._rsp.TargetFault(gva, f"gpa {gpa:#x} is not backed by memory")

    def _cr3(self) -> int:
        return int(self._vcpu.get_sregs().cr3)

    # -- breakpoints (gdb_rsp.SoftwareBreakpoints, HardwareBreakpoints) --

    @_refusable
    def insert_breakpoint(self, address: int) -> None:
        """Put an int3 at a gva."""
        self._patch(address)

    def remove_breakpoint(self, address: int) -> None:
        """Put the program's own byte back."""
        self._unpatch(address)

    def _patch(self, address: int) -> None:
        if address not in self._patches:
            mapping, offset, _ = self._place(address, 1, writing=True)
            self._patches[address] = (mapping, offset, mapping.read_u8(offset))
            mapping.write(offset, _INT3)

    def _unpatch(self, address: int) -> None:
        """Undo `_patch` where it was done, and where the guest has copied the page to since."""
        mapping, offset, original = self._patches.pop(address)
        places = [(mapping, offset)]
        with contextlib.suppress(self._rsp.TargetError):
            places.append(self._place(address, 1, writing=True)[:2])
        for place, at in places:
            with contextlib.suppress(HyperlightError):  # the memory may have been replaced since
                if place.read(at, 1) == _INT3:
                    place.write_u8(at, original)

    @contextlib.contextmanager
    def without_breakpoints(self) -> Iterator[None]:
        """Take traps and breakpoints out of guest memory for a while; the breakpoints come back."""
        self.lift_traps()
        addresses = list(self._patches)
        for address in addresses:
            self._unpatch(address)
        try:
            yield
        finally:
            for address in addresses:
                with contextlib.suppress(self._rsp.TargetError):  # the guest has unmapped it
                    self._patch(address)

    def hardware_access(self) -> frozenset[gdb_rsp.Access]:
        """Return what debug registers can do: nothing where KVM does not report them (spec/kvm-hosts.md 2.7)."""
        return frozenset(self._rsp.Access) if self._reports_events else frozenset()

    def set_hardware_breakpoints(self, breakpoints: Sequence[gdb_rsp.HardwareBreakpoint]) -> None:
        """Arm exactly these from the next entry on."""
        self._hardware = list(breakpoints)

    # -- what the guest is (gdb_rsp.ExecFile, LoadAddress, Auxv, ThreadInfo, Restart, Monitor) --

    def exec_file(self) -> tuple[str, bytes]:
        """Return the guest's ELF file, for gdb to fetch symbols from."""
        elf = self._guest.snapshot.elf
        return elf.path or "/guest", elf.data

    def load_address(self) -> int:
        """Return where the image lies (gva)."""
        return BASE_ADDRESS

    def auxv(self) -> Sequence[tuple[int, int]]:
        """Return what a kernel would tell the program: AT_PAGESZ and AT_ENTRY (elf.h)."""
        return [(6, PAGE_SIZE), (9, BASE_ADDRESS + self._guest.snapshot.elf.entry)]

    def thread_info(self) -> str:
        """Say what the vCPU is doing."""
        return f"vcpu 0, {self._guest.activity}"

    @_refusable
    def restart(self) -> None:
        """Put the guest back to its first snapshot, and its call back to the beginning."""
        self._patches.clear()
        self._traps.clear()
        self._trap_patches.clear()
        self._crash = self._own_trap = None
        self._guest.start_again()

    def monitor_commands(self) -> Mapping[str, gdb_rsp.MonitorCommand]:
        """Return the commands of gdb's ``monitor`` by name."""
        commands: dict[str, tuple[str, Callable[[Sequence[str]], str]]] = {
            "regs": ("general registers", lambda _: _table(self._read_general())),
            "sregs": ("segment, control and descriptor registers", lambda _: _table(self._read_system())),
            "msr": ("INDEX: read a model-specific register", self._monitor_msr),
            "cpuid": ("LEAF: what the guest's CPUID says", self._monitor_cpuid),
            "pt": ("GVA: how an address is translated", self._monitor_pt),
            "layout": ("where everything lies in guest memory", lambda _: self._monitor_layout()),
            "exits": (f"the last {_NOTED_EXITS} exits from the guest, the latest last", self._monitor_exits),
            "snapshot": ("keep memory and registers as they are now", self._monitor_snapshot),
            "restore": ("go back to what 'snapshot' has kept", self._monitor_restore),
        }
        return {
            name: self._rsp.MonitorCommand(text, functools.partial(self._monitor, run))
            for name, (text, run) in commands.items()
        }

    @_refusable
    def _monitor(self, run: Callable[[Sequence[str]], str], arguments: Sequence[str]) -> str:
        return run(arguments)

    def _monitor_msr(self, arguments: Sequence[str]) -> str:
        index = _number_argument(arguments, self._rsp.TargetError)
        try:
            return f"{index:#x} = {self._vcpu.get_msrs([index])[index]:#x}"
        except (kvm_abi.KvmError, OverflowError) as error:
            raise self._rsp.TargetError(f"MSR {index:#x} cannot be read: {error}") from error

    def _monitor_cpuid(self, arguments: Sequence[str]) -> str:
        leaf = _number_argument(arguments, self._rsp.TargetError)
        rows = [
            f"{entry.function:#010x}.{entry.index}: eax {entry.eax:08x} ebx {entry.ebx:08x} "
            f"ecx {entry.ecx:08x} edx {entry.edx:08x}"
            for entry in _guest_cpuid().entries
            if entry.function == leaf
        ]
        return "\n".join(rows) or f"there is no CPUID leaf {leaf:#x}"

    def _monitor_pt(self, arguments: Sequence[str]) -> str:
        gva = _number_argument(arguments, self._rsp.TargetError)
        try:
            found = self._guest.physical.translate(self._cr3(), gva)
        except memory.TranslationFault as fault:
            return str(fault)
        rights = "".join(
            letter if is_set else "-"
            for letter, is_set in zip(
                "WXUC", (found.writable, found.executable, found.user, found.copy_on_write), strict=True
            )
        )
        return f"gva {gva:#x} -> gpa {found.gpa:#x}, page of {found.page_size:#x} bytes, R{rights}"

    def _monitor_exits(self, _arguments: Sequence[str]) -> str:
        size = ctypes.sizeof(kvm_abi.kvm_run)
        runs = (kvm_abi.kvm_run.from_buffer_copy(noted.ljust(size, b"\0")) for noted in self._exits)
        return "\n".join(map(kvm_abi.describe_exit, runs)) or "none yet"

    def _monitor_snapshot(self, _arguments: Sequence[str]) -> str:
        self._refuse_after_crash("state")
        self._checkpoint = _Checkpoint(self._guest)
        return "kept"

    def _monitor_restore(self, _arguments: Sequence[str]) -> str:
        if self._checkpoint is None:
            raise self._rsp.TargetError("nothing has been kept: 'monitor snapshot' does that")
        self._checkpoint.restore()
        self._crash = self._own_trap = None
        return "restored; now tell gdb: maintenance flush register-cache"

    def _monitor_layout(self) -> str:
        layout = self._guest.snapshot.layout
        rows = [f"{region.gpa:#18x} {region.size:#10x} {region.name} {region.flags}" for region in layout.regions()]
        scratch = f"{layout.scratch_base_gva:#18x} {layout.scratch_size:#10x} scratch"
        rows.append(f"{scratch}, gpa {layout.scratch_base_gpa:#x}")
        return "\n".join(rows)


class _Checkpoint:
    """A guest as it stood at one moment, also within a call: what `monitor snapshot` keeps.

    A `Snapshot` is of a guest at rest, fit for any sandbox; this is of one call, of one VM, for one debugger.
    """

    def __init__(self, guest: _Guest) -> None:
        vcpu = guest.vm.vcpu
        guest.vm.settle()
        guest.vm._complete_exit()
        self._guest = guest
        self._call, self._ram, self._abort_bytes = guest._begin_again, guest._ram, bytes(guest._abort_bytes)
        self._pages = [
            (mapping, [(offset, mapping.read(offset, size)) for offset, size in mapping.populated(0, mapping.size)])
            for mapping in (guest._ram.image, guest._ram.scratch)
        ]
        self._events, self._xcrs, self._xsave = vcpu.get_vcpu_events(), vcpu.get_xcrs(), vcpu.get_xsave()
        self._debugregs, self._sregs, self._regs = vcpu.get_debugregs(), vcpu.get_sregs(), vcpu.get_regs()

    def restore(self) -> None:
        """Put memory and registers back; refuse where the call is another, or a restore has replaced the memory."""
        guest, vm = self._guest, self._guest.vm
        if guest._begin_again is not self._call or guest._ram is not self._ram:
            raise HyperlightError("what was kept is of another call, or of a time before a restore")
        guest._abort_bytes[:], guest._fault = self._abort_bytes, None
        guest._ram.discard()
        for mapping, runs in self._pages:
            for offset, content in runs:
                if mapping.read(offset, len(content)) != content:
                    mapping.write(offset, content)
        vm.settle()
        vm._complete_exit()
        vm.vcpu.set_vcpu_events(self._events)
        vm.vcpu.set_xcrs(self._xcrs)
        vm.vcpu.set_xsave(self._xsave)
        vm.vcpu.set_debugregs(self._debugregs)
        vm.load_sregs(self._sregs)
        vm.vcpu.set_regs(self._regs)


def _table(values: Mapping[str, int]) -> str:
    return "\n".join(f"{name:12} {value:#x}" for name, value in values.items())


def _number_argument(arguments: Sequence[str], error: type[Exception]) -> int:
    try:
        (text, *_) = arguments
        return int(text, 0) & 0xFFFF_FFFF_FFFF_FFFF
    except ValueError:
        raise error("one number is needed, such as 0x10") from None


_INT3 = b"\xcc"
_REPORT_ALL = kvm_abi.GuestDebug.ENABLE | kvm_abi.GuestDebug.USE_SW_BP | kvm_abi.GuestDebug.USE_HW_BP
_NOTHING_ARMED: tuple[Any, ...] = ((), (_REPORT_ALL, ()))
_NOTED_EXITS = 32
_NOTED_SIZE = kvm_abi.kvm_run.kvm_valid_regs.offset  # of kvm_run: all that describes an exit
_GATE = struct.Struct("<HHBBHII")
"""An IDT gate: offset, selector, IST, flags, two more pieces of the offset (AMD64 APM volume 2, 4.8.4)."""
_GATE_PRESENT = 0x80
_INTERRUPT_FRAME = struct.Struct("<5Q")
"""What the CPU pushes for a vector without error code: rip, cs, rflags, rsp, ss."""

_GDB_NAMES = {"rflags": "eflags"}
_KVM_NAMES = {"eflags": "rflags"}
_GENERAL_NAMES = frozenset(_GDB_NAMES.get(name, name) for name, *_ in kvm_abi.kvm_regs._fields_)

_SREGS_PATHS = {
    **{name: f"{name}.selector" for name in ("cs", "ss", "ds", "es", "fs", "gs", "tr")},
    **{name: name for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")},
    "ldtr": "ldt.selector",
    "fs_base": "fs.base",
    "gs_base": "gs.base",
    "gdtr_base": "gdt.base",
    "gdtr_limit": "gdt.limit",
    "idtr_base": "idt.base",
    "idtr_limit": "idt.limit",
}
"""Where kvm_sregs has the system registers."""
_SYSTEM_NAMES = frozenset(_SREGS_PATHS)

_XSAVE_FIELDS = {
    "fctrl": (0, 2), "fstat": (2, 2), "fop": (6, 2), "fioff": (8, 4), "fiseg": (12, 2),
    "fooff": (16, 4), "foseg": (20, 2), "mxcsr": (24, 4),
    **{f"st{index}": (32 + 16 * index, 10) for index in range(8)},
    **{f"xmm{index}": (160 + 16 * index, 16) for index in range(16)},
    **{f"ymm{index}h": (576 + 16 * index, 16) for index in range(16)},
}  # fmt: skip
"""(offset, size) in the XSAVE area, standard format (AMD64 APM volume 2, 11.5)."""
_XSAVE_NAMES = frozenset({*_XSAVE_FIELDS, "ftag"})
_XSTATE_BV = 512
_XSAVE_LEAF = 0xD  # of CPUID: eax has XCR0's bits (AMD64 APM volume 3, E.3.8)

_DEBUG_NAMES = frozenset({"dr0", "dr1", "dr2", "dr3", "dr6", "dr7"})
_MSRS = {
    "msr_star": kvm_abi.Msr.STAR,
    "msr_lstar": kvm_abi.Msr.LSTAR,
    "msr_pat": kvm_abi.Msr.IA32_CR_PAT,
    "msr_apic_base": kvm_abi.Msr.IA32_APICBASE,
}
_MSR_NAMES = frozenset(_MSRS)


def _full_tags(area: bytes) -> int:
    """Expand FXSAVE's tag byte to x87's tag word: 0 valid, 1 zero, 2 special, 3 empty for each register."""
    top = area[3] >> 3 & 7  # FSW.TOP: st0 is this physical register
    tags = 0
    for physical in range(8):
        tag = 3
        if area[4] >> physical & 1:
            stack_index = (physical - top) % 8
            tag = _x87_class(area[32 + 16 * stack_index : 42 + 16 * stack_index])
        tags |= tag << 2 * physical
    return tags


def _x87_class(value: bytes) -> int:
    mantissa = int.from_bytes(value[:8], "little")
    exponent = int.from_bytes(value[8:], "little") & 0x7FFF
    if exponent == 0 and mantissa == 0:
        return 1
    return 0 if 0 < exponent < 0x7FFF and mantissa >> 63 else 2


# ======================================================================================
# Benchmarks: `hyperlight bench`; tests/bench has more of them, and the floor to compare with
# ======================================================================================


Sampler = Callable[[int], "list[int]"]
"""Takes so many samples and returns the time of each in nanoseconds."""


class Timing(typing.NamedTuple):
    """What came out of a benchmark, in nanoseconds."""

    median_ns: float
    p95_ns: float
    spread: float
    """The distance between the quartiles, as a part of the median."""
    samples: int

    @classmethod
    def of(cls, times_ns: Sequence[int]) -> Timing:
        """Sum up the *times_ns*, at least one, of single samples."""
        ordered = sorted(times_ns)
        first, median, third, p95 = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75, 0.95))
        return cls(median, p95, (third - first) / max(median, 1), len(ordered))


def timed(
    action: Callable[[], Any], *, before: Callable[[], Any] | None = None, after: Callable[[Any], Any] | None = None
) -> Sampler:
    """Return a sampler of *action*. Untimed are *before*, and *after*, which gets what the action returned.

    *after* is called when all samples have been taken: closing a VM keeps the kernel busy beyond its end.
    """

    def sample(count: int) -> list[int]:
        times, results = [], []
        for _ in range(count):
            if before is not None:
                before()
            begin = time.perf_counter_ns()
            result = action()
            times.append(time.perf_counter_ns() - begin)
            if after is not None:
                results.append(result)
        if after is not None:
            for result in results:
                after(result)
        return times

    return sample


def measure(samplers: Mapping[str, Sampler], seconds: float = 5.0, warm_up_s: float = 3.0) -> dict[str, Timing]:
    """Take samples of all *samplers* in turns for so many seconds each, after a warm-up, and sum them up.

    In turns, because whatever else the machine does then hits all of them. Cyclic garbage is collected between
    turns, never during a sample.
    """
    import gc

    counts = {name: _samples_per_turn(sampler, warm_up_s) for name, sampler in samplers.items()}
    times: dict[str, list[int]] = {name: [] for name in samplers}
    spent = dict.fromkeys(samplers, 0.0)
    while unfinished := [name for name in samplers if spent[name] < seconds]:
        for name in unfinished:
            gc.collect()
            gc.disable()
            begin = time.perf_counter()
            try:
                times[name] += samplers[name](counts[name])
            finally:
                gc.enable()
            spent[name] += time.perf_counter() - begin
    return {name: Timing.of(each) for name, each in times.items()}


_TURN_S = 0.05
_MAX_SAMPLES_PER_TURN = 1000


def _samples_per_turn(sampler: Sampler, warm_up_s: float) -> int:
    """Warm *sampler* up and return how many samples take one turn."""
    count, begin = 0, time.perf_counter()
    while not count or time.perf_counter() - begin < warm_up_s:
        sampler(1)
        count += 1
    return min(max(1, int(count * _TURN_S / (time.perf_counter() - begin))), _MAX_SAMPLES_PER_TURN)


@contextlib.contextmanager
def _benchmark_sandbox(config: SandboxConfiguration) -> Iterator[MultiUseSandbox]:
    """Boot the guest of the benchmarks."""
    with UninitializedSandbox("simpleguest", config) as uninitialized:
        uninitialized.register("HostAdd", lambda left, right: left + right, (Int, Int), Int)
        with uninitialized.evolve() as sandbox:
            yield sandbox


@contextlib.contextmanager
def _bench_call(config: SandboxConfiguration) -> Iterator[Sampler]:
    with _benchmark_sandbox(config) as sandbox:
        yield timed(lambda: sandbox.call("Echo", "hello\n", returns=str))


@contextlib.contextmanager
def _bench_call_with_restore(config: SandboxConfiguration) -> Iterator[Sampler]:
    with _benchmark_sandbox(config) as sandbox:
        snapshot = sandbox.snapshot()

        def call_and_restore() -> None:
            sandbox.call("Echo", "hello\n", returns=str)
            sandbox.restore(snapshot)

        yield timed(call_and_restore)


@contextlib.contextmanager
def _bench_call_with_host_function(config: SandboxConfiguration) -> Iterator[Sampler]:
    with _benchmark_sandbox(config) as sandbox:
        yield timed(lambda: sandbox.call("Add", 1, 41, returns=Int))


@contextlib.contextmanager
def _bench_create_initialized(config: SandboxConfiguration) -> Iterator[Sampler]:
    yield timed(lambda: UninitializedSandbox("simpleguest", config).evolve(), after=MultiUseSandbox.close)


@contextlib.contextmanager
def _bench_sandbox_from_snapshot(config: SandboxConfiguration) -> Iterator[Sampler]:
    with _benchmark_sandbox(config) as sandbox:
        snapshot, functions = sandbox.snapshot(), sandbox._functions
        yield timed(
            lambda: MultiUseSandbox.from_snapshot(snapshot, functions, config), after=MultiUseSandbox.close
        )


@contextlib.contextmanager
def _bench_interrupt_latency(config: SandboxConfiguration) -> Iterator[Sampler]:
    """From just before ``kill()`` in one thread to the end of the call in another."""
    with _benchmark_sandbox(config) as sandbox:
        snapshot, handle = sandbox.snapshot(), sandbox.interrupt_handle()

        def sample(count: int) -> list[int]:
            return [_interrupt_once(sandbox, handle, snapshot) for _ in range(count)]

        yield sample


def _interrupt_once(sandbox: MultiUseSandbox, handle: InterruptHandle, snapshot: Snapshot) -> int:
    killed_ns = 0
    ended = threading.Lock()
    ended.acquire()

    def kill() -> None:
        nonlocal killed_ns
        while True:
            time.sleep(0.01)  # as in 0.14's benchmark: the guest is well under way
            killed_ns = time.perf_counter_ns()
            if handle.kill():
                ended.acquire()  # without the GIL, as a watchdog waits for its next task: to end a thread takes long
                return

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        sandbox.call("Spin", returns=None)
        raise HyperlightError("a guest that spins returned")
    except ExecutionCanceledByHost:
        ended_ns = time.perf_counter_ns()
    finally:
        ended.release()
        thread.join()
    sandbox.restore(snapshot)
    return ended_ns - killed_ns


BENCHMARKS: Mapping[str, Callable[[SandboxConfiguration], contextlib.AbstractContextManager[Sampler]]] = {
    "guest_calls/call": _bench_call,
    "guest_calls/call_with_restore": _bench_call_with_restore,
    "guest_calls/call_with_host_function": _bench_call_with_host_function,
    "guest_calls/interrupt_latency": _bench_interrupt_latency,
    "sandboxes/create_initialized": _bench_create_initialized,
    "sandboxes/sandbox_from_snapshot": _bench_sandbox_from_snapshot,
}
"""Benchmarks by the names of 0.14's own (spec/performance.md E.3), each a context that yields a sampler."""


def benchmark_table(timings: Mapping[str, Timing], earlier: Mapping[str, Timing] | None = None) -> str:
    """Return a line for each benchmark, with the change against an *earlier* run where that has it."""
    width = max(map(len, timings), default=0)
    lines = [f"{'':{width}}  {'median':>10}  {'p95':>10}  {'spread':>6}  {'samples':>7}"]
    for name, timing in timings.items():
        median, p95 = _readable_time(timing.median_ns), _readable_time(timing.p95_ns)
        line = f"{name:{width}}  {median:>10}  {p95:>10}  {timing.spread:>6.0%}  {timing.samples:>7}"
        if earlier and name in earlier:
            line += f"  {timing.median_ns / max(earlier[name].median_ns, 1) - 1:+.1%}"
        lines.append(line)
    return "\n".join(lines)


def _readable_time(time_ns: float) -> str:
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if time_ns >= size:
            return f"{time_ns / size:.2f} {unit}"
    return f"{time_ns:.0f} ns"


def save_benchmarks(path: StrPath, timings: Mapping[str, Timing]) -> None:
    """Write *timings* as JSON, with what they were measured on."""
    import json

    machine = {
        "machine": " ".join(os.uname()[index] for index in (0, 2, 4)),
        "cpu_count": os.cpu_count(),
        "python": sys.version.split()[0],
        "hyperlight": __version__,
        "cpl0_is_emulated": cpl0_is_emulated(),
    }
    document = {**machine, "benchmarks": {name: each._asdict() for name, each in timings.items()}}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")


def load_benchmarks(path: StrPath) -> dict[str, Timing]:
    """Read what ``save_benchmarks`` wrote. Raises ``HyperlightError`` for a file of anything else, or none."""
    import json

    try:
        with open(path, encoding="utf-8") as file:
            return {name: Timing(**values) for name, values in json.load(file)["benchmarks"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HyperlightError(f"{os.fspath(path)} holds no benchmarks: {error}") from error


# ======================================================================================
# Command line
# ======================================================================================


class _Status(enum.IntEnum):
    """Exit statuses of the command line; ``_STATUS_MEANINGS`` says what they mean."""

    OK = 0
    GUEST_FAILED = 1
    USAGE = 2
    BAD_INPUT = 3
    NO_KVM = 4
    HOST_FAILED = 5
    TIMED_OUT = 124  # as timeout(1)
    INTERRUPTED = 130  # as a shell reports a death by SIGINT
    BROKEN_PIPE = 141  # as a shell reports a death by SIGPIPE


_STATUS_MEANINGS = {
    _Status.OK: "the guest did what it was asked to",
    _Status.GUEST_FAILED: "the guest answered with an error, crashed or does not compile",
    _Status.USAGE: "the command line makes no sense",
    _Status.BAD_INPUT: "a guest file, an argument, a size or another file cannot be used",
    _Status.NO_KVM: "there is no usable KVM on this machine ('hyperlight doctor' says why)",
    _Status.HOST_FAILED: "something else of this machine failed: KVM refused a request, gcc is missing ...",
    _Status.TIMED_OUT: "--timeout ran out and the guest was stopped",
    _Status.INTERRUPTED: "Ctrl-C; the guest was stopped",
    _Status.BROKEN_PIPE: "whoever read the output went away",
}


class _CommandError(HyperlightError):
    """What ends a command: its exit status, one line, and for a crashed guest more lines below it."""

    def __init__(self, status: _Status, headline: str, *details: str) -> None:
        super().__init__(headline)
        self.status = status
        self.details = details


_OUTCOMES: tuple[tuple[type[HyperlightError], _Status, str], ...] = (
    (NoHypervisorFound, _Status.NO_KVM, ""),
    (GuestError, _Status.GUEST_FAILED, ""),
    (GuestFailure, _Status.GUEST_FAILED, ""),
    (memory.InvalidFlatBuffer, _Status.GUEST_FAILED, ""),
    (GuestBinaryNotFound, _Status.BAD_INPUT, "; a guest is a file, or hello or simpleguest, which are included"),
    (memory.ElfError, _Status.BAD_INPUT, ""),
    (LayoutError, _Status.BAD_INPUT, "; change --heap-size, --scratch-size, --input-size or --output-size"),
    (memory.ValueRangeError, _Status.BAD_INPUT, ""),
    (memory.IoStackFull, _Status.BAD_INPUT, "; make room with --input-size"),
    (IoStackError, _Status.GUEST_FAILED, ""),
    (HyperlightError, _Status.HOST_FAILED, ""),
)
"""What an error means for the user: the exit status, and what to add to its text. The first row counts."""


def _outcome_of(error: HyperlightError) -> tuple[_Status, str]:
    return next((status, advice) for kind, status, advice in _OUTCOMES if isinstance(error, kind))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``hyperlight`` command with the arguments *argv*, by default the process's own.

    Returns the exit status, of which ``hyperlight --help`` prints the table. Nothing is raised for bad
    input: it becomes one line on standard error.
    """
    try:
        arguments = _argument_parser().parse_args(argv)
        with _logging_to_stderr(arguments.verbose):
            status = _run_command(arguments)
    except SystemExit as finished:  # how argparse ends after --help, --version and bad usage
        status = int(finished.code or 0)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        return _output_failed(error)
    return status


def _run_command(arguments: argparse.Namespace) -> int:
    """Run the chosen command and turn whatever ends it into an exit status."""
    try:
        return int(arguments.command(arguments))
    except KeyboardInterrupt:
        _complain("interrupted")
        return _Status.INTERRUPTED
    except HyperlightError as error:
        if (failed := _output_error_behind(error)) is not None:
            return _output_failed(failed)
        _logger.debug("where it came from", exc_info=error)
        if isinstance(error, _CommandError):
            _complain(str(error), *error.details)
            return error.status
        status, advice = _outcome_of(error)
        _complain(str(error), advice=advice)
        return status
    except OSError as error:
        return _output_failed(error)


class _OutputError(OSError):
    """Standard output cannot be written."""


def _output_error_behind(error: BaseException | None) -> _OutputError | None:
    """Return the failure of a guest's HostPrint that led to *error*, if that is how it came."""
    while error is not None and not isinstance(error, _OutputError):
        error = error.__cause__
    return error


def _output_failed(error: OSError) -> _Status:
    """Say that standard output cannot be written, unless its reader just went away.

    What is left of the output goes nowhere, or the interpreter would complain at its exit.
    """
    with contextlib.suppress(OSError, ValueError):  # standard output may not be a file at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if error.errno == errno.EPIPE:
        return _Status.BROKEN_PIPE
    _complain(f"the output cannot be written: {error.strerror or error}")
    return _Status.HOST_FAILED


# -- text that leaves ----------------------------------------------------------------------

_MAX_SHOWN = 1000
"""Characters of a line of error text; a guest may have written it."""


def _escaped(text: str) -> str:
    """Return *text* as one line that is harmless on a terminal, whoever wrote it."""
    shown = text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


def _complain(headline: str, *details: str, advice: str = "") -> None:
    """Print the error line, and below it, indented, what a crashed guest said."""
    lines = [f"hyperlight: error: {_escaped(headline)}{advice}", *(f"    {_escaped(line)}" for line in details)]
    print("\n".join(lines), file=sys.stderr)


def _put(output: str | bytes) -> None:
    """Write to standard output: text as UTF-8 whatever the locale, bytes as they are."""
    if sys.stdout is not None:
        data = output if isinstance(output, bytes) else output.encode("utf-8", "backslashreplace")
        try:
            sys.stdout.flush()
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        except OSError as error:
            raise _OutputError(error.errno, error.strerror) from error


@contextlib.contextmanager
def _logging_to_stderr(verbose: bool) -> Iterator[None]:
    """Show what guests log, and if *verbose* what the host does, for the time of a command."""

    class Lines(logging.Formatter):
        def formatMessage(self, record: logging.LogRecord) -> str:
            return _escaped(super().formatMessage(record))

        def formatException(self, *args: Any) -> str:
            return "\n".join(map(_escaped, super().formatException(*args).split("\n")))

    handler = logging.StreamHandler(sys.stderr)
    guest_handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines("[host %(levelname)s] %(message)s"))
    guest_handler.setFormatter(Lines("[guest %(levelname)s %(filename)s:%(lineno)d] %(message)s"))
    chosen = [(_guest_logger, guest_handler, TRACE)]  # the guest itself keeps to its level
    if verbose:
        chosen.append((_logger, handler, logging.DEBUG))
    logging.addLevelName(TRACE, "TRACE")
    with contextlib.ExitStack() as undo:
        for logger, sink, level in chosen:
            undo.callback(logger.setLevel, logger.level)
            undo.callback(logger.removeHandler, sink)
            logger.setLevel(level)
            logger.addHandler(sink)
        yield


# -- run, call ----------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> int:
    """Boot the guest and call its ``Main``, if it has one, with the arguments as strings."""
    try:
        result = _call_guest(arguments, "Main", arguments.arguments)
    except GuestError as error:
        if not _is_unknown(error, "Main"):
            raise
        return _Status.OK
    if isinstance(result, int) and not isinstance(result, bool):
        return result if 0 <= result <= 255 else 255
    _put_result(result)
    return _Status.OK


def _call(arguments: argparse.Namespace) -> int:
    """Boot the guest, call one function and print its result."""
    values = [_argument_value(text) for text in arguments.arguments]
    try:
        _put_result(_call_guest(arguments, arguments.function, values))
    except GuestError as error:
        if not _is_unknown(error, arguments.function):
            raise
        message = f"the guest {arguments.guest} has no function {arguments.function}"
        raise _CommandError(_Status.GUEST_FAILED, message) from error
    return _Status.OK


def _is_unknown(error: GuestError, function: str) -> bool:
    """Whether *error* is the guest's way to say that it has no *function* (abi.md 7.2)."""
    return error.code is ErrorCode.GuestFunctionNotFound and function in error.message


def _gdb(arguments: argparse.Namespace) -> int:
    """Boot the guest under a debugger, call one function and print its result."""
    listen = "stdio" if arguments.stdio else arguments.listen
    with contextlib.ExitStack() as undo:
        if arguments.stdio:  # standard output belongs to the protocol
            undo.enter_context(contextlib.redirect_stdout(sys.stderr))
        announce = functools.partial(_launch_gdb, undo) if arguments.launch else _announce_debugger
        debug_info = DebugInfo(listen, announce=None if arguments.stdio else announce)
        values = [_argument_value(text) for text in arguments.arguments]
        _put_result(_call_guest(arguments, arguments.function, values, debug_info))
    return _Status.OK


def _announce_debugger(address: str) -> None:
    sys.stderr.write(f"The guest waits for a debugger. In another terminal:\n  {' '.join(_gdb_command(address))}\n")
    if cpl0_is_emulated():
        sys.stderr.write("This KVM emulates code at CPL 0: no hardware breakpoints, no watchpoints in hardware.\n")


def _gdb_command(address: str, *, quoted: bool = True) -> list[str]:
    target = f"target extended-remote {address.removeprefix('unix:')}"
    return ["gdb", "-q", "-ex", f"'{target}'" if quoted else target]


def _launch_gdb(undo: contextlib.ExitStack, address: str) -> None:
    """Start gdb in this terminal; *undo* waits for it. Ctrl-C is for gdb alone meanwhile."""
    import subprocess

    try:
        gdb = subprocess.Popen(_gdb_command(address, quoted=False))
    except FileNotFoundError as error:
        raise _CommandError(_Status.HOST_FAILED, "gdb is not installed: apt install gdb") from error
    undo.callback(gdb.wait)


def _call_guest(
    arguments: argparse.Namespace, function: str, values: Sequence[Any], debug_info: DebugInfo | None = None
) -> Any:
    """Boot the guest, call *function* in it and return its result."""
    config = dataclasses.replace(_configuration(arguments), guest_debug_info=debug_info)
    with _trace_to(arguments.trace) as trace:
        config = dataclasses.replace(config, trace=trace)
        return _call_configured(arguments, config, function, values)


@contextlib.contextmanager
def _trace_to(path: str | None) -> Iterator[TraceRecorder | None]:
    """Record what guests do, and write it to the file at *path* in the end, however that comes."""
    recorder = None if path is None else TraceRecorder()
    try:
        yield recorder
    finally:
        if path is not None and recorder is not None:
            try:
                recorder.write_chrome_trace(path)
            except OSError as error:
                raise _CommandError(_Status.BAD_INPUT, f"cannot write the trace {path}: {error.strerror}") from error


def _call_configured(
    arguments: argparse.Namespace, config: SandboxConfiguration, function: str, values: Sequence[Any]
) -> Any:
    with UninitializedSandbox(_environment(arguments), config) as uninitialized:
        elf = uninitialized.snapshot().elf
        uninitialized.register("HostPrint", _print_plainly, (str,), Int)
        uninitialized.register("HostAdd", lambda left, right: left + right, (Int, Int), Int)
        guest = _GuestThread(uninitialized, function, values)
        try:
            guest.start()  # on a busy machine Ctrl-C can come before it returns
            return guest.result(arguments.timeout)
        except TimeoutError:
            place = _place(elf, guest.stop())
            message = f"the guest did not finish within {arguments.timeout:g} s{place}"
            raise _CommandError(_Status.TIMED_OUT, message) from None
        except KeyboardInterrupt:
            place = _place(elf, guest.stop())
            raise _CommandError(_Status.INTERRUPTED, f"interrupted{place}") from None
        except GuestFailure as failure:
            headline, *details = str(failure).rstrip().split("\n")
            if place := _place(elf, _registers_of(failure)):
                details.append(f"stopped{place}")
            if failure.core_dump is not None:
                details.append(f"core dump: {failure.core_dump}")
            raise _CommandError(_Status.GUEST_FAILED, headline, *details) from failure


class _GuestThread(threading.Thread):
    """Boots a guest and makes one call, beside the main thread: Ctrl-C reaches only that one.

    A daemon, so that a guest which cannot be stopped, because it waits for a host function that hangs,
    does not keep the process.
    """

    STOP_GRACE_S = 1.0

    def __init__(self, uninitialized: UninitializedSandbox, function: str, values: Sequence[Any]) -> None:
        super().__init__(name="hyperlight-guest", daemon=True)
        self._uninitialized = uninitialized
        self._function = function
        self._values = values
        self._interrupt = uninitialized.interrupt_handle()
        self._ended = threading.Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Keep the result or the error for ``result()``."""
        try:
            with self._uninitialized.evolve() as sandbox:
                self._call(sandbox)
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()

    def _call(self, sandbox: MultiUseSandbox) -> None:
        """Keep the outcome at once: the end of the VM takes its time on a busy machine."""
        try:
            self._result = sandbox.call(self._function, *self._values)
        except BaseException as error:
            self._error = error

    def result(self, timeout_s: float | None) -> Any:
        """Return the call's result or raise its error. Raises ``TimeoutError`` after *timeout_s*."""
        if not self._ended.wait(timeout_s):
            raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._result

    def stop(self) -> Mapping[str, int]:
        """End the call and return the registers it had; {} where it had ended, or does not end."""
        for _ in range(2):  # the first kill may come just before the call begins
            self._interrupt.kill()
            if self._ended.wait(self.STOP_GRACE_S):
                break
        return _registers_of(self._error)


def _registers_of(error: BaseException | None) -> Mapping[str, int]:
    """Return the registers of a guest's failure, or of the one that caused it."""
    while isinstance(error, GuestFailure) and not error.registers:
        error = error.__cause__
    return error.registers if isinstance(error, GuestFailure) else {}


def _place(elf: GuestElf, registers: Mapping[str, int]) -> str:
    """Say where in the guest's code *registers* are: `` at 0x2041 (spin+0x1)``; nothing where unknown."""
    if "rip" not in registers:
        return ""
    return f" at {_named_address(elf, registers['rip'])}"


def _named_address(elf: GuestElf, gva: int) -> str:
    """Spell a gva, with the function it is in where the guest has symbols."""
    offset = gva - BASE_ADDRESS
    with contextlib.suppress(memory.ElfError):
        for symbol in reversed(elf.symbols()):
            if symbol.offset <= offset < symbol.offset + max(symbol.size, 1):
                return f"{gva:#x} ({symbol.name}+{offset - symbol.offset:#x})"
    return f"{gva:#x}"


def _print_plainly(text: str) -> Int:
    _put(text)
    return Int(len(text.encode()))


def _put_result(result: Any) -> None:
    """Print a result in a line of its own; bytes as they are, or in hex on a terminal; Void not at all."""
    if isinstance(result, bytes):
        _put(result.hex() + "\n" if sys.stdout is not None and sys.stdout.isatty() else result)
    elif isinstance(result, bool):
        _put(f"{result}\n".lower())
    elif result is not None:
        _put(f"{result}\n")


def _environment(arguments: argparse.Namespace) -> GuestEnvironment:
    return GuestEnvironment(
        arguments.guest, _bytes_of_file(arguments.init_data) if arguments.init_data else b""
    )


def _configuration(arguments: argparse.Namespace) -> SandboxConfiguration:
    """Take each setting that the command line gave; options are stored under the settings' names."""
    names = [field.name for field in dataclasses.fields(SandboxConfiguration)]
    names.remove("trace")  # a file's name on the command line
    given = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    return SandboxConfiguration(**given)


# -- arguments as they are typed ----------------------------------------------------------

_INTEGER = r"[+-]?(0[xX][0-9a-fA-F]{1,32}|[0-9]{1,40})"
_REAL = r"[+-]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][+-]?[0-9]+)?"
_BOOLEANS = {"true": True, "false": False}


def _integer(text: str) -> int:
    if not re.fullmatch(_INTEGER, text):
        raise memory.ValueRangeError("it is not a whole number such as 5, -5 or 0x5")
    return int(text, 16 if "x" in text.lower() else 10)


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise memory.ValueRangeError("it is not a number such as 1.5, 1e-3, inf or nan") from None


def _boolean(text: str) -> bool:
    if text not in _BOOLEANS:
        raise memory.ValueRangeError("a Bool is true or false")
    return _BOOLEANS[text]


_TYPED: dict[str, Callable[[str], Any]] = {
    "Int": lambda text: Int(_integer(text)),
    "UInt": lambda text: UInt(_integer(text)),
    "Long": lambda text: Long(_integer(text)),
    "ULong": lambda text: ULong(_integer(text)),
    "Float": lambda text: Float(_real(text)),
    "Double": lambda text: Double(_real(text)),
    "Bool": _boolean,
    "String": str,
    "Bytes": os.fsencode,
}
"""What may stand behind the last colon of an argument."""


def _argument_value(text: str) -> Any:
    """Read an argument as the user typed it. Raises ``_CommandError`` where it does not fit its type."""
    if text.startswith("@@"):
        return text[1:]
    if text.startswith("@"):
        return _bytes_of_file(text[1:])
    literal, _, kind = text.rpartition(":")
    try:
        value = _TYPED[kind](literal) if kind in _TYPED else _untyped(text)
        memory.wire_type_of(value)
        return value
    except memory.ValueRangeError as error:
        raise _CommandError(_Status.BAD_INPUT, f"the argument {text} cannot be sent: {error}") from error


def _untyped(text: str) -> Any:
    if re.fullmatch(_INTEGER, text):
        return _integer(text)
    if re.fullmatch(_REAL, text):
        return float(text)
    return _BOOLEANS.get(text, text)


def _bytes_of_file(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise _CommandError(_Status.BAD_INPUT, f"'{path}' cannot be read: {error.strerror}") from error


_SIZE = r"(?i)(0x[0-9a-f]{1,16}|[0-9]{1,20})(?:([KMG])(?:iB)?)?"
_SIZE_UNITS = {None: 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def _size(text: str) -> int:
    import argparse

    if (match := re.fullmatch(_SIZE, text)) is None:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 64K, 16M, 1G, 20000 or 0x4000")
    number, unit = match.groups()
    return _integer(number) * _SIZE_UNITS[unit and unit.upper()]


def _seconds(text: str) -> float:
    import argparse

    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) <= threading.TIMEOUT_MAX:
            return seconds
    raise argparse.ArgumentTypeError(f"{text} is not a number of seconds greater than 0")


def _readable(size: int) -> str:
    """Spell a size in bytes with the largest unit that is exact: ``128 KiB``."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size and size % unit == 0:
            return f"{size // unit} {name}"
    return f"{size} B"


# -- inspect ------------------------------------------------------------------------------


def _inspect(arguments: argparse.Namespace) -> int:
    """Draw a guest's memory and say what is known about its file; nothing is run in it."""
    config = _configuration(arguments)
    with UninitializedSandbox(_environment(arguments), config) as uninitialized:
        snapshot = uninitialized.snapshot()
        _put("\n".join([*_elf_facts(snapshot.elf), "", *_drawing(snapshot), ""]))
    return _Status.OK


def _elf_facts(elf: GuestElf) -> list[str]:
    functions = len(elf.symbols())
    facts = {
        "file": _escaped(elf.path or "<unknown>"),
        "image": f"{elf.code_size:#x} bytes in {len(elf.segments)} segments, "
        f"entered at {_escaped(_named_address(elf, BASE_ADDRESS + elf.entry))}",
        "symbols": f"{functions} functions" if functions else "none: addresses stay without names",
        "made for": f"Hyperlight {elf.version}" if elf.version else "any Hyperlight: it has no version note",
        "privilege": _privilege_of(elf),
        "runs here": _runs_here(elf),
    }
    return [f"{name:<10} {fact}" for name, fact in facts.items()]


def _privilege_of(elf: GuestElf) -> str:
    if not elf.privilege.user_mode:
        return "kernel mode: all of its code runs at CPL 0"
    size = _readable(elf.privilege.kernel_size)
    return f"user mode: its code runs at CPL 3, but for {size} at {elf.privilege.kernel_offset:#x} of the image"


def _runs_here(elf: GuestElf) -> str:
    try:
        _open_kvm().close()
    except NoHypervisorFound as error:
        return f"no: {error}"
    with _kvm_errors_in_tree():
        emulated = cpl0_is_emulated()
    if emulated and not elf.privilege.user_mode:
        return "yes, slowly and without SSE, AVX and x87: this KVM emulates code at CPL 0"
    return "yes"


class _DrawnRegion(typing.NamedTuple):
    """A line of the drawing; None for an address means that there is none."""

    name: str
    gva: int | None
    gpa: int | None
    size: int
    access: str


def _drawing(snapshot: Snapshot) -> list[str]:
    layout = snapshot.layout
    boxes: tuple[tuple[str, list[_DrawnRegion]], ...] = (
        (f"image: {_readable(layout.snapshot_size)}, KVM slot 0", _image_regions(snapshot)),
        (f"scratch: {_readable(layout.scratch_size)}, KVM slot 1", _scratch_regions(snapshot)),
        ("made by the guest from free pages", _guest_made_regions(snapshot.elf)),
    )
    lines = [f"   {'guest virtual':<18}   {'physical':<11} {'size':>9}  access"]
    for title, regions in boxes:
        lines.append(f"+-- {title} ".ljust(_DRAWING_WIDTH, "-") + "+")
        for name, gva, gpa, size, access in regions:
            virtual = "-" if gva is None else f"{gva:#018x}"
            physical = "-" if gpa is None else f"{gpa:#011x}"
            line = f"|  {virtual:<18}   {physical:<11} {_readable(size):>9}  {access:<9}  {name}"
            lines.append(line.ljust(_DRAWING_WIDTH) + "|")
    lines.append("+".ljust(_DRAWING_WIDTH, "-") + "+")
    who = "the host's kernel" if snapshot.copy_on_write == "host" else "the guest's page-fault handler"
    lines.append(f"R read, W write, X execute, U at CPL 3 too, c copied by {who} at the first write")
    return lines


_DRAWING_WIDTH = 96


def _access(writable: bool, executable: bool, *, user: bool = False, copied: bool = False) -> str:
    return "".join(
        letter if has else "-"
        for letter, has in (("R", True), ("W", writable), ("X", executable), ("U", user), ("c", copied))
    )


def _image_regions(snapshot: Snapshot) -> list[_DrawnRegion]:
    layout, note = snapshot.layout, snapshot.elf.privilege
    names = {region.gpa: _REGION_NAMES[region.name] for region in layout.regions()}
    drawn = [_DrawnRegion("(null pointers fault)", 0, None, BASE_ADDRESS, "-----")]
    for leaf in memory.image_leaves(layout, note):
        access = _access(leaf.writable, leaf.executable, user=leaf.user, copied=leaf.writable)
        name = names.get(leaf.gpa, "code, continued")
        if note.user_mode and leaf.gpa == BASE_ADDRESS + note.kernel_offset and not leaf.user:
            name = "code, kernel part"
        drawn.append(_DrawnRegion(name, leaf.gva, leaf.gpa, leaf.page_count * PAGE_SIZE, access))
    tables_gpa = BASE_ADDRESS + layout.memory_size
    drawn.append(_DrawnRegion("page tables, original", None, tables_gpa, layout.pt_size, "-----"))
    return drawn


_REGION_NAMES = {
    "code": "code and statics",
    "peb": "PEB: where the guest finds the rest",
    "heap": "heap",
    "init_data": "init data",
}


def _scratch_regions(snapshot: Snapshot) -> list[_DrawnRegion]:
    layout = snapshot.layout
    stack_offset = layout.scratch_size - _NEVER_ALLOCATED
    free_offset = layout.page_table_scratch_offset + layout.pt_size
    io = _access(True, False, user=snapshot.elf.privilege.user_mode)
    rows = (
        ("input buffer: calls and host results", 0, layout.input_data_size, io),
        ("output buffer: results and host calls", layout.output_scratch_offset, layout.output_data_size, io),
        ("page tables, live", layout.page_table_scratch_offset, layout.pt_size, _access(True, False)),
        ("free pages", free_offset, stack_offset - free_offset, _access(True, False)),
        ("exception stack, bookkeeping", stack_offset, _NEVER_ALLOCATED, _access(True, False)),
    )
    return [
        _DrawnRegion(name, layout.scratch_base_gva + offset, layout.scratch_base_gpa + offset, size, access)
        for name, offset, size, access in rows
    ]


_NEVER_ALLOCATED = 3 * PAGE_SIZE
"""Bytes at the top of scratch that a guest's allocator does not hand out (abi.md 1.4)."""



def _guest_made_regions(elf: GuestElf) -> list[_DrawnRegion]:
    limit, top = memory.MAIN_STACK_LIMIT_GVA, memory.MAIN_STACK_TOP_GVA
    stack = _access(True, False, user=elf.privilege.user_mode)
    return [
        _DrawnRegion("GDT, TSS, IDT", memory.PROC_CONTROL_GVA, None, 2 * PAGE_SIZE, _access(True, False)),
        _DrawnRegion("main stack, grows down as it is used", limit, None, top - limit, stack),
    ]


# -- doctor -------------------------------------------------------------------------------


def _doctor(arguments: argparse.Namespace) -> int:
    """Find out whether guests can run here, and say for each thing that is missing what to do."""
    import platform

    _put(f"hyperlight {__version__}, Python {platform.python_version()}, {platform.platform()}\n\n")
    status = _Status.OK
    try:
        _examine_kvm()
        _examine_boot()
    except HyperlightError as error:
        _put_check("FAIL", str(error))
        status, _ = _outcome_of(error)
    _put("\n")
    for found, name, purpose, advice in _tools():
        _put_check("ok" if found else "--", f"{name}: {purpose}" + ("" if found else f"; {advice}"))
    verdict = "Guests can run here." if status is _Status.OK else "Guests cannot run here."
    _put(f"\n{verdict}\n")
    return status


def _put_check(mark: str, text: str) -> None:
    _put(f"[{mark:^4}] {_escaped(text)}\n")


def _examine_kvm() -> None:
    """Print what KVM offers. Raises ``NoHypervisorFound``, which says what to do."""
    with _kvm_errors_in_tree(), _open_kvm() as kvm:
        _put_check("ok", f"{KVM_PATH} can be opened and speaks version {kvm.api_version()} of the KVM API")
        for capability, purpose, without in _CAPABILITIES:
            value = kvm.check_extension(capability)
            lack = "" if value else f"; without it {without}"
            mark = "ok" if value else "--"
            _put_check(mark, f"{f'KVM_CAP_{capability.name} = {value}':<30} {purpose}{lack}")
    with _kvm_errors_in_tree():
        emulated = cpl0_is_emulated()
    _put_check(
        "--" if emulated else "ok",
        "code at CPL 0 is emulated: kernel-mode guests are slow and have no SSE, AVX and x87; "
        "prefer user-mode guests"
        if emulated
        else "code at CPL 0 runs natively: every kind of guest is fast",
    )


_CAPABILITIES = (
    (Cap.USER_MEMORY, "guest memory", "nothing works"),
    (Cap.IMMEDIATE_EXIT, "stopping a guest without a race", "a kill may come too early and be lost"),
    (Cap.READONLY_MEM, "mapped files, copy-on-write by the guest", "both fail"),
    (Cap.SYNC_REGS, "registers without ioctls", "each call takes a little longer"),
    (Cap.EXT_CPUID, "the CPUID that a guest sees", "no guest boots"),
    (Cap.XSAVE, "snapshots: vector registers", "restore() fails"),
    (Cap.XCRS, "snapshots: XCR0", "no guest boots"),
    (Cap.DEBUGREGS, "snapshots: debug registers", "restore() fails"),
    (Cap.INTERNAL_ERROR_DATA, "naming an instruction that KVM cannot emulate", "it stays unnamed"),
    (Cap.NR_MEMSLOTS, "mapped regions and files, two less than this", "the number is unknown"),
)
"""The capabilities that this host uses: what for, and what becomes of it without."""

_BOOT_LIMIT_S = 10.0


def _examine_boot() -> None:
    """Boot the guest ``hello`` and print how long it took. Raises ``HyperlightError``."""
    import time

    printed = io.StringIO()
    started = time.perf_counter()
    with UninitializedSandbox("hello") as uninitialized:
        uninitialized.register("HostPrint", printed.write, (str,), Int)
        guest = _GuestThread(uninitialized, "Main", ["doctor"])
        guest.start()
        try:
            guest.result(_BOOT_LIMIT_S)
        except TimeoutError:
            guest.stop()
            raise HyperlightError(f"the guest hello did not finish within {_BOOT_LIMIT_S:g} s") from None
    if (greeting := printed.getvalue().strip()) != "Hello, doctor!":
        raise HyperlightError(f"the guest hello said {greeting!r} instead of 'Hello, doctor!'")
    milliseconds = (time.perf_counter() - started) * 1000
    _put_check("ok", f"the guest hello booted and said {greeting!r} after {milliseconds:.0f} ms")


def _tools() -> Iterator[tuple[bool, str, str, str]]:
    """Yield (found, name, what for, how to get it) for each program that is useful, but not needed."""
    import shutil

    for name, purpose in (("gcc", "'hyperlight build' compiles guests"), ("gdb", "looks into guests")):
        yield shutil.which(name) is not None, name, purpose, f"to have it: apt install {name}"
    found = _installed_musl() is not None
    yield found, "musl", "the C library for guests beyond the SDK's own", "to have it: apt install musl-dev"


# -- bench --------------------------------------------------------------------------------


def _bench(arguments: argparse.Namespace) -> int:
    """Run the benchmarks, one after another, and print a table."""
    earlier = load_benchmarks(arguments.compare) if arguments.compare else None
    config = _configuration(arguments)
    timings: dict[str, Timing] = {}
    for name, benchmark in BENCHMARKS.items():
        with benchmark(config) as sampler:
            timings |= measure({name: sampler}, arguments.seconds, min(0.5, arguments.seconds))
    _put(benchmark_table(timings, earlier) + "\n")
    if arguments.json:
        save_benchmarks(arguments.json, timings)
    return _Status.OK


# -- build --------------------------------------------------------------------------------


def _build(arguments: argparse.Namespace) -> int:
    """Compile C files and link them with the guest SDK."""
    import tempfile

    gcc, output = _Gcc(_sdk_parent(), user_mode=not arguments.kernel), os.path.abspath(arguments.output)
    with tempfile.TemporaryDirectory() as directory:
        objects = []
        for name, flags in _SDK_SOURCES:  # the linker script knows kernel.o by that name
            objects.append(os.path.join(directory, f"{os.path.splitext(name)[0]}.o"))
            gcc.compile(os.path.join(gcc.sdk, name), [*_SDK_FLAGS, *flags], objects[-1])
        for number, source in enumerate(arguments.sources):
            objects.append(os.path.join(directory, f"{number}.guest.o"))
            gcc.compile_guest(source, objects[-1])
        gcc.link(objects, output)
    return _Status.OK


class _Gcc:
    """gcc, run in the SDK's parent directory: debug information does not depend on the user's own."""

    def __init__(self, directory: str, *, user_mode: bool) -> None:
        self.sdk = os.path.join(directory, "sdk")
        self._directory = directory
        self._user_mode = user_mode
        self._common = ("-I", self.sdk, f"-DHL_USER_MODE={int(user_mode)}", f"-ffile-prefix-map={directory}=.")
        self._libraries: list[str] = []
        self._headers: list[str] = []
        if (musl := _installed_musl()) is not None:
            own_headers = os.fsdecode(self._run(["-print-file-name=include"]).stdout).strip()
            self._libraries = [musl.archive]
            self._headers = ["-nostdinc", "-isystem", musl.headers, "-isystem", own_headers]

    def compile(self, source: str, flags: Sequence[str], output: str) -> None:
        """Compile the file *source*, an absolute path. Raises ``_CommandError`` where that fails."""
        self._check(self._try(source, flags, output), f"{source} does not compile")

    def compile_guest(self, source: str, output: str) -> None:
        """Compile a guest's file; for CPL 0 with SSE only where it computes with floating point."""
        _bytes_of_file(source)  # one line instead of gcc's
        flags, restrictions = [*_GUEST_FLAGS, *self._headers], [] if self._user_mode else [*_CPL0_FLAGS]
        integer_only = [] if self._user_mode else [*_INTEGER_ONLY]
        compiled = self._try(os.path.abspath(source), [*flags, *restrictions, *integer_only], output)
        if compiled.returncode and integer_only and b"SSE" in compiled.stderr:
            compiled = self._try(os.path.abspath(source), [*flags, *restrictions], output)
        self._check(compiled, f"{source} does not compile")

    def link(self, objects: Sequence[str], output: str) -> None:
        """Link *objects* to a guest. Raises ``_CommandError`` where that fails."""
        script = f"-Wl,-T,{os.path.join(self.sdk, 'guest.ld')}"
        linked = self._run([*_LINK_FLAGS, script, *objects, *self._libraries, "-o", output])
        hint = "" if self._libraries else "; more of the C library comes with musl: apt install musl-dev"
        self._check(linked, f"{output} cannot be linked", hint)

    def _try(self, source: str, flags: Sequence[str], output: str) -> subprocess.CompletedProcess[bytes]:
        return self._run([*flags, *self._common, "-c", source, "-o", output])

    def _check(self, done: subprocess.CompletedProcess[bytes], failure: str, hint: str = "") -> None:
        """Show what gcc said, and raise ``_CommandError`` if it failed."""
        sys.stderr.write(done.stderr.decode("utf-8", "replace"))
        if done.returncode:
            raise _CommandError(_Status.GUEST_FAILED, f"{failure}: gcc says above why{hint}")

    def _run(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
        import subprocess

        environment = {**os.environ, "LC_ALL": "C"}  # what it says is looked at
        try:
            return subprocess.run(
                ["gcc", *arguments], cwd=self._directory, env=environment, capture_output=True, check=False
            )
        except FileNotFoundError as error:
            message = "gcc is not installed, which compiles guests: apt install gcc"
            raise _CommandError(_Status.HOST_FAILED, message) from error


def _sdk_parent() -> str:
    for directory in map(os.path.dirname, _PREBUILT_GUESTS):
        if os.path.isdir(os.path.join(directory, "sdk")):
            return directory
    raise _CommandError(
        _Status.HOST_FAILED,
        f"the guest SDK is not there: copy the project's directory guests beside {os.path.basename(__file__)}",
    )


class _Musl(typing.NamedTuple):
    """Where a C library for guests may be installed."""

    archive: str
    headers: str


_MUSLS = (
    _Musl("/usr/lib/x86_64-linux-musl/libc.a", "/usr/include/x86_64-linux-musl"),  # Debian
    _Musl("/usr/lib/musl/lib/libc.a", "/usr/lib/musl/include"),
    _Musl("/usr/local/musl/lib/libc.a", "/usr/local/musl/include"),  # its own default
)


def _installed_musl() -> _Musl | None:
    return next((musl for musl in _MUSLS if os.path.isfile(musl.archive)), None)


# fmt: off
_INTEGER_ONLY = ("-mgeneral-regs-only",)
_COMMON_FLAGS = (
    "-std=gnu11", "-O2", "-fPIE", "-fvisibility=hidden", "-fno-stack-protector", "-fcf-protection=none",
    "-fno-asynchronous-unwind-tables", "-fno-unwind-tables", "-fno-ident", "-fno-common", "-U_FORTIFY_SOURCE",
)
_CPL0_FLAGS = (  # exceptions push onto the stack below; some KVMs emulate CPL 0 (spec/kvm-hosts.md 2.6)
    "-mno-red-zone", "-mno-popcnt", "-mno-bmi", "-mno-bmi2", "-mno-lzcnt", "-mno-movbe", "-mno-stv",
    "-fno-tree-vectorize", "-fno-tree-slp-vectorize",
)
_SDK_FLAGS = (*_COMMON_FLAGS, *_CPL0_FLAGS, "-g1", "-ffreestanding", "-fno-tree-loop-distribute-patterns")
_GUEST_FLAGS = (
    *_COMMON_FLAGS, "-g", "-fno-builtin-printf", "-fno-builtin-puts", "-fno-builtin-putchar",
    "-fstack-clash-protection",
)
_SDK_SOURCES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("entry.S", ()),
    ("kernel.c", _INTEGER_ONLY),
    ("runtime.c", _INTEGER_ONLY),
    ("messages.c", _INTEGER_ONLY),
    ("libc.c", _INTEGER_ONLY),
    ("printf.c", ()),
)
_LINK_FLAGS = (
    "-static-pie", "-nostdlib", "-Wl,--no-dynamic-linker", "-Wl,--build-id=none",
    "-Wl,-z,max-page-size=4096", "-Wl,-z,norelro", "-Wl,-z,noexecstack", "-Wl,--hash-style=sysv",
    "-Wl,--compress-debug-sections=zlib",
)
# fmt: on


# -- the commands and their options ---------------------------------------------------------


class _Option(typing.NamedTuple):
    """What ``argparse`` needs to know about an option or argument."""

    names: tuple[str, ...]
    settings: dict[str, Any]


def _option(*names: str, **settings: Any) -> _Option:
    return _Option(names, settings)


class _Command(typing.NamedTuple):
    """A subcommand: its name, what follows it, a line about it, help text, options and function."""

    name: str
    synopsis: str
    summary: str
    explanation: str
    options: tuple[_Option, ...]
    function: Callable[[argparse.Namespace], int]


_GUEST = _option("guest", metavar="GUEST", help="a guest's ELF file, or hello or simpleguest, which are included")

_SIZE_OPTIONS = (
    *(
        _option(option, dest=setting, type=_size, metavar="SIZE", help=text)
        for option, setting, text in (
            ("--input-size", "input_data_size", "buffer for calls and host functions' results (16K)"),
            ("--output-size", "output_data_size", "buffer for results and calls of host functions (16K)"),
            ("--heap-size", "heap_size", "the guest's heap (128K)"),
            ("--scratch-size", "scratch_size", "buffers, page tables, stack (288K); a multiple of 4K"),
        )
    ),
    _option(
        "--copy-on-write", choices=("guest", "host"), help="who copies a page at its first write (host)"
    ),
)
_LAYOUT_OPTIONS = (
    *_SIZE_OPTIONS,
    _option("--init-data", metavar="FILE", help="bytes that the guest finds in its memory"),
)
_VERBOSE = _option("-v", "--verbose", action="store_true", help="show the host's own log and tracebacks")
_RUN_OPTIONS = (
    *_LAYOUT_OPTIONS,
    _option(
        "--log-level",
        dest="guest_log_level",
        type=str.lower,
        choices=(*_GUEST_LOG_LEVELS, *"012345"),
        metavar="LEVEL",
        help="what the guest logs to standard error: off, error, warn, info, debug, trace or 0 to 5 "
        "(what RUST_LOG says, or error)",
    ),
    _option("--timeout", type=_seconds, metavar="SECONDS", help="stop the guest after this long"),
    _option("--trace", metavar="FILE", help="write what the guest did and when, for chrome://tracing or Perfetto"),
    _option(
        "--core-dump",
        dest="guest_core_dump",
        metavar="DIR",
        help="if the guest crashes, leave a core file for gdb there",
    ),
)

_COMMANDS = (
    _Command(
        "run",
        "[options] GUEST [ARG...]",
        "boot a guest and call its Main",
        """\
Boot GUEST in a micro-VM of its own and call its function Main, if it has one, with the
arguments as strings. What the guest prints goes to standard output. If Main returns an
integer, that is the exit status (255 where it is not in 0..255); any other result is printed.

Options come before GUEST: what follows it belongs to the guest.

examples:
  hyperlight run hello World
  hyperlight run --timeout 2.5 --heap-size 16M ./myguest --an-option-of-the-guest
  hyperlight run --log-level debug ./myguest""",
        (*_RUN_OPTIONS, _GUEST, _option("arguments", metavar="ARG", nargs="...", help="strings for Main")),
        _run,
    ),
    _Command(
        "call",
        "[options] GUEST FUNCTION [ARG...]",
        "boot a guest and call one of its functions",
        """\
Boot GUEST in a micro-VM of its own, call FUNCTION and print its result; Void prints nothing,
bytes are written as they are, or in hex to a terminal. HostAdd(Int, Int) is there for guests to call.

How an ARG is typed:
  5 -5 0x5        Int, or Long or ULong where it does not fit
  1.5 1e-3        Double
  true false      Bool
  hello           String; so is everything that is nothing else
  @file  @@hello  the bytes of a file; the String @hello
  5:Long          what stands before the colon, as Int UInt Long ULong Float Double String
                  Bool or Bytes

Options come before GUEST.

examples:
  hyperlight call simpleguest Echo hello
  hyperlight call simpleguest Add 1 41
  hyperlight call --input-size 4M simpleguest EchoBytes @picture.png > copy.png""",
        (
            *_RUN_OPTIONS,
            _GUEST,
            _option("function", metavar="FUNCTION", help="its name, exactly"),
            _option("arguments", metavar="ARG", nargs="...", help="see above"),
        ),
        _call,
    ),
    _Command(
        "gdb",
        "[options] GUEST [FUNCTION [ARG...]]",
        "debug a guest",
        """\
Boot GUEST under a debugger, stopped at its first instruction, and call FUNCTION (Main, if none is
named) once the debugger lets it go on. Prints the gdb command to paste; gdb finds the symbols by
itself. ARGs are typed as for 'call'. Options come before GUEST.

examples:
  hyperlight gdb simpleguest Echo hello
  hyperlight gdb --launch simpleguest Add 1 41
  gdb -ex 'target remote | hyperlight gdb --stdio simpleguest Echo hello'
  hyperlight gdb --listen unix:/tmp/guest.sock simpleguest Echo hello""",
        (
            *_RUN_OPTIONS,
            _option(
                "--listen",
                metavar="ADDRESS",
                default="127.0.0.1:0",
                help="HOST:PORT or unix:PATH; by default a free port on this machine only. Whoever "
                "connects owns the guest",
            ),
            _option("--stdio", action="store_true", help="speak to the debugger over standard input and output"),
            _option("--launch", action="store_true", help="start gdb in this terminal"),
            _GUEST,
            _option("function", metavar="FUNCTION", nargs="?", default="Main", help="what to call"),
            _option("arguments", metavar="ARG", nargs="...", help="its arguments"),
        ),
        _gdb,
    ),
    _Command(
        "inspect",
        "[options] GUEST",
        "draw a guest's memory",
        """\
Say what is known about GUEST's file and draw the memory that it would get with these
options: addresses, sizes and rights. Nothing is run in it, and no KVM is needed.

examples:
  hyperlight inspect hello
  hyperlight inspect --heap-size 1G --copy-on-write guest ./myguest""",
        (*_LAYOUT_OPTIONS, _GUEST),
        _inspect,
    ),
    _Command(
        "doctor",
        "",
        "find out whether guests can run here",
        """\
Look at /dev/kvm, at what it can do, boot a guest, and say what to do about each lack.
The exit status is 0 only if guests can run.

example:
  hyperlight doctor""",
        (),
        _doctor,
    ),
    _Command(
        "bench",
        "[options]",
        "measure calls, restores and creations",
        """\
Measure, on the guest simpleguest, what a call costs, a call and a restore, a call with a host function,
an interrupt, a new sandbox, and a sandbox from a snapshot. Prints median, 95th percentile and the
distance of the quartiles as a part of the median.

examples:
  hyperlight bench
  hyperlight bench --json before.json
  hyperlight bench --compare before.json""",
        (
            *_SIZE_OPTIONS,
            _option("--seconds", type=_seconds, default=1.0, metavar="SECONDS", help="for each benchmark (1)"),
            _option("--json", metavar="FILE", help="write the results there"),
            _option("--compare", metavar="FILE", help="show the change against an earlier --json FILE"),
        ),
        _bench,
    ),
    _Command(
        "build",
        "FILE.c... -o GUEST",
        "compile a guest",
        """\
Compile C files and link them with the guest SDK. gcc is all it takes; functions of the C
library beyond the SDK's own come from musl (apt install musl-dev).

examples:
  hyperlight build hello.c -o hello
  hyperlight build main.c parser.c -o myguest && hyperlight run ./myguest""",
        (
            _option("sources", metavar="FILE.c", nargs="+", help="the guest's source files"),
            _option("-o", "--output", metavar="GUEST", required=True, help="the guest to make"),
            _option(
                "--kernel",
                action="store_true",
                help="all code at CPL 0, as Hyperlight's own guests, instead of the guest's own at CPL 3",
            ),
        ),
        _build,
    ),
)


def _argument_parser() -> argparse.ArgumentParser:
    import argparse

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> typing.NoReturn:
            _complain(f"{message} ('{self.prog} --help' explains)")
            sys.exit(_Status.USAGE)

    meanings = "\n".join(f"  {status:<4} {meaning}" for status, meaning in _STATUS_MEANINGS.items())
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="hyperlight",
        description="Run untrusted code in micro-VMs. Try: hyperlight run hello World",
        epilog=f"'hyperlight COMMAND --help' shows options and examples.\n\nexit status:\n{meanings}",
        formatter_class=layout,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hyperlight {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        subparser = commands.add_parser(
            command.name,
            usage=f"hyperlight {command.name} {command.synopsis}",
            help=command.summary,
            description=command.explanation,
            formatter_class=layout,
            allow_abbrev=False,
        )
        subparser.set_defaults(command=command.function)
        for names, settings in (*command.options, _VERBOSE):
            subparser.add_argument(*names, **settings)
    return parser


if __name__ == "__main__":
    sys.exit(main())
