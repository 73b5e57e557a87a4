"""A small x86-64 machine for the debugger's tests, an interpreter of fifteen instructions with all capabilities; a client.

It runs on the thread that calls `run`, like a vCPU, and checks what the session promises: the memory that the
guest executes holds a breakpoint at every address where one should be, and none while it stands still.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from gdb_rsp import (
    REGISTERS,
    Access,
    HardwareBreakpoint,
    MonitorCommand,
    Packet,
    PacketDecoder,
    Reason,
    Signal,
    Stop,
    TargetError,
    TargetFault,
    encode,
)

BASE = 0x1000
ALIAS = 0xFFFF_8000_0000_0000  # the same memory once more, at the upper end of the address space
SIZE = 0x4000
READ_ONLY = range(0x3000, 0x4000)
STACK_TOP = 0x5000

CLIENT_TIMEOUT_S = 120  # only ever used up by a failure

# The guest, linked at 0 and loaded at BASE. `work` and `leaf` have frame information, so that gdb can unwind.
SOURCE = """
        .cfi_sections .debug_frame
        .globl _start, work, leaf, counter, crash
        .text
_start: mov $0, %rax
again:  call work
        jmp again

        .type work, @function
work:   .cfi_startproc
        push %rbp
        .cfi_def_cfa_offset 16
        .cfi_offset %rbp, -16
        mov %rsp, %rbp
        .cfi_def_cfa_register %rbp
        call leaf
        nop
        pop %rbp
        .cfi_def_cfa %rsp, 8
        ret
        .cfi_endproc
        .size work, . - work

        .type leaf, @function
leaf:   .cfi_startproc
        inc %rax
        mov %rax, counter + 0x1000
        ret
        .cfi_endproc
        .size leaf, . - leaf

        .type crash, @function
crash:  ud2
        hlt
        .size crash, . - crash

        .data
        .balign 8
        .type counter, @object
        .size counter, 8
counter: .quad 0
"""

# The same, assembled: for tests that need no symbols.
CODE = bytes.fromhex(
    "48c7c000000000"  # 1000 _start: mov $0, %rax
    "e802000000"  # 1007 again: call work
    "ebf9"  # 100c jmp again
    "55"  # 100e work: push %rbp
    "4889e5"  # 100f mov %rsp, %rbp
    "e803000000"  # 1012 call leaf
    "90"  # 1017 nop
    "5d"  # 1018 pop %rbp
    "c3"  # 1019 ret
    "48ffc0"  # 101a leaf: inc %rax
    "4889042500200000"  # 101d mov %rax, 0x2000
    "c3"  # 1025 ret
    "0f0b"  # 1026 crash: ud2
    "f4"  # 1028 hlt
)
AGAIN, WORK, CALL_LEAF, AFTER_LEAF, LEAF, STORE, LEAF_RET, CRASH = (
    0x1007, 0x100E, 0x1012, 0x1017, 0x101A, 0x101D, 0x1025, 0x1026
)  # fmt: skip
COUNTER = 0x2000

_GENERAL = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")


class Plain:
    """The interpreter, with the five methods that a target must have."""

    def __init__(self, code: bytes = CODE) -> None:
        self.first_memory = bytes(code.ljust(SIZE, b"\0"))
        self.runs = 0
        self.interrupted = threading.Event()
        self.reset()

    def reset(self) -> None:
        self.memory = bytearray(self.first_memory)
        # A distinct value in every register catches any two that are mixed up.
        self.registers = {
            register.name: int.from_bytes(bytes((number, 0xA5)) * 8, "little") & ((1 << register.bits) - 1)
            for number, register in enumerate(REGISTERS)
        }
        self.registers.update(rip=BASE, rsp=STACK_TOP, eflags=2, rbp=0)

    # --- Target

    def read_registers(self, names: Sequence[str]) -> Mapping[str, int]:
        return {name: self.registers[name] for name in names if name in self.registers}

    def write_registers(self, values: Mapping[str, int]) -> None:
        if "cr8" in values:
            raise TargetError("cr8 cannot be written")
        self.registers.update(values)

    def _offset(self, address: int, size: int) -> int:
        offset = address - (ALIAS if address >= ALIAS else 0) - BASE
        if not 0 <= offset <= SIZE - size:
            raise TargetFault(address)
        return offset

    def read_memory(self, address: int, size: int) -> bytes:
        offset = self._offset(address, 1)
        page_end = (offset | 0xFFF) + 1
        return bytes(self.memory[offset : min(offset + size, page_end)])

    def write_memory(self, address: int, data: bytes) -> None:
        if address in READ_ONLY:
            raise TargetFault(address, "read-only")
        offset = self._offset(address, len(data))
        self.memory[offset : offset + len(data)] = data

    def interrupt(self) -> None:
        self.interrupted.set()

    # --- the processor

    def run(self, *, step: bool, limit: int = 1_000_000) -> Stop | None:
        """Execute until there is something to report; None when interrupted or after *limit* instructions."""
        self.runs += 1
        for _ in range(limit):
            if self.interrupted.is_set():
                self.interrupted.clear()
                return None
            if (stop := self.before()) is not None:
                return stop
            written = self.execute()
            if isinstance(written, Stop):
                return written
            if (stop := self.after(written)) is not None:
                return stop
            if step:
                return Stop(reason=Reason.STEP)
        return None

    def before(self) -> Stop | None:
        return None

    def after(self, written: int | None) -> Stop | None:
        return None

    def execute(self) -> int | Stop | None:
        """Execute one instruction; return the address of the eight bytes it wrote, if any, or a stop."""
        registers = self.registers
        rip = registers["rip"]
        code = bytes(self.memory[rip - BASE : rip - BASE + 8])
        written = None
        match code[0]:
            case 0xCC:
                return Stop(reason=Reason.BREAKPOINT)
            case 0x90:
                size = 1
            case 0x48 if code[1:3] == b"\xff\xc0":
                size, registers["rax"] = 3, registers["rax"] + 1 & (1 << 64) - 1
            case 0x48 if code[1:3] == b"\xc7\xc0":
                size, registers["rax"] = 7, int.from_bytes(code[3:7], "little")
            case 0x48 if code[1:3] == b"\x89\xe5":
                size, registers["rbp"] = 3, registers["rsp"]
            case 0x48 if code[1:4] == b"\x89\x04\x25":
                size, written = 8, int.from_bytes(code[4:8], "little")
                self._store(written, registers["rax"])
            case 0x50 | 0x55:
                size, written = 1, self._push(registers[_GENERAL[code[0] - 0x50]])
            case 0x5D:
                size, registers["rbp"] = 1, self._pop()
            case 0xC3:
                size, rip = 0, self._pop()
            case 0xE8:
                size, written = 5 + struct.unpack("<i", code[1:5])[0], self._push(rip + 5)
            case 0xEB:
                size = 2 + struct.unpack("<b", code[1:2])[0]
            case 0xF4:
                return Stop(Signal.TRAP)
            case _:
                return Stop(Signal.ILL)
        registers["rip"] = rip + size
        return written

    def _store(self, address: int, value: int) -> None:
        self.memory[address - BASE : address - BASE + 8] = value.to_bytes(8, "little")

    def _push(self, value: int) -> int:
        self.registers["rsp"] -= 8
        self._store(self.registers["rsp"], value)
        return self.registers["rsp"]

    def _pop(self) -> int:
        offset = self.registers["rsp"] - BASE
        self.registers["rsp"] += 8
        return int.from_bytes(self.memory[offset : offset + 8], "little")


class Machine(Plain):
    """The interpreter with every capability except `SoftwareBreakpoints`, `MemoryMap` and `Idle`."""

    def __init__(self, code: bytes = CODE, path: str = "/guest/toy.elf", file: bytes = b"") -> None:
        super().__init__(code)
        self.path, self.file = path, file
        self.modules: Sequence[tuple[str, int]] = [("/guest/lib&more.so", 0x3000)]
        self.debug_registers: tuple[HardwareBreakpoint, ...] = ()
        self.restarts = 0

    def hardware_access(self) -> frozenset[Access]:
        return frozenset(Access)

    def set_hardware_breakpoints(self, breakpoints: Sequence[HardwareBreakpoint]) -> None:
        assert len(breakpoints) <= 4
        assert all(point.address % point.size == 0 for point in breakpoints)
        self.debug_registers = tuple(breakpoints)

    def before(self) -> Stop | None:
        for slot, point in enumerate(self.debug_registers):
            if point.access is Access.EXECUTE and point.address == self.registers["rip"]:
                return Stop(reason=Reason.HARDWARE, slot=slot)
        return None

    def after(self, written: int | None) -> Stop | None:
        for slot, point in enumerate(self.debug_registers):
            is_data = point.access is not Access.EXECUTE and written is not None
            if is_data and written < point.address + point.size and point.address < written + 8:
                return Stop(reason=Reason.HARDWARE, slot=slot)
        return None

    def read_physical(self, address: int, size: int) -> bytes:
        if address >= SIZE:
            raise TargetFault(address)
        return bytes(self.memory[address : address + size])

    def write_physical(self, address: int, data: bytes) -> None:
        if address + len(data) > SIZE:
            raise TargetFault(address)
        self.memory[address : address + len(data)] = data

    def exec_file(self) -> tuple[str, bytes]:
        return self.path, self.file

    def load_address(self) -> int:
        return BASE

    def thread_info(self) -> str:
        return 'vcpu 0 <in "leaf">'

    def libraries(self) -> Sequence[tuple[str, int]]:
        return self.modules

    def auxv(self) -> Sequence[tuple[int, int]]:
        return [(9, BASE)]  # AT_ENTRY

    def monitor_commands(self) -> Mapping[str, MonitorCommand]:
        def fail(arguments: Sequence[str]) -> str:
            raise TargetError("does not work")

        return {
            "layout": MonitorCommand("show the memory", lambda arguments: "code 0x1000"),
            "echo": MonitorCommand("show the arguments", " ".join),
            "fail": MonitorCommand("do not work", fail),
        }

    def restart(self) -> None:
        self.restarts += 1
        self.reset()


def load_elf(path: Path) -> bytes:
    """Return the loadable segments of a program, as they lie in memory from BASE on."""
    data = path.read_bytes()
    (table,) = struct.unpack_from("<Q", data, 32)
    (count,) = struct.unpack_from("<H", data, 56)
    memory = bytearray(SIZE)
    for index in range(count):
        kind, _, start, address, _, size = struct.unpack_from("<IIQQQQ", data, table + 56 * index)
        if kind == 1:  # PT_LOAD
            memory[address : address + size] = data[start : start + size]
    return bytes(memory)


class Client:
    """A debugger's end of the connection, by hand."""

    def __init__(self, address: str) -> None:
        if address.startswith("/"):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(address)
        else:
            host, _, port = address.rpartition(":")
            self.socket = socket.create_connection((host.strip("[]"), int(port)))
        self.socket.settimeout(CLIENT_TIMEOUT_S)
        self.decoder = PacketDecoder()
        self.arrived: list[bytes] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, payload: bytes) -> None:
        self.socket.sendall(encode(payload))

    def interrupt(self) -> None:
        self.socket.sendall(b"\x03")

    def receive(self) -> bytes:
        """Wait for the next packet; an error at the end of the connection."""
        while not self.arrived:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError
            self.arrived += [event.payload for event in self.decoder.feed(data) if isinstance(event, Packet)]
        return self.arrived.pop(0)

    def ask(self, payload: bytes) -> bytes:
        self.send(payload)
        return self.receive()

    def is_closed_by_peer(self) -> bool:
        try:
            return self.receive() == b""
        except (EOFError, ConnectionError):
            return True
