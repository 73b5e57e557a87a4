"""What lies in the memory of a Hyperlight guest: mappings, layout, page tables, ELF image, messages.

    from memory import GuestElf, SandboxMemoryLayout, SharedMemory, build_page_tables, image_leaves

    elf = GuestElf.parse(open("guest", "rb").read())
    layout = SandboxMemoryLayout(code_size=elf.code_size)
    layout.check()
    tables = build_page_tables(layout, image_leaves(layout))     # bytes, for scratch
    layout = layout.with_pt_size(len(tables))
    with SharedMemory.memfd(layout.snapshot_size) as snapshot:
        snapshot.write(0, elf.load())
        snapshot.write(layout.peb_offset, layout.peb_bytes())
        snapshot.write(layout.memory_size, tables)
        snapshot.seal()

What this is not: it opens no /dev/kvm, runs no guest and knows no registers; `hyperlight.py` does.
Everything but `SharedMemory` is pure: page tables are walked through a callable, so that the walker
serves a live guest, a snapshot file and a property test alike. Bytes that a guest, an ELF file or a
snapshot file supplies are hostile: they can only make a `HyperlightError` come out.

                 guest physical                              guest virtual
    0x10_0000_0000 +-----------------+    0xFFFF_FFFF_FFFF_F000 +------------------+
                   | scratch         | <----------------------- | scratch map      |
    ... - S        +-----------------+    ... - S               +------------------+
                   | hole            |                          | what the guest   |
    0x1000 + N     +-----------------+                          | maps for itself  |
                   | page tables     |    master copy, unmapped |                  |
                   | init data       |                          +------------------+
                   | heap            |                          | init data        |
                   | PEB, one page   | <----------------------- | heap, PEB, code  |
                   | code            |    identity at first     |                  |
    0x1000         +-----------------+    0x1000                +------------------+
                   | nothing         |                          | never mapped     |
    0              +-----------------+    0                     +------------------+

Sources: the Hyperlight 0.14.0 guest ABI (spec/abi.md sections 1 to 5, 9, 10, 16), guest versions
(spec/guest-versions.md), AMD64 Architecture Programmer's Manual volume 2 (chapter 5, page
translation), the ELF-64 object file format, mmap(2), memfd_create(2), fcntl(2).
"""
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
import dataclasses
import errno
import fcntl
import io
import math
import operator
import os
import re
import struct
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from functools import lru_cache, partial
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Final,
    Literal,
    NamedTuple,
    NoReturn,
    SupportsFloat,
    SupportsIndex,
    TypeVar,
)

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Buffer, Self

__version__ = "0.14.0"

__all__ = [
    "BASE_ADDRESS",
    "DEFAULT_HEAP_SIZE",
    "DEFAULT_INPUT_DATA_SIZE",
    "DEFAULT_OUTPUT_DATA_SIZE",
    "DEFAULT_SCRATCH_SIZE",
    "EMPTY_IO_STACK",
    "MAIN_STACK_LIMIT_GVA",
    "MAIN_STACK_TOP_GVA",
    "MAX_GPA",
    "MAX_GVA",
    "MAX_MEMORY_SIZE",
    "MIN_IO_DATA_SIZE",
    "PAGE_SIZE",
    "PEB_SIZE",
    "PROC_CONTROL_GVA",
    "PTE_ACCESSED",
    "PTE_ADDRESS_MASK",
    "PTE_AVL_MASK",
    "PTE_COPY_ON_WRITE",
    "PTE_DIRTY",
    "PTE_LARGE",
    "PTE_NO_EXECUTE",
    "PTE_PRESENT",
    "PTE_USER",
    "PTE_WRITABLE",
    "SCRATCH_TOP_ALLOCATOR",
    "SCRATCH_TOP_GENERATION",
    "SCRATCH_TOP_RNG_SEED",
    "SCRATCH_TOP_SIZE",
    "SCRATCH_TOP_SNAPSHOT_PT_BASE",
    "SNAPSHOT_PT_GVA_MAX",
    "SNAPSHOT_PT_GVA_MIN",
    "SUPPORTED_GUEST_VERSIONS",
    "AdjacentMemories",
    "BoundsCheckFailed",
    "CloseSpan",
    "Double",
    "EditSpan",
    "ElfError",
    "ErrorCode",
    "Float",
    "FunctionCall",
    "FunctionCallType",
    "GuestBinVersionMismatch",
    "GuestElf",
    "GuestErrorResult",
    "GuestLogData",
    "GuestLogLevel",
    "GuestMemory",
    "GuestRegion",
    "GuestStart",
    "HostFunctionDefinition",
    "HyperlightError",
    "Int",
    "InvalidFlatBuffer",
    "IoStack",
    "IoStackError",
    "IoStackFull",
    "KeyValue",
    "LayoutError",
    "Leaf",
    "LogEvent",
    "Long",
    "MemoryRegion",
    "MemoryRegionFlags",
    "MemoryRequestTooBig",
    "MemoryRequestTooSmall",
    "MmapFailed",
    "OpenSpan",
    "PageTableBuilder",
    "PageTableError",
    "ParameterType",
    "PhysicalFault",
    "PrivilegeNote",
    "ReturnType",
    "ReturnValue",
    "SandboxMemoryLayout",
    "Segment",
    "SharedMemory",
    "Symbol",
    "TraceEvent",
    "Translation",
    "TranslationFault",
    "UInt",
    "ULong",
    "ValueRangeError",
    "build_page_tables",
    "count_tables",
    "decode_function_call",
    "decode_function_call_result",
    "decode_guest_log_data",
    "decode_host_function_definition",
    "decode_host_function_details",
    "decode_key_value",
    "decode_trace_batch",
    "encode_function_call",
    "encode_guest_error",
    "encode_guest_log_data",
    "encode_host_function_definition",
    "encode_host_function_details",
    "encode_key_value",
    "encode_return_value",
    "encode_trace_event",
    "exception_stack_top_gva",
    "image_leaves",
    "min_scratch_size",
    "page_up",
    "scratch_base_gpa",
    "scratch_base_gva",
    "spell_parameter",
    "table_index",
    "translate",
    "walk",
    "wire_type_of",
]

# ======================================================================================
# Errors
# ======================================================================================


class HyperlightError(Exception):
    """Root of every error that this project raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes as what it is, not by way of a constructor with other arguments."""
        arguments = self.args
        if isinstance(self, OSError):
            arguments = (self.errno, self.strerror, *([] if self.filename is None else [self.filename]))
        return _rebuilt_error, (type(self), arguments, self.__dict__)


def _rebuilt_error(kind: type[HyperlightError], arguments: tuple[Any, ...], state: dict[str, Any]) -> HyperlightError:
    error = kind.__new__(kind, *arguments)  # an OSError takes them here or below
    base: type[BaseException] = OSError if issubclass(kind, OSError) else Exception
    base.__init__(error, *arguments)
    error.__dict__.update(state)
    return error


class LayoutError(HyperlightError, ValueError):
    """A size or an address that no sandbox can have."""


class MemoryRequestTooBig(LayoutError):
    """A region is larger than the greatest size allowed. Spec: abi.md 2."""

    def __init__(self, requested_size: int, max_size: int) -> None:
        super().__init__(f"Memory requested {requested_size} exceeds maximum size allowed {max_size}")
        self.requested_size = requested_size
        self.max_size = max_size


class MemoryRequestTooSmall(LayoutError):
    """A region is smaller than what must fit in it. Spec: abi.md 2."""

    def __init__(self, requested_size: int, min_size: int) -> None:
        super().__init__(
            f"Memory requested {requested_size} is less than the minimum size allowed {min_size}"
        )
        self.requested_size = requested_size
        self.min_size = min_size


class BoundsCheckFailed(HyperlightError, IndexError):
    """An access of `size` bytes at `offset` leaves a memory of `limit` bytes."""

    def __init__(self, offset: int, size: int, limit: int) -> None:
        super().__init__(f"{size:#x} bytes at offset {offset:#x} are outside a memory of {limit:#x} bytes")
        self.offset = offset
        self.size = size
        self.limit = limit


class MmapFailed(HyperlightError, OSError):
    """The kernel refused a memory mapping; `errno` and `strerror` say why."""


class PhysicalFault(HyperlightError):
    """A guest physical address cannot be accessed by the host."""

    def __init__(self, gpa: int, reason: str) -> None:
        super().__init__(f"guest physical address {gpa:#x} {reason}")
        self.gpa = gpa
        self.reason = reason


class TranslationFault(HyperlightError):
    """A guest virtual address has no translation.

    `level` is that of the entry at fault (4 for the PML4 down to 1, 0 for the page itself);
    `reason` is "not canonical", "not present", "reserved bit" or "outside" (of guest memory).
    """

    def __init__(self, gva: int, level: int, reason: str) -> None:
        super().__init__(f"guest virtual address {gva:#x} is not mapped: {reason} at level {level}")
        self.gva = gva
        self.level = level
        self.reason = reason


class PageTableError(HyperlightError):
    """Page tables that cannot be built, or that no sane guest would have."""


class ElfError(HyperlightError, ValueError):
    """A file is not an ELF file that can run as a guest."""


class GuestBinVersionMismatch(ElfError):
    """The guest was built for a release whose ABI this host does not speak."""

    def __init__(self, guest_bin_version: str, host_version: str = __version__) -> None:
        super().__init__(
            f"Guest binary was built with hyperlight-guest-bin {_printable(guest_bin_version)}, "
            f"but the host is running hyperlight {host_version} "
            f"(it runs guests of {', '.join(SUPPORTED_GUEST_VERSIONS)})"
        )
        self.guest_bin_version = guest_bin_version
        self.host_version = host_version


class IoStackError(HyperlightError):
    """An input or output buffer is corrupt or full. Spec: abi.md 9."""


class IoStackFull(IoStackError):
    """A message is too large for its buffer."""


class InvalidFlatBuffer(HyperlightError, ValueError):
    """Bytes are not the FlatBuffers message that they should be. Spec: abi.md 10."""


class ValueRangeError(HyperlightError, ValueError):
    """A Python value does not fit its wire type."""


def _printable(text: str, limit: int = 60) -> str:
    """Make text from a hostile source safe for a one-line message."""
    return ascii(text[:limit])[1:-1] + ("..." if len(text) > limit else "")


# ======================================================================================
# Addresses and sizes (spec: abi.md 1.1, 1.4, 2; guest-versions.md 5)
# ======================================================================================

PAGE_SIZE: Final = 0x1000
BASE_ADDRESS: Final = 0x1000  # gpa, and at first gva, of the first byte of the snapshot region
MAX_GPA: Final = 0xF_FFFF_FFFF  # last guest physical byte
MAX_GVA: Final = 0xFFFF_FFFF_FFFF_EFFF  # last guest virtual byte; the page above it stays unused
MAX_MEMORY_SIZE: Final = (16 << 30) - BASE_ADDRESS  # bytes; of scratch, and of the low memory

SNAPSHOT_PT_GVA_MIN: Final = 0xFFFF_8000_0000_0000  # window that snapshots skip; both ends inclusive
SNAPSHOT_PT_GVA_MAX: Final = 0xFFFF_80FF_FFFF_FFFF
PROC_CONTROL_GVA: Final = 0xFFFF_FD00_0000_0000  # the guest's GDT, TSS and IDT, two pages
MAIN_STACK_LIMIT_GVA: Final = 0xFFFF_FE00_0000_0000  # lowest byte of the main stack
MAIN_STACK_TOP_GVA: Final = 0xFFFF_FF00_0000_0000  # exclusive

DEFAULT_INPUT_DATA_SIZE: Final = 0x4000  # bytes, like all that follow
DEFAULT_OUTPUT_DATA_SIZE: Final = 0x4000
DEFAULT_HEAP_SIZE: Final = 0x20000
DEFAULT_SCRATCH_SIZE: Final = 0x48000
MIN_IO_DATA_SIZE: Final = 0x2000
PEB_SIZE: Final = 64

# Words at the end of scratch, as distances below its exclusive end.
SCRATCH_TOP_SIZE: Final = 0x08
SCRATCH_TOP_ALLOCATOR: Final = 0x10
SCRATCH_TOP_SNAPSHOT_PT_BASE: Final = 0x18  # nobody reads it
SCRATCH_TOP_GENERATION: Final = 0x20  # from 0.15 on
SCRATCH_TOP_IMAGE_END: Final = 0x20  # this SDK's guests, which are 0.14's: gpa behind the image
SCRATCH_TOP_RNG_SEED: Final = 0x28  # from 0.17 on

SUPPORTED_GUEST_VERSIONS: Final = ("0.14.0", "0.15.0", "0.16.0", "0.17.0")

# TSS, IDT and their tables (2 + 4), the first stack page and its tables (1 + 3), and the top of
# scratch with the exception stack and the words above (2).
_MIN_SCRATCH_PAGES: Final = 12
_PAGE_SHIFT: Final = 12
_U64_MAX: Final = (1 << 64) - 1


def page_up(size: int) -> int:
    """Round a size or an address up to the next multiple of PAGE_SIZE."""
    return (size + PAGE_SIZE - 1) & -PAGE_SIZE


def scratch_base_gpa(scratch_size: int) -> int:
    """Return the gpa of the first byte of a scratch region of `scratch_size` bytes."""
    return MAX_GPA + 1 - scratch_size


def scratch_base_gva(scratch_size: int) -> int:
    """Return the gva of the first byte of a scratch region of `scratch_size` bytes."""
    return MAX_GVA + 1 - scratch_size


def min_scratch_size(input_data_size: int, output_data_size: int) -> int:
    """Return the least scratch size, in bytes, for these buffers, page tables not counted."""
    return page_up(input_data_size + output_data_size) + _MIN_SCRATCH_PAGES * PAGE_SIZE


def exception_stack_top_gva(version: str | None) -> int:
    """Return the exclusive top (gva) of the exception stack of a guest of this version.

    `version` is that of the guest's version note, None where it has none. The first stack pointer
    of a guest lies 8 bytes lower. Spec: guest-versions.md 5 and 7.
    """
    distance = 0x20 if version is None or version == "0.14.0" else 0x30
    return MAX_GVA + 1 - distance


class MemoryRegionFlags(IntFlag):
    """What the guest may do with a region. READ cannot be withheld. Spec: abi.md 1.6."""

    NONE = 0
    READ = 1
    WRITE = 2
    EXECUTE = 4

    def __str__(self) -> str:
        """Return, for example, "READ | EXECUTE"."""
        names = [name for name in ("READ", "WRITE", "EXECUTE") if self & MemoryRegionFlags[name]]
        return " | ".join(names) or "NONE"


# ======================================================================================
# Shared memory: host mappings
# ======================================================================================

# <asm-generic/mman-common.h> and <linux/mman.h>; the mmap module lacks some before Python 3.13.
_PROT_NONE, _PROT_READ, _PROT_WRITE = 0, 1, 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
_MADV_DONTNEED = 4
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

_MAX_MAPPING_SIZE = 1 << 46  # a quarter of what x86-64 Linux gives a process: a slip, not a wish

# The highest byte of an entry of /proc/self/pagemap: bit 63 is "present", bit 62 "swapped"
# (Documentation/admin-guide/mm/pagemap.rst).
_IS_BACKED = bytes(int(top & 0xC0 != 0) for top in range(256))
_IS_CHANGED = bytes(int(top & 0xC0 != 0 and top & 0x20 == 0) for top in range(256))  # bit 61: "a file's page"
_MAX_REVERTED_PAGES = 128
_POPULATED_RUN = re.compile(b"\1{1,256}")

_U8 = struct.Struct("<B")
_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_Result = TypeVar("_Result")


class SharedMemory:
    """One mapping of host memory, with an inaccessible guard page before and after it.

    Creation: `anonymous`, `memfd`, `sealed` or `from_fd`, then `map_private` for further mappings of
    the same file. All sizes are bytes and positive multiples of PAGE_SIZE.

    Offsets count from the first byte. Every access is checked against the bounds first. Reads return
    copies: neither a view nor an address leaves the object, `with_hva` excepted. After `close` every
    access raises HyperlightError. The mapping goes when it is closed or when the last reference to
    the object goes, and nobody holds it (`hold`) any more; then no copy may be under way in another thread.
    `close` itself may be called from several threads.
    """

    __slots__ = (
        "__weakref__", "_address", "_extent", "_file", "_file_offset", "_limit", "_overlays",
        "_shared", "_size", "_view", "_writable", "_write_limit",
    )  # fmt: skip

    def __init__(
        self,
        size: int,
        *,
        file: _File | None = None,
        file_offset: int = 0,
        writable: bool = True,
        shared: bool = False,
        within: tuple[_Extent, int] | None = None,
    ) -> None:
        """Map `size` bytes, `within` reserved addresses at an offset; the named constructors are the public way here.

        Raises:
            LayoutError: the size is not a positive multiple of PAGE_SIZE, or is absurd.
            MmapFailed: the kernel refuses.
        """
        _check_mapping_size(size)
        extent, offset = within or (_Extent(size + 2 * PAGE_SIZE), PAGE_SIZE)
        self._extent: _Extent | None = extent
        self._address = extent.address + offset
        self._size = size
        self._file = file
        self._file_offset = file_offset
        self._writable = writable
        self._shared = shared
        self._overlays: list[tuple[int, int, _File, int]] = []  # begin, end; file and the offset in it
        self._map_between_guards()
        self._view = memoryview((ctypes.c_char * size).from_address(self._address)).cast("B")
        # Both limits drop to -1 at close, so that one comparison per access covers that as well.
        self._limit = size
        self._write_limit = size if writable else -1

    @classmethod
    def anonymous(cls, size: int, *, shared: bool = False) -> SharedMemory:
        """Map zeroed memory that no file backs; `shared` means with forked children."""
        return cls(size, shared=shared)

    @classmethod
    def memfd(cls, size: int, name: str = "hyperlight") -> SharedMemory:
        """Map a new memory file, writable and shared, so that it can be filled and sealed."""
        _check_mapping_size(size)
        file = _File.memory(name)
        try:
            os.ftruncate(file.fd, size)
        except OSError as error:
            raise MmapFailed(error.errno, f"cannot make a memory file of {size} bytes") from error
        return cls(size, file=file, shared=True)

    @classmethod
    def sealed(
        cls, size: int, pieces: Iterable[tuple[int, Buffer]], name: str = "hyperlight"
    ) -> SharedMemory:
        """Write (offset, bytes) pieces into a new memory file, seal it, and map it privately.

        What no piece covers reads as zero and takes no memory.

        Raises:
            BoundsCheckFailed: a piece is not wholly inside.
        """
        _check_mapping_size(size)
        file = _File.memory(name)
        try:
            os.ftruncate(file.fd, size)
            for offset, data in pieces:
                piece = memoryview(_flat(data))
                if offset < 0 or offset + len(piece) > size:
                    raise BoundsCheckFailed(offset, len(piece), size)
                while piece:  # the kernel writes at most 2 GiB at once
                    written = os.pwrite(file.fd, piece, offset)
                    offset, piece = offset + written, piece[written:]
        except OSError as error:
            raise MmapFailed(error.errno, f"cannot fill a memory file: {error.strerror}") from error
        file.seal()
        return cls(size, file=file)

    @classmethod
    def from_fd(
        cls, fd: int, size: int, *, offset: int = 0, writable: bool = False, shared: bool = False
    ) -> SharedMemory:
        """Map part of a file; the caller may close `fd` afterwards.

        `offset` is a multiple of PAGE_SIZE. A private mapping never changes the file. Bytes of the
        last page beyond the end of the file read as zero. Nobody may shorten the file while it is mapped
        writable: the kernel would kill the process at the next access (a sealed memfd cannot be).

        Raises:
            LayoutError: the size or offset is not page aligned, or the file ends before the range.
        """
        _check_mapping_size(size)
        if offset < 0 or offset % PAGE_SIZE:
            raise LayoutError(f"file offset {offset} is not a multiple of {PAGE_SIZE}")
        try:
            file = _File(os.dup(fd))
            file_size = os.fstat(file.fd).st_size
        except OSError as error:
            raise MmapFailed(error.errno, f"cannot map file descriptor {fd}: {error.strerror}") from error
        if offset + size > page_up(file_size):
            raise LayoutError(f"the file has {file_size} bytes, the mapping needs {offset + size}")
        return cls(size, file=file, file_offset=offset, writable=writable, shared=shared)

    @property
    def size(self) -> int:
        """Bytes between the guard pages."""
        return self._size

    @property
    def writable(self) -> bool:
        """Whether the host may write."""
        return self._writable

    @property
    def closed(self) -> bool:
        """Whether the mapping is gone."""
        return self._limit < 0

    def fileno(self) -> int | None:
        """Return the descriptor of the file behind the mapping, None for anonymous memory.

        It belongs to this mapping and those made by `map_private`: duplicate it to keep it.
        """
        self._check_open()
        return self._file.fd if self._file else None

    def read(self, offset: int, size: int) -> bytes:
        """Return a copy of `size` bytes at `offset`.

        A read-only mapping of a file is read through the file: were that cut short meanwhile, touching
        the mapping would kill the process. What is missing reads as zero.

        Raises:
            BoundsCheckFailed: a byte of the range is outside the memory.
        """
        if offset < 0 or size < 0 or offset + size > self._limit:
            self._refuse(offset, size)
        if not self._writable and self._file is not None:
            return os.pread(self._file.fd, size, self._file_offset + offset).ljust(size, b"\0")
        return bytes(self._view[offset : offset + size])

    def write(self, offset: int, data: Buffer) -> None:
        """Copy all bytes of `data` to `offset`.

        Raises:
            BoundsCheckFailed: a byte of the range is outside the memory; nothing was written.
        """
        source = data if isinstance(data, bytes) else _flat(data)
        end = offset + len(source)
        if offset < 0 or end > self._write_limit:
            self._refuse(offset, len(source), writing=True)
        self._view[offset:end] = source

    def fill(self, offset: int, size: int, byte: int = 0) -> None:
        """Set `size` bytes at `offset` to `byte` (0 to 255)."""
        if not 0 <= byte <= 0xFF:
            raise ValueRangeError(f"cannot fill with {byte}: a byte is 0 to 255")
        end = offset + size
        if offset < 0 or size < 0 or end > self._write_limit:
            self._refuse(offset, size, writing=True)
        if size <= PAGE_SIZE:  # for little, a ctypes call costs more than the bytes
            self._view[offset:end] = bytes((byte,)) * size if byte else bytes(size)
        else:
            ctypes.memset(self._address + offset, byte, size)

    def copy_from(self, offset: int, source: SharedMemory, source_offset: int, size: int) -> None:
        """Copy `size` bytes from another memory, or from this one (overlap is allowed)."""
        if offset < 0 or size < 0 or offset + size > self._write_limit:
            self._refuse(offset, size, writing=True)
        if source_offset < 0 or source_offset + size > source._limit:
            source._refuse(source_offset, size)
        self._view[offset : offset + size] = source.read(source_offset, size)

    def read_u8(self, offset: int) -> int:
        """Return the byte at `offset`."""
        return self._read_scalar(_U8, offset)

    def read_u16(self, offset: int) -> int:
        """Return the little-endian u16 at `offset`, aligned or not."""
        return self._read_scalar(_U16, offset)

    def read_u32(self, offset: int) -> int:
        """Return the little-endian u32 at `offset`, aligned or not."""
        return self._read_scalar(_U32, offset)

    def read_u64(self, offset: int) -> int:
        """Return the little-endian u64 at `offset`, aligned or not."""
        if offset < 0 or offset + 8 > self._limit:  # spelled out: on the path of every guest call
            self._refuse(offset, 8)
        if not self._writable:
            return int.from_bytes(self.read(offset, 8), "little")
        value: int = _U64.unpack_from(self._view, offset)[0]
        return value

    def write_u8(self, offset: int, value: int) -> None:
        """Store a byte at `offset`."""
        self._write_scalar(_U8, offset, value)

    def write_u16(self, offset: int, value: int) -> None:
        """Store a little-endian u16 at `offset`, aligned or not."""
        self._write_scalar(_U16, offset, value)

    def write_u32(self, offset: int, value: int) -> None:
        """Store a little-endian u32 at `offset`, aligned or not."""
        self._write_scalar(_U32, offset, value)

    def write_u64(self, offset: int, value: int) -> None:
        """Store a little-endian u64 at `offset`, aligned or not."""
        if offset < 0 or offset + 8 > self._write_limit:  # spelled out: on the path of every guest call
            self._refuse(offset, 8, writing=True)
        try:
            _U64.pack_into(self._view, offset, value)
        except struct.error as error:
            raise ValueRangeError(f"{value!r} does not fit 64 unsigned bits") from error

    def discard(self, offset: int = 0, size: int | None = None) -> None:
        """Drop whole pages: they read as zero again, or as the file where one is behind them.

        Only what was touched costs anything. `size` defaults to the rest of the memory.

        Raises:
            LayoutError: the range is not page aligned.
            HyperlightError: the mapping is shared, so its content would stay.
        """
        if size is None:
            size = self._size - offset
        if offset < 0 or size < 0 or offset + size > self._limit:
            self._refuse(offset, size)
        if self._shared:
            raise HyperlightError("only a private mapping can discard its pages")
        if offset % PAGE_SIZE or size % PAGE_SIZE:
            raise LayoutError(f"cannot discard {size:#x} bytes at {offset:#x}: only whole pages")
        if _libc.madvise(self._address + offset, size, _MADV_DONTNEED):
            raise MmapFailed(ctypes.get_errno(), "madvise(MADV_DONTNEED) failed")

    def overlay(self, offset: int, source: SharedMemory, source_offset: int, size: int) -> None:
        """Show part of the file behind another memory, privately, instead of the pages at `offset`.

        `discard` then brings back the file's bytes where it would have brought zeros. `source` may
        be closed afterwards.

        Raises:
            LayoutError: an offset or the size is not page aligned, or there is an overlay already.
            HyperlightError: no file is behind the source, or this memory is not private and writable.
        """
        source._check_open()
        if source._file is None:
            raise HyperlightError("anonymous memory cannot be mapped a second time")
        if self._shared:
            raise HyperlightError("only a private mapping can be overlaid")
        if offset < 0 or size < 0 or offset + size > self._write_limit:
            self._refuse(offset, size, writing=True)
        if source_offset < 0 or source_offset + size > source._limit:
            source._refuse(source_offset, size)
        if offset % PAGE_SIZE or source_offset % PAGE_SIZE or size % PAGE_SIZE:
            raise LayoutError(f"cannot overlay {size:#x} bytes at {offset:#x}: only whole pages")
        if any(start < offset + size and offset < stop for start, stop, _, _ in self._overlays):
            raise LayoutError(f"cannot overlay {size:#x} bytes at {offset:#x}: something is overlaid there already")
        if size:
            flags = _MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE
            place = source._file_offset + source_offset
            _mmap(self._address + offset, size, _PROT_READ | _PROT_WRITE, flags, source._file.fd, place)
            self._overlays.append((offset, offset + size, source._file, place))

    def populated(self, offset: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield the (offset, size) runs of whole pages that may hold anything but zeros.

        The range is page aligned, the runs ascend and have at most 1 MiB. Reading the rest too would
        cost memory: the kernel backs even a hole at its first read. What it has backed is in its map
        of this process's pages; what else there is lies in the file.
        """
        if offset < 0 or size < 0 or offset + size > self._limit:
            self._refuse(offset, size)
        if offset % PAGE_SIZE or size % PAGE_SIZE:
            raise LayoutError(f"cannot look for pages in {size:#x} bytes at {offset:#x}: only whole pages")
        pages = _backed_pages(self._address + offset, size)
        extents = [(start - offset, end - offset) for start, end, _, _ in self._overlays]
        extents += _data_extents(self._file, self._file_offset + offset, size)
        for start, end in extents:
            first, last = max(start, 0) // PAGE_SIZE, page_up(min(end, size)) // PAGE_SIZE
            if first < last:
                pages[first:last] = b"\1" * (last - first)
        for run in _POPULATED_RUN.finditer(pages):
            yield offset + run.start() * PAGE_SIZE, (run.end() - run.start()) * PAGE_SIZE

    def seal(self) -> None:
        """Make the memory file immutable and this mapping of it private, at the same address.

        For `memfd` only. The content stays; later writes change this mapping alone.

        Raises:
            HyperlightError: the memory is not a memory file of this object.
            MmapFailed: another writable shared mapping of the file exists; the file is not sealed
                then, but this mapping of it is private already.
        """
        self._check_open()
        if self._file is None or not self._shared:
            raise HyperlightError("only a shared memory file can be sealed")
        self._shared = False
        self._map_between_guards()  # replaces the shared mapping, which the kernel would not let be
        self._file.seal()

    def map_private(self, within: tuple[_Extent, int] | None = None) -> SharedMemory:
        """Return a new private, writable mapping of the same file; `within` is as in the constructor.

        It stays valid when this one is closed. Of a file that is not sealed it shows the content
        that nobody has changed since.

        Raises:
            HyperlightError: no file is behind this memory.
        """
        self._check_open()
        if self._file is None:
            raise HyperlightError("anonymous memory cannot be mapped a second time")
        return SharedMemory(self._size, file=self._file, file_offset=self._file_offset, within=within)

    def with_hva(self, function: Callable[[int], _Result]) -> _Result:
        """Call `function` with the host virtual address and return its result.

        The only way an address gets out, for KVM_SET_USER_MEMORY_REGION: whoever keeps it must `hold` the
        memory for as long.
        """
        self._check_open()
        return function(self._address)

    def hold(self) -> object:
        """Return something that keeps the memory mapped for as long as it is referred to, even beyond `close`.

        Otherwise a VM could show its guest what the host has put there since.
        """
        self._check_open()
        return self._extent

    def view(self, offset: int, size: int) -> memoryview:
        """Return `size` bytes at `offset` to be read and written in place, for code that calls `open_view` each time.

        Nothing else may use it: once the memory is closed, touching a view of it kills the process.
        """
        if offset < 0 or size < 0 or offset + size > self._write_limit:
            self._refuse(offset, size, writing=True)
        return self._view[offset : offset + size]

    def open_view(self, view: memoryview) -> memoryview:
        """Return what `view` made, if the memory is still open. Raises HyperlightError."""
        if self._limit < 0:
            self._check_open()
        return view

    def close(self) -> None:
        """Unmap the memory. Closing again does nothing."""
        self._limit = self._write_limit = -1
        self._file = self._extent = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        """Return one line: size, kind and state."""
        kind = "shared" if self._shared else "private"
        backing = "anonymous" if self._file is None else f"file {self._file.fd}"
        state = "closed" if self.closed else f"{kind} {backing}"
        return f"<SharedMemory {self._size:#x} bytes, {state}>"

    def _original(self, begin: int, end: int) -> bytes:
        """Return what a discarded run of pages would read as; what lies under an overlay is the overlay's."""
        size = end - begin
        content = self._file.read(self._file_offset + begin, size) if self._file else bytes(size)
        for start, stop, file, place in self._overlays:
            first, last = max(begin, start), min(end, stop)
            if first < last:
                covered = file.read(place + first - start, last - first)
                content = content[: first - begin] + covered + content[last - begin :]
        return content

    def _map_between_guards(self) -> None:
        flags = (_MAP_SHARED if self._shared else _MAP_PRIVATE) | _MAP_FIXED | _MAP_NORESERVE
        protection = _PROT_READ | (_PROT_WRITE if self._writable else 0)
        if self._file is None:
            _mmap(self._address, self._size, protection, flags | _MAP_ANONYMOUS)
        else:
            _mmap(self._address, self._size, protection, flags, self._file.fd, self._file_offset)

    def _read_scalar(self, codec: struct.Struct, offset: int) -> int:
        if offset < 0 or offset + codec.size > self._limit:
            self._refuse(offset, codec.size)
        if not self._writable:
            return int.from_bytes(self.read(offset, codec.size), "little")
        value: int = codec.unpack_from(self._view, offset)[0]
        return value

    def _write_scalar(self, codec: struct.Struct, offset: int, value: int) -> None:
        if offset < 0 or offset + codec.size > self._write_limit:
            self._refuse(offset, codec.size, writing=True)
        try:
            codec.pack_into(self._view, offset, value)
        except struct.error as error:
            raise ValueRangeError(f"{value!r} does not fit {8 * codec.size} unsigned bits") from error

    def _check_open(self) -> None:
        if self._limit < 0:
            raise HyperlightError("the shared memory is closed")

    def _refuse(self, offset: int, size: int, *, writing: bool = False) -> NoReturn:
        """Raise the error that tells why an access failed its check."""
        self._check_open()
        if writing and not self._writable:
            raise HyperlightError("the shared memory is mapped read-only")
        raise BoundsCheckFailed(offset, size, self._size)


class _Extent:
    """A range of addresses, reserved and inaccessible; unmapped when nobody refers to it any more."""

    __slots__ = ("__weakref__", "address")

    def __init__(self, size: int) -> None:
        self.address = _mmap(None, size, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE)
        weakref.finalize(self, _libc.munmap, self.address, size).atexit = False  # a daemon thread may still run a guest


class AdjacentMemories:
    """A guest's scratch and image side by side, so that one look tells which pages of either have changed.

    Guard pages lie before, between and after them.
    """

    def __init__(self, scratch_size: int, source: SharedMemory) -> None:
        """Map `scratch_size` zeroed bytes, and privately the sealed file behind `source`.

        Raises as `SharedMemory.anonymous` and `map_private`, and HyperlightError where the file can change.
        """
        _check_mapping_size(scratch_size)
        if source._file is None or not source._file.is_sealed:
            raise HyperlightError("a guest's image must be a sealed memory file")
        self._image_offset = scratch_size + PAGE_SIZE  # as all offsets here, from scratch's first byte
        self._size = self._image_offset + source.size
        extent = _Extent(self._size + 2 * PAGE_SIZE)
        self.scratch = SharedMemory(scratch_size, within=(extent, PAGE_SIZE))
        self.image = source.map_private((extent, PAGE_SIZE + self._image_offset))
        self._presets: list[tuple[int, bytes]] = []
        self._has_presets = True
        self._pagemap: PageMap | None = None  # until it is needed
        self._planned: ChangedPages | None = None
        self._plan: list[tuple[memoryview, bytes]] = []  # what to write where, to revert that

    def preset(self, offset: int, data: bytes) -> None:
        """Write bytes into scratch that are to be there after every `revert` and `discard`, too.

        Raises as `SharedMemory.write`.
        """
        self.scratch.write(offset, data)
        self._presets.append((offset, data))
        self._planned = None

    def changed(self) -> ChangedPages | None:
        """Return the pages that `revert` has to write; None where `discard` is the better way.

        That is, where many pages have changed, or which ones cannot be known.

        Raises:
            HyperlightError: the memory is closed.
        """
        self.scratch._check_open()
        if not self._has_presets:  # nothing tells what else an interrupted discard has left
            return None
        if self._pagemap is None:
            self._pagemap = PageMap(self.scratch._address, self._size)
        return self._pagemap.changed()

    def revert(self, changed: ChangedPages) -> None:
        """Make every page read as the file behind it, or as zeros, with the presets, as `discard` does.

        A discarded page costs a fault at the next access, and more than one inside a VM. Few pages are far
        cheaper written over in place: those that `changed` has just found.

        Raises:
            HyperlightError: a memory is closed.
        """
        self.scratch._check_open()
        self.image._check_open()
        for place, content in self._plan if changed is self._planned else self._plan_for(changed):
            place[:] = content
        if changed.end < self._size:
            self._discard_from(changed.end)

    def _plan_for(self, changed: ChangedPages) -> list[tuple[memoryview, bytes]]:
        """Return what to write where. Guests change the same few pages in each call: the last short plan is kept."""
        plan = []
        for begin, end in changed.runs:
            if begin < self._image_offset:
                plan.append((self.scratch.view(begin, end - begin), self._original_scratch(begin, end)))
            else:
                offset = begin - self._image_offset
                content = self.image._original(offset, end - self._image_offset)
                plan.append((self.image.view(offset, end - begin), content))
        if sum(end - begin for begin, end in changed.runs) <= _MAX_PLAN_SIZE:
            self._planned = None  # a plan is never taken for another's, wherever this is interrupted
            self._plan = plan
            self._planned = changed
        return plan

    def _original_scratch(self, begin: int, end: int) -> bytes:
        content = bytearray(self.scratch._original(begin, end))
        for offset, data in self._presets:
            first, last = max(begin, offset), min(end, offset + len(data))
            if first < last:
                content[first - begin : last - begin] = data[first - offset : last - offset]
        return bytes(content)

    def discard(self) -> None:
        """Drop all pages of both, and write the presets; raises as `SharedMemory.discard`."""
        self._discard_from(0)

    def _discard_from(self, offset: int) -> None:
        self._has_presets = False  # of an interrupted discard it is not known how far it came
        self.scratch.discard(min(offset, self.scratch.size))
        self.image.discard(max(offset - self._image_offset, 0))
        for place, data in self._presets:
            self.scratch.write(place, data)
        self._has_presets = True

    def close(self) -> None:
        """Close both."""
        if self._pagemap is not None:
            self._pagemap.close()
        self.scratch.close()
        self.image.close()


_MAX_PLAN_SIZE = 16 * PAGE_SIZE  # bytes; of more, looking them up is not what takes time


class ChangedPages(NamedTuple):
    """Pages of a range of addresses that were written to."""

    runs: Sequence[tuple[int, int]]
    """Of pages: offsets from the first address, in bytes; ends exclusive."""
    end: int
    """The offset, exclusive, where the search ended: of what lies beyond nothing is known."""

    def touch(self, begin: int, end: int) -> bool:
        """Return whether a page from *begin* to *end* (exclusive) may have been written to."""
        return end > self.end or any(first < end and begin < last for first, last in self.runs)


class PageMap:
    """The kernel's map of some addresses of this process: which of their pages are copies of its own.

    After a fork, it still tells about the process that made it.
    Source: Documentation/admin-guide/mm/pagemap.rst in the kernel, /proc/pid/pagemap and PAGEMAP_SCAN.
    """

    def __init__(self, address: int, size: int) -> None:
        """Look at `size` bytes of private mappings from `address`, an hva, on."""
        try:
            self._fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # then nothing is known, and all of it is discarded at each revert
            self._fd = -1
        self._finalizer = weakref.finalize(self, _close_unless_missing, self._fd)
        self._finalizer.atexit = False
        self._address, self._size = address, size
        found = (ctypes.c_uint64 * (3 * _MAX_REVERTED_PAGES))()  # struct page_region: start, end, categories
        self._found = memoryview(found).cast("B")
        self._order = _pm_scan_arg(
            size=ctypes.sizeof(_pm_scan_arg),
            start=address,
            end=address + size,
            vec=ctypes.addressof(found),
            vec_len=_MAX_REVERTED_PAGES,
            max_pages=_MAX_REVERTED_PAGES,
            category_inverted=_PAGE_IS_FILE,
            category_mask=_PAGE_IS_FILE,
            category_anyof_mask=_PAGE_IS_PRESENT | _PAGE_IS_SWAPPED,
        )
        self._scan: Callable[[], int] | None = partial(_libc.ioctl, self._fd, _PAGEMAP_SCAN, ctypes.byref(self._order))
        self._last_found: bytes | None = b""
        self._last = ChangedPages([], size)

    def changed(self) -> ChangedPages | None:
        """Return the pages that were written to, the same object as long as they are the same.

        None where that cannot be known, or where there are many.
        """
        if self._scan is None:
            return self._read()
        if (count := self._scan()) < 0:  # Linux has it since 6.7
            self._scan = None
            return self._read()
        if self._order.walk_end < self._order.end:
            return None
        found = self._found[: count * _PAGE_REGION.size].tobytes()
        if found != self._last_found:
            regions = _PAGE_REGION.iter_unpack(found)
            begin = self._address
            self._last_found = None  # until all of it is there
            self._last = ChangedPages([(start - begin, end - begin) for start, end, _ in regions], self._size)
            self._last_found = found
        return self._last

    def _read(self) -> ChangedPages | None:
        """Look at one entry for each page, and so not at all of them."""
        size = min(self._size, _READ_WINDOW)
        try:
            entries = os.pread(self._fd, size // PAGE_SIZE * 8, self._address // PAGE_SIZE * 8)
        except OSError:
            return None
        pages = entries[7::8].translate(_IS_CHANGED)
        if len(pages) != size // PAGE_SIZE or pages.count(1) > _MAX_REVERTED_PAGES:
            return None
        if pages != self._last_found:
            runs = _POPULATED_RUN.finditer(pages)
            self._last_found = None
            self._last = ChangedPages([(run.start() * PAGE_SIZE, run.end() * PAGE_SIZE) for run in runs], size)
            self._last_found = pages
        return self._last

    def close(self) -> None:
        """Close the file; afterwards nothing is known."""
        self._finalizer()
        self._fd, self._scan = -1, None


class _pm_scan_arg(ctypes.Structure):
    """What PAGEMAP_SCAN takes (<linux/fs.h> since 6.7)."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages"),
            *("category_inverted", "category_mask", "category_anyof_mask", "return_mask"),
        )
    ]


_PAGE_REGION = struct.Struct("<3Q")
_PAGEMAP_SCAN = 3 << 30 | ctypes.sizeof(_pm_scan_arg) << 16 | ord("f") << 8 | 16
_PAGE_IS_FILE, _PAGE_IS_PRESENT, _PAGE_IS_SWAPPED = 1 << 2, 1 << 3, 1 << 4
_READ_WINDOW = 1 << 20  # bytes at the begin of a mapping: reading more entries costs more than a discard


def _close_unless_missing(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


class _File:
    """A file descriptor that several mappings share; the last to go closes it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._kept: dict[tuple[int, int], bytes] | None = None
        weakref.finalize(self, os.close, fd).atexit = False

    @classmethod
    def memory(cls, name: str) -> _File:
        """Create a memory file that can be sealed."""
        try:
            return cls(os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            code = error.errno if isinstance(error, OSError) else errno.EINVAL
            raise MmapFailed(code, f"cannot create memory file {_printable(name)}") from error

    def seal(self) -> None:
        """Forbid for ever to change or resize the file."""
        try:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        except OSError as error:
            raise MmapFailed(error.errno, f"cannot seal the memory file: {error.strerror}") from error
        self._kept = {}

    @property
    def is_sealed(self) -> bool:
        """Whether the content is for ever."""
        return self._kept is not None

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the file, with zeros for what is beyond its end.

        A sealed file keeps some short pieces: guests change the same few pages in each call.
        """
        if self._kept is not None and (kept := self._kept.get((offset, size))) is not None:
            return kept
        data = os.pread(self.fd, size, offset).ljust(size, b"\0")
        if self._kept is not None and len(self._kept) < _MAX_KEPT_PIECES and size <= _MAX_KEPT_SIZE:
            self._kept[offset, size] = data
        return data


_MAX_KEPT_PIECES, _MAX_KEPT_SIZE = 64, 4 * PAGE_SIZE


def _backed_pages(address: int, size: int) -> bytearray:
    """Return a byte for each page: 1 where the kernel has memory for it, or does not tell."""
    page_count = size // PAGE_SIZE
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            entries = os.pread(pagemap.fileno(), page_count * 8, address // PAGE_SIZE * 8)
    except OSError:
        entries = b""
    if len(entries) != page_count * 8:
        return bytearray(b"\1" * page_count)
    return bytearray(entries[7::8].translate(_IS_BACKED))


def _data_extents(file: _File | None, offset: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) runs of a file's range, from its begin, that are not holes."""
    position, end = offset, offset + size
    while file is not None and position < end:
        try:
            start = os.lseek(file.fd, position, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        position = min(os.lseek(file.fd, start, os.SEEK_HOLE), end)
        if start < position:
            yield start - offset, position - offset


def _check_mapping_size(size: int) -> None:
    if size <= 0 or size % PAGE_SIZE:
        raise LayoutError(f"shared memory must be a multiple of {PAGE_SIZE} bytes, not {size}")
    if size > _MAX_MAPPING_SIZE:
        raise MemoryRequestTooBig(size, _MAX_MAPPING_SIZE)


def _mmap(address: int | None, size: int, protection: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    result: int = _libc.mmap(address, size, protection, flags, fd, offset)
    if result == _MAP_FAILED:
        code = ctypes.get_errno()
        raise MmapFailed(code, f"cannot map {size:#x} bytes: {os.strerror(code)}")
    return result


def _flat(data: Buffer) -> memoryview | bytes:
    """View any buffer as bytes, by copy only where its items do not lie in one piece."""
    view = memoryview(data)
    return view.cast("B") if view.c_contiguous and view.nbytes else view.tobytes()


# ======================================================================================
# Guest memory: the guest-physical view
# ======================================================================================


class GuestRegion(NamedTuple):
    """A part of guest physical memory: `mapping` begins at `gpa`."""

    gpa: int
    mapping: SharedMemory
    flags: MemoryRegionFlags
    holds_tables: bool

    @property
    def size(self) -> int:
        """Bytes."""
        return self.mapping.size

    @property
    def end(self) -> int:
        """First gpa behind the region."""
        return self.gpa + self.mapping.size


class GuestMemory:
    """Guest physical memory: regions that do not overlap, and the views that page tables give of it.

    It owns none of the mappings. Addresses are a guest's word: each is checked, and a size is
    limited by the memory there is before anything is read.
    """

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._regions: list[GuestRegion] = []

    def add(
        self, gpa: int, mapping: SharedMemory, flags: MemoryRegionFlags, *, holds_tables: bool = True
    ) -> None:
        """Place a mapping at a page-aligned gpa.

        `holds_tables` tells whether page tables are looked for in the region; in dynamic mappings
        they are not. Spec: abi.md 5.4.

        Raises:
            LayoutError: the gpa is not aligned, the region leaves the physical space or overlaps.
        """
        if gpa < 0 or gpa % PAGE_SIZE:
            raise LayoutError(f"guest physical address {gpa:#x} is not a multiple of {PAGE_SIZE:#x}")
        end = gpa + mapping.size
        if end > MAX_GPA + 1:
            raise LayoutError(f"region {gpa:#x}-{end:#x} ends above the last address {MAX_GPA:#x}")
        for region in self._regions:
            if region.gpa < end and gpa < region.end:
                raise LayoutError(f"region {gpa:#x}-{end:#x} overlaps {region.gpa:#x}-{region.end:#x}")
        index = bisect_right(self._bases, gpa)
        self._bases.insert(index, gpa)
        self._regions.insert(index, GuestRegion(gpa, mapping, flags, holds_tables))

    def remove(self, gpa: int) -> SharedMemory:
        """Take away the region that begins at `gpa` and return its mapping.

        Raises:
            LayoutError: no region begins there.
        """
        index = self._index_of(gpa)
        del self._bases[index]
        return self._regions.pop(index).mapping

    def replace(
        self, gpa: int, mapping: SharedMemory, flags: MemoryRegionFlags | None = None
    ) -> SharedMemory:
        """Put another mapping in the place of the region at `gpa` and return the old one.

        Raises:
            LayoutError: no region begins there, or the new one does not fit; nothing changed.
        """
        old = self._regions[self._index_of(gpa)]
        self.remove(gpa)
        try:
            self.add(gpa, mapping, old.flags if flags is None else flags, holds_tables=old.holds_tables)
        except LayoutError:
            self.add(*old[:3], holds_tables=old.holds_tables)
            raise
        return old.mapping

    def regions(self) -> tuple[GuestRegion, ...]:
        """Return all regions by ascending gpa."""
        return tuple(self._regions)

    def resolve(self, gpa: int, size: int = 1) -> tuple[SharedMemory, int] | None:
        """Return (mapping, offset) of a range that lies in one region, else None."""
        region = self._region_at(gpa)
        if region is None or size < 0 or gpa + size > region.end:
            return None
        return region.mapping, gpa - region.gpa

    def read_phys(self, gpa: int, size: int) -> bytes:
        """Return `size` bytes of guest physical memory; adjacent regions read as one.

        Raises:
            PhysicalFault: a byte of the range is in no region.
        """
        pieces = self._physical_pieces(gpa, size)
        return b"".join(region.mapping.read(offset, count) for region, offset, count in pieces)

    def write_phys(self, gpa: int, data: Buffer, *, force: bool = False) -> None:
        """Write guest physical memory.

        `force` writes also where the guest itself may not, as a loader or a debugger does.

        Raises:
            PhysicalFault: a byte of the range is in no region or, without `force`, in one without
                MemoryRegionFlags.WRITE; nothing was written.
        """
        source = memoryview(_flat(data))
        pieces = self._physical_pieces(gpa, len(source))
        for region, offset, _ in pieces:
            if not force and not region.flags & MemoryRegionFlags.WRITE:
                raise PhysicalFault(region.gpa + offset, "is read-only")
        self._scatter(((region.mapping, offset, count) for region, offset, count in pieces), source)

    def read_entry(self, gpa: int) -> int | None:
        """Return the page-table entry at `gpa`, or None where no table can be."""
        region = self._region_at(gpa)
        if region is None or not region.holds_tables or gpa + 8 > region.end:
            return None
        return region.mapping.read_u64(gpa - region.gpa)

    def read_table(self, gpa: int) -> array[int] | None:
        """Return the 512 entries of the page table at `gpa`, or None where no table can be."""
        region = self._region_at(gpa)
        if region is None or not region.holds_tables or gpa + PAGE_SIZE > region.end:
            return None
        return array("Q", region.mapping.read(gpa - region.gpa, PAGE_SIZE))

    def translate(self, cr3: int, gva: int) -> Translation:
        """Translate a gva by the tables under `cr3`; see the function `translate`."""
        return translate(self.read_entry, cr3, gva)

    def walk(self, cr3: int, *, skip_large_pages: bool = False) -> Iterator[Leaf]:
        """Yield the mappings of the tables under `cr3`; see the function `walk`.

        There cannot be more tables than pages that may hold one.
        """
        pages = sum(region.size for region in self._regions if region.holds_tables) // PAGE_SIZE
        return walk(self.read_table, cr3, max_tables=pages, skip_large_pages=skip_large_pages)

    def read_virt(self, cr3: int, gva: int, size: int) -> bytes:
        """Return `size` bytes of guest virtual memory, whatever the guest's rights to them.

        Raises:
            TranslationFault: a page of the range is not mapped.
            BoundsCheckFailed: the guest has less memory than that.
        """
        pieces = self._virtual_pieces(cr3, gva, size)
        return b"".join(mapping.read(offset, count) for mapping, offset, count in pieces)

    def write_virt(self, cr3: int, gva: int, data: Buffer) -> None:
        """Write guest virtual memory where the host may write, whatever the guest's rights to it.

        Raises:
            TranslationFault: a page of the range is not mapped; nothing was written.
            HyperlightError: the host maps the memory read-only.
        """
        source = memoryview(_flat(data))
        self._scatter(self._virtual_pieces(cr3, gva, len(source)), source)

    def _index_of(self, gpa: int) -> int:
        index = bisect_right(self._bases, gpa) - 1
        if index < 0 or self._bases[index] != gpa:
            raise LayoutError(f"no memory region begins at {gpa:#x}")
        return index

    def _region_at(self, gpa: int) -> GuestRegion | None:
        index = bisect_right(self._bases, gpa) - 1
        if index < 0:
            return None
        region = self._regions[index]
        return region if gpa < region.end else None

    def _physical_pieces(self, gpa: int, size: int) -> list[tuple[GuestRegion, int, int]]:
        """Split a range at the borders of regions: (region, offset in it, bytes)."""
        self._check_size(gpa, size)
        pieces = []
        end = gpa + size
        while gpa < end:
            region = self._region_at(gpa)
            if region is None:
                raise PhysicalFault(gpa, "is not backed by memory")
            count = min(end, region.end) - gpa
            pieces.append((region, gpa - region.gpa, count))
            gpa += count
        return pieces

    def _virtual_pieces(self, cr3: int, gva: int, size: int) -> list[tuple[SharedMemory, int, int]]:
        """Split a range at the borders of pages: (mapping, offset in it, bytes)."""
        self._check_size(gva, size)
        pieces = []
        end = gva + size
        while gva < end:
            count = min(end - gva, PAGE_SIZE - gva % PAGE_SIZE)
            place = self.resolve(self.translate(cr3, gva).gpa, count)
            if place is None:
                raise TranslationFault(gva, 0, "outside")
            pieces.append((*place, count))
            gva += count
        return pieces

    def _check_size(self, address: int, size: int) -> None:
        """Refuse sizes that only aliases could satisfy: a guest can make those endless."""
        total = sum(region.size for region in self._regions)
        if not 0 <= size <= total:
            raise BoundsCheckFailed(address, size, total)

    @staticmethod
    def _scatter(pieces: Iterable[tuple[SharedMemory, int, int]], source: memoryview) -> None:
        position = 0
        for mapping, offset, count in pieces:
            mapping.write(offset, source[position : position + count])
            position += count


# ======================================================================================
# Layout of a fresh sandbox (spec: abi.md 1.3, 1.4, 2, 3)
# ======================================================================================

_PEB = struct.Struct("<8Q")


class MemoryRegion(NamedTuple):
    """A region of the low memory as the guest finds it: gva equals gpa, size in whole pages."""

    name: Literal["code", "peb", "heap", "init_data"]
    gpa: int
    size: int
    flags: MemoryRegionFlags


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxMemoryLayout:
    """Where everything lies, computed from sizes alone. All sizes are bytes.

    `*_offset` counts from the begin of the snapshot memory (its gpa is BASE_ADDRESS) except
    `page_table_scratch_offset` and `output_scratch_offset`, which count from the begin of scratch.
    Creating a layout checks nothing but the signs; `check` tells whether it can exist.
    """

    code_size: int
    heap_size: int = DEFAULT_HEAP_SIZE
    init_data_size: int = 0
    input_data_size: int = DEFAULT_INPUT_DATA_SIZE
    output_data_size: int = DEFAULT_OUTPUT_DATA_SIZE
    scratch_size: int = DEFAULT_SCRATCH_SIZE
    init_data_flags: MemoryRegionFlags = MemoryRegionFlags.READ
    pt_size: int = 0
    heap_executable: bool = False
    image_size: int | None = None  # of a snapshot's low memory, whose pages are packed closer

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is not None and value < 0:
                raise LayoutError(f"{item.name} is {value}: a size cannot be negative")

    # Snapshot memory ------------------------------------------------------------------

    @property
    def peb_offset(self) -> int:
        """Where the PEB lies: the first page behind the code."""
        return page_up(self.code_size)

    @property
    def heap_offset(self) -> int:
        """Where the heap begins: the page behind the PEB."""
        return page_up(self.peb_offset + PEB_SIZE)

    @property
    def init_data_offset(self) -> int:
        """Where the init data begins, were it empty or not."""
        return page_up(self.heap_offset + self.heap_size)

    @property
    def memory_size(self) -> int:
        """Bytes of the low memory, page tables not counted."""
        if self.image_size is not None:
            return self.image_size
        return page_up(self.init_data_offset + self.init_data_size)

    @property
    def snapshot_size(self) -> int:
        """Bytes of the snapshot memory, page tables included."""
        return self.memory_size + self.pt_size

    @property
    def code_gpa(self) -> int:
        """Address of the code; gva and gpa are the same, as for the next three."""
        return BASE_ADDRESS

    @property
    def peb_gpa(self) -> int:
        """Address of the PEB."""
        return BASE_ADDRESS + self.peb_offset

    @property
    def heap_gpa(self) -> int:
        """Address of the heap."""
        return BASE_ADDRESS + self.heap_offset

    @property
    def init_data_gpa(self) -> int:
        """Address of the init data."""
        return BASE_ADDRESS + self.init_data_offset

    # Scratch --------------------------------------------------------------------------

    @property
    def scratch_base_gpa(self) -> int:
        """First gpa of scratch."""
        return scratch_base_gpa(self.scratch_size)

    @property
    def scratch_base_gva(self) -> int:
        """First gva of the scratch map."""
        return scratch_base_gva(self.scratch_size)

    @property
    def output_scratch_offset(self) -> int:
        """Where in scratch the output buffer begins, right behind the input buffer at 0."""
        return self.input_data_size

    @property
    def input_gva(self) -> int:
        """Address of the input buffer."""
        return self.scratch_base_gva

    @property
    def output_gva(self) -> int:
        """Address of the output buffer."""
        return self.scratch_base_gva + self.output_scratch_offset

    @property
    def page_table_scratch_offset(self) -> int:
        """Where in scratch the live page tables begin."""
        return page_up(self.input_data_size + self.output_data_size)

    @property
    def pt_base_gpa(self) -> int:
        """Address of the root page table: the first CR3."""
        return self.scratch_base_gpa + self.page_table_scratch_offset

    @property
    def first_free_gpa(self) -> int:
        """First page that the guest's allocator hands out."""
        return self.pt_base_gpa + self.pt_size

    @property
    def min_scratch_size(self) -> int:
        """Least scratch size for these buffers and page tables."""
        return min_scratch_size(self.input_data_size, self.output_data_size) + self.pt_size

    # The whole ------------------------------------------------------------------------

    def regions(self) -> tuple[MemoryRegion, ...]:
        """Return the mapped regions of the low memory by ascending address. Spec: abi.md 1.6."""
        read, write, execute = MemoryRegionFlags.READ, MemoryRegionFlags.WRITE, MemoryRegionFlags.EXECUTE
        heap_flags = read | write | (execute if self.heap_executable else MemoryRegionFlags.NONE)
        regions = (
            MemoryRegion("code", self.code_gpa, page_up(self.code_size), read | write | execute),
            MemoryRegion("peb", self.peb_gpa, page_up(PEB_SIZE), read),
            MemoryRegion("heap", self.heap_gpa, page_up(self.heap_size), heap_flags),
            MemoryRegion("init_data", self.init_data_gpa, page_up(self.init_data_size), self.init_data_flags),
        )
        return tuple(region for region in regions if region.size)

    def peb_bytes(self) -> bytes:
        """Return the 64 bytes of the PEB: four pairs of size and gva. Spec: abi.md 3."""
        return _PEB.pack(
            self.input_data_size, self.input_gva,
            self.output_data_size, self.output_gva,
            self.init_data_size, self.init_data_gpa,
            self.heap_size, self.heap_gpa,
        )  # fmt: skip

    def check(self) -> None:
        """Raise unless a sandbox can have this layout; the order is that of abi.md 2.

        Raises:
            MemoryRequestTooBig: scratch or the low memory exceeds MAX_MEMORY_SIZE.
            MemoryRequestTooSmall: the buffers, the page tables and what every guest needs do not
                fit in scratch.
            LayoutError: the scratch size is not a multiple of PAGE_SIZE.
        """
        if self.scratch_size > MAX_MEMORY_SIZE:
            raise MemoryRequestTooBig(self.scratch_size, MAX_MEMORY_SIZE)
        without_tables = min_scratch_size(self.input_data_size, self.output_data_size)
        if self.scratch_size < without_tables:
            raise MemoryRequestTooSmall(self.scratch_size, without_tables)
        if self.memory_size > MAX_MEMORY_SIZE:
            raise MemoryRequestTooBig(self.memory_size, MAX_MEMORY_SIZE)
        if self.scratch_size % PAGE_SIZE:
            raise LayoutError(f"scratch size must be a multiple of {PAGE_SIZE}, not {self.scratch_size}")
        if self.scratch_size < self.min_scratch_size:
            raise MemoryRequestTooSmall(self.scratch_size, self.min_scratch_size)

    def with_pt_size(self, pt_size: int) -> SandboxMemoryLayout:
        """Return the same layout with page tables of `pt_size` bytes."""
        return dataclasses.replace(self, pt_size=pt_size)


# ======================================================================================
# Page tables: entries and building (spec: abi.md 5.1, 5.2)
# ======================================================================================

PTE_PRESENT: Final = 1 << 0
PTE_WRITABLE: Final = 1 << 1
PTE_USER: Final = 1 << 2
PTE_ACCESSED: Final = 1 << 5
PTE_DIRTY: Final = 1 << 6
PTE_LARGE: Final = 1 << 7  # PS: a 1 GiB page at level 3, a 2 MiB page at level 2
PTE_AVL_MASK: Final = 0xE00  # free for software
PTE_COPY_ON_WRITE: Final = 0x200  # the whole AVL field of a copy-on-write leaf
PTE_ADDRESS_MASK: Final = 0x000F_FFFF_FFFF_F000
PTE_NO_EXECUTE: Final = 1 << 63

_TABLE_ENTRIES: Final = 512
_LEVELS: Final = (4, 3, 2, 1)  # PML4, PDPT, PD, PT
_VA_SIZE: Final = 1 << 48
_EMPTY_TABLE: Final = array("Q", bytes(PAGE_SIZE))
_TABLE_SPAN: Final = _TABLE_ENTRIES * PAGE_SIZE  # bytes that one level-1 table maps
# A table as one integer: the value 1 in each entry, and the offset of the page in each entry.
_EVERY_ENTRY: Final = int.from_bytes(array("Q", [1] * _TABLE_ENTRIES).tobytes(), "little")
_PAGE_STEPS: Final = int.from_bytes(array("Q", range(0, _TABLE_SPAN, PAGE_SIZE)).tobytes(), "little")


def table_index(gva: int, level: int) -> int:
    """Return the index of a gva in its table of `level` (4 for the PML4 down to 1)."""
    return gva >> _shift(level) & (_TABLE_ENTRIES - 1)


def count_tables(ranges: Iterable[tuple[int, int]]) -> int:
    """Return how many page tables map these (gva, size) ranges, the root included."""
    spans = [(gva % _VA_SIZE, gva % _VA_SIZE + size - 1) for gva, size in ranges if size > 0]
    count = 1
    for level in _LEVELS[:-1]:
        last_counted = -1
        for first, last in sorted((first >> _shift(level), last >> _shift(level)) for first, last in spans):
            count += max(0, last - max(first - 1, last_counted))
            last_counted = max(last, last_counted)
    return count


class PageTableBuilder:
    """Builds 4-level page tables of 4 KiB pages that will lie at a known gpa.

    The root is the first table; others follow in the order in which mappings need them.
    """

    def __init__(self, pt_base_gpa: int, max_tables: int | None = None) -> None:
        """Begin with an empty root table.

        `pt_base_gpa` is a multiple of PAGE_SIZE; `max_tables`, where given, includes the root.
        """
        if not 0 <= pt_base_gpa <= MAX_GPA or pt_base_gpa % PAGE_SIZE:
            raise PageTableError(f"page tables cannot begin at {pt_base_gpa:#x}")
        self._base = pt_base_gpa
        self._max_tables = max_tables
        self._entries = array("Q", _EMPTY_TABLE)

    @property
    def size(self) -> int:
        """Bytes of all tables."""
        return len(self._entries) * 8

    def to_bytes(self) -> bytes:
        """Return all tables, the root first."""
        return self._entries.tobytes()

    def map(
        self,
        gva: int,
        gpa: int,
        size: int,
        *,
        writable: bool,
        executable: bool,
        copy_on_write: bool = False,
        user: bool = False,
    ) -> None:
        """Map `size` bytes, rounded up to whole pages, at `gva` to `gpa`; both page aligned.

        A copy-on-write page is present and read-only whatever `writable` says. Pages mapped before
        are mapped anew.

        Raises:
            PageTableError: a range is not aligned or leaves its address space, or there would be
                more than `max_tables`.
        """
        size = page_up(size)
        _check_mapping(gva, gpa, size)
        flags = PTE_PRESENT | PTE_ACCESSED | PTE_DIRTY
        flags |= PTE_COPY_ON_WRITE if copy_on_write else PTE_WRITABLE if writable else 0
        flags |= (PTE_USER if user else 0) | (0 if executable else PTE_NO_EXECUTE)
        end = gva + size
        while gva < end:
            count = (min(end, (gva | (_TABLE_SPAN - 1)) + 1) - gva) // PAGE_SIZE
            start = self._leaf_table(gva, user) + table_index(gva, 1)
            self._entries[start : start + count] = _entry_run(gpa | flags, count)
            gva += count * PAGE_SIZE
            gpa += count * PAGE_SIZE

    def _leaf_table(self, gva: int, user: bool) -> int:
        """Return where the entries of the level-1 table of a gva begin, making tables as needed."""
        # x86 ANDs the user bit over all levels: the tables above grant it, the leaf decides.
        link_flags = PTE_PRESENT | PTE_WRITABLE | PTE_ACCESSED | (PTE_USER if user else 0)
        table = 0
        for level in _LEVELS[:-1]:
            slot = table + table_index(gva, level)
            if not self._entries[slot]:
                self._entries[slot] = self._base + self._new_table() * 8
            self._entries[slot] |= link_flags
            table = ((self._entries[slot] & PTE_ADDRESS_MASK) - self._base) // 8
        return table

    def _new_table(self) -> int:
        """Append an empty table and return where its entries begin."""
        start = len(self._entries)
        if self._max_tables is not None and start // _TABLE_ENTRIES >= self._max_tables:
            raise PageTableError(f"the mappings need more than {self._max_tables} page tables")
        self._entries.extend(_EMPTY_TABLE)
        return start


def image_leaves(layout: SandboxMemoryLayout, privilege: PrivilegeNote | None = None) -> list[Leaf]:
    """Return the mappings of the low memory of a fresh sandbox, gva equal to gpa.

    Where `privilege` asks for user mode all are user pages but the kernel range of the image.
    """
    privilege = privilege or PrivilegeNote()
    leaves: list[Leaf] = []
    for region in layout.regions():
        writable = bool(region.flags & MemoryRegionFlags.WRITE)
        executable = bool(region.flags & MemoryRegionFlags.EXECUTE)
        whole = Leaf(region.gpa, region.gpa, region.size // PAGE_SIZE, writable, executable, False, privilege.user_mode)
        if region.name == "code" and privilege.user_mode:
            leaves += _with_kernel_range(whole, privilege)
        else:
            leaves.append(whole)
    return leaves


def build_page_tables(
    layout: SandboxMemoryLayout,
    leaves: Iterable[Leaf],
    *,
    copy_on_write: Literal["guest", "host"] = "guest",
    user_io: bool = False,
) -> bytes:
    """Build the tables of a sandbox: `leaves`, then the scratch map. Spec: abi.md 5.2, 5.7.

    A leaf that is writable or copy-on-write becomes copy-on-write where the guest copies
    (`"guest"`), plainly writable where the host kernel does (`"host"`). `user_io` makes the input
    and output buffers user pages; the rest of scratch, with the page tables, never is.

    Raises:
        MemoryRequestTooSmall: scratch has no room for the tables. Nothing is built then.
        PageTableError: a leaf cannot be mapped.
    """
    leaves = list(leaves)
    ranges = [(leaf.gva, leaf.page_count * PAGE_SIZE) for leaf in leaves]
    table_count = count_tables([*ranges, (layout.scratch_base_gva, layout.scratch_size)])
    layout.with_pt_size(table_count * PAGE_SIZE).check()

    builder = PageTableBuilder(layout.pt_base_gpa, table_count)
    for leaf, (gva, size) in zip(leaves, ranges, strict=True):
        changeable = leaf.writable or leaf.copy_on_write
        builder.map(
            gva,
            leaf.gpa,
            size,
            writable=changeable and copy_on_write == "host",
            executable=leaf.executable,
            copy_on_write=changeable and copy_on_write == "guest",
            user=leaf.user,
        )
    _map_scratch(builder, layout, user_io)
    return builder.to_bytes()


def _map_scratch(builder: PageTableBuilder, layout: SandboxMemoryLayout, user_io: bool) -> None:
    gva, gpa, io_size = layout.scratch_base_gva, layout.scratch_base_gpa, layout.page_table_scratch_offset
    builder.map(gva, gpa, io_size, writable=True, executable=False, user=user_io)
    rest = layout.scratch_size - io_size
    builder.map(gva + io_size, gpa + io_size, rest, writable=True, executable=False)


def _with_kernel_range(code: Leaf, privilege: PrivilegeNote) -> Iterator[Leaf]:
    """Split the mapping of a user-mode image: user, kernel, user; empty parts are left out."""
    first = privilege.kernel_offset // PAGE_SIZE
    last = first + privilege.kernel_size // PAGE_SIZE
    for start, end, user in ((0, first, True), (first, last, False), (last, code.page_count, True)):
        if start < end:
            address = code.gva + start * PAGE_SIZE
            yield code._replace(gva=address, gpa=address, page_count=end - start, user=user)


def _entry_run(first: int, count: int) -> array[int]:
    """Return up to 512 entries for consecutive pages, all with the flags of the first.

    One addition of 4096-byte integers makes a whole table: seven times as fast as a range, but slower
    for a few. No entry may overflow into the next.
    """
    if count < 64:
        return array("Q", range(first, first + count * PAGE_SIZE, PAGE_SIZE))
    return array("Q", (first * _EVERY_ENTRY + _PAGE_STEPS).to_bytes(PAGE_SIZE, "little"))[:count]


def _shift(level: int) -> int:
    return _PAGE_SHIFT + 9 * (level - 1)


def _check_mapping(gva: int, gpa: int, size: int) -> None:
    if gva % PAGE_SIZE or gpa % PAGE_SIZE:
        raise PageTableError(f"mapping {gva:#x} to {gpa:#x} is not page aligned")
    if size < 0 or not 0 <= gpa <= gpa + size <= MAX_GPA + 1:
        raise PageTableError(f"mapping {gva:#x}: {size:#x} bytes at {gpa:#x} leave the physical space")
    halves = ((0, _VA_SIZE // 2), (_U64_MAX + 1 - _VA_SIZE // 2, _U64_MAX + 1))
    if not any(low <= gva <= gva + size <= high for low, high in halves):
        raise PageTableError(f"mapping {gva:#x}: {size:#x} bytes leave the canonical addresses")


# ======================================================================================
# Page tables: translating and walking
# ======================================================================================


class Translation(NamedTuple):
    """Where a gva leads: `gpa` of that very byte, in a page of `page_size` bytes.

    `writable`, `executable` and `user` are what the processor grants over all levels;
    `copy_on_write` is the leaf's.
    """

    gpa: int
    page_size: int
    writable: bool
    executable: bool
    copy_on_write: bool
    user: bool


class Leaf(NamedTuple):
    """A run of 4 KiB pages, consecutive in gva and in gpa, with equal rights (see Translation)."""

    gva: int
    gpa: int
    page_count: int
    writable: bool
    executable: bool
    copy_on_write: bool
    user: bool


class _Rights(NamedTuple):
    """What the levels passed so far grant."""

    writable: bool = True
    executable: bool = True
    user: bool = True

    def under(self, entry: int) -> _Rights:
        """Return what is left under an entry."""
        return _Rights(
            self.writable and bool(entry & PTE_WRITABLE),
            self.executable and not entry & PTE_NO_EXECUTE,
            self.user and bool(entry & PTE_USER),
        )


def translate(read_entry: Callable[[int], int | None], cr3: int, gva: int) -> Translation:
    """Translate one gva as the processor would.

    `read_entry` returns the u64 at a gpa, None outside guest memory. Pages of 2 MiB and 1 GiB are
    understood.

    Raises:
        TranslationFault: there is no translation; its `reason` and `level` say why and where.
    """
    if not 0 <= gva <= _U64_MAX or _canonical(gva % _VA_SIZE) != gva:
        raise TranslationFault(gva, 4, "not canonical")
    entry = cr3
    rights = _Rights()
    for level in _LEVELS:
        entry = _present_entry(read_entry, entry & PTE_ADDRESS_MASK, level, gva)
        rights = rights.under(entry)
        if entry & PTE_LARGE and level > 1:  # at level 1 that bit selects a memory type
            break
    page_size = 1 << _shift(level)
    gpa = entry & PTE_ADDRESS_MASK & -page_size | gva & page_size - 1
    return Translation(gpa, page_size, rights.writable, rights.executable, _is_cow(entry), rights.user)


def _present_entry(read_entry: Callable[[int], int | None], table: int, level: int, gva: int) -> int:
    entry = read_entry(table + 8 * table_index(gva, level))
    if entry is None:
        raise TranslationFault(gva, level, "outside")
    if not entry & PTE_PRESENT:
        raise TranslationFault(gva, level, "not present")
    if level == 4 and entry & PTE_LARGE:
        raise TranslationFault(gva, level, "reserved bit")
    return entry


def walk(
    read_table: Callable[[int], array[int] | None],
    cr3: int,
    *,
    max_tables: int,
    skip_large_pages: bool = False,
) -> Iterator[Leaf]:
    """Yield all mappings, as runs of pages, by ascending gva of the low half, then of the high half.

    `read_table` returns the 512 entries of the table at a gpa; where it returns None nothing is
    present. Runs are as long as they can be. At most `max_tables` tables are gone through (one that is
    reached twice counts twice), which bounds the time; the memory is that of a few tables.

    Raises:
        PageTableError: there are more tables (tables that lead back to themselves have no end), or
            there is a large page (level 2 or 3, or that bit at level 4) and `skip_large_pages` is
            false.
    """
    walker = _Walker(read_table, max_tables, skip_large_pages)
    current: Leaf | None = None
    for leaf in walker.leaves(cr3 & PTE_ADDRESS_MASK, 4, 0, _Rights()):
        if current is not None and _continues(current, leaf):
            current = current._replace(page_count=current.page_count + leaf.page_count)
            continue
        if current is not None:
            yield current
        current = leaf
    if current is not None:
        yield current


class _Walker:
    """One walk: the way to read a table, and how many more may be read."""

    def __init__(
        self, read_table: Callable[[int], array[int] | None], max_tables: int, skip_large_pages: bool
    ) -> None:
        self._read_table = read_table
        self._tables_left = self._max_tables = max_tables
        self._skip_large_pages = skip_large_pages

    def leaves(self, table: int, level: int, base: int, rights: _Rights) -> Iterator[Leaf]:
        """Yield the runs of one table and those under it; `base` is the 48-bit address it begins at."""
        entries = self._read_table(table)
        if entries is None:  # not counted: there can be no more of these than entries in tables that are
            return
        if self._tables_left <= 0:
            raise PageTableError(f"more than {self._max_tables} page tables under CR3")
        self._tables_left -= 1
        if entries == _EMPTY_TABLE:
            return
        if level == 1:
            yield from _leaf_runs(entries, base, rights)
            return
        for index, entry in enumerate(entries):
            if not entry & PTE_PRESENT:
                continue
            address = base + (index << _shift(level))
            if not entry & PTE_LARGE:
                yield from self.leaves(entry & PTE_ADDRESS_MASK, level - 1, address, rights.under(entry))
            elif not self._skip_large_pages:
                raise PageTableError(f"page at {_canonical(address):#x} is larger than 4 KiB (level {level})")


def _leaf_runs(entries: array[int], base: int, rights: _Rights) -> Iterator[Leaf]:
    """Yield the runs of one level-1 table."""
    index = 0
    while index < _TABLE_ENTRIES:
        entry = entries[index]
        if not entry & PTE_PRESENT:
            index += 1
            continue
        count = _run_length(entries, index)
        granted = rights.under(entry)
        yield Leaf(
            _canonical(base + index * PAGE_SIZE),
            entry & PTE_ADDRESS_MASK,
            count,
            granted.writable,
            granted.executable,
            _is_cow(entry),
            granted.user,
        )
        index += count


def _run_length(entries: array[int], start: int) -> int:
    """Count the entries from `start` on that point to consecutive pages with equal flags."""
    first = entries[start]
    # Beyond the last address the next one would spill into the flags.
    pages_left = (PTE_ADDRESS_MASK - (first & PTE_ADDRESS_MASK)) // PAGE_SIZE + 1
    limit = min(_TABLE_ENTRIES - start, pages_left)
    if limit == _TABLE_ENTRIES and entries == _entry_run(first, limit):
        return _TABLE_ENTRIES
    count = 1
    while count < limit and entries[start + count] == first + count * PAGE_SIZE:
        count += 1
    return count


def _continues(run: Leaf, leaf: Leaf) -> bool:
    size = run.page_count * PAGE_SIZE
    return leaf[3:] == run[3:] and leaf.gva == run.gva + size and leaf.gpa == run.gpa + size


def _canonical(address: int) -> int:
    """Sign-extend a 48-bit address."""
    return address + (_U64_MAX + 1 - _VA_SIZE) if address >= _VA_SIZE // 2 else address


def _is_cow(entry: int) -> bool:
    return entry & PTE_AVL_MASK == PTE_COPY_ON_WRITE


# ======================================================================================
# The guest's ELF file (spec: abi.md 4, guest-versions.md 3)
# ======================================================================================

_MAX_PROGRAM_HEADERS = 64  # a static-pie has about ten; these bound what a hostile file costs
_MAX_SECTION_HEADERS = 1024
_MAX_NAME_SIZE = 4096

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR_SIZE, _SHDR_SIZE = 56, 64
_ET_DYN, _EM_X86_64 = 3, 62
_SHN_XINDEX = 0xFFFF
_PF_X = 1

_DT_NULL, _DT_NEEDED, _DT_RELA, _DT_RELASZ, _DT_REL, _DT_RELSZ = 0, 1, 7, 8, 17, 18
_DT_PLTRELSZ, _DT_PLTREL, _DT_JMPREL, _DT_RELRSZ, _DT_RELR = 2, 20, 23, 35, 36
_R_X86_64_NONE, _R_X86_64_RELATIVE = 0, 8

_DYN = struct.Struct("<qQ")
_REL = struct.Struct("<QQ")
_RELA = struct.Struct("<QQq")
_SYM = struct.Struct("<IBBHQQ")
_STT_FUNC = 2

_NOTE_NAME = b"Hyperlight"
_VERSION_SECTION, _VERSION_NOTE_TYPE = ".note.hyperlight-version", 1
_PRIVILEGE_SECTION, _PRIVILEGE_NOTE_TYPE = ".note.hyperlight-privilege", 2
_NOTE_HEADER = struct.Struct("<III")
_PRIVILEGE = struct.Struct("<IIQQ")
_PRIVILEGE_FORMAT = 1
_PRIVILEGE_FLAGS = ("user_mode", "resets_fpu", "takes_seed")  # by bit


class Segment(NamedTuple):
    """A PT_LOAD: where it lies in the image and in the file, in bytes."""

    offset: int
    size: int
    file_offset: int
    file_size: int
    executable: bool


class Symbol(NamedTuple):
    """A function: its offset in the image and its size, in bytes."""

    name: str
    offset: int
    size: int


class PrivilegeNote(NamedTuple):
    """What a guest built with this SDK says of itself; without a note, none of it.

    `user_mode` is the wish to run its own code at CPL 3.

    The pages [kernel_offset, kernel_offset + kernel_size) of the image, in bytes, stay supervisor
    pages. `resets_fpu` tells that the guest resets its own FPU at each call, `takes_seed` that it reads
    a request to seed its random numbers out of RDI at each call: bit 32 set, and the seed below.
    """

    user_mode: bool = False
    resets_fpu: bool = False
    takes_seed: bool = False
    kernel_offset: int = 0
    kernel_size: int = 0


class _Section(NamedTuple):
    name: str
    type: str
    offset: int
    size: int
    alignment: int
    link: int


@dataclass(frozen=True, slots=True, eq=False)
class GuestElf:
    """A guest's ELF file, checked and ready to load.

    Creation: `GuestElf.parse`. Offsets in the image count from its first byte, so that the image
    address of `entry` is BASE_ADDRESS + entry.
    """

    path: str | None
    entry: int
    code_size: int
    version: str | None
    privilege: PrivilegeNote
    segments: tuple[Segment, ...]
    _data: bytes = field(repr=False)
    _dynamic: Mapping[int, int] = field(repr=False)
    _sections: tuple[_Section, ...] = field(repr=False)

    @classmethod
    def parse(cls, data: bytes, path: str | None = None) -> GuestElf:
        """Check a file's bytes and read what loading it takes.

        Accepted are static position-independent executables for x86-64 whose first PT_LOAD is at
        address 0. Relocations are checked by `load`.

        Raises:
            GuestBinVersionMismatch: the version note names a release that is not supported.
            ElfError: the file is anything else but a guest.
        """
        with _elf_errors(path):
            _check_header(data)
            elf = _open_elf(data)
            headers = _program_headers(elf)
            segments = _load_segments(headers, len(data))
            sections = _sections(elf, data)
            code_size = segments[-1].offset + segments[-1].size
            guest = cls(
                path=path,
                entry=_checked_entry(elf["e_entry"], segments),
                code_size=code_size,
                version=_read_version(sections, data),
                privilege=_read_privilege(sections, data, code_size),
                segments=segments,
                _data=data,
                _dynamic=_read_dynamic(headers, data),
                _sections=sections,
            )
            if guest.version is not None and guest.version not in SUPPORTED_GUEST_VERSIONS:
                raise GuestBinVersionMismatch(guest.version)
            return guest

    @property
    def exception_stack_top_gva(self) -> int:
        """Exclusive top of the exception stack; see the function of that name."""
        return exception_stack_top_gva(self.version)

    def load(self, base: int = BASE_ADDRESS) -> bytearray:
        """Return the image, `code_size` bytes, relocated to run at address `base`.

        Raises:
            ElfError: a relocation is of another kind than RELATIVE or leaves the image.
        """
        with _elf_errors(self.path):
            try:
                image = bytearray(self.code_size)
            except MemoryError as error:
                raise ElfError(f"no host memory for an image of {self.code_size:#x} bytes") from error
            source = memoryview(self._data)
            for segment in self.segments:
                start, end = segment.file_offset, segment.file_offset + segment.file_size
                image[segment.offset : segment.offset + segment.file_size] = source[start:end]
            _relocate(image, self._dynamic, base)
            return image

    @property
    def data(self) -> bytes:
        """The bytes of the file."""
        return self._data

    def symbols(self) -> list[Symbol]:
        """Return the functions of the symbol table by ascending offset; none where it is stripped.

        Raises:
            ElfError: the symbol table is malformed.
        """
        with _elf_errors(self.path):
            return _read_symbols(self._sections, self._data)


@contextmanager
def _elf_errors(path: str | None) -> Iterator[None]:
    """Turn whatever parsing a hostile file raises into one line that names the file.

    pyelftools raises ELFError, but also what its parts raise: construct's errors, AssertionError,
    KeyError, struct.error, UnicodeDecodeError, RecursionError, MemoryError.
    """
    prefix = f"{_printable(path, 200)}: " if path else ""
    try:
        yield
    except GuestBinVersionMismatch:
        raise
    except ElfError as error:
        raise ElfError(f"{prefix}{error}") from error.__cause__
    except Exception as error:
        text = _printable(f"{type(error).__name__}: {error}", 100)
        raise ElfError(f"{prefix}malformed ELF file ({text})") from error


def _check_header(data: bytes) -> None:
    """Check what makes a file a guest at all, before a parser is let loose on it."""
    if data[:4] != b"\x7fELF":
        raise ElfError("not an ELF file: a guest is a static-pie ELF executable for x86-64")
    if len(data) < _EHDR.size:
        raise ElfError(f"truncated ELF file: {len(data)} bytes are less than its header")
    header = _EHDR.unpack_from(data)
    ident, kind, machine = header[:3]
    program_offset, section_offset = header[5:7]
    program_size, program_count, section_size, section_count, names_index = header[9:]
    if ident[4] != 2 or ident[5] != 1:
        raise ElfError("not a 64-bit little-endian ELF file: a guest is one for x86-64")
    if machine != _EM_X86_64:
        raise ElfError(f"ELF file for {_machine_name(machine)}: a guest is one for x86-64")
    if kind != _ET_DYN:
        raise ElfError("not a position-independent executable: link the guest with -static-pie")
    _check_headers("program", len(data), program_offset, program_size, _PHDR_SIZE, program_count,
                   _MAX_PROGRAM_HEADERS)  # fmt: skip
    _check_headers("section", len(data), section_offset, section_size, _SHDR_SIZE, section_count,
                   _MAX_SECTION_HEADERS)  # fmt: skip
    if (section_offset and not section_count) or (section_count and names_index == _SHN_XINDEX):
        raise ElfError("the ELF file has 65,280 sections or more: strip it")


def _check_headers(
    what: str, file_size: int, offset: int, entry_size: int, known_size: int, count: int, limit: int
) -> None:
    if count == 0:
        return
    if entry_size != known_size:
        raise ElfError(f"{what} headers of {entry_size} bytes: those of ELF-64 have {known_size}")
    if count > limit:
        raise ElfError(f"{count} {what} headers: a guest has at most {limit}")
    end = offset + count * entry_size
    if end > file_size:
        raise ElfError(f"truncated ELF file: {what} headers end at byte {end}, the file has {file_size}")


def _open_elf(data: bytes) -> Any:
    # Imported here because that takes longer than to boot a guest.
    from elftools.elf.elffile import ELFFile

    return ELFFile(io.BytesIO(data))


def _machine_name(machine: int) -> str:
    from elftools.elf.enums import ENUM_E_MACHINE

    names = (name.removeprefix("EM_") for name, value in ENUM_E_MACHINE.items() if value == machine)
    return f"machine {machine} ({next(names, 'unknown')})"


def _headers(elf: Any, layout: Any, offset: int, entry_size: int, count: int) -> list[Any]:
    # Raw headers rather than pyelftools' segment and section objects: making those already parses
    # hash tables and string tables, which a guest does not need and a hostile file makes endless.
    from elftools.common.utils import struct_parse

    return [struct_parse(layout, elf.stream, offset + index * entry_size) for index in range(count)]


def _program_headers(elf: Any) -> list[Any]:
    headers = _headers(elf, elf.structs.Elf_Phdr, elf["e_phoff"], _PHDR_SIZE, elf["e_phnum"])
    if any(header["p_type"] == "PT_INTERP" for header in headers):
        raise ElfError("dynamically linked: link the guest with -static-pie")
    return headers


def _load_segments(headers: list[Any], file_size: int) -> tuple[Segment, ...]:
    """Check the PT_LOADs: ascending from 0, apart, inside the file and of sane size."""
    segments: list[Segment] = []
    end = 0
    for header in headers:
        if header["p_type"] != "PT_LOAD":
            continue
        segment = Segment(
            header["p_vaddr"],
            header["p_memsz"],
            header["p_offset"],
            header["p_filesz"],
            bool(header["p_flags"] & _PF_X),
        )
        if not segments and segment.offset != 0:
            raise ElfError(f"first PT_LOAD at {segment.offset:#x}, not at 0: link the guest with -static-pie")
        if segment.offset < end:
            raise ElfError(f"PT_LOAD at {segment.offset:#x} begins before the one before it ends")
        _check_segment(segment, file_size)
        end = segment.offset + segment.size
        segments.append(segment)
    if not segments:
        raise ElfError("ELF must have at least one PT_LOAD header")
    return tuple(segments)


def _check_segment(segment: Segment, file_size: int) -> None:
    if segment.file_size > segment.size:
        raise ElfError(f"PT_LOAD at {segment.offset:#x} has more bytes in the file than in memory")
    file_end = segment.file_offset + segment.file_size
    if file_end > file_size:
        raise ElfError(f"truncated ELF file: a segment ends at byte {file_end}, the file has {file_size}")
    end = segment.offset + segment.size
    if end > MAX_MEMORY_SIZE:
        raise ElfError(f"the image ends at {end:#x}: the most is {MAX_MEMORY_SIZE:#x}")


def _checked_entry(entry: int, segments: Iterable[Segment]) -> int:
    for segment in segments:
        if segment.executable and segment.offset <= entry < segment.offset + segment.file_size:
            return entry
    raise ElfError(f"entry point {entry:#x} is in no executable segment")


def _sections(elf: Any, data: bytes) -> tuple[_Section, ...]:
    """Read the section headers, with names; none where they are stripped."""
    headers = _headers(elf, elf.structs.Elf_Shdr, elf["e_shoff"], _SHDR_SIZE, elf["e_shnum"])
    names = b""
    if elf["e_shstrndx"] < len(headers):
        table = headers[elf["e_shstrndx"]]
        names = data[table["sh_offset"] : table["sh_offset"] + table["sh_size"]]
    return tuple(
        _Section(
            _string_at(names, header["sh_name"]),
            str(header["sh_type"]),
            header["sh_offset"],
            header["sh_size"],
            header["sh_addralign"],
            header["sh_link"],
        )
        for header in headers
    )


def _section_bytes(section: _Section, data: bytes) -> bytes:
    end = section.offset + section.size
    if end > len(data):
        raise ElfError(f"truncated ELF file: section {_printable(section.name)} ends at byte {end}")
    return data[section.offset : end]


def _string_at(table: bytes, offset: int) -> str:
    """Return the NUL-terminated string at `offset` of a string table, cut at _MAX_NAME_SIZE."""
    return table[offset : offset + _MAX_NAME_SIZE].partition(b"\0")[0].decode("utf-8", "replace")


# Notes --------------------------------------------------------------------------------


def _read_version(sections: Iterable[_Section], data: bytes) -> str | None:
    text = _find_note(sections, data, _VERSION_SECTION, _VERSION_NOTE_TYPE)
    try:
        return None if text is None else text.decode().rstrip("\0")
    except UnicodeDecodeError:
        return None  # as the reference: a text that is none is no version


def _read_privilege(sections: Iterable[_Section], data: bytes, code_size: int) -> PrivilegeNote:
    content = _find_note(sections, data, _PRIVILEGE_SECTION, _PRIVILEGE_NOTE_TYPE)
    if content is None:
        return PrivilegeNote()
    if len(content) != _PRIVILEGE.size:
        raise ElfError(f"privilege note of {len(content)} bytes, not {_PRIVILEGE.size}")
    version, flags, offset, size = _PRIVILEGE.unpack(content)
    if version != _PRIVILEGE_FORMAT or flags >> len(_PRIVILEGE_FLAGS):
        raise ElfError(f"privilege note of format {version}, flags {flags:#x}: use a newer hyperlight")
    if offset % PAGE_SIZE or size % PAGE_SIZE or offset + size > page_up(code_size):
        raise ElfError(f"privilege note: kernel range {offset:#x}+{size:#x} is not whole pages of the image")
    named = {name: bool(flags >> bit & 1) for bit, name in enumerate(_PRIVILEGE_FLAGS)}
    return PrivilegeNote(**named, kernel_offset=offset, kernel_size=size)


def _find_note(sections: Iterable[_Section], data: bytes, section_name: str, note_type: int) -> bytes | None:
    """Return the description of the first such Hyperlight note in the section of that name.

    The section's name counts: real guests carry a PT_NOTE that is not made of notes.
    """
    for section in sections:
        if section.name == section_name and section.type == "SHT_NOTE":
            for name, kind, description in _notes(_section_bytes(section, data), section.alignment):
                if name == _NOTE_NAME and kind == note_type:
                    return description
    return None


def _notes(content: bytes, alignment: int) -> Iterator[tuple[bytes, int, bytes]]:
    """Yield (name without NUL, type, description) of each note, up to the first malformed one."""
    alignment = max(alignment, 4)
    if alignment not in (4, 8):
        return
    position = 0
    while position + _NOTE_HEADER.size <= len(content):
        name_size, size, kind = _NOTE_HEADER.unpack_from(content, position)
        name_start = position + _NOTE_HEADER.size
        start = name_start + name_size + -(_NOTE_HEADER.size + name_size) % alignment
        if start + size > len(content):
            return
        name = content[name_start : name_start + name_size]
        yield name.removesuffix(b"\0"), kind, content[start : start + size]
        position = start + size + -size % alignment


# Dynamic section, relocations, symbols ------------------------------------------------


def _read_dynamic(headers: Iterable[Any], data: bytes) -> dict[int, int]:
    """Return tag -> value of PT_DYNAMIC; empty where there is none."""
    header = next((header for header in headers if header["p_type"] == "PT_DYNAMIC"), None)
    if header is None:
        return {}
    start, size = header["p_offset"], header["p_filesz"]
    if start + size > len(data):
        raise ElfError(f"truncated ELF file: the dynamic section ends at byte {start + size}")
    tags: dict[int, int] = {}
    for tag, value in _DYN.iter_unpack(data[start : start + size // _DYN.size * _DYN.size]):
        if tag == _DT_NULL:
            break
        tags[tag] = value
    if _DT_NEEDED in tags:
        raise ElfError("needs shared libraries: link the guest with -static-pie")
    # The zeros behind a segment's file bytes are no relocations, and may be gigabytes.
    if any(tags.get(tag, 0) > len(data) for tag in (_DT_RELASZ, _DT_RELSZ, _DT_PLTRELSZ, _DT_RELRSZ)):
        raise ElfError("a relocation table is larger than the ELF file")
    return tags


def _relocate(image: bytearray, dynamic: Mapping[int, int], base: int) -> None:
    """Apply the relocations in place. Spec: abi.md 4.4; DT_RELR and DT_JMPREL go beyond it."""
    for relocations in _addend_tables(image, dynamic):
        last = len(image) - 8
        for offset, info, addend in _RELA.iter_unpack(relocations):
            if info & 0xFFFF_FFFF == _R_X86_64_RELATIVE and offset <= last:
                _U64.pack_into(image, offset, (base + addend) & _U64_MAX)
            else:
                _check_skippable(info, offset, last)
    for offset in _relr_offsets(_dynamic_table(image, dynamic, _DT_RELR, _DT_RELRSZ, _U64)):
        if offset > len(image) - 8:
            raise ElfError(f"relocation at {offset:#x} is outside the image")
        (addend,) = _U64.unpack_from(image, offset)
        _U64.pack_into(image, offset, (base + addend) & _U64_MAX)


def _addend_tables(image: bytearray, dynamic: Mapping[int, int]) -> Iterator[bytes]:
    """Yield the tables of relocations with addends; refuse RELATIVE ones without."""
    plt_is_rel = dynamic.get(_DT_PLTREL) == _DT_REL
    plt = _dynamic_table(image, dynamic, _DT_JMPREL, _DT_PLTRELSZ, _REL if plt_is_rel else _RELA)
    without = _dynamic_table(image, dynamic, _DT_REL, _DT_RELSZ, _REL) + (plt if plt_is_rel else b"")
    for offset, info in _REL.iter_unpack(without):
        if info & 0xFFFF_FFFF == _R_X86_64_RELATIVE:
            raise ElfError("R_X86_64_RELATIVE missing addend")
        _check_skippable(info, offset, len(image) - 8)
    yield _dynamic_table(image, dynamic, _DT_RELA, _DT_RELASZ, _RELA)
    if not plt_is_rel:
        yield plt


def _check_skippable(info: int, offset: int, last: int) -> None:
    """Accept a relocation that asks for nothing; raise for what cannot be applied."""
    kind = info & 0xFFFF_FFFF
    if kind == _R_X86_64_RELATIVE:
        raise ElfError(f"relocation at {offset:#x} is outside the image, whose last word is at {last:#x}")
    if kind != _R_X86_64_NONE:
        raise ElfError(f"unsupported x86_64 relocation {kind}: link the guest with -static-pie")


def _dynamic_table(
    image: bytearray, dynamic: Mapping[int, int], address_tag: int, size_tag: int, codec: struct.Struct
) -> bytes:
    """Return a copy of a table that the dynamic section names; empty where it does not."""
    start, size = dynamic.get(address_tag, 0), dynamic.get(size_tag, 0)
    if address_tag not in dynamic or size == 0:
        return b""
    if start + size > len(image) or size % codec.size:
        raise ElfError(f"relocation table {start:#x}+{size:#x} is not inside the image")
    return bytes(image[start : start + size])


def _relr_offsets(table: bytes) -> Iterator[int]:
    """Decode packed relative relocations: an address, then bitmaps for the 63 words behind."""
    position = 0
    for (word,) in _U64.iter_unpack(table):
        if not word & 1:
            yield word
            position = word + 8
            continue
        for bit in range(63):
            if word >> (bit + 1) & 1:
                yield position + 8 * bit
        position += 63 * 8


def _read_symbols(sections: tuple[_Section, ...], data: bytes) -> list[Symbol]:
    table = next((section for section in sections if section.type == "SHT_SYMTAB"), None)
    if table is None:
        return []
    if table.link >= len(sections):
        raise ElfError("the symbol table has no string table")
    names = _section_bytes(sections[table.link], data)
    content = _section_bytes(table, data)
    symbols = [
        Symbol(_string_at(names, name), value, size)
        for name, info, _, section, value, size in _SYM.iter_unpack(content)
        if info & 0xF == _STT_FUNC and section
    ]
    return sorted(symbols, key=lambda symbol: (symbol.offset, symbol.name))


# ======================================================================================
# Input and output stacks (spec: abi.md 9)
# ======================================================================================

EMPTY_IO_STACK: Final = 8  # the stack pointer of an empty stack: right behind itself
_BOTTOM: Final = _U64.pack(EMPTY_IO_STACK)  # an empty stack's pointer; the back-pointer of its first message
_U32_MAX: Final = 0xFFFF_FFFF


class IoStack:
    """A stack of size-prefixed messages in memory that the guest shares.

        0     u64  stack pointer: offset of the first free byte
        8     message, then the offset at which it begins (u64), then the next message ...

    All offsets count from the begin of the stack. The guest can write anything at any time between
    two calls: each number is read once and checked. An operation that fails has changed nothing.
    """

    def __init__(self, memory: SharedMemory, offset: int, size: int) -> None:
        """Use the `size` bytes at `offset`; `reset` makes an empty stack of them.

        Raises:
            BoundsCheckFailed: the range is not inside the memory.
            LayoutError: the stack could not hold an empty message.
        """
        if offset < 0 or offset + size > memory.size:
            raise BoundsCheckFailed(offset, size, memory.size)
        if size < 2 * EMPTY_IO_STACK:
            raise LayoutError(f"an I/O buffer of {size} bytes cannot hold a message")
        self._memory = memory
        self._view = memory.view(offset, size)
        self._top = self._view[:EMPTY_IO_STACK].cast("Q")  # the stack pointer
        self._size = size

    @property
    def is_empty(self) -> bool:
        """Whether the stack pointer says that nothing is there."""
        return bool(self._memory.open_view(self._top)[0] == EMPTY_IO_STACK)

    def reset(self) -> None:
        """Make the stack empty by setting its stack pointer; nothing else is touched."""
        self._memory.open_view(self._top)[0] = EMPTY_IO_STACK

    def replace(self, data: bytes) -> None:
        """Make a message the only one, whatever the guest has left there: `reset` and `push` at once.

        Raises:
            IoStackFull: the message does not fit.
        """
        end = EMPTY_IO_STACK + len(data)
        if end + 8 > self._size:
            self._refuse_push(data, EMPTY_IO_STACK)
        if self._memory._limit < 0:  # as `open_view`: on the path of every guest call
            self._memory.open_view(self._view)
        self._top[0] = end + 8
        self._view[EMPTY_IO_STACK : end + 8] = data + _BOTTOM

    def push(self, data: bytes) -> None:
        """Put a message on top. One of less than 8 bytes could not be popped again.

        Raises:
            IoStackError: the stack pointer is not inside the buffer.
            IoStackFull: the message does not fit.
        """
        view = self._memory.open_view(self._view)
        top = self._top[0]
        if not EMPTY_IO_STACK <= top <= self._size:
            raise IoStackError(
                "Unable to push data to buffer: Stack pointer is out of bounds. "
                f"Stack pointer: {top}, Buffer size: {self._size}"
            )
        end = top + len(data)
        if end + 8 > self._size:
            self._refuse_push(data, top)
        view[top : end + 8] = data + _U64.pack(top)
        self._top[0] = end + 8

    def pop(self) -> bytes:
        """Take the message on top, size prefix included, and zero the bytes it leaves.

        Raises:
            IoStackError: the stack is empty or corrupt; it stays as it is.
        """
        view = self._view
        if self._memory._limit < 0:  # as `open_view`: on the path of every guest call
            self._memory.open_view(view)
        top = self._top[0]
        if not 2 * EMPTY_IO_STACK <= top <= self._size:
            raise IoStackError(
                "Unable to pop data from buffer: Stack pointer is out of bounds. "
                f"Stack pointer: {top}, Buffer size: {self._size}"
            )
        (element,) = _U64.unpack_from(view, top - 8)
        if not EMPTY_IO_STACK <= element <= top - 16:
            raise IoStackError(
                f"Corrupt buffer back-pointer: element offset {element} "
                f"is outside valid range [8, {top - 16}]."
            )
        data = bytes(view[element : top - 8])
        claimed: int = _U32.unpack_from(data)[0] + 4
        if claimed != len(data):
            data = self._claimed_part(data, claimed)
        self._top[0] = element
        view[element:top] = bytes(top - element)
        return data

    def drain(self) -> None:
        """Pop until the stack is empty or corrupt. Each pop lowers the stack pointer: this ends."""
        if self._memory.open_view(self._top)[0] == EMPTY_IO_STACK:  # as nearly always
            return
        with suppress(IoStackError):
            while not self.is_empty:
                self.pop()

    def _refuse_push(self, data: bytes, top: int) -> NoReturn:
        available = self._size - top
        raise IoStackFull(
            f"Not enough space in buffer to push data. Required: {len(data) + 8}, Available: {available}"
        )

    @staticmethod
    def _claimed_part(slot: bytes, claimed: int) -> bytes:
        """Return the part of an element's slot that its size prefix claims; the guest may have padded it."""
        if claimed > _U32_MAX:
            raise IoStackError(
                f"Corrupt buffer size prefix: value {claimed - 4} overflows when adding 4-byte header."
            )
        if claimed > len(slot):
            raise IoStackError(
                f"Corrupt buffer size prefix: flatbuffer claims {claimed} bytes "
                f"but the element slot is only {len(slot)} bytes."
            )
        return slot[:claimed]


# ======================================================================================
# Messages: what travels in the I/O buffers (spec: abi.md 10)
# ======================================================================================

# ======================================================================================
# messages
# ======================================================================================
#
# What travels in the I/O buffers is FlatBuffers, written and read by hand. In this order:
#
#   types     the enums, the wrapper classes, and the rule from a Python value to its wire type
#   messages  one named tuple per message, and a function each way
#   schema    every table of the protocol as data; a message is a nest of tuples in slot order
#   writing   _Builder lays a message out from its last byte to its first. The layout depends on
#             types and lengths alone, so for calls and results it is made once per shape and kept
#             as a _Plan: constant bytes with holes, filled by one Struct.pack.
#   reading   _Reader checks each offset, length and alignment before it follows it, and bounds
#             the work that a hostile message can cause. Results that are laid out as the
#             reference does take a shortcut to the same answer.
#
# A message is bytes: a u32 length of what follows, then the FlatBuffer, and nothing after it (the
# host pops exactly that much). Alignment counts from the first byte of the length.
# Spec: abi.md section 10.

_Buffer = bytes | bytearray | memoryview


# ---- types -----------------------------------------------------------------------------


class ParameterType(IntEnum):
    """Name the wire type of a parameter. Spec: abi.md 10.2."""

    Int = 0
    UInt = 1
    Long = 2
    ULong = 3
    Float = 4
    Double = 5
    String = 6
    Bool = 7
    VecBytes = 8


class ReturnType(IntEnum):
    """Name the wire type of a return value; 0 to 7 agree with ParameterType. Spec: abi.md 10.2."""

    Int = 0
    UInt = 1
    Long = 2
    ULong = 3
    Float = 4
    Double = 5
    String = 6
    Bool = 7
    Void = 8
    VecBytes = 9


class FunctionCallType(IntEnum):
    """Say who is called. The wire's 0 (none) is not a call and has no member. Spec: abi.md 10.2."""

    Guest = 1
    Host = 2


_GUEST_CALL: Final = FunctionCallType.Guest  # a member of an enum is slow to look up


class ErrorCode(IntEnum):
    """Name the errors a guest reports, in the reference's spelling. Spec: abi.md 11.1.

    ErrorCode(n) is UnknownError for every unassigned number n.
    """

    NoError = 0
    UnsupportedParameterType = 2
    GuestFunctionNameNotProvided = 3
    GuestFunctionNotFound = 4
    GuestFunctionIncorrecNoOfParameters = 5
    GispatchFunctionPointerNotSet = 6
    OutbError = 7
    UnknownError = 8
    GsCheckFailed = 10
    TooManyGuestFunctions = 11
    FailureInDlmalloc = 12
    MallocFailed = 13
    GuestFunctionParameterTypeMismatch = 14
    GuestError = 15
    ArrayLengthParamIsMissing = 16
    HostFunctionError = 17

    @classmethod
    def _missing_(cls, value: object) -> ErrorCode | None:
        return cls.UnknownError if isinstance(value, int) else None


class GuestLogLevel(IntEnum):
    """Name the level of a guest's log record (None_ is the wire's "None"). Spec: abi.md 11.2."""

    Trace = 0
    Debug = 1
    Information = 2
    Warning = 3
    Error = 4
    Critical = 5
    None_ = 6


class _Integer(int):
    """An int that knows its wire type; arithmetic gives plain ints."""

    minimum: ClassVar[int]
    maximum: ClassVar[int]

    def __new__(cls, value: SupportsIndex) -> _Integer:
        if isinstance(value, bool) or not hasattr(value, "__index__"):  # a bool is not a number here
            _refuse(cls.__name__, "an int", value)
        number = operator.index(value)
        if not cls.minimum <= number <= cls.maximum:
            raise ValueRangeError(
                f"{cls.__name__} must be between {cls.minimum} and {cls.maximum}, got {_show(number)}"
            )
        return super().__new__(cls, number)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({int(self)})"

    __str__ = int.__repr__


class Int(_Integer):
    """A signed 32-bit integer. Raises ValueRangeError when the value does not fit."""

    minimum, maximum = -(1 << 31), (1 << 31) - 1


class UInt(_Integer):
    """An unsigned 32-bit integer. Raises ValueRangeError when the value does not fit."""

    minimum, maximum = 0, (1 << 32) - 1


class Long(_Integer):
    """A signed 64-bit integer. Raises ValueRangeError when the value does not fit."""

    minimum, maximum = -(1 << 63), (1 << 63) - 1


class ULong(_Integer):
    """An unsigned 64-bit integer. Raises ValueRangeError when the value does not fit."""

    minimum, maximum = 0, (1 << 64) - 1


class _Real(float):
    """A float that knows its wire type; arithmetic gives plain floats."""

    _wire: ClassVar[struct.Struct]

    def __new__(cls, value: SupportsFloat | SupportsIndex) -> _Real:
        if isinstance(value, bool) or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
            _refuse(cls.__name__, "a float", value)
        try:
            rounded = cls._wire.unpack(cls._wire.pack(float(value)))[0]
        except OverflowError:
            raise ValueRangeError(f"{cls.__name__} cannot hold a number as large as {_show(value)}") from None
        return super().__new__(cls, rounded)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({float(self)})"

    __str__ = float.__repr__


class Float(_Real):
    """A number rounded to 32-bit precision. Raises ValueRangeError when it would become infinite."""

    _wire = struct.Struct("<f")


class Double(_Real):
    """A 64-bit floating point number."""

    _wire = struct.Struct("<d")


def _show(value: object) -> str:
    """Spell a value within 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print an int of more than 4300 digits
        text = f"a huge {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(wire_type: str, needed: str, value: object) -> NoReturn:
    got = "None" if value is None else f"{type(value).__name__} {_show(value)}"
    raise ValueRangeError(f"{wire_type} needs {needed}, got {got}")


_WIRE_TYPES: dict[type, ParameterType] = {
    **{wrapper: ParameterType[wrapper.__name__] for wrapper in (Int, UInt, Long, ULong, Float, Double)},
    bool: ParameterType.Bool,
    float: ParameterType.Double,
    str: ParameterType.String,
    bytes: ParameterType.VecBytes,
    bytearray: ParameterType.VecBytes,
    memoryview: ParameterType.VecBytes,
}


_PLAIN_INTEGERS = [(wrapper.minimum, wrapper.maximum, _WIRE_TYPES[wrapper]) for wrapper in (Int, Long, ULong)]


def wire_type_of(value: object) -> ParameterType:
    """Return the wire type under which a Python value travels.

    A wrapper names its own. A plain int is Int where it fits, else Long, else ULong;
    float is Double; bool, str and bytes-like are themselves; subclasses go as their base.
    Raises: ValueRangeError for an int past 64 bits, or for a value of any other type.
    """
    if type(value) is not int:  # of which there are more than of anything else
        if (wire_type := _WIRE_TYPES.get(type(value))) is not None:
            return wire_type
        for base in type(value).__mro__:
            if base in _WIRE_TYPES:
                return _WIRE_TYPES[base]
        if not isinstance(value, int):
            raise ValueRangeError(f"no wire type for {type(value).__name__} {_show(value)}")
    for minimum, maximum, wire_type in _PLAIN_INTEGERS:
        if minimum <= value <= maximum:
            return wire_type
    raise ValueRangeError(
        f"an integer must be between {Long.minimum} and {ULong.maximum}, got {_show(value)}"
    )


_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\0": "\\0"}
_SPELL_LIMIT = 64  # characters or bytes of a payload that an error message shows


def spell_parameter(wire_type: ParameterType, value: Any) -> str:
    """Spell a parameter as the reference's messages do: `Int(1)`, `String("x")`, `Bool(true)`.

    Strings and bytes longer than 64 are cut and end in `...`. Spec: abi.md 7.3.
    """
    if wire_type is ParameterType.String:
        shown = "".join(
            _ESCAPES.get(c) or (c if c.isprintable() else f"\\u{{{ord(c):x}}}") for c in value[:_SPELL_LIMIT]
        )
        text = f'"{shown}"'
    elif wire_type is ParameterType.VecBytes:
        text = str(list(value[:_SPELL_LIMIT]))
    elif wire_type is ParameterType.Bool:
        return f"Bool({str(value).lower()})"
    else:
        return f"{wire_type.name}({'NaN' if value != value else value})"
    return f"{wire_type.name}({text}{'...' if len(value) > _SPELL_LIMIT else ''})"


# ---- messages --------------------------------------------------------------------------
#
# Every decoder raises InvalidFlatBuffer, and nothing else, whatever bytes it is given. Every
# encoder raises ValueRangeError for a value that its field cannot hold.


class FunctionCall(NamedTuple):
    """A call of a guest or host function; values are plain Python values. Spec: abi.md 10.3."""

    name: str
    parameters: tuple[tuple[ParameterType, Any], ...]
    call_type: FunctionCallType
    return_type: ReturnType


class ReturnValue(NamedTuple):
    """What a function returned; the value of Void is None. Spec: abi.md 10.4."""

    type: ReturnType
    value: Any


class GuestErrorResult(NamedTuple):
    """What a function failed with, in place of a value. Spec: abi.md 10.4."""

    code: ErrorCode
    message: str


class GuestLogData(NamedTuple):
    """One log record of a guest. Spec: abi.md 10.7."""

    message: str
    source: str
    level: GuestLogLevel
    caller: str
    source_file: str
    line: int


class KeyValue(NamedTuple):
    """One field of a trace event."""

    key: str
    value: str


class OpenSpan(NamedTuple):
    """A trace span begins, in `parent` if that is not None; tsc is the guest's time stamp counter."""

    id: int
    parent: int | None
    name: str
    target: str
    tsc: int
    fields: tuple[KeyValue, ...] = ()


class CloseSpan(NamedTuple):
    """A trace span ends."""

    id: int
    tsc: int


class LogEvent(NamedTuple):
    """Something happened in the span `parent_id`."""

    parent_id: int
    name: str
    tsc: int
    fields: tuple[KeyValue, ...] = ()


class EditSpan(NamedTuple):
    """Fields are added to the span `id`."""

    id: int
    fields: tuple[KeyValue, ...] = ()


class GuestStart(NamedTuple):
    """The guest's clock starts at `tsc`."""

    tsc: int


TraceEvent = OpenSpan | CloseSpan | LogEvent | EditSpan | GuestStart


class HostFunctionDefinition(NamedTuple):
    """The signature of a host function; a library type, not sent by 0.14. Spec: abi.md 10.6."""

    name: str
    parameters: tuple[ParameterType, ...]
    return_type: ReturnType


def encode_function_call(
    name: str,
    parameters: Iterable[tuple[ParameterType, Any]],
    call_type: FunctionCallType,
    return_type: ReturnType,
) -> bytes:
    """Encode a call. Each value is checked against the type it is paired with.

    Raises: ValueRangeError when a value does not fit, or a string cannot be encoded.
    Spec: abi.md 10.3.
    """
    shape: list[Any] = [name, call_type, return_type]
    filling: list[Any] = []
    for wire_type, value in parameters:
        extent, own = _PARAMETER_LEAVES[wire_type](value)
        shape += wire_type, extent
        filling += own
    filling.reverse()  # the layout grows from its end: the first parameter has the highest address
    return _call_plan(*shape).fill(filling)


def encode_guest_call(name: str, values: Iterable[Any], return_type: ReturnType) -> bytes:
    """Encode a call of a guest function; each value travels under its `wire_type_of`. Raises as both do."""
    shape: list[Any] = [name, _GUEST_CALL, return_type]
    filling: list[Any] = []
    for value in values:
        wire_type = _WIRE_TYPES.get(type(value))
        if wire_type is None:
            wire_type = wire_type_of(value)
        extent, own = _PARAMETER_LEAVES[wire_type](value)
        shape += wire_type, extent
        filling += own
    filling.reverse()  # as in encode_function_call
    return _call_plan(*shape).fill(filling)


def decode_function_call(data: _Buffer) -> FunctionCall:
    """Decode a call. Spec: abi.md 10.3."""
    if type(data) is not bytes:
        data = bytes(data)
    known = _KNOWN_CALLS.get((len(data), data[_CALL_KEY]))
    call = known.read(data) if known is not None else None
    if call is None:
        call = _decode_any_call(data)
        _remember_call(data, call)
    return call


def encode_return_value(return_type: ReturnType, value: Any) -> bytes:
    """Encode what a function returned; the value of Void is None.

    Raises: ValueRangeError when the value does not fit `return_type`. Spec: abi.md 10.4.
    """
    extent, filling = _RETURN_LEAVES[return_type](value)
    return _result_plan(return_type, extent).fill(filling)


def encode_guest_error(code: ErrorCode, message: str) -> bytes:
    """Encode what a function failed with, in place of a value. Spec: abi.md 10.4."""
    return _encode(_RESULT, (2, (code, message)))


def decode_function_call_result(data: _Buffer) -> ReturnValue | GuestErrorResult:
    """Decode what a function returned or failed with. Spec: abi.md 10.4."""
    if type(data) is not bytes:
        data = bytes(data)
    shortcut = _RESULT_SHORTCUTS.get(data[_SHORTCUT_KEY])
    result = shortcut(data) if shortcut is not None else None
    return _decode_any_result(data) if result is None else result


def encode_guest_log_data(record: GuestLogData) -> bytes:
    """Encode a log record. Spec: abi.md 10.7."""
    return _encode(_GUEST_LOG_DATA, record)


def decode_guest_log_data(data: _Buffer) -> GuestLogData:
    """Decode a log record; all four strings must be there. Spec: abi.md 10.7."""
    record = GuestLogData(*_decode(_GUEST_LOG_DATA, data))
    return record._replace(level=_member(GuestLogLevel, record.level, "GuestLogData.level"))


def encode_key_value(pair: KeyValue) -> bytes:
    """Encode one key and value as a message of their own. Spec: abi.md 10.8."""
    return _encode(_KEY_VALUE, pair)


def decode_key_value(data: _Buffer) -> KeyValue:
    """Decode one key and value. Spec: abi.md 10.8."""
    return KeyValue(*_decode(_KEY_VALUE, data))


def encode_trace_event(event: TraceEvent) -> bytes:
    """Encode one trace event in its envelope; a batch is a concatenation of these. Spec: abi.md 10.8."""
    return _encode(_ENVELOPE, (_TRACE_EVENT_NUMBERS[type(event)], event))


def decode_trace_batch(data: _Buffer) -> list[TraceEvent]:
    """Decode a batch of trace events. Spec: abi.md 10.8."""
    data = bytes(data)
    events: list[TraceEvent] = []
    position = 0
    while position < len(data):
        if position + 4 > len(data):
            raise InvalidFlatBuffer(f"trace batch: {len(data) - position} bytes after the last event")
        end: int = position + 4 + _U32.unpack_from(data, position)[0]
        events.append(_decode_trace_event(data[position:end]))
        position = end
    return events


def encode_host_function_definition(definition: HostFunctionDefinition) -> bytes:
    """Encode the signature of a host function. Spec: abi.md 10.6."""
    return _encode(_HOST_FUNCTION, _host_function_row(definition))


def decode_host_function_definition(data: _Buffer) -> HostFunctionDefinition:
    """Decode the signature of a host function. Spec: abi.md 10.6."""
    return _host_function(*_decode(_HOST_FUNCTION, data))


def encode_host_function_details(definitions: Iterable[HostFunctionDefinition]) -> bytes:
    """Encode the signatures of host functions, in the order given. Spec: abi.md 10.6."""
    return _encode(_HOST_FUNCTIONS, (tuple(map(_host_function_row, definitions)),))


def decode_host_function_details(data: _Buffer) -> tuple[HostFunctionDefinition, ...]:
    """Decode the signatures of host functions. Spec: abi.md 10.6."""
    (rows,) = _decode(_HOST_FUNCTIONS, data)
    return tuple(_host_function(*row) for row in rows)


# Unions count from 1, because 0 is NONE; the enums of the same types count from 0.
_PARAMETER_TYPES = dict(enumerate(ParameterType, 1))
_RETURN_TYPES = dict(enumerate(ReturnType, 1))
_TRACE_EVENTS: dict[int, type[TraceEvent]] = dict(
    enumerate((OpenSpan, CloseSpan, LogEvent, EditSpan, GuestStart), 1)
)
_TRACE_EVENT_NUMBERS = {event: number for number, event in _TRACE_EVENTS.items()}


def _decode_trace_event(data: bytes) -> TraceEvent:
    number, values = _decode(_ENVELOPE, data)
    event = _TRACE_EVENTS[number](*values)
    if isinstance(event, (CloseSpan, GuestStart)):
        return event
    return event._replace(fields=tuple(KeyValue(*pair) for pair in event.fields))


def _host_function_row(definition: HostFunctionDefinition) -> tuple[Any, ...]:
    return definition.name, bytes(definition.parameters), definition.return_type


def _host_function(name: str, parameters: bytes, return_type: int) -> HostFunctionDefinition:
    return HostFunctionDefinition(
        name,
        tuple(_member(ParameterType, each, "HostFunctionDefinition.parameters") for each in parameters),
        _member(ReturnType, return_type, "HostFunctionDefinition.return_type"),
    )


# ---- schema ----------------------------------------------------------------------------

_STRING, _BYTES = "string", "vector of bytes"


class _Field(NamedTuple):
    name: str
    kind: struct.Struct | str | _Vector | _Union  # a Struct is a scalar; str is _STRING or _BYTES
    absent: Any = None  # what decoding gives where the field is not there
    required: bool = False
    nullable: bool = False  # a scalar whose zero is written, because absent means None
    where: str = ""  # "Table.field", for errors; set by _Table


class _Table:
    """One table of the schema: its fields by slot, and the order in which they are written."""

    def __init__(self, name: str, *fields: _Field, order: tuple[int, ...] | None = None) -> None:
        self.name = name
        self.fields = tuple(field._replace(where=f"{name}.{field.name}") for field in fields)
        self.order = order or tuple(range(len(fields)))
        # By how many of these fields a vtable tells about: their offsets, behind the two sizes.
        self.vtables = [struct.Struct(f"<4x{count}H") for count in range(len(fields) + 1)]


class _Vector(NamedTuple):
    """A vector of offsets to tables."""

    element: _Table


class _Union(NamedTuple):
    """A table chosen by the u8 in the slot before; 0 is NONE, so they count from 1."""

    tables: dict[int, _Table]


def _scalar(name: str, code: str, *, nullable: bool = False) -> _Field:
    zero = {"?": False, "f": 0.0, "d": 0.0}.get(code, 0)
    return _Field(name, struct.Struct("<" + code), None if nullable else zero, nullable=nullable)


def _string(name: str, *, required: bool = False) -> _Field:
    return _Field(name, _STRING, "", required)


def _bytes(name: str) -> _Field:
    return _Field(name, _BYTES, b"")


def _tables(name: str, element: _Table) -> _Field:
    return _Field(name, _Vector(element), ())


def _union(name: str, *tables: _Table) -> tuple[_Field, _Field]:
    return _scalar(f"{name}_type", "B"), _Field(name, _Union(dict(enumerate(tables, 1))), required=True)


_SCALAR_CODES = {
    "Int": "i", "UInt": "I", "Long": "q", "ULong": "Q", "Float": "f", "Double": "d", "Bool": "?",
}  # fmt: skip
# The first eight parameter and return types, in the order of their numbers.
_SHARED_VALUES = tuple(
    _Table(f"hl{kind.name.lower()}", _string("value") if kind.name == "String"
           else _scalar("value", _SCALAR_CODES[kind.name]))
    for kind in list(ParameterType)[:8]
)  # fmt: skip
_PARAMETER_VALUES = (*_SHARED_VALUES, _Table("hlvecbytes", _bytes("value")))
_RETURN_VALUES = (
    *_SHARED_VALUES,
    _Table("hlvoid"),
    _Table("hlsizeprefixedbuffer", _scalar("size", "i"), _bytes("value"), order=(1, 0)),
)

_PARAMETER = _Table("Parameter", *_union("value", *_PARAMETER_VALUES), order=(1, 0))
_FUNCTION_CALL = _Table(
    "FunctionCall",
    _string("function_name", required=True),
    _tables("parameters", _PARAMETER),
    _scalar("function_call_type", "B"),
    _scalar("expected_return_type", "B"),
    order=(1, 0, 3, 2),
)
_RETURN_VALUE_BOX = _Table("ReturnValueBox", *_union("value", *_RETURN_VALUES), order=(1, 0))
_GUEST_ERROR = _Table("GuestError", _scalar("code", "Q"), _string("message"))
_RESULT = _Table("FunctionCallResult", *_union("result", _RETURN_VALUE_BOX, _GUEST_ERROR), order=(1, 0))
_GUEST_LOG_DATA = _Table(
    "GuestLogData",
    _string("message", required=True),  # required by the decoders, optional in the schema; so the
    _string("source", required=True),  # other three strings
    _scalar("level", "B"),
    _string("caller", required=True),
    _string("source_file", required=True),
    _scalar("line", "I"),
    order=(5, 4, 3, 1, 0, 2),
)
_KEY_VALUE = _Table("KeyValue", _string("key", required=True), _string("value", required=True), order=(1, 0))
_OPEN_SPAN = _Table(
    "OpenSpanType",
    _scalar("id", "Q"),
    _scalar("parent", "Q", nullable=True),
    _string("name", required=True),
    _string("target", required=True),
    _scalar("tsc", "Q"),
    _tables("fields", _KEY_VALUE),
    order=(4, 1, 0, 5, 3, 2),
)
_CLOSE_SPAN = _Table("CloseSpanType", _scalar("id", "Q"), _scalar("tsc", "Q"), order=(1, 0))
_LOG_EVENT = _Table(
    "LogEventType",
    _scalar("parent_id", "Q"),
    _string("name", required=True),
    _scalar("tsc", "Q"),
    _tables("fields", _KEY_VALUE),
    order=(2, 0, 3, 1),
)
_EDIT_SPAN = _Table("EditSpanType", _scalar("id", "Q"), _tables("fields", _KEY_VALUE))
_GUEST_START = _Table("GuestStartType", _scalar("tsc", "Q"))
_ENVELOPE = _Table(
    "GuestEventEnvelopeType",
    *_union("event", _OPEN_SPAN, _CLOSE_SPAN, _LOG_EVENT, _EDIT_SPAN, _GUEST_START),
    order=(1, 0),
)
_HOST_FUNCTION = _Table(
    "HostFunctionDefinition",
    _string("function_name", required=True),
    _bytes("parameters"),
    _scalar("return_type", "B"),
    order=(1, 0, 2),
)
_HOST_FUNCTIONS = _Table("HostFunctionDetails", _tables("functions", _HOST_FUNCTION))


# ---- writing ---------------------------------------------------------------------------

_MAX_MESSAGE_SIZE = (1 << 31) - 1  # bytes; table offsets are signed 32-bit
_PLAN_COUNT = 512  # shapes remembered for calls, and as many for results
_OMITTED: tuple[int, tuple[Any, ...]] = (0, ())


class _Hole(int):
    """Stands for a value that is filled in later; as an int it is the value's extent.

    That is all the layout needs to know of it: 0 for a scalar that is omitted as the default,
    1 for any other scalar, the length in bytes for a string or vector.
    """


class _Plan:
    """A message whose values are still to be filled in: constant bytes, hole, constant bytes, ..."""

    def __init__(self, codes: list[str], arguments: list[Any]) -> None:
        self._parts: list[Any] = []
        layout = run_codes = "<"
        run: list[Any] = []
        # One more hole closes the last run of constant bytes; it is dropped again below.
        for code, argument in zip((*codes, ""), (*arguments, _Hole()), strict=True):
            if not isinstance(argument, _Hole):
                run_codes += code
                run.append(argument)
                continue
            constant = struct.Struct(run_codes).pack(*run)
            self._parts += [constant, None]
            layout += f"{len(constant)}s{code}"
            run_codes, run = "<", []
        self._parts.pop()
        codec = struct.Struct(layout)
        self._pack, self.unpack = codec.pack, codec.unpack
        self.constants = tuple(self._parts[::2])
        self.header: bytes = self._parts[0]  # all before the first hole
        self._rest = self.constants[-1]

    def fill(self, values: Sequence[Any]) -> bytes:
        """Return the message with `values` in its holes, in the order of their addresses."""
        if len(values) == 1:  # as in most calls and results
            return self._pack(self.header, values[0], self._rest)
        parts = self._parts.copy()
        parts[1::2] = values
        return self._pack(*parts)


class _Builder:
    """Lays out one message from its last byte to its first, as FlatBuffers are built.

    A position is the distance from the end of the message, so it stays valid while the front
    grows. Spec: abi.md 10.10.
    """

    def __init__(self) -> None:
        self._codes: list[str] = []  # struct codes and their arguments, last bytes first
        self._arguments: list[Any] = []
        self._size = 0
        self._alignment = 4
        self._vtables: dict[bytes, int] = {}

    def finish(self, table: _Table, values: tuple[Any, ...]) -> _Plan:
        """Lay out a whole message around its root table."""
        root = self._table(table, values)
        self._align(self._alignment, 8)  # the root offset and the size prefix come before the rest
        self._offset(root)
        self._put("I", 4, self._size)
        if self._size > _MAX_MESSAGE_SIZE:
            raise ValueRangeError(f"a message of {self._size} bytes is longer than {_MAX_MESSAGE_SIZE} bytes")
        return _Plan(self._codes[::-1], self._arguments[::-1])

    def _put(self, code: str, size: int, argument: Any) -> None:
        self._codes.append(code)
        self._arguments.append(argument)
        self._size += size

    def _align(self, alignment: int, following: int) -> None:
        """Pad so that the position is aligned once `following` more bytes are put."""
        self._alignment = max(self._alignment, alignment)
        padding = -(self._size + following) % alignment
        if padding:
            self._put(f"{padding}s", padding, b"")

    def _offset(self, target: int) -> None:
        self._align(4, 4)
        self._put("I", 4, self._size + 4 - target)

    def _blob(self, content: bytes | _Hole, terminator: bytes) -> int:
        size = content if isinstance(content, _Hole) else len(content)
        self._align(4, size + len(terminator))
        self._put(f"{len(terminator)}s", len(terminator), terminator)
        self._put(f"{size}s", size, content)
        self._put("I", 4, int(size))
        return self._size

    def _vector(self, element: _Table, rows: tuple[Any, ...]) -> int:
        targets = [self._table(element, row) for row in rows]
        for target in reversed(targets):
            self._offset(target)
        self._put("I", 4, len(targets))
        return self._size

    def _child(self, field: _Field, value: Any, discriminant: Any) -> int | None:
        """Lay out what a field points to and return its position; None where it points to nothing."""
        kind = field.kind
        if isinstance(kind, struct.Struct):
            return None  # a scalar lies in the table itself
        if isinstance(kind, _Vector):
            return self._vector(kind.element, value) if value else None
        if isinstance(kind, _Union):
            return self._table(kind.tables[discriminant], value)
        if kind == _BYTES:
            return self._blob(value, b"")
        return self._blob(value if isinstance(value, _Hole) else _utf8(value), b"\0")

    def _table(self, table: _Table, values: tuple[Any, ...]) -> int:
        fields = table.fields
        children = [
            self._child(field, value, values[slot - 1])
            for slot, (field, value) in enumerate(zip(fields, values, strict=True))
        ]
        end = self._size
        positions = [0] * len(fields)
        for slot in table.order:
            if self._inline(fields[slot], values[slot], children[slot]):
                positions[slot] = self._size
        return self._vtable(positions, end)

    def _inline(self, field: _Field, value: Any, child: int | None) -> bool:
        """Put what lies in the table itself: a scalar or an offset. False: the field is omitted."""
        if child is not None:
            self._offset(child)
            return True
        is_written = value is not None if field.nullable else bool(value)
        if isinstance(field.kind, struct.Struct) and is_written:
            self._align(field.kind.size, field.kind.size)
            self._put(field.kind.format[1:], field.kind.size, value)
            return True
        return False

    def _vtable(self, positions: list[int], end: int) -> int:
        """Put the offset that starts a table, and its vtable unless an equal one is there already."""
        self._align(4, 4)
        start = self._size + 4
        while positions and not positions[-1]:
            positions.pop()
        slots = [start - position if position else 0 for position in positions]
        size = 4 + 2 * len(slots)
        vtable = struct.pack(f"<{2 + len(slots)}H", size, start - end, *slots)
        known = self._vtables.setdefault(vtable, start + size)
        self._put("i", 4, known - start)
        if known == start + size:
            self._put(f"{size}s", size, vtable)
        return start


def _encode(table: _Table, values: tuple[Any, ...]) -> bytes:
    try:
        return _Builder().finish(table, values).fill(())
    except struct.error as error:
        raise ValueRangeError(f"{table.name}: a number does not fit its field: {error}") from error


def _utf8(value: object) -> bytes:
    if not isinstance(value, str):
        _refuse("String", "a str", value)
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise ValueRangeError(f"String is not valid Unicode: lone surrogate at index {error.start}") from None


# A leaf function checks a value and returns what the layout depends on (see _Hole) and what fills the hole.
_Leaf = Callable[[Any], tuple[int, tuple[Any, ...]]]


def _integer_leaf(wrapper: type[_Integer]) -> _Leaf:
    minimum, maximum = wrapper.minimum, wrapper.maximum

    def leaf(value: Any) -> tuple[int, tuple[Any, ...]]:
        if type(value) is not int or not minimum <= value <= maximum:
            value = wrapper(value)
        return (1, (value,)) if value else _OMITTED

    return leaf


def _real_leaf(wrapper: type[_Real]) -> _Leaf:
    def leaf(value: Any) -> tuple[int, tuple[Any, ...]]:
        if type(value) is not wrapper:
            value = wrapper(value)
        # Minus zero is written, unlike the reference, which omits it and so loses the sign.
        return (1, (value,)) if value or math.copysign(1.0, value) < 0 else _OMITTED

    return leaf


def _bool_leaf(value: Any) -> tuple[int, tuple[Any, ...]]:
    if not isinstance(value, bool):
        _refuse("Bool", "a bool", value)
    return (1, (True,)) if value else _OMITTED


def _string_leaf(value: Any) -> tuple[int, tuple[Any, ...]]:
    content = value.encode() if type(value) is str and value.isascii() else _utf8(value)
    return len(content), (content,)


def _bytes_leaf(value: Any) -> tuple[int, tuple[Any, ...]]:
    if not isinstance(value, (bytes, bytearray, memoryview)):
        _refuse("VecBytes", "bytes", value)
    content = bytes(value)
    return len(content), (content,)


def _void_leaf(value: Any) -> tuple[int, tuple[Any, ...]]:
    if value is not None:
        _refuse("Void", "None", value)
    return _OMITTED


_SHARED_LEAVES: tuple[_Leaf, ...] = (
    *map(_integer_leaf, (Int, UInt, Long, ULong)),
    *map(_real_leaf, (Float, Double)),
    _string_leaf,
    _bool_leaf,
)
_PARAMETER_LEAVES = (*_SHARED_LEAVES, _bytes_leaf)
_RETURN_LEAVES = (*_SHARED_LEAVES, _void_leaf, _bytes_leaf)


@lru_cache(_PLAN_COUNT)
def _call_plan(name: str, call_type: int, return_type: int, *shape: int) -> _Plan:
    """Plan a call; `shape` is the type and the extent (see _Hole) of each parameter in turn."""
    pairs = zip(shape[::2], shape[1::2], strict=True)
    parameters = tuple((wire_type + 1, (_Hole(extent),)) for wire_type, extent in pairs)
    return _Builder().finish(_FUNCTION_CALL, (name, parameters, call_type, return_type))


@lru_cache(_PLAN_COUNT)
def _result_plan(return_type: int, extent: int) -> _Plan:
    """Plan a return value; `extent` as in _Hole."""
    if return_type == ReturnType.Void:
        value: tuple[int, ...] = ()
    elif return_type == ReturnType.VecBytes:
        value = (extent, _Hole(extent))
    else:
        value = (_Hole(extent),)
    return _Builder().finish(_RESULT, (1, (return_type + 1, value)))


# ---- reading ---------------------------------------------------------------------------

_MAX_TABLES = 1 << 16  # per message; the reference's 1,000,000 would be seconds of Python
_I32 = struct.Struct("<i")


class _Reader:
    """Reads one message, and believes nothing in it. The schema does not recurse: depth is at most 4.

    Parts of a message may be shared or overlap, so its size alone does not bound the work. As in
    the reference, strings and vectors are counted as often as they are visited, against a budget:
    here 1 MiB or 4 times the message, whichever is more. Spec: abi.md 10.9.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._size = len(data)
        self._tables_left = _MAX_TABLES
        self._bytes_left = max(1 << 20, 4 * len(data))

    def root(self, table: _Table) -> tuple[Any, ...]:
        """Return the values of the root table, in slot order."""
        prefix = self._scalar(_U32, 0, "size prefix")
        if prefix != self._size - 4:
            raise InvalidFlatBuffer(f"size prefix: says {prefix} bytes, {self._size - 4} bytes follow it")
        return self._table(table, self._follow(4, "root"))

    def _check(self, position: int, size: int, alignment: int, where: str) -> None:
        """Require that `size` bytes at `position` lie in the message and are aligned."""
        if not 0 <= position <= self._size - size:
            raise InvalidFlatBuffer(
                f"{where}: {size} bytes at {position} are outside the message of {self._size} bytes"
            )
        if position % alignment:
            raise InvalidFlatBuffer(f"{where}: position {position} is not a multiple of {alignment}")

    def _scalar(self, kind: struct.Struct, position: int, where: str) -> Any:
        self._check(position, kind.size, kind.size, where)
        return kind.unpack_from(self._data, position)[0]

    def _follow(self, position: int, where: str) -> int:
        """Return the position that the offset at `position` points to; it may lie outside the message."""
        offset: int = self._scalar(_U32, position, where)
        return position + offset

    def _slots(self, table: _Table, position: int) -> tuple[int, ...]:
        """Return where each field of a table lies, counted from `position`; 0 means absent."""
        self._tables_left -= 1
        if self._tables_left < 0:
            raise InvalidFlatBuffer(f"{table.name}: more than {_MAX_TABLES} tables in one message")
        vtable = position - self._scalar(_I32, position, table.name)
        size = self._scalar(_U16, vtable, table.name)
        if size < 4 or size % 2:
            raise InvalidFlatBuffer(f"{table.name}: vtable of {size} bytes; the size is even and at least 4")
        self._check(vtable, size, 2, table.name)
        known = min(len(table.fields), size // 2 - 2)
        offsets = table.vtables[known].unpack_from(self._data, vtable)
        return (*offsets, *(0,) * (len(table.fields) - known))

    def _table(self, table: _Table, position: int) -> tuple[Any, ...]:
        values: list[Any] = []
        for entry, offset in zip(table.fields, self._slots(table, position), strict=True):
            if isinstance(entry.kind, _Union) and bool(values[-1]) != bool(offset):
                raise InvalidFlatBuffer(f"{entry.where}: a union has both a type and a value, or neither")
            if offset:
                values.append(self._field(entry, position + offset, values))
            elif entry.required:
                raise InvalidFlatBuffer(f"Missing field: {entry.name}")
            else:
                values.append(entry.absent)
        return tuple(values)

    def _field(self, field: _Field, position: int, before: list[Any]) -> Any:
        kind, where = field.kind, field.where
        if isinstance(kind, struct.Struct):
            return self._scalar(kind, position, where)
        target = self._follow(position, where)
        if isinstance(kind, _Union):
            chosen = kind.tables.get(before[-1])
            if chosen is None:
                raise InvalidFlatBuffer(f"{where}: unknown type {before[-1]}")
            return self._table(chosen, target)
        if isinstance(kind, _Vector):
            start, end = self._vector(target, 4, where)
            return tuple(self._table(kind.element, self._follow(at, where)) for at in range(start, end, 4))
        if kind == _STRING:
            return self._text(target, where)
        start, end = self._vector(target, 1, where)
        return self._data[start:end]

    def _vector(self, position: int, element_size: int, where: str) -> tuple[int, int]:
        """Return where the elements of a vector start and end."""
        size = self._scalar(_U32, position, where) * element_size
        self._check(position + 4, size, element_size, where)
        self._bytes_left -= size
        if self._bytes_left < 0:
            raise InvalidFlatBuffer(f"{where}: too many parts of the message overlap")
        return position + 4, position + 4 + size

    def _text(self, position: int, where: str) -> str:
        start, end = self._vector(position, 1, where)
        if self._scalar(_U8, end, where):
            raise InvalidFlatBuffer(f"{where}: string is not followed by a NUL byte")
        try:
            return self._data[start:end].decode()
        except UnicodeDecodeError as error:
            raise InvalidFlatBuffer(f"{where}: string is not UTF-8 at its byte {error.start}") from None


def _decode(table: _Table, data: _Buffer) -> tuple[Any, ...]:
    return _Reader(bytes(data)).root(table)


def _member(enum: type[IntEnum], value: int, where: str) -> Any:
    try:
        return enum(value)
    except ValueError:
        raise InvalidFlatBuffer(f"{where}: unknown value {value}") from None


def _decode_any_call(data: bytes) -> FunctionCall:
    """Decode a call of any valid layout."""
    name, parameters, call_type, return_type = _decode(_FUNCTION_CALL, data)
    return FunctionCall(
        name,
        tuple((_PARAMETER_TYPES[union_type], value[0]) for union_type, value in parameters),
        _member(FunctionCallType, call_type, "FunctionCall.function_call_type"),
        _member(ReturnType, return_type, "FunctionCall.expected_return_type"),
    )


# A guest calls the same few host functions over and over, and lays calls out as the encoder here does. So the
# plan of a call once decoded also reads the next that differs in values alone: if all constant bytes are as
# planned, the message is what the plan makes of the values in its holes, and _Reader would find just these.
_CALL_KEY = slice(-32, None)  # the function's name, mostly; with the length it tells nearly all calls apart
_MAX_KNOWN_CALLS = 256
_MAX_KNOWN_SIZE = 1024  # bytes; of a long message, reading is not what takes time


class _KnownCall:
    """Reads calls of one function, of the same types and lengths."""

    def __init__(self, plan: _Plan, call: FunctionCall, holes: Sequence[int | None]) -> None:
        """`holes` says for each parameter which of the plan's it fills, or None where it is omitted."""
        self._unpack, self._constants = plan.unpack, plan.constants
        self._call = call
        self._parameters = [
            (kind, hole, value if hole is None else None)
            for (kind, value), hole in zip(call.parameters, holes, strict=True)
        ]

    def read(self, data: bytes) -> FunctionCall | None:
        """Decode a message of the right length; None where it is laid out in another way, or is no good."""
        parts = self._unpack(data)
        if parts[::2] != self._constants:
            return None
        parameters = []
        try:
            for kind, hole, value in self._parameters:
                if hole is not None:
                    value = parts[hole].decode() if kind is _STRING_TYPE else parts[hole]
                parameters.append((kind, value))
        except UnicodeDecodeError:
            return None
        call = self._call
        return _function_call((call.name, tuple(parameters), call.call_type, call.return_type))


_STRING_TYPE: Final = ParameterType.String
_function_call = partial(tuple.__new__, FunctionCall)  # three times as fast as FunctionCall(...)
_KNOWN_CALLS: dict[tuple[int, bytes], _KnownCall] = {}


def _remember_call(data: bytes, call: FunctionCall) -> None:
    """Keep the plan of a call for the next of its kind, if there is a plan that makes it."""
    if len(data) > _MAX_KNOWN_SIZE:
        return
    shape: list[int] = []
    filling: list[Any] = []
    holes: list[int | None] = []
    for wire_type, value in call.parameters:
        extent, own = _PARAMETER_LEAVES[wire_type](value)
        shape += wire_type, extent
        holes.append(len(filling) if own else None)
        filling += own
    plan = _call_plan(call.name, call.call_type, call.return_type, *shape)
    if plan.fill(filling[::-1]) == data:
        if len(_KNOWN_CALLS) >= _MAX_KNOWN_CALLS:
            _KNOWN_CALLS.clear()
        last = 2 * len(filling) - 1  # in the plan, constants and holes take turns, and the last parameter comes first
        places = [None if hole is None else last - 2 * hole for hole in holes]
        _KNOWN_CALLS[len(data), data[_CALL_KEY]] = _KnownCall(plan, call, places)


def _decode_any_result(data: bytes) -> ReturnValue | GuestErrorResult:
    """Decode a result of any valid layout."""
    kind, body = _decode(_RESULT, data)
    if kind == 2:
        return GuestErrorResult(ErrorCode(body[0]), body[1])
    union_type, value = body
    return ReturnValue(_RETURN_TYPES[union_type], value[-1] if value else None)


# Guests lay results out as the encoder here does, and then bytes 4 to 51 tell the type. A shortcut
# compares the other bytes that this layout fixes and checks those that it does not (lengths, NUL,
# UTF-8); so it finds what _Reader would find, in a tenth of the time. It returns None for any other
# message, for _Reader to judge.
_Shortcut = Callable[[bytes], "ReturnValue | None"]
_return_value = partial(tuple.__new__, ReturnValue)
_SHORTCUT_KEY = slice(4, 52)


def _scalar_shortcut(return_type: ReturnType) -> tuple[bytes, _Shortcut]:
    header = _result_plan(return_type, 1).header
    layout = struct.Struct(f"<{len(header)}s{_SCALAR_CODES[return_type.name]}")

    def shortcut(data: bytes) -> ReturnValue | None:
        if len(data) != layout.size:
            return None
        found, value = layout.unpack(data)
        return _return_value((return_type, value)) if found == header else None

    return header, shortcut


def _zero_shortcut(return_type: ReturnType, zero: Any) -> tuple[bytes, _Shortcut]:
    message = encode_return_value(return_type, zero)
    result = ReturnValue(return_type, zero)
    return message, lambda data: result if data == message else None


def _payload_shortcut(return_type: ReturnType, fixed: slice, terminator: bytes) -> tuple[bytes, _Shortcut]:
    header = _result_plan(return_type, 1).header
    start = len(header)
    constant = header[fixed]  # what is fixed between the key and the length that ends the header
    unpack = struct.Struct(f"<I{fixed.start - 4}x{len(constant)}s{start - fixed.stop - 4}xI").unpack_from
    is_text = return_type is ReturnType.String

    def shortcut(data: bytes) -> ReturnValue | None:
        size = len(data)
        if size < start:
            return None
        prefix, found, length = unpack(data)
        end = start + length
        after = end + len(terminator)
        if found != constant or prefix + 4 != size or after > size or data[end:after] != terminator:
            return None
        try:
            return _return_value((return_type, data[start:end].decode() if is_text else data[start:end]))
        except UnicodeDecodeError:
            return None

    return header, shortcut


def _result_shortcuts() -> dict[bytes, _Shortcut]:
    zeros = (*(table.fields[0].absent for table in _SHARED_VALUES), None, b"")
    shortcuts = [
        *map(_zero_shortcut, ReturnType, zeros),
        *(_scalar_shortcut(ReturnType[name]) for name in _SCALAR_CODES),
        # An empty string has the layout of any other, so this one takes the place of its "zero" above.
        _payload_shortcut(ReturnType.String, slice(52, 64), b"\0"),
        _payload_shortcut(ReturnType.VecBytes, slice(56, 60), b""),
    ]
    return {message[_SHORTCUT_KEY]: shortcut for message, shortcut in shortcuts}


_RESULT_SHORTCUTS = _result_shortcuts()
