"""Serve a machine to gdb or lldb: the GDB remote serial protocol, with no knowledge of any machine.

Give it an object with the five methods of `Target`, and tell it when the machine stops::

    from gdb_rsp import DebugServer, Resume, Stop

    with DebugServer(machine, "127.0.0.1:0") as server:     # or "unix:/run/my.sock", or "stdio"
        print("gdb -ex 'target remote", server.address + "'")
        server.wait_for_client()
        action = server.stopped(Stop())                     # serves gdb until it says how to go on
        while action is not Resume.KILL:
            stop = machine.run(step=action is Resume.STEP)  # returns None when interrupt() was called
            action = server.attend() if stop is None else server.stopped(stop)

`examples/gdb_toy_target.py` is this loop around a complete toy machine. Anything that a target can do beyond the
five methods (debug registers, its ELF file, `monitor` commands, a restart...) is one more small
protocol, found by looking at its methods: what is not there is not offered to the debugger.

The file has four chapters, and none uses a later one::

    1  codec     bytes <-> packets: checksums, escapes, run lengths, acknowledgements   pure
    2  target    what a machine must and may be able to do                              protocols
    3  session   packets <-> replies: registers, memory, breakpoints, run control       pure
    4  server    sockets, one thread, and who may touch the machine when                all the I/O

Who may touch the machine
    One *owner* at a time: the thread that runs the guest, whenever the guest stands still, or the server's
    own thread while no guest call is in progress and the target lends itself (`Idle`). Only the owner
    executes packets, so a target needs no locks; `Target.interrupt` alone is called from outside. While the
    guest runs, the server costs nothing but a sleeping thread.

Breakpoints are never in memory while the guest stands still
    The session keeps the list. It inserts at every resume and lifts at every stop and at the end of every
    guest call (`DebugServer.left`). So memory reads show, and writes change, the program's own bytes;
    a snapshot or a core dump taken between calls is clean; a restore cannot lose a breakpoint; and all of it holds
    by construction rather than by masking.

What this is not: a debugger for several processors (one thread, number 1), non-stop mode, tracepoints, or a file
server: `vFile` serves the one ELF file that the target hands out. There is no authentication in the protocol: whoever
connects owns the guest, and through a target's `monitor` commands perhaps more. So the default address is
loopback, and a Unix socket is made with mode 0600. Everything a debugger sends is treated as hostile:
sizes and counts are bounded, and no input makes `PacketDecoder.feed` or `Session.handle` raise.

Sources: "Debugging with GDB", appendices E (remote protocol), F (agent expressions) and G (target descriptions), for
gdb 13; what gdb 13.1 and lldb 14.0.6 were seen to send. Addresses are guest-virtual unless a name says physical,
sizes are bytes, ends are exclusive.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import binascii
import enum
import errno
import logging
import os
import re
import selectors
import socket
import stat
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Protocol, cast, runtime_checkable

__version__ = "0.14.0"
__all__ = [
    "PACKET_SIZE",
    "REGISTERS",
    "Access",
    "Auxv",
    "DebugServer",
    "Event",
    "ExecFile",
    "HardwareBreakpoint",
    "HardwareBreakpoints",
    "Idle",
    "Libraries",
    "Link",
    "ListenError",
    "LoadAddress",
    "MemoryMap",
    "MemoryRange",
    "Monitor",
    "MonitorCommand",
    "Packet",
    "PacketDecoder",
    "PhysicalMemory",
    "Reason",
    "Restart",
    "Resume",
    "RspError",
    "RspUsageError",
    "Session",
    "Signal",
    "SoftwareBreakpoints",
    "State",
    "Stop",
    "Target",
    "TargetError",
    "TargetFault",
    "ThreadInfo",
    "encode",
    "evaluate",
    "target_description",
]

_log = logging.getLogger("hyperlight.gdb")
_log.addHandler(logging.NullHandler())
_packet_log = logging.getLogger("hyperlight.gdb.packet")  # every packet, at DEBUG


class RspError(Exception):
    """The root of this module's errors. None is ever caused by what a debugger sends."""


class RspUsageError(RspError):
    """The embedding program broke the contract; the message names the call."""


class ListenError(RspError, OSError):
    """The address cannot be listened on; the message says why and what to do."""


class TargetError(RspError):
    """Raise this from a target to refuse a request: the debugger gets an error, and debugging goes on.

    `code` is an errno. Replies carry its low byte in hexadecimal: EFAULT is ``E0e``.
    """

    def __init__(self, message: str, code: int = errno.EIO) -> None:
        super().__init__(message)
        self.code = code


class TargetFault(TargetError):
    """Raise this from a target when the memory at `address` cannot be read or written; `reason` says why."""

    def __init__(self, address: int, reason: str = "not mapped") -> None:
        super().__init__(f"{address:#x}: {reason}", errno.EFAULT)
        self.address = address
        self.reason = reason


# =====================================================================================================
# 1. Codec: bytes <-> packets
#
#    $payload#cs   A packet. cs is the sum of the bytes between $ and #, modulo 256, as two hex digits.
#                  It covers the bytes as they travel: escaped, and with run lengths.
#    + -           "Received well" and "send that again", until QStartNoAckMode has been answered.
#    0x03          An interrupt, but only between packets: inside one it is data.
#    }x            An escape: the byte x ^ 0x20. Senders must escape # $ } and, in replies, *.
#    x*n           A run: x, and then n - 29 more of it. n is a printable character.
#
#    Manual: E.1 Overview, E.2 Packet acknowledgment, E.3 Interrupts.
# =====================================================================================================

PACKET_SIZE = 0x10000
"""Size in bytes of the largest payload that is accepted; advertised to the debugger."""

# Whether the advertised size counts $ and #cs is read both ways in the wild: accept a little more than we say.
_SLACK = 64

_START = re.compile(rb"[$+\-\x03]")  # what means something between packets; anything else there is noise
_END_OR_RESTART = re.compile(rb"[#$]")
_CHECKSUM = re.compile(rb"[0-9a-fA-F]{2}")
_TOKEN = re.compile(rb"([}*].)", re.DOTALL)
_MUST_ESCAPE = re.compile(rb"[#$}*]")
# A run worth shortening. An escape pair is matched first, as a unit, so that no run begins inside one:
# readers disagree on whether such a run would repeat the raw or the decoded byte.
_RUN = re.compile(rb"\}.|([^}])\1{3,}", re.DOTALL)
_RUN_LONGEST = 98  # the byte itself and 97 more: '~', the last printable count


class Packet(NamedTuple):
    """A well-formed packet; `payload` is unescaped and expanded."""

    payload: bytes


class Event(enum.Enum):
    """What can arrive beside a packet."""

    ACK = "received well"
    NAK = "send it again"
    INTERRUPT = "stop the machine"
    BAD_CHECKSUM = "a packet damaged on the way"
    INVALID = "an undamaged packet that is too long, or whose escapes or run lengths are wrong"


_SINGLE = {b"+": Event.ACK, b"-": Event.NAK, b"\x03": Event.INTERRUPT}


class PacketDecoder:
    """Turn bytes, however they are cut, into packets and events; any input is acceptable.

    Goals: the same events for every way to cut the input; linear time when it arrives one byte at a time (`_searched`
    remembers how far the end of the packet was looked for); at most `limit` bytes kept. A packet that grows
    beyond that is forgotten as it comes in, and reported `INVALID` at its end.
    """

    def __init__(self, limit: int = PACKET_SIZE + _SLACK) -> None:
        self._limit = limit
        self._buffer = bytearray()  # begins with the '$' of an unfinished packet, or is empty
        self._searched = 1
        self._overflowed = False

    def feed(self, data: bytes) -> list[Packet | Event]:
        """Take more bytes and return, in order, the packets and events that they complete."""
        self._buffer += data
        events = []
        while (event := self._next_event()) is not None:
            events.append(event)
        return events

    def _next_event(self) -> Packet | Event | None:
        while (start := _START.search(self._buffer)) is not None:
            del self._buffer[: start.start()]
            if self._buffer[0] != ord("$"):
                return _SINGLE[self._take(1)]
            end = _END_OR_RESTART.search(self._buffer, self._searched)
            if end is None:
                self._wait_for_end()
                return None
            if end.group() == b"$":  # '$' is always escaped, so the packet before this one was cut short
                self._take(end.start())
                continue
            if len(self._buffer) < end.end() + 2:
                self._searched = end.start()
                return None
            return self._finish(end.start())
        self._buffer.clear()
        return None

    def _wait_for_end(self) -> None:
        self._searched = len(self._buffer)
        if self._searched - 1 > self._limit:
            del self._buffer[1:]
            self._searched, self._overflowed = 1, True

    def _finish(self, end: int) -> Packet | Event:
        overflowed = self._overflowed or end - 1 > self._limit
        digits = bytes(self._buffer[end + 1 : end + 3])
        if not _CHECKSUM.fullmatch(digits):
            self._take(end + 1)  # what follows may be a packet, so it is looked at again
            return Event.BAD_CHECKSUM
        raw = self._take(end + 3)[1:end]
        if overflowed:
            return Event.INVALID
        if sum(raw) & 0xFF != int(digits, 16):
            return Event.BAD_CHECKSUM
        payload = _expand(raw, self._limit)
        return Event.INVALID if payload is None else Packet(payload)

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        self._searched, self._overflowed = 1, False
        return taken


def _expand(raw: bytes, limit: int) -> bytes | None:
    """Undo escapes and run lengths; None if they are wrong, or if the result is longer than *limit*."""
    out = bytearray()
    for index, piece in enumerate(_TOKEN.split(raw)):
        if index % 2 == 0:  # the text between two tokens; a lone } or * can only be the last byte of all
            if piece.endswith((b"}", b"*")):
                return None
            out += piece
        elif piece[0] == ord("}"):
            out.append(piece[1] ^ 0x20)
        elif out and 32 <= piece[1] <= 126:
            out += out[-1:] * (piece[1] - 29)
        else:
            return None
        if len(out) > limit:
            return None
    return bytes(out)


def encode(payload: bytes) -> bytes:
    """Frame *payload*: escape it, shorten its runs, add the checksum."""
    escaped = _MUST_ESCAPE.sub(lambda found: bytes((ord("}"), found.group()[0] ^ 0x20)), payload)
    body = _RUN.sub(_shorten, escaped)
    return b"$%b#%02x" % (body, sum(body) & 0xFF)


def _shorten(found: re.Match[bytes]) -> bytes:
    """Write the run that was found as ``x*n`` groups."""
    byte = found.group(1)
    if byte is None:  # an escape pair
        return found.group()
    left, out = len(found.group()), b""
    while left > 3:
        more = min(left, _RUN_LONGEST) - 1
        if more in (6, 7):  # their counts would be '#' and '$'
            more = 5
        out += b"%b*%c" % (byte, more + 29)
        left -= more + 1
    return out + byte * left


class Link:
    """The framing of one connection: who acknowledges what, and what may have to be sent again."""

    def __init__(self) -> None:
        self._decoder = PacketDecoder()
        self._acks = True
        self._last = b""

    def receive(self, data: bytes) -> tuple[list[Packet | Event], bytes]:
        """Take bytes; return what they mean to a session, and the bytes to answer at once.

        The events are packets, `Event.INTERRUPT` and `Event.INVALID` (a packet that deserves an error reply).
        """
        events: list[Packet | Event] = []
        answer = b""
        resend = False
        for event in self._decoder.feed(data):
            if isinstance(event, Packet) or event is Event.INVALID:
                answer += b"+" if self._acks else b""
                events.append(event)
                # The request itself is still acknowledged, its reply no longer is. A late ack does no harm.
                self._acks = self._acks and event != Packet(b"QStartNoAckMode")
            elif event is Event.BAD_CHECKSUM:
                answer += b"-" if self._acks else b""
            elif event is Event.NAK:
                resend = self._acks
            elif event is Event.INTERRUPT:
                events.append(event)
        return events, answer + (self._last if resend else b"")

    def send(self, payload: bytes) -> bytes:
        """Frame *payload*, and remember it in case the peer asks for it again."""
        self._last = encode(payload)
        return self._last


# =====================================================================================================
# 2. Target: what a machine must and may be able to do
# =====================================================================================================


class Signal(enum.IntEnum):
    """Why a machine stopped, in the protocol's numbers (those of gdb, not of any kernel)."""

    INT = 2
    ILL = 4
    TRAP = 5
    ABRT = 6
    FPE = 8
    BUS = 10
    SEGV = 11


class Resume(enum.Enum):
    """What the guest's thread shall do next."""

    CONTINUE = "run until something happens"
    STEP = "run one instruction, then report a stop with Reason.STEP"
    KILL = "do not run: end the guest call with an error"


class Reason(enum.Enum):
    """What stopped the machine, as far as a debugger asked for it."""

    OTHER = "the signal says it all"
    STEP = "one instruction was executed, as asked"
    BREAKPOINT = "an inserted software breakpoint is about to be executed: rip is its address"
    HARDWARE = "a hardware breakpoint or watchpoint: Stop.slot says which"


class Stop(NamedTuple):
    """Why the machine stopped. `slot` counts in the list last given to `set_hardware_breakpoints`."""

    signal: int = Signal.TRAP
    reason: Reason = Reason.OTHER
    slot: int = 0


class Access(enum.Enum):
    """What a debug register looks out for. x86 has no way to watch reads only."""

    EXECUTE = "an instruction that begins there is about to be executed"
    WRITE = "a byte of it was written"
    ACCESS = "a byte of it was read or written"


class HardwareBreakpoint(NamedTuple):
    """One debug register: `size` is 1, 2, 4 or 8 bytes, `address` a multiple of it."""

    access: Access
    address: int
    size: int


class MonitorCommand(NamedTuple):
    """A ``monitor`` command: one line of help, and a function from its arguments to the text to show."""

    help: str
    run: Callable[[Sequence[str]], str]


class MemoryRange(NamedTuple):
    """A range of the memory map; `kind` is "ram" or "rom"."""

    kind: str
    address: int
    size: int


class Target(Protocol):
    """The machine that is debugged: the five methods that every target has.

    All but `interrupt` are called by the machine's owner, while it stands still. Only `TargetError` may be raised; it
    becomes an error reply. Anything else is a bug in the target and reaches the thread that made the call.
    """

    def read_registers(self, names: Sequence[str]) -> Mapping[str, int]:
        """Return the values, unsigned, of those of *names* (see `REGISTERS`) that can be read.

        What is missing is shown as ``<unavailable>``, never as zero. A whole group (such as AVX) that was missing
        when the debugger connected is not described to it at all.
        """

    def write_registers(self, values: Mapping[str, int]) -> None:
        """Set these registers and leave every other one as it is."""

    def read_memory(self, address: int, size: int) -> bytes:
        """Return from 1 to *size* bytes at a virtual address; fewer where a page ends, for instance.

        Raises:
            TargetFault: the first byte cannot be read.
        """

    def write_memory(self, address: int, data: bytes) -> None:
        """Write at a virtual address, whatever the guest's own page permissions say.

        Raises:
            TargetFault: a byte cannot be written.
        """

    def interrupt(self) -> None:
        """Have the guest's thread call `DebugServer.attend` soon: make it leave the guest, or not enter it.

        Called from the server's thread at any time, also while the guest's thread is in a host function or
        not running a guest at all. It must neither block nor get lost, and may come without need.
        """


@runtime_checkable
class SoftwareBreakpoints(Protocol):
    """A target that inserts breakpoints itself; for others, 0xCC is written with `Target.write_memory`.

    Worth having where the page behind an address can change while the guest runs (copy on write): a target
    remembers the place that it patched, and lifts the patch there. Insertion happens at resume, lifting at stop.
    """

    def insert_breakpoint(self, address: int) -> None:
        """Insert a breakpoint, or raise `TargetError`. Never called twice for an address without a removal."""

    def remove_breakpoint(self, address: int) -> None:
        """Lift a breakpoint that `insert_breakpoint` accepted; no error if memory has changed or gone since."""


@runtime_checkable
class HardwareBreakpoints(Protocol):
    """A target with four debug registers. They share one list; its index is `Stop.slot`."""

    def hardware_access(self) -> frozenset[Access]:
        """Return what the debug registers can do here. What is not in the set is refused to the debugger."""

    def set_hardware_breakpoints(self, breakpoints: Sequence[HardwareBreakpoint]) -> None:
        """Arm exactly these, at most four, from the next resume on; they outlive restores and guest calls."""


@runtime_checkable
class PhysicalMemory(Protocol):
    """A target whose guest-physical memory can be read and written: ``monitor phys on``."""

    def read_physical(self, address: int, size: int) -> bytes:
        """Return from 1 to *size* bytes at a guest-physical address, or raise `TargetFault`."""

    def write_physical(self, address: int, data: bytes) -> None:
        """Write at a guest-physical address, or raise `TargetFault`."""


@runtime_checkable
class ExecFile(Protocol):
    """A target that knows its ELF file, so that gdb finds the symbols without being told."""

    def exec_file(self) -> tuple[str, bytes]:
        """Return an absolute path and the file's bytes. Only this path can be opened, and only for reading."""


@runtime_checkable
class LoadAddress(Protocol):
    """A target that loads its ELF file elsewhere than it was linked."""

    def load_address(self) -> int:
        """Return the address at which the first loadable segment lies."""


@runtime_checkable
class ThreadInfo(Protocol):
    """A target that can say in a few words what it is doing, for ``info threads``."""

    def thread_info(self) -> str:
        """Return a line such as ``vcpu 0, in guest function Echo``."""


@runtime_checkable
class Libraries(Protocol):
    """A target with further modules mapped."""

    def libraries(self) -> Sequence[tuple[str, int]]:
        """Return the path, and the address of the first segment, of each module."""


@runtime_checkable
class Auxv(Protocol):
    """A target with an auxiliary vector."""

    def auxv(self) -> Sequence[tuple[int, int]]:
        """Return (type, value) pairs, without the terminating AT_NULL."""


@runtime_checkable
class MemoryMap(Protocol):
    """A target with a memory map. Implement this only where a user asked for it.

    gdb 13 then refuses every address outside the map *without asking*, and uses hardware breakpoints in "rom".
    """

    def memory_map(self) -> Sequence[MemoryRange]:
        """Return the ranges of *virtual* addresses that exist, ascending and apart."""


@runtime_checkable
class Monitor(Protocol):
    """A target with ``monitor`` commands of its own beside help, phys and trace."""

    def monitor_commands(self) -> Mapping[str, MonitorCommand]:
        """Return the commands by name."""


@runtime_checkable
class Restart(Protocol):
    """A target that can begin anew: gdb's ``run`` after ``target extended-remote``."""

    def restart(self) -> None:
        """Put the machine, which stands still, into its first state. Resuming it then runs it from there."""


@runtime_checkable
class Idle(Protocol):
    """A target that has nothing to do at times, and can then be served by the server's own thread.

    Typically the two methods are those of the lock that every guest call holds.
    """

    def try_acquire(self) -> bool:
        """Take the machine if no guest call is in progress, without waiting; say whether that worked."""

    def release(self) -> None:
        """Give it back. Called on the thread that acquired it."""


# =====================================================================================================
# 3. Session: packets <-> replies
#
# 3.1 Registers. One table makes the description that gdb asks for, the layout of `g` and the numbers of `p`:
#     a register's number is its place in the description. gdb wants the core group first, in this order.
#     Manual: G.2 Target description format, G.5.16 i386 features; gdb/features/i386/*.xml for the types.
# =====================================================================================================


class Register(NamedTuple):
    """A register: its name for gdb and for targets, its size in bits, and a type of the description."""

    name: str
    bits: int = 64
    type: str = "int64"

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.bits // 8


class RegisterGroup(NamedTuple):
    """A <feature> of the description. What is not `in_g` is only read when gdb asks for it by number."""

    feature: str
    registers: tuple[Register, ...]
    types: str = ""
    in_g: bool = True
    attributes: str = ""


def _flags(name: str, size: int, bits: str) -> str:
    """Describe a register of flags; *bits* is a list such as ``CF:0 IOPL:12-13``."""
    fields = []
    for field in bits.split():
        label, _, where = field.partition(":")
        start, _, end = where.partition("-")
        fields.append(f'<field name="{label}" start="{start}" end="{end or start}"/>')
    return f'<flags id="{name}" size="{size}">{"".join(fields)}</flags>'


def _vectors(*rows: str) -> str:
    """Describe vec128, the type of an xmm register, from rows such as ``v4_float ieee_single 4``."""
    split = [row.split() for row in rows]
    vectors = "".join(f'<vector id="{name}_t" type="{kind}" count="{count}"/>' for name, kind, count in split)
    fields = "".join(f'<field name="{name}" type="{name}_t"/>' for name, _, _ in split)
    return f'{vectors}<union id="vec128">{fields}<field name="uint128" type="uint128"/></union>'


_GENERAL = "rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15"
_POINTERS = {"rbp": "data_ptr", "rsp": "data_ptr"}
_X87_CONTROL = "fctrl fstat ftag fiseg fioff foseg fooff fop"

_CORE = RegisterGroup(
    "org.gnu.gdb.i386.core",
    (
        *(Register(name, 64, _POINTERS.get(name, "int64")) for name in _GENERAL.split()),
        Register("rip", 64, "code_ptr"),
        Register("eflags", 32, "i386_eflags"),
        *(Register(name, 32, "int32") for name in ("cs", "ss", "ds", "es", "fs", "gs")),
        *(Register(f"st{index}", 80, "i387_ext") for index in range(8)),
        *(Register(name, 32, "int") for name in _X87_CONTROL.split()),
    ),
    _flags(
        "i386_eflags",
        4,
        "CF:0 PF:2 AF:4 ZF:6 SF:7 TF:8 IF:9 DF:10 OF:11 IOPL:12-13 NT:14 RF:16 VM:17 AC:18 VIF:19 VIP:20"
        " ID:21",
    ),
)
_SSE = RegisterGroup(
    "org.gnu.gdb.i386.sse",
    (*(Register(f"xmm{index}", 128, "vec128") for index in range(16)), Register("mxcsr", 32, "i386_mxcsr")),
    _vectors(
        "v4_float ieee_single 4",
        "v2_double ieee_double 2",
        "v16_int8 int8 16",
        "v8_int16 int16 8",
        "v4_int32 int32 4",
        "v2_int64 int64 2",
    )
    + _flags(
        "i386_mxcsr", 4, "IE:0 DE:1 ZE:2 OE:3 UE:4 PE:5 DAZ:6 IM:7 DM:8 ZM:9 OM:10 UM:11 PM:12 RC:13-14 FZ:15"
    ),
)
_AVX = RegisterGroup(  # the upper halves: gdb composes $ymm0 itself
    "org.gnu.gdb.i386.avx", tuple(Register(f"ymm{index}h", 128, "uint128") for index in range(16))
)
_SEGMENTS = RegisterGroup("org.gnu.gdb.i386.segments", (Register("fs_base"), Register("gs_base")))
_CONTROL = RegisterGroup(
    "org.hyperlight.x86.control",
    (
        Register("cr0", 64, "x86_cr0"),
        Register("cr2", 64, "data_ptr"),
        Register("cr3", 64, "x86_cr3"),
        Register("cr4", 64, "x86_cr4"),
        Register("cr8"),
        Register("efer", 64, "x86_efer"),
    ),
    _flags("x86_cr0", 8, "PE:0 MP:1 EM:2 TS:3 ET:4 NE:5 WP:16 AM:18 NW:29 CD:30 PG:31")
    + _flags("x86_cr3", 8, "PWT:3 PCD:4 PDBR:12-51")
    + _flags(
        "x86_cr4",
        8,
        "VME:0 PVI:1 TSD:2 DE:3 PSE:4 PAE:5 MCE:6 PGE:7 PCE:8 OSFXSR:9 OSXMMEXCPT:10 UMIP:11 LA57:12 VMXE:13"
        " SMXE:14 FSGSBASE:16 PCIDE:17 OSXSAVE:18 SMEP:20 SMAP:21 PKE:22 CET:23 PKS:24",
    )
    + _flags("x86_efer", 8, "SCE:0 LME:8 LMA:10 NXE:11 SVME:12 LMSLE:13 FFXSR:14 TCE:15"),
    attributes='group="system"',
)
_SYSTEM = RegisterGroup(
    "org.hyperlight.x86.system",
    (
        *(Register(name) for name in ("dr0", "dr1", "dr2", "dr3", "dr6", "dr7")),
        Register("gdtr_base", 64, "data_ptr"),
        Register("gdtr_limit", 32, "int32"),
        Register("idtr_base", 64, "data_ptr"),
        Register("idtr_limit", 32, "int32"),
        Register("tr", 32, "int32"),
        Register("ldtr", 32, "int32"),
        *(Register(name) for name in ("msr_star", "msr_lstar", "msr_pat", "msr_apic_base")),
    ),
    in_g=False,
    attributes='group="system"',
)
_GROUPS = (_CORE, _SSE, _AVX, _SEGMENTS, _CONTROL, _SYSTEM)

REGISTERS: tuple[Register, ...] = tuple(register for group in _GROUPS for register in group.registers)
"""Every register that a target can have, by the name that `Target.read_registers` is asked for."""


def target_description(groups: Sequence[RegisterGroup] = _GROUPS) -> str:
    """Return the XML description of these register groups."""
    features = []
    for group in groups:
        lines = (
            f'<reg name="{name}" bitsize="{bits}" type="{kind}" {group.attributes}/>'
            for name, bits, kind in group.registers
        )
        features.append(f'<feature name="{group.feature}">{group.types}{"".join(lines)}</feature>')
    return (
        '<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target version="1.0">'
        f"<architecture>i386:x86-64</architecture><osabi>none</osabi>{''.join(features)}</target>"
    )


def _pack(register: Register, value: int | None) -> bytes:
    """Write a register's value in hex, least significant byte first; ``xx`` where there is none."""
    if value is None:
        return b"xx" * register.size
    wrapped = value & ((1 << register.bits) - 1)
    return binascii.hexlify(wrapped.to_bytes(register.size, "little"))


def _unpack(register: Register, text: bytes) -> int | None:
    """Read what `_pack` writes. The caller has checked the length."""
    return None if text == b"xx" * register.size else int.from_bytes(_parse_bytes(text), "little")


# -----------------------------------------------------------------------------------------------------
# 3.2 Conditions. gdb compiles the condition of a breakpoint to a program for a small stack machine, so
#     that a false one costs no round trip. All values are 64 bits wide. Manual: appendix F.
# -----------------------------------------------------------------------------------------------------

_BITS64 = (1 << 64) - 1
_AGENT_STEPS = 1000  # conditions can jump backwards
_AGENT_STACK = 100


class _AgentError(Exception):
    """The program is wrong, or does what this machine does not do."""


def _signed(value: int, bits: int = 64) -> int:
    value &= (1 << bits) - 1
    return value - ((value >> (bits - 1)) << bits)


def _divide(left: int, right: int) -> tuple[int, int]:
    """Return quotient and remainder as C has them: rounded towards zero."""
    if right == 0:
        raise _AgentError("division by zero")
    quotient = abs(left) // abs(right)
    if (left < 0) != (right < 0):
        quotient = -quotient
    return quotient, left - quotient * right


_AGENT_BINARY: Mapping[int, Callable[[int, int], int]] = {
    0x02: lambda left, right: left + right,
    0x03: lambda left, right: left - right,
    0x04: lambda left, right: left * right,
    0x05: lambda left, right: _divide(_signed(left), _signed(right))[0],
    0x06: lambda left, right: _divide(left, right)[0],
    0x07: lambda left, right: _divide(_signed(left), _signed(right))[1],
    0x08: lambda left, right: _divide(left, right)[1],
    0x09: lambda left, right: left << right if right < 64 else 0,
    0x0A: lambda left, right: _signed(left) >> min(right, 63),
    0x0B: lambda left, right: left >> min(right, 64),
    0x0F: lambda left, right: left & right,
    0x10: lambda left, right: left | right,
    0x11: lambda left, right: left ^ right,
    0x13: lambda left, right: left == right,
    0x14: lambda left, right: _signed(left) < _signed(right),
    0x15: lambda left, right: left < right,
}
_AGENT_UNARY: Mapping[int, Callable[[int], int]] = {
    0x0E: lambda value: value == 0,
    0x12: lambda value: ~value,
}
_AGENT_REF = {0x17: 1, 0x18: 2, 0x19: 4, 0x1A: 8}  # memory of so many bytes, at the address popped
_AGENT_CONST = {0x22: 1, 0x23: 2, 0x24: 4, 0x25: 8}  # a big-endian operand of so many bytes
_IF_GOTO, _GOTO, _REG, _END = 0x20, 0x21, 0x26, 0x27
_EXT, _ZERO_EXT = 0x16, 0x2A
_DUP, _POP, _SWAP, _PICK, _ROT = 0x28, 0x29, 0x2B, 0x32, 0x33


class _Agent:
    """One run of an agent expression."""

    def __init__(
        self, code: bytes, read_register: Callable[[int], int], read_memory: Callable[[int, int], bytes]
    ) -> None:
        self._code = code
        self._position = 0
        self._stack: list[int] = []
        self._read_register = read_register
        self._read_memory = read_memory

    def run(self) -> int:
        """Run to `end`, and return the value on top of the stack."""
        for _ in range(_AGENT_STEPS):
            operation = self._operand(1)
            if operation == _END:
                return self._pop()
            self._execute(operation)
            if len(self._stack) > _AGENT_STACK:
                raise _AgentError("stack overflow")
        raise _AgentError(f"not finished after {_AGENT_STEPS} steps")

    def _execute(self, operation: int) -> None:
        if operation in _AGENT_BINARY:
            right, left = self._pop(), self._pop()
            self._push(_AGENT_BINARY[operation](left, right))
        elif operation in _AGENT_UNARY:
            self._push(_AGENT_UNARY[operation](self._pop()))
        elif operation in _AGENT_REF:
            self._push(int.from_bytes(self._fetch(self._pop(), _AGENT_REF[operation]), "little"))
        elif operation in _AGENT_CONST:
            self._push(self._operand(_AGENT_CONST[operation]))
        elif operation in (_EXT, _ZERO_EXT):
            bits, value = self._operand(1), self._pop()
            if 0 < bits < 64:  # any other width leaves the value as it is
                value = _signed(value, bits) if operation == _EXT else value & ((1 << bits) - 1)
            self._push(value)
        elif operation == _REG:
            self._push(self._read_register(self._operand(2)))
        elif operation in (_IF_GOTO, _GOTO):
            destination = self._operand(2)
            if operation == _GOTO or self._pop():
                self._position = destination
        else:
            self._shuffle(operation)

    def _shuffle(self, operation: int) -> None:
        if operation == _DUP:
            self._push(self._peek(0))
        elif operation == _POP:
            self._pop()
        elif operation == _SWAP:
            self._stack += [self._pop(), self._pop()]
        elif operation == _PICK:
            self._push(self._peek(self._operand(1)))
        elif operation == _ROT:  # a b c -> c a b
            top, middle, bottom = self._pop(), self._pop(), self._pop()
            self._stack += [top, bottom, middle]
        else:  # tracing, floating point, trace variables, printf
            raise _AgentError(f"opcode {operation:#x} is not supported in a condition")

    def _operand(self, size: int) -> int:
        text = self._code[self._position : self._position + size]
        if len(text) < size:
            raise _AgentError("ran off the end")
        self._position += size
        return int.from_bytes(text, "big")

    def _fetch(self, address: int, size: int) -> bytes:
        data = self._read_memory(address, size)
        if len(data) < size:
            raise _AgentError(f"memory at {address:#x} cannot be read")
        return data

    def _push(self, value: int) -> None:
        self._stack.append(value & _BITS64)

    def _pop(self) -> int:
        if not self._stack:
            raise _AgentError("stack underflow")
        return self._stack.pop()

    def _peek(self, depth: int) -> int:
        if depth >= len(self._stack):
            raise _AgentError("stack underflow")
        return self._stack[-1 - depth]


def evaluate(
    code: bytes, read_register: Callable[[int], int], read_memory: Callable[[int, int], bytes]
) -> int | None:
    """Run an agent expression; return its value (0 is false), or None if it cannot be evaluated.

    Registers are asked for by their number in the description. A `TargetError` of a callback counts as
    "cannot be evaluated". The run is bounded in steps and in stack.
    """
    try:
        return _Agent(code, read_register, read_memory).run()
    except (_AgentError, TargetError) as error:
        _log.info("condition %s: %s", code.hex(), error)
        return None


# -----------------------------------------------------------------------------------------------------
# 3.3 What packets say. Parsers turn the text after a packet's name into a value, or raise _Malformed.
# -----------------------------------------------------------------------------------------------------

_NUMBER = re.compile(rb"[0-9a-fA-F]{1,16}")
# All threads, any, or our one; pP.T is how multiprocess writes it.
_THREAD = re.compile(rb"-1|0*[01]|p(-1|0*[01])(\.(-1|0*[01]))?")
_CONDITION = re.compile(rb";?X([0-9a-fA-F]{1,4}),")


class _Malformed(Exception):
    """The packet breaks the protocol's grammar: the reply is E16, EINVAL."""


class _Range(NamedTuple):
    """``addr,length``"""

    address: int
    size: int


class _Point(NamedTuple):
    """A breakpoint or watchpoint: ``kind,addr,size``, conditions, and whether there were commands as well."""

    kind: int
    address: int
    size: int
    conditions: tuple[bytes, ...] = ()
    commands: bool = False
    slots: tuple[HardwareBreakpoint, ...] = ()  # the debug registers that hold it; none for a software breakpoint

    @property
    def key(self) -> tuple[int, int, int]:
        """What tells breakpoints apart. The size of an instruction breakpoint is only its kind (1 on x86)."""
        return self.kind, self.address, 0 if self.kind in (0, 1) else self.size

    def stops_at(self, address: int) -> bool:
        """Say whether executing the instruction at *address* is what it waits for."""
        return self.address == address and self.kind in (0, 1)


class _Goal(NamedTuple):
    """How the debugger wants the machine to go on: run, or step until outside of [start, end)."""

    step: bool
    start: int = 0
    end: int = 0


def _parse_number(text: bytes) -> int:
    # Not int() alone, which also takes signs, underscores, spaces and 0x.
    if not _NUMBER.fullmatch(text):
        raise _Malformed(f"{text[:32]!r} is not a hexadecimal number of at most 64 bits")
    return int(text, 16)


def _parse_bytes(text: bytes) -> bytes:
    try:
        return binascii.unhexlify(text)
    except binascii.Error as error:
        raise _Malformed(f"{text[:32]!r} is not a string of hexadecimal digit pairs") from error


def _parse_fields(text: bytes, count: int, separator: bytes = b",") -> list[bytes]:
    fields = text.split(separator, count - 1)
    if len(fields) != count:
        raise _Malformed(f"{count} fields expected")
    return fields


def _parse_range(text: bytes) -> _Range:
    address, size = _parse_fields(text, 2)
    return _Range(_parse_number(address), _parse_number(size))


def _parse_write(text: bytes) -> tuple[_Range, bytes]:
    """``addr,length:data``; how the data is written differs from packet to packet."""
    where, data = _parse_fields(text, 2, b":")
    return _parse_range(where), data


def _parse_point(text: bytes) -> _Point:
    """``kind,addr,size[;X<length>,<code>...][;cmds:...]``"""
    where, _, options = text.partition(b";")
    kind, address, size = (_parse_number(field) for field in _parse_fields(where, 3))
    conditions: list[bytes] = []
    position = 0
    while (found := _CONDITION.match(options, position)) is not None:
        position = found.end() + 2 * int(found.group(1), 16)
        if len(conditions) == _MOST_CONDITIONS:
            raise _Malformed(f"more than {_MOST_CONDITIONS} conditions")
        conditions.append(_parse_bytes(options[found.end() : position]))
        if len(conditions[-1]) != int(found.group(1), 16):
            raise _Malformed("a condition is shorter than its length says")
    rest = options[position:].strip(b";")
    if rest and not rest.startswith(b"cmds:"):
        raise _Malformed(f"{rest[:32]!r} is not a condition")
    return _Point(kind, address, size, tuple(conditions), bool(rest))


def _parse_resume(text: bytes) -> tuple[_Goal, int | None]:
    """``c [addr]``, ``C sig[;addr]`` and the same with s: the goal, and where to go on if not at rip.

    Signals are checked and dropped: a guest has none.
    """
    letter, address = text[:1], text[1:]
    if letter in b"CS":
        signal, separator, address = address.partition(b";")
        _parse_number(signal)
        if separator and not address:
            raise _Malformed("an address is missing")
    return _Goal(letter in b"sS"), _parse_number(address) if address else None


def _parse_vcont(text: bytes) -> _Goal:
    """``action[:thread];...``: the first action that is meant for our thread."""
    for action in text.split(b";"):
        what, separator, thread = action.partition(b":")
        if separator and not _THREAD.fullmatch(thread):
            continue
        if what[:1] == b"r":
            start, end = _parse_range(what[1:])
            return _Goal(True, start, end)
        if what in (b"c", b"s") or (what[:1] in (b"C", b"S") and _parse_number(what[1:]) >= 0):
            return _Goal(what[:1] in b"sS")
        raise _Malformed(f"vCont action {what[:32]!r}")
    raise _Malformed("no action for thread 1")


# -----------------------------------------------------------------------------------------------------
# 3.4 Breakpoints and watchpoints: what the debugger has set, and what is inserted just now.
# -----------------------------------------------------------------------------------------------------

_SLOTS = 4  # debug registers of an x86 processor
_MOST_POINTS = 1024
_MOST_CONDITIONS = 16  # of one breakpoint: gdb sends one for each breakpoint that a user has set there
_SOFTWARE = 0
_KINDS = {1: Access.EXECUTE, 2: Access.WRITE, 4: Access.ACCESS}  # the digit of Z1, Z2 and Z4
_INT3 = b"\xcc"


class _Patches:
    """`SoftwareBreakpoints` for a target that has only memory: 0xCC over the first byte."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._original: dict[int, bytes] = {}

    def insert_breakpoint(self, address: int) -> None:
        original = self._target.read_memory(address, 1)
        self._target.write_memory(address, _INT3)
        self._original[address] = original

    def remove_breakpoint(self, address: int) -> None:
        original = self._original.pop(address)
        try:
            if self._target.read_memory(address, 1) == _INT3:  # else the guest has overwritten it
                self._target.write_memory(address, original)
        except TargetError as error:  # the page has gone, and the patch with it
            _log.info("breakpoint not lifted: %s", error)


class _Breakpoints:
    """The debugger's list. Adding twice and removing twice are no errors: gdb retries."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._planter = target if isinstance(target, SoftwareBreakpoints) else _Patches(target)
        self._points: dict[tuple[int, int, int], _Point] = {}
        self._inserted: list[int] = []
        self._armed: tuple[HardwareBreakpoint, ...] = ()
        self.access: frozenset[Access] = frozenset()
        if isinstance(target, HardwareBreakpoints):
            self.access = target.hardware_access()

    def __bool__(self) -> bool:
        """Whether there is anything to insert, or a debug register to disarm."""
        return bool(self._points or self._armed)

    def add(self, point: _Point) -> None:
        """Set a breakpoint; conditions replace those of before. Raises `TargetError` if it is impossible."""
        old = self._points.get(point.key)
        if old is None and len(self._points) >= _MOST_POINTS:
            raise TargetError(f"more than {_MOST_POINTS} breakpoints", errno.ENOSPC)
        slots = old.slots if old is not None else self._place(point)
        if old is None and slots:  # now, while an error can still be reported
            self._arm((*self._all_slots(), *slots))
        self._points[point.key] = point._replace(slots=slots)

    def remove(self, point: _Point) -> None:
        """Forget a breakpoint."""
        self._points.pop(point.key, None)

    def clear(self) -> None:
        """Forget them all, and disarm the debug registers."""
        self.lift()
        self._points.clear()
        self._arm(())

    def at(self, address: int) -> list[_Point]:
        """Return the breakpoints, of either sort, on the instruction at *address*."""
        return [point for point in self._points.values() if point.stops_at(address)]

    def slot(self, index: int) -> HardwareBreakpoint | None:
        """Return what debug register *index* was armed with."""
        return self._armed[index] if 0 <= index < len(self._armed) else None

    def insert(self, skip: int | None) -> None:
        """Insert and arm all, except on the instruction at *skip*, which is about to be stepped over."""
        wanted = [point for point in self._points.values() if skip is None or not point.stops_at(skip)]
        for point in wanted:
            if not point.slots:
                self._insert(point.address)
        self._arm(tuple(slot for point in wanted for slot in point.slots))

    def lift(self) -> None:
        """Take every inserted breakpoint out of memory. Debug registers stay armed: they disturb nobody."""
        while self._inserted:
            self._planter.remove_breakpoint(self._inserted.pop())

    def _insert(self, address: int) -> None:
        try:
            self._planter.insert_breakpoint(address)
        except TargetError as error:  # unmapped since it was set; tried again at the next resume
            _log.info("breakpoint not inserted: %s", error)
        else:
            self._inserted.append(address)

    def _place(self, point: _Point) -> tuple[HardwareBreakpoint, ...]:
        """Try a new breakpoint out. An instruction that cannot be patched gets a debug register."""
        if point.kind != _SOFTWARE:
            return self._slots(_KINDS[point.kind], point.address, point.size)
        try:
            self._planter.insert_breakpoint(point.address)
            self._planter.remove_breakpoint(point.address)
        except TargetError as error:
            if Access.EXECUTE not in self.access:
                raise
            self._target.read_memory(point.address, 1)  # not even there: this raises
            _log.info("%s; using a debug register", error)
            return self._slots(Access.EXECUTE, point.address, 1)
        return ()

    def _slots(self, access: Access, address: int, size: int) -> tuple[HardwareBreakpoint, ...]:
        size = 1 if access is Access.EXECUTE else size
        free = _SLOTS - len(self._all_slots())
        pieces: list[HardwareBreakpoint] = []
        while size > 0:
            if len(pieces) == free:
                raise TargetError("the four debug registers are in use", errno.ENOSPC)
            piece = next(width for width in (8, 4, 2, 1) if width <= size and address % width == 0)
            pieces.append(HardwareBreakpoint(access, address, piece))
            address, size = (address + piece) & _BITS64, size - piece
        return tuple(pieces)

    def _all_slots(self) -> list[HardwareBreakpoint]:
        return [slot for point in self._points.values() for slot in point.slots]

    def _arm(self, slots: tuple[HardwareBreakpoint, ...]) -> None:
        if slots != self._armed:
            cast(HardwareBreakpoints, self._target).set_hardware_breakpoints(slots)
            self._armed = slots


# -----------------------------------------------------------------------------------------------------
# 3.5 The session itself: one connection to one debugger.
# -----------------------------------------------------------------------------------------------------


class State(enum.Enum):
    """What the debugger believes the machine to be doing."""

    STOPPED = "stopped"
    RUNNING = "running"
    EXITED = "exited"
    DETACHED = "detached"


class _Move(enum.Enum):
    STOP = "the machine stopped, and the debugger is told"
    RESUME = "c, s, vCont"
    EXIT = "the machine ended, or k"
    DETACH = "D, or the connection is gone"
    RESTART = "R, vRun, vAttach"


# What is not in the table changes nothing: a machine that stops while nobody is attached, for example.
_MOVES: Mapping[tuple[State, _Move], State] = {
    (State.STOPPED, _Move.RESUME): State.RUNNING,
    (State.STOPPED, _Move.EXIT): State.EXITED,
    (State.STOPPED, _Move.DETACH): State.DETACHED,
    (State.STOPPED, _Move.RESTART): State.STOPPED,
    (State.RUNNING, _Move.STOP): State.STOPPED,
    (State.RUNNING, _Move.EXIT): State.EXITED,
    (State.RUNNING, _Move.DETACH): State.DETACHED,
    (State.RUNNING, _Move.RESTART): State.STOPPED,
    (State.EXITED, _Move.RESTART): State.STOPPED,
    (State.EXITED, _Move.DETACH): State.DETACHED,
    (State.DETACHED, _Move.RESTART): State.STOPPED,
}

_OK = b"OK"
_MOST_BINARY = PACKET_SIZE // 2 - _SLACK  # bytes in a reply, all of which may need an escape
_MOST_HEX = PACKET_SIZE // 2 - _SLACK
_MOST_FILES = 16
_MOST_SCANNED = 1 << 28  # bytes of memory that one search or CRC may read
_SCAN_CHUNK = 1 << 16
_TRACE_PACKETS, _TRACE_WIDTH = 64, 100
_BUSY = b"E%02x" % errno.EBUSY
_INVALID = b"E%02x" % errno.EINVAL
_PLAIN_STOP = Stop()
_EXPEDITED = ("rbp", "rsp", "rip", "eflags")
_FSTAT = struct.Struct(">7I3Q3I")  # dev ino mode nlink uid gid rdev, size blksize blocks, atime mtime ctime


class Session:
    """One debugger's connection to a target: packets in, replies out; no I/O.

    A session begins STOPPED. While it is `waiting`, give it packets (`handle`). When it no longer is, call `resume`
    and do what that says; then report what happened with `stopped` or `exited`. Packets may be handled in any
    state, provided that the machine stands still (`pause` first, if it was running) and `resume` is called after.

    Every method returns the payloads to send, in order. `handle` returns exactly one for every packet, except that
    there is none for a resume or a kill (a stop reply comes later, from `stopped`), that ``O`` packets with
    text precede the reply to a monitor command, and that vCtrlC brings its stop reply along.
    """

    def __init__(self, target: Target, stop: Stop = _PLAIN_STOP) -> None:
        self._target = target
        self._packets = _known_packets(target)
        self._exact = {packet.name: packet.answer for packet in self._packets if packet.exact}
        self._prefixed = {packet.name: packet.answer for packet in self._packets if not packet.exact}
        self._lengths = sorted({len(name) for name in self._prefixed}, reverse=True)
        self._groups = _offered_groups(target)
        self._registers = tuple(register for group in self._groups for register in group.registers)
        self._breakpoints = _Breakpoints(target)
        self._in_g = tuple(register for group in self._groups if group.in_g for register in group.registers)
        self.state = State.STOPPED
        self._stop = stop
        self._detail: tuple[bytes, bytes] | None = None  # swbreak, hwbreak, watch or awatch, and its value
        self._exit_reply = b"W00"
        self._goal = _Goal(step=False)
        self._over: int | None = None  # where the machine stands on a breakpoint that it has already reported
        self._ended = False  # and this has not been said to the owner yet
        self._extended = False
        self._physical = False
        self._offered: frozenset[bytes] = frozenset()  # what the debugger says it understands
        self._files: dict[int, bytes] = {}
        self._console: list[bytes] = []
        self._trace: deque[str] = deque(maxlen=_TRACE_PACKETS)

    # --- for the owner of the machine ----------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether the machine must stand still until a packet says otherwise."""
        may_restart = self._extended and isinstance(self._target, Restart)
        return self.state is State.STOPPED or (self.state is State.EXITED and may_restart)

    @property
    def is_needed(self) -> bool:
        """Whether `resume` would do more than say CONTINUE."""
        goes_on = self.state is State.RUNNING or self.state is State.DETACHED
        return self._ended or self._goal.step or bool(self._breakpoints) or not goes_on

    def handle(self, payload: bytes) -> list[bytes]:
        """Execute one packet and return the replies."""
        self._note("<-", payload)
        answer, arguments = self._find(payload)
        try:
            reply = answer if isinstance(answer, bytes) else answer(self, arguments)
        except _Malformed as error:
            _log.info("malformed packet %r: %s", payload[:_TRACE_WIDTH], error)
            reply = _INVALID
        except TargetError as error:
            reply = self._refuse(payload, error)
        replies = [*self._console, *([reply] if isinstance(reply, bytes) else reply)]
        self._console = []
        return self._noted(replies)

    def interrupt(self) -> list[bytes]:
        """Execute an interrupt request (0x03). None is needed, or answered, while the machine is stopped."""
        return self.stopped(Stop(Signal.INT))

    def stopped(self, stop: Stop) -> list[bytes]:
        """Take note of a stop. It may not concern the debugger: then the session does not wait."""
        self.pause()
        if self.state is not State.RUNNING or self._goes_on(stop):
            return []
        self._move(_Move.STOP)
        self._stop, self._detail, self._over = stop, self._why(stop), self._rip()
        return self._noted([self._stop_reply()])

    def exited(self, status: int, signal: int | None = None) -> list[bytes]:
        """Take note of the machine's end, with an exit status (its low byte is shown) or by a signal."""
        self.pause()
        self._exit_reply = b"W%02x" % (status & 0xFF) if signal is None else b"X%02x" % signal
        was_running, self._ended = self.state is State.RUNNING, True
        self._move(_Move.EXIT)
        return self._noted([self._exit_reply] if was_running else [])

    def detach(self) -> None:
        """Take note that the debugger has gone: forget its breakpoints and let the guest go on."""
        self._breakpoints.clear()
        self._move(_Move.DETACH)

    def pause(self) -> None:
        """Lift the breakpoints, because the machine stands still."""
        self._breakpoints.lift()

    def left(self) -> None:
        """Take note that the guest call is over: the next one does not begin on a breakpoint already reported."""
        self.pause()
        self._over = None

    def resume(self) -> Resume:
        """Insert the breakpoints, because the machine is about to go on, and say how. An end is said once."""
        if self._ended:
            self._ended = False
            return Resume.KILL
        if self.state is not State.RUNNING:
            return Resume.CONTINUE
        if not self._breakpoints:  # do not even look at the registers: this is the way into every guest call
            self._over = None
            return Resume.STEP if self._goal.step else Resume.CONTINUE
        return self._resume_among_breakpoints()

    # --- run control ---------------------------------------------------------------------------------

    def _resume_among_breakpoints(self) -> Resume:
        """Step over a breakpoint that has been reported already; hit the others, at rip too."""
        rip = self._rip()
        if rip != self._over or rip is None or not self._breakpoints.at(rip):
            self._over = None
        step = self._goal.step or self._over is not None
        self._breakpoints.insert(skip=rip if step else None)
        return Resume.STEP if step else Resume.CONTINUE

    def _goes_on(self, stop: Stop) -> bool:
        """Say whether this stop is only a step on the way to the goal. It leaves `_over` as `resume` needs it."""
        rip, over, self._over = self._rip(), self._over, None
        if rip is None:
            return False
        if stop.reason is Reason.STEP:
            if not self._goal.step:
                return over is not None  # the breakpoint has been stepped over
            return self._goal.start <= rip < self._goal.end and not self._breaks_at(rip)
        if self._is_instruction_stop(stop) and self._breakpoints.at(rip) and not self._breaks_at(rip):
            self._over = rip
            return True
        return False

    def _is_instruction_stop(self, stop: Stop) -> bool:
        slot = self._breakpoints.slot(stop.slot)
        on_execution = slot is not None and slot.access is Access.EXECUTE
        return stop.reason is Reason.BREAKPOINT or (stop.reason is Reason.HARDWARE and on_execution)

    def _breaks_at(self, address: int) -> bool:
        """Say whether a breakpoint there has no condition, a true one, or one that cannot be evaluated."""
        conditions = [point.conditions for point in self._breakpoints.at(address)]
        return any(not codes or any(self._is_true(code) for code in codes) for codes in conditions)

    def _is_true(self, condition: bytes) -> bool:
        return evaluate(condition, self._register_value, self._read_virtual) != 0

    def _why(self, stop: Stop) -> tuple[bytes, bytes] | None:
        if self._is_instruction_stop(stop):
            kinds = {point.kind for point in self._breakpoints.at(self._rip() or 0)}
            # What the debugger set, not what was used for it: gdb ignores a hwbreak where it set a Z0.
            return (b"hwbreak", b"") if kinds == {1} else (b"swbreak", b"")
        slot = self._breakpoints.slot(stop.slot)
        if stop.reason is not Reason.HARDWARE or slot is None:
            return None
        return (b"watch" if slot.access is Access.WRITE else b"awatch", b"%x" % slot.address)

    def _stop_reply(self) -> bytes:
        if self.state is State.EXITED:
            return self._exit_reply
        fields = []
        if self._detail is not None:
            key, value = self._detail
            if key in (b"watch", b"awatch") or key + b"+" in self._offered:
                fields.append(key + b":" + value)
        fields.append(b"thread:1")
        values = self._known(_EXPEDITED)
        for number, register in enumerate(self._registers):
            if register.name in _EXPEDITED and register.name in values:
                fields.append(b"%02x:%b" % (number, _pack(register, values[register.name])))
        return b"T%02x%b;" % (self._stop.signal, b";".join(fields))

    def _resume_with(self, goal: _Goal, address: int | None = None) -> bytes | list[bytes]:
        if self.state is State.EXITED:
            return self._exit_reply
        if self.state is not State.STOPPED:
            return _BUSY
        if address is not None:
            self._target.write_registers({"rip": address})
        self._goal = goal
        self._move(_Move.RESUME)
        return []

    def _restart(self) -> None:
        cast(Restart, self._target).restart()
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._stop, self._detail, self._over, self._ended = _PLAIN_STOP, None, None, False
        self._move(_Move.RESTART)

    def _kill(self) -> None:
        self._breakpoints.clear()
        self._ended = True
        self._exit_reply = b"X09"
        self._move(_Move.EXIT)

    def _move(self, move: _Move) -> None:
        self.state = _MOVES.get((self.state, move), self.state)

    def _known(self, names: Sequence[str]) -> Mapping[str, int]:
        """Read registers for a stop reply, which has no way to say that they cannot be read."""
        try:
            return self._target.read_registers(names)
        except TargetError as error:
            _log.info("%s: %s", ", ".join(names), error)
            return {}

    def _rip(self) -> int | None:
        return self._known(("rip",)).get("rip")

    # --- dispatch and errors -------------------------------------------------------------------------

    def _find(self, payload: bytes) -> tuple[_Handler | bytes, bytes]:
        """Return what answers a packet, and the arguments after its name."""
        if payload in self._exact:
            return self._exact[payload], b""
        for length in self._lengths:  # the longest first
            if len(payload) >= length and payload[:length] in self._prefixed:
                return self._prefixed[payload[:length]], payload[length:]
        return b"", b""

    def _refuse(self, payload: bytes, error: TargetError) -> bytes:
        """Word an error. Text is only sent where gdb shows it: gdb 13 takes that of P, and stumbles over that of m."""
        _log.info("%r: %s", payload[:_TRACE_WIDTH], error)
        if payload.startswith(b"P") or b"error-message+" in self._offered:
            return b"E." + str(error).encode("utf-8", "replace")
        return b"E%02x" % (error.code & 0xFF)

    def _note(self, direction: str, payload: bytes) -> None:
        more = "..." if len(payload) > _TRACE_WIDTH else ""
        self._trace.append(f"{direction} {payload[:_TRACE_WIDTH].decode('latin-1')!r}{more}")

    def _noted(self, replies: list[bytes]) -> list[bytes]:
        for reply in replies:
            self._note("->", reply)
        return replies

    # --- negotiation and threads ---------------------------------------------------------------------

    def _on_supported(self, arguments: bytes) -> bytes:
        self._offered = frozenset(arguments.removeprefix(b":").split(b";"))
        features = [b"PacketSize=%x" % PACKET_SIZE]
        features += (feature for packet in self._packets for feature in packet.offers)
        if b"error-message+" in self._offered:  # valid only between two that both say so
            features.append(b"error-message+")
        return b";".join(features)

    def _on_extended(self, _arguments: bytes) -> bytes:
        self._extended = True
        return _OK

    def _on_set_thread(self, arguments: bytes) -> bytes:
        return self._on_thread_alive(arguments[1:])  # the first byte says what for: g or c

    def _on_thread_alive(self, arguments: bytes) -> bytes:
        return _OK if _THREAD.fullmatch(arguments) else b"E%02x" % errno.ESRCH

    def _on_thread_extra(self, _arguments: bytes) -> bytes:
        return binascii.hexlify(self._thread_info().encode("utf-8", "replace"))

    def _thread_info(self) -> str:
        return self._target.thread_info() if isinstance(self._target, ThreadInfo) else "vcpu 0"

    # --- running -------------------------------------------------------------------------------------

    def _on_why(self, _arguments: bytes) -> bytes:
        return self._stop_reply()

    def _on_resume(self, arguments: bytes) -> bytes | list[bytes]:
        return self._resume_with(*_parse_resume(arguments))

    def _on_vcont(self, arguments: bytes) -> bytes | list[bytes]:
        return self._resume_with(_parse_vcont(arguments))

    def _on_ctrl_c(self, _arguments: bytes) -> list[bytes]:
        return [_OK, *self.interrupt()]

    def _on_detach(self, _arguments: bytes) -> bytes:
        self.detach()
        return _OK

    def _on_kill(self, _arguments: bytes) -> list[bytes]:
        self._kill()
        return []

    def _on_vkill(self, _arguments: bytes) -> bytes:
        self._kill()
        return _OK

    def _on_restart(self, _arguments: bytes) -> list[bytes]:
        self._restart()
        return []

    def _on_run(self, _arguments: bytes) -> bytes:
        """``vRun;filename[;argument]...``: a target has one program, so the name is not looked at."""
        self._restart()
        return self._stop_reply()

    def _on_attach(self, _arguments: bytes) -> bytes:
        self._begin_anew()
        return self._stop_reply()

    # --- registers -----------------------------------------------------------------------------------

    def _on_read_all(self, _arguments: bytes) -> bytes:
        values = self._target.read_registers([register.name for register in self._in_g])
        return b"".join(_pack(register, values.get(register.name)) for register in self._in_g)

    def _on_write_all(self, arguments: bytes) -> bytes:
        if len(arguments) != sum(2 * register.size for register in self._in_g):
            raise _Malformed("G of the wrong length")
        old = self._target.read_registers([register.name for register in self._in_g])
        new, position = {}, 0
        for register in self._in_g:
            text = arguments[position : position + 2 * register.size]
            position += len(text)
            value = _unpack(register, text)
            # Only what has changed: many registers can be read but not written.
            if value is not None and value != old.get(register.name):
                new[register.name] = value
        if new:
            self._target.write_registers(new)
        return _OK

    def _on_read_one(self, arguments: bytes) -> bytes:
        register = self._register(_parse_number(arguments))
        return _pack(register, self._target.read_registers((register.name,)).get(register.name))

    def _on_write_one(self, arguments: bytes) -> bytes:
        number, text = _parse_fields(arguments, 2, b"=")
        register = self._register(_parse_number(number))
        if len(text) != 2 * register.size or (value := _unpack(register, text)) is None:
            raise _Malformed(f"{register.name} has {register.size} bytes")
        self._target.write_registers({register.name: value})
        return _OK

    def _register(self, number: int) -> Register:
        if number >= len(self._registers):
            raise _Malformed(f"there is no register {number}")
        return self._registers[number]

    def _register_value(self, number: int) -> int:
        if number < len(self._registers):
            name = self._registers[number].name
            if (value := self._target.read_registers((name,)).get(name)) is not None:
                return value
        raise TargetError(f"register {number} is not available")

    # --- memory --------------------------------------------------------------------------------------

    def _on_read_hex(self, arguments: bytes) -> bytes:
        where = _parse_range(arguments)
        return binascii.hexlify(self._read(where.address, min(where.size, _MOST_HEX)))

    def _on_read_binary(self, arguments: bytes) -> bytes:
        where = _parse_range(arguments)
        return b"b" + self._read(where.address, min(where.size, _MOST_BINARY))

    def _on_write_hex(self, arguments: bytes) -> bytes:
        where, data = _parse_write(arguments)
        return self._write(where, _parse_bytes(data))

    def _on_write_binary(self, arguments: bytes) -> bytes:
        return self._write(*_parse_write(arguments))

    def _write(self, where: _Range, data: bytes) -> bytes:
        if len(data) != where.size:
            raise _Malformed(f"{len(data)} bytes of data, {where.size} announced")
        if where.address + where.size > _BITS64 + 1:
            raise TargetFault(where.address, "the range ends beyond 64 bits")
        if data and self._physical:
            cast(PhysicalMemory, self._target).write_physical(where.address, data)
        elif data:  # gdb probes for X with an empty write
            self._target.write_memory(where.address, data)
        return _OK

    def _read(self, address: int, size: int) -> bytes:
        if self._physical:
            return _read_on(cast(PhysicalMemory, self._target).read_physical, address, size)
        return self._read_virtual(address, size)

    def _read_virtual(self, address: int, size: int) -> bytes:
        return _read_on(self._target.read_memory, address, size)

    def _scan(self, where: _Range) -> Iterator[bytes]:
        """Read a range in pieces; raises TargetFault where it cannot be read."""
        if where.size > _MOST_SCANNED:
            raise TargetError(f"more than {_MOST_SCANNED:#x} bytes", errno.E2BIG)
        address, end = where.address, where.address + where.size
        while address < end:
            data = self._read(address, min(end - address, _SCAN_CHUNK))
            if not data:
                raise TargetFault(address)
            yield data
            address += len(data)

    def _on_search(self, arguments: bytes) -> bytes:
        """``address;length;pattern``, the pattern in binary. A wrong address in the reply makes gdb loop."""
        address, length, pattern = _parse_fields(arguments, 3, b";")
        where = _Range(_parse_number(address), _parse_number(length))
        if not pattern:
            raise _Malformed("nothing to search for")
        window, start = b"", where.address  # start is the address of the first byte of the window
        for data in self._scan(where):
            window += data
            found = window.find(pattern)
            if found >= 0:
                return b"1,%x" % (start + found)
            keep = min(len(pattern) - 1, len(window))
            start += len(window) - keep
            window = window[len(window) - keep :]
        return b"0"

    def _on_crc(self, arguments: bytes) -> bytes:
        """CRC-32, polynomial 0x04c11db7, most significant bit first, neither start nor result inverted.

        binascii has the same one with the bits of every byte and of the result reversed, and inverted at both ends.
        """
        reversed_bits = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
        crc = 0
        for data in self._scan(_parse_range(arguments)):
            crc = binascii.crc32(data.translate(reversed_bits), crc)
        return b"C%08x" % int(f"{crc ^ 0xFFFFFFFF:032b}"[::-1], 2)

    def _on_physical(self, arguments: bytes) -> bytes:
        if arguments not in (b"0", b"1"):
            raise _Malformed("PhyMemMode is 0 or 1")
        self._physical = arguments == b"1"
        return _OK

    def _on_physical_query(self, _arguments: bytes) -> bytes:
        return b"%d" % self._physical

    # --- breakpoints ---------------------------------------------------------------------------------

    def _on_insert(self, arguments: bytes) -> bytes:
        """``Z0``, ``Z1``, ``Z2``, ``Z4``; *arguments* begins with the digit."""
        point = _parse_point(arguments)
        if point.kind in _KINDS and _KINDS[point.kind] not in self._breakpoints.access:
            return b""  # gdb then finds another way, or says so
        if point.commands:
            raise TargetError("commands on the target's side are not supported", errno.EOPNOTSUPP)
        if point.kind in (2, 4) and point.size == 0:
            raise _Malformed("nothing to watch")
        self._breakpoints.add(point)
        return _OK

    def _on_remove(self, arguments: bytes) -> bytes:
        if arguments[:1] not in (b"0", b"1", b"2", b"4"):
            return b""
        self._breakpoints.remove(_parse_point(arguments))
        return _OK

    # --- documents and files -------------------------------------------------------------------------

    def _on_features(self, arguments: bytes) -> bytes:
        annex = arguments.partition(b":")[0]
        if annex != b"target.xml":
            return b"E00"  # the manual's word for an unknown annex
        return _window(target_description(self._groups).encode(), arguments)

    def _on_exec_file(self, arguments: bytes) -> bytes:
        return _window(os.fsencode(cast(ExecFile, self._target).exec_file()[0]), arguments)

    def _on_threads(self, arguments: bytes) -> bytes:
        info = _escape_xml(self._thread_info())
        document = f'<?xml version="1.0"?><threads><thread id="1" core="0">{info}</thread></threads>'
        return _window(document.encode(), arguments)

    def _on_libraries(self, arguments: bytes) -> bytes:
        rows = (
            f'<library name="{_escape_xml(path)}"><segment address="{address:#x}"/></library>'
            for path, address in cast(Libraries, self._target).libraries()
        )
        return _window(f"<library-list>{''.join(rows)}</library-list>".encode("utf-8", "replace"), arguments)

    def _on_auxv(self, arguments: bytes) -> bytes:
        pairs = [*cast(Auxv, self._target).auxv(), (0, 0)]
        return _window(b"".join(struct.pack("<QQ", *pair) for pair in pairs), arguments)

    def _on_memory_map(self, arguments: bytes) -> bytes:
        rows = (
            f'<memory type="{kind}" start="{address:#x}" length="{size:#x}"/>'
            for kind, address, size in cast(MemoryMap, self._target).memory_map()
        )
        return _window(f"<memory-map>{''.join(rows)}</memory-map>".encode(), arguments)

    def _on_offsets(self, _arguments: bytes) -> bytes:
        return b"TextSeg=%x" % cast(LoadAddress, self._target).load_address()

    def _on_file_open(self, arguments: bytes) -> bytes:
        """``vFile:open:name,flags,mode``: only the target's own file, and only for reading (flags 0)."""
        name, flags, _mode = _parse_fields(arguments, 3)
        path, data = cast(ExecFile, self._target).exec_file()
        if _parse_bytes(name) != os.fsencode(path):
            return _file_error(errno.ENOENT)
        if _parse_number(flags) != 0:
            return _file_error(errno.EACCES)
        free = next((number for number in range(_MOST_FILES) if number not in self._files), None)
        if free is None:
            return _file_error(errno.EMFILE)
        self._files[free] = data
        return b"F%x" % free

    def _on_file_close(self, arguments: bytes) -> bytes:
        known = self._files.pop(_parse_number(arguments), None) is not None
        return b"F0" if known else _file_error(errno.EBADF)

    def _on_file_read(self, arguments: bytes) -> bytes:
        number, count, offset = (_parse_number(field) for field in _parse_fields(arguments, 3))
        if number not in self._files:
            return _file_error(errno.EBADF)
        data = self._files[number][offset : offset + min(count, _MOST_BINARY)]
        return b"F%x;%b" % (len(data), data)

    def _on_file_stat(self, arguments: bytes) -> bytes:
        data = self._files.get(_parse_number(arguments))
        if data is None:
            return _file_error(errno.EBADF)
        mode, blocks = stat.S_IFREG | 0o444, (len(data) + 511) // 512
        status = _FSTAT.pack(0, 0, mode, 1, 0, 0, 0, len(data), 512, blocks, 0, 0, 0)
        return b"F%x;%b" % (len(status), status)

    # --- monitor -------------------------------------------------------------------------------------

    def _on_monitor(self, arguments: bytes) -> bytes:
        """``qRcmd,text``: what the command prints goes out in O packets, then OK."""
        name, *rest = _parse_bytes(arguments).decode("utf-8", "replace").split() or ["help"]
        commands = self._monitor_commands()
        if name in commands:
            try:
                text = commands[name].run(rest)
            except TargetError as error:
                text = f"{name}: {error}"
        else:
            text = f"{name}: no such command; try 'monitor help'"
        data = (text.rstrip("\n") + "\n").encode("utf-8", "replace")
        for start in range(0, len(data), _MOST_HEX):
            self._console.append(b"O" + binascii.hexlify(data[start : start + _MOST_HEX]))
        return _OK

    def _monitor_commands(self) -> dict[str, MonitorCommand]:
        commands = {
            "help": MonitorCommand("show this list", self._monitor_help),
            "trace": MonitorCommand(f"show the last {_TRACE_PACKETS} packets", self._monitor_trace),
        }
        if isinstance(self._target, PhysicalMemory):
            commands["phys"] = MonitorCommand(
                "on|off: take the addresses of memory reads and writes as guest-physical", self._monitor_phys
            )
        if isinstance(self._target, Monitor):
            commands.update(self._target.monitor_commands())
        return commands

    def _monitor_help(self, _arguments: Sequence[str]) -> str:
        return "\n".join(f"{name:10} {command.help}" for name, command in self._monitor_commands().items())

    def _monitor_trace(self, _arguments: Sequence[str]) -> str:
        return "\n".join(self._trace)

    def _monitor_phys(self, arguments: Sequence[str]) -> str:
        if list(arguments) in (["on"], ["off"]):
            self._physical = list(arguments) == ["on"]
        elif arguments:
            return "phys: on or off"
        return f"memory addresses are {'physical' if self._physical else 'virtual'}"


_Handler = Callable[[Session, bytes], "bytes | list[bytes]"]  # gets what follows the name; see Session.handle


class _PacketType(NamedTuple):
    """A line of the table below."""

    name: bytes
    answer: _Handler | bytes
    exact: bool = False  # nothing may follow the name
    needs: type | None = None  # a capability of the target; without it the packet is unknown
    offers: tuple[bytes, ...] = ()  # what qSupported then says


def _with(prefix: bytes, handler: _Handler) -> _Handler:
    """Let *handler* see the end of the packet's name as well."""
    return lambda session, arguments: handler(session, prefix + arguments)


def _transfer(what: bytes, handler: _Handler, needs: type | None = None) -> _PacketType:
    """Make the line of a document that is read in windows: ``qXfer:what:read:annex:offset,length``."""
    return _PacketType(b"qXfer:%b:read:" % what, handler, False, needs, (b"qXfer:%b:read+" % what,))


_EXACT = True
_DENIED = b"F-1,%x" % errno.EACCES
_HOST_INFO = b"triple:%b;endian:little;ptrsize:8;" % binascii.hexlify(b"x86_64-unknown-unknown")

# Every packet there is. Dispatch takes an exact match first, then the longest name that the packet begins with;
# what matches nothing is answered empty, which means "not supported". So are, on purpose: Z3 (x86 cannot watch
# reads only; gdb retries with Z4), qTStatus (an answer makes gdb ask for tracepoints), qSymbol, vMustReplyEmpty.
PACKETS: tuple[_PacketType, ...] = (
    # negotiation
    _PacketType(b"qSupported", Session._on_supported, offers=(b"vContSupported+",)),
    _PacketType(b"QStartNoAckMode", b"OK", _EXACT, offers=(b"QStartNoAckMode+",)),  # see Link
    _PacketType(b"!", Session._on_extended, _EXACT),
    _PacketType(b"qHostInfo", _HOST_INFO, _EXACT),  # lldb
    _PacketType(b"qProcessInfo", b"pid:1;" + _HOST_INFO, _EXACT),  # lldb
    # threads
    _PacketType(b"H", Session._on_set_thread),
    _PacketType(b"T", Session._on_thread_alive),
    _PacketType(b"qC", b"QC1", _EXACT),
    _PacketType(b"qfThreadInfo", b"m1", _EXACT),
    _PacketType(b"qsThreadInfo", b"l", _EXACT),
    _PacketType(b"qThreadExtraInfo,", Session._on_thread_extra),
    _PacketType(b"qAttached", b"1"),  # so that gdb detaches, not kills, when it quits
    _transfer(b"threads", Session._on_threads),
    # running
    _PacketType(b"?", Session._on_why, _EXACT),
    *(_PacketType(name, _with(name, Session._on_resume)) for name in (b"c", b"C", b"s", b"S")),
    _PacketType(b"vCont?", b"vCont;c;C;s;S;r", _EXACT),
    _PacketType(b"vCont;", Session._on_vcont),
    _PacketType(b"vCtrlC", Session._on_ctrl_c, _EXACT),
    _PacketType(b"D", Session._on_detach),
    _PacketType(b"k", Session._on_kill, _EXACT),
    _PacketType(b"vKill;", Session._on_vkill),
    _PacketType(b"R", Session._on_restart, needs=Restart),
    _PacketType(b"vRun;", Session._on_run, needs=Restart),
    _PacketType(b"vAttach;", Session._on_attach),
    # registers
    _PacketType(b"g", Session._on_read_all, _EXACT),
    _PacketType(b"G", Session._on_write_all),
    _PacketType(b"p", Session._on_read_one),
    _PacketType(b"P", Session._on_write_one),
    _transfer(b"features", Session._on_features),
    # memory
    _PacketType(b"m", Session._on_read_hex),
    _PacketType(b"x", Session._on_read_binary, offers=(b"binary-upload+",)),
    _PacketType(b"M", Session._on_write_hex),
    _PacketType(b"X", Session._on_write_binary),
    _PacketType(b"qSearch:memory:", Session._on_search),
    _PacketType(b"qCRC:", Session._on_crc),
    _PacketType(b"Qqemu.PhyMemMode:", Session._on_physical, needs=PhysicalMemory),
    _PacketType(b"qqemu.PhyMemMode", Session._on_physical_query, _EXACT, needs=PhysicalMemory),
    _transfer(b"memory-map", Session._on_memory_map, MemoryMap),
    # breakpoints
    _PacketType(b"Z0", _with(b"0", Session._on_insert), offers=(b"swbreak+", b"ConditionalBreakpoints+")),
    _PacketType(b"Z1", _with(b"1", Session._on_insert), needs=HardwareBreakpoints, offers=(b"hwbreak+",)),
    _PacketType(b"Z2", _with(b"2", Session._on_insert), needs=HardwareBreakpoints),
    _PacketType(b"Z4", _with(b"4", Session._on_insert), needs=HardwareBreakpoints),
    _PacketType(b"z", Session._on_remove),
    # files and modules
    _transfer(b"exec-file", Session._on_exec_file, ExecFile),
    _transfer(b"libraries", Session._on_libraries, Libraries),
    _transfer(b"auxv", Session._on_auxv, Auxv),
    _PacketType(b"qOffsets", Session._on_offsets, _EXACT, needs=LoadAddress),
    _PacketType(b"vFile:setfs:", b"F0", needs=ExecFile),  # there is only one file system to choose
    _PacketType(b"vFile:open:", Session._on_file_open, needs=ExecFile),
    _PacketType(b"vFile:close:", Session._on_file_close, needs=ExecFile),
    _PacketType(b"vFile:pread:", Session._on_file_read, needs=ExecFile),
    _PacketType(b"vFile:fstat:", Session._on_file_stat, needs=ExecFile),
    _PacketType(b"vFile:pwrite:", _DENIED, needs=ExecFile),
    _PacketType(b"vFile:unlink:", _DENIED, needs=ExecFile),
    _PacketType(b"vFile:readlink:", _DENIED, needs=ExecFile),
    # commands
    _PacketType(b"qRcmd,", Session._on_monitor),
)


def _known_packets(target: Target) -> list[_PacketType]:
    return [packet for packet in PACKETS if packet.needs is None or isinstance(target, packet.needs)]


def _offered_groups(target: Target) -> tuple[RegisterGroup, ...]:
    """Return the register groups of which the target can read something now; the core group always is one."""
    try:
        known = target.read_registers([register.name for register in REGISTERS])
    except TargetError as error:
        _log.info("only the core registers are described: %s", error)
        known = {}
    return tuple(
        group
        for group in _GROUPS
        if group is _CORE or any(register.name in known for register in group.registers)
    )


def _read_on(read: Callable[[int, int], bytes], address: int, size: int) -> bytes:
    """Read as far as it goes. A fault, or the end of the address space, counts only at the first byte."""
    size = min(size, _BITS64 + 1 - address)
    data = read(address, size) if size else b""
    while 0 < len(data) < size:
        try:
            more = read(address + len(data), size - len(data))
        except TargetError:
            break
        if not more:
            break
        data += more
    return data


def _window(document: bytes, arguments: bytes) -> bytes:
    """Answer ``annex:offset,length`` of a qXfer read: m and a part, or l and the last part."""
    offset, length = _parse_range(_parse_fields(arguments, 2, b":")[1])
    part = document[offset : offset + min(length, _MOST_BINARY)]
    return (b"l" if offset + len(part) >= len(document) else b"m") + part


def _escape_xml(text: str) -> str:
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def _file_error(code: int) -> bytes:
    """Word the failure of a file operation. The protocol's numbers for these are errno's own."""
    return b"F-1,%x" % code


# =====================================================================================================
# 4. Server: sockets, one thread, and who may touch the machine when
#
#    The server's thread reads packets and puts them into the inbox; the owner takes them out and executes them.
#    Who the owner is depends on what the guest's thread does:
#
#      inside stopped(), attend(), entered()    it is the owner, and waits for the inbox
#      running the guest, or a host function    nobody: the thread is asked to come (Target.interrupt)
#      not in a guest call, machine released    the server's thread, if it can acquire the machine (Idle)
#
#    So an inbox that is not empty always has somebody on the way to it. Sessions belong to the owner alone.
# =====================================================================================================

_READ_SIZE = 1 << 16
_MOST_UNANSWERED = 64  # packets in the inbox; no debugger sends ahead like that
_KILL = Packet(b"k")  # which gdb sends as its last word, because there is no answer
_MOST_REFUSED = 8  # connections that are kept only to tell them that they are one too many
_REFUSAL = b"E.another debugger is connected to this guest"


class _Client:
    """A connection: bytes in and out, framed by a `Link`. Reads on one thread, writes on any.

    Nobody waits for a peer that does not read. What its socket does not take is kept, and *on_full* is called: the
    server's thread then sends the rest when it can, and does not read from the peer before.
    """

    def __init__(
        self, read_fd: int, write_fd: int, close: Callable[[], None], on_full: Callable[[], None]
    ) -> None:
        self.read_fd = read_fd
        self._write_fd = write_fd
        self._close = close
        self._on_full = on_full
        self._link = Link()
        self._writing = threading.Lock()  # guards the next two
        self._unsent = bytearray()
        self._closed = False
        self._begun = False

    @classmethod
    def over_socket(cls, connection: socket.socket, on_full: Callable[[], None]) -> _Client:
        """Use a connected socket."""
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # packets are small, and answered
        return cls(connection.fileno(), connection.fileno(), connection.close, on_full)

    @classmethod
    def over_stdio(cls) -> _Client:
        """Use standard input and output, and keep everybody else's output out of the protocol.

        From now on fd 0 is empty and fd 1 is standard error, for this process and its children. These two are not
        ours alone, so that they stay blocking: a writer waits for the gdb that started us to read on, or to end.
        """
        read_fd, write_fd = os.dup(0), os.dup(1)
        os.set_blocking(write_fd, True)
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)

        def close() -> None:
            os.close(read_fd)
            os.close(write_fd)

        return cls(read_fd, write_fd, close, lambda: None)

    def receive(self) -> list[Packet | Event] | None:
        """Read what is there, and acknowledge it. None at the end of the connection."""
        try:
            data = os.read(self.read_fd, _READ_SIZE)
        except BlockingIOError:
            return []
        except OSError as error:
            _log.debug("read: %s", error)
            return None
        if not self._begun and data and not _START.match(data):
            # A web page can have a browser POST anything to any port of this machine, packets included.
            _log.warning("a connection that begins with %r is no debugger's", data[:16])
            return None
        self._begun = True
        if not data:
            return None
        events, answer = self._link.receive(data)
        if answer:
            self._write(answer)
        return events

    def send(self, payload: bytes) -> None:
        """Send a packet. A connection that is gone is not an error here: its reader notices."""
        _packet_log.debug("-> %r", payload)
        self._write(self._link.send(payload))

    def _write(self, data: bytes) -> None:
        with self._writing:
            if not self._closed:
                self._unsent += data
        if not self.flush():
            self._on_full()

    def flush(self) -> bool:
        """Send what is kept; return whether that is all of it."""
        with self._writing:
            while self._unsent and not self._closed:
                try:
                    del self._unsent[: os.write(self._write_fd, self._unsent)]
                except BlockingIOError:
                    return False
                except OSError as error:
                    _log.debug("write: %s", error)
                    self._unsent.clear()
            return True

    def close(self) -> None:
        """Close the connection, at most once."""
        with self._writing:  # else the number of the fd could be another file's by now
            if not self._closed:
                self._closed = True
                self._unsent.clear()
                self._close()


class _Gone(NamedTuple):
    """In the inbox: the debugger of before has disconnected."""


class DebugServer:
    """Serve one target at one address, to one debugger at a time, one after the other.

    *address* is ``HOST:PORT`` (port 0 takes a free one, no host means 127.0.0.1), ``unix:PATH`` or ``stdio``. The
    server listens when the constructor returns; `address` then says where. A debugger may connect at any time,
    before the guest first runs or long after. Connecting stops the guest. Disconnecting, in whatever way, removes
    all breakpoints and lets the guest go on.

    The guest's thread must say what it does::

        entered()           a guest call begins; returns how. Nearly free while no debugger wants anything
        stopped(stop)       the guest has stopped; returns when and how it goes on
        attend()            the guest was interrupted, or is about to be entered, and `attention` is true
        left()              the guest call is over, the machine not yet released
        released()          the machine's lock has been released, after a guest call or anything else
        exited(status)      the guest will not run again

    Resume.KILL as an answer means: end the guest call with an error. After CONTINUE, `attached` tells whether the
    debugger wants the guest to go on, or has gone. All of these belong to one thread at a time; `attention`,
    `attached`, `wait_for_client` and `close` may be used on any.

    Raises:
        ListenError: the address cannot be used.
        RspUsageError: the address makes no sense.
    """

    def __init__(self, target: Target, address: str = "127.0.0.1:0") -> None:
        self._target = target
        self._arrived = threading.Condition()  # guards the next four
        self._inbox: deque[Packet | Event | _Client | _Gone] = deque()
        self._serving = False  # the guest's thread looks at the inbox before it does anything else
        self._reader: _Client | None = None  # the connected client, for the server's thread
        self._closing = False
        self._client: _Client | None = None  # the same for the owner, who learns of it through the inbox
        self._session: Session | None = None
        self._parted = Resume.CONTINUE  # how to go on without a session: KILL if the last debugger said so
        self._idle = False  # the server's thread is the owner
        self._refused: set[socket.socket] = set()
        self._is_reading = False  # the selector waits for the client's packets, not for room to answer it
        self._stdio = _Client.over_stdio() if address == "stdio" else None
        self._listener = None if self._stdio else _Listener(address)
        self.address = self._listener.name if self._listener else "stdio"
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name=f"gdb server {self.address}", daemon=True)
        self._thread.start()

    # --- for the guest's thread ----------------------------------------------------------------------

    @property
    def attention(self) -> bool:
        """Whether something waits in the inbox: call `attend` before entering the guest again."""
        return bool(self._inbox)

    @property
    def attached(self) -> bool:
        """Whether a debugger is connected."""
        return self._reader is not None

    @property
    def is_needed(self) -> bool:
        """Whether `entered` would do more than say CONTINUE. If not, it and the call's `left` may be left out."""
        if self._session is None:
            return bool(self._inbox) or self._parted is not Resume.CONTINUE
        return bool(self._inbox) or self._session.is_needed

    def entered(self) -> Resume:
        """Tell that a guest call begins, registers and memory being ready; return how to begin it.

        A debugger that was idle when it said ``stepi`` gets Resume.STEP here.
        """
        if self._inbox or (self._session is not None and self._session.waiting):
            return self.attend()
        return self._resume()

    def attend(self) -> Resume:
        """Execute what has arrived while the guest stands still; return how to go on.

        Spurious calls are welcome. If the debugger wants the guest to stop, this waits until it goes on.
        """
        if self._session is not None:
            self._session.pause()
        return self._serve(_PLAIN_STOP)

    def stopped(self, stop: Stop) -> Resume:
        """Tell that the guest has stopped; wait until the debugger lets it go on; return how.

        Without a debugger the answer comes at once: CONTINUE.
        """
        if self._session is not None:
            self._send(self._session.stopped(stop))
        return self._serve(stop)

    def left(self) -> None:
        """Tell that a guest call is over. No breakpoint is in memory when this returns."""
        if self._session is not None:
            self._session.left()

    def released(self) -> None:
        """Tell that the machine's lock (`Idle`) has just been released, so that the server can take it."""
        if self._inbox:
            self._wake()

    def exited(self, status: int = 0, signal: int | None = None) -> Resume:
        """Tell that the guest will not run again.

        With a debugger in extended mode and a target with `Restart` this waits for ``run``; the guest is then to be
        started again, as the answer says. Otherwise the answer is KILL, at once.
        """
        if self._session is None:
            return Resume.KILL
        self._send(self._session.exited(status, signal))
        return self._serve(_PLAIN_STOP)

    def wait_for_client(self, timeout_s: float | None = None) -> bool:
        """Wait until a debugger is connected, without limit by default. False if time is up or it was closed.

        The debugger stops the guest at the next `entered`, `attend` or `stopped`.
        """
        with self._arrived:
            self._arrived.wait_for(lambda: self._reader is not None or self._closing, timeout_s)
            return self._reader is not None and not self._closing

    def close(self) -> None:
        """End the service: the debugger is told that the guest has exited, the thread is joined.

        A guest stopped by the debugger goes on. Do not hold the machine's lock: the server may have it.
        """
        with self._arrived:
            self._closing = True
            self._arrived.notify_all()
        self._wake()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> DebugServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- for the owner, whoever it is ----------------------------------------------------------------

    def _serve(self, stop: Stop) -> Resume:
        """Execute the inbox, waiting for more as long as the session does."""
        try:
            while (item := self._next(wait=True)) is not None:
                self._execute(item, stop)
        finally:
            self._serving = False  # also after a KeyboardInterrupt, for instance
        return self._resume()

    def _serve_idle(self) -> None:
        """Do what `_serve` does, on the server's thread, without waiting; release the machine if nobody needs it."""
        while (item := self._next(wait=False)) is not None:
            self._execute(item, _PLAIN_STOP)
        if self._session is None or not self._session.waiting:
            self._idle = False
            cast(Idle, self._target).release()

    def _next(self, *, wait: bool) -> Packet | Event | _Client | _Gone | None:
        with self._arrived:
            while not self._inbox:
                self._serving = wait and self._session is not None and self._session.waiting
                if not self._serving:
                    return None
                self._arrived.wait()
            self._serving = wait
            return self._inbox.popleft()

    def _execute(self, item: Packet | Event | _Client | _Gone, stop: Stop) -> None:
        if isinstance(item, _Client):
            self._client, self._session = item, Session(self._target, stop)
        elif self._session is None:
            return
        elif isinstance(item, _Gone):
            self._session.detach()
            self._parted = self._session.resume()
            self._client = self._session = None
        elif isinstance(item, Packet):
            _packet_log.debug("<- %r", item.payload)
            self._send(self._session.handle(item.payload))
        elif item is Event.INTERRUPT:
            self._send(self._session.interrupt())
        else:
            self._send([_INVALID])

    def _resume(self) -> Resume:
        if self._session is not None:
            return self._session.resume()
        action, self._parted = self._parted, Resume.CONTINUE
        return action

    def _send(self, payloads: Sequence[bytes]) -> None:
        for payload in payloads:
            if self._client is not None:
                self._client.send(payload)

    # --- the server's own thread ---------------------------------------------------------------------

    def _run(self) -> None:
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._on_wake)
        if self._listener is not None:
            self._selector.register(self._listener.socket, selectors.EVENT_READ, self._on_connection)
        try:
            if self._stdio is not None:
                self._connect(self._stdio)
            while not self._closing:
                for key, _ in self._selector.select():
                    key.data()
        finally:
            self._shut_down()

    def _on_wake(self) -> None:
        os.eventfd_read(self._wake_fd)
        if self._reader is not None:
            self._on_writable()
        if self._inbox and not self._serving:
            self._summon()

    def _on_connection(self) -> None:
        connection = cast(_Listener, self._listener).accept()
        if connection is None:
            return
        if self._reader is None:
            self._connect(_Client.over_socket(connection, self._wake))
        else:
            self._refuse(connection)

    def _connect(self, client: _Client) -> None:
        self._selector.register(client.read_fd, selectors.EVENT_READ, self._on_readable)
        self._is_reading = True
        self._post(client)

    def _on_readable(self) -> None:
        events = cast(_Client, self._reader).receive()
        if events is None or len(self._inbox) + len(events) > _MOST_UNANSWERED:
            self._hang_up()
            return
        for event in events:
            self._post(event)

    def _on_writable(self) -> None:
        """Send what the client had no room for; read from it only when nothing is left of that."""
        client = cast(_Client, self._reader)
        is_empty = client.flush()
        if is_empty and not self._is_reading:
            self._selector.modify(client.read_fd, selectors.EVENT_READ, self._on_readable)
        elif not is_empty and self._is_reading:
            self._selector.modify(client.read_fd, selectors.EVENT_WRITE, self._on_writable)
        self._is_reading = is_empty

    def _hang_up(self) -> None:
        """Close the connection. What the debugger said without waiting for the answer is void, but for ``k``."""
        client = cast(_Client, self._reader)
        self._selector.unregister(client.read_fd)
        with self._arrived:
            if is_new := client in self._inbox:  # nobody has taken notice of it yet, and nobody shall
                while self._inbox.pop() is not client:
                    pass
                self._reader = None
            else:
                said = [item for item in self._inbox if item == _KILL]
                self._inbox.clear()
                self._inbox.extend(said)
        if not is_new:
            self._post(_Gone())
        client.close()

    def _post(self, item: Packet | Event | _Client | _Gone) -> None:
        """Put something into the inbox, and see to it that somebody takes it out."""
        with self._arrived:
            self._inbox.append(item)
            if isinstance(item, (_Client, _Gone)):  # not earlier: `wait_for_client` promises a guest that stops
                self._reader = item if isinstance(item, _Client) else None
            self._arrived.notify_all()
            served = self._serving
        if not served:
            self._summon()

    def _summon(self) -> None:
        if not self._idle and isinstance(self._target, Idle):
            self._idle = self._target.try_acquire()
        if self._idle:
            self._serve_idle()
        else:
            self._target.interrupt()

    def _refuse(self, connection: socket.socket) -> None:
        """Answer the first packet of a second debugger with an error, and drop what else it says."""
        try:
            if len(self._refused) == _MOST_REFUSED:
                raise ConnectionRefusedError("too many at a time")
            connection.setblocking(False)
            connection.send(b"+" + encode(_REFUSAL))
            connection.shutdown(socket.SHUT_WR)  # closing outright would throw the answer away
        except OSError as error:
            _log.debug("refused connection: %s", error)
            connection.close()
            return
        self._refused.add(connection)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._drain(connection))

    def _drain(self, connection: socket.socket) -> None:
        try:
            if connection.recv(_READ_SIZE):
                return
        except OSError as error:
            _log.debug("refused connection: %s", error)
        self._selector.unregister(connection)
        self._refused.remove(connection)
        connection.close()

    def _wake(self) -> None:
        with self._arrived:
            if self._wake_fd >= 0:
                os.eventfd_write(self._wake_fd, 1)

    def _shut_down(self) -> None:
        with self._arrived:
            self._closing = True  # also when an error of the target has ended the thread
            self._arrived.notify_all()
        if self._reader is not None:
            if self._session is not None and self._session.state is State.RUNNING:
                self._reader.send(b"W00")
            self._hang_up()
        for connection in self._refused:
            connection.close()
        if self._listener is not None:
            self._listener.close()
        self._selector.close()
        with self._arrived:
            os.close(self._wake_fd)
            self._wake_fd = -1


class _Listener:
    """A listening socket, TCP or Unix. `name` is what gdb's ``target remote`` takes."""

    def __init__(self, address: str) -> None:
        self._path = address.removeprefix("unix:") if address.startswith("unix:") else None
        try:
            if self._path is not None:
                self.socket = self._listen_unix(self._path)
                self.name = self._path
            else:
                self.socket = self._listen_tcp(*_parse_address(address))
                host, port = self.socket.getsockname()[:2]
                self.name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            self._spare = socket.socket()  # an fd to give up when there are no more
        except UnicodeError as error:
            raise RspUsageError(f"{address!r} has no host's name: {error}") from error
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            advice = "; another sandbox or program listens there, choose another address" if in_use else ""
            raise ListenError(f"cannot listen on {address}: {error.strerror or error}{advice}") from error

    @staticmethod
    def _listen_tcp(host: str, port: int) -> socket.socket:
        # One address, even where a name such as localhost has several: two servers must not share a port unnoticed.
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(where)
            listener.listen()
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
        return listener

    @staticmethod
    def _listen_unix(path: str) -> socket.socket:
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            os.fchmod(listener.fileno(), 0o600)  # before bind: the file is never open to others
            listener.bind(path)
            listener.listen()
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
        return listener

    def accept(self) -> socket.socket | None:
        """Return the next connection. None if it is gone, or had to be dropped because the process has no fd left."""
        try:
            return self.socket.accept()[0]
        except OSError as error:
            _log.warning("a connection was lost before it was accepted: %s", error)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._drop_one()
            return None

    def _drop_one(self) -> None:
        """Get rid of a connection for which there is no fd: it would wake the server again at once, for ever."""
        self._spare.close()
        try:
            self.socket.accept()[0].close()
            self._spare = socket.socket()
        except OSError as error:  # somebody else took the fd
            _log.debug("accept: %s", error)

    def close(self) -> None:
        """Stop listening, and remove the socket file."""
        self.socket.close()
        self._spare.close()
        if self._path is not None:
            _remove_stale(self._path)


def _remove_stale(path: str) -> None:
    """Remove a socket file that nobody listens on any more; leave everything else alone."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return  # bind will say that the name is taken
    except FileNotFoundError:
        return
    # A datagram socket cannot connect to a listener (EPROTOTYPE), so that a live one does not notice the question.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        if probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)


def _parse_address(address: str) -> tuple[str, int]:
    host, separator, port = address.rpartition(":")
    if not separator or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 0xFFFF:
        raise RspUsageError(f"{address!r} is not HOST:PORT, unix:PATH or stdio")
    return host.strip("[]") or "127.0.0.1", int(port)
