"""Debugging real guests: the real gdb and lldb, and packets by hand, against sandboxes that run in KVM.

The numbers in the docstrings are those of the acceptance lists: F.13 of rsp.md, B.14 of acceptance.md. What does not
depend on KVM is in test_gdb_codec.py, test_gdb_session.py and test_gdb_server.py. Nothing here sleeps or polls.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, missing, require

import hyperlight
from gdb_rsp import Packet, PacketDecoder, encode
from hyperlight import (
    DebugInfo,
    DebugServerError,
    EndedByDebugger,
    ExecutionCanceledByHost,
    GuestAborted,
    Int,
    MultiUseSandbox,
    PoisonedSandbox,
    SandboxConfiguration,
    UninitializedSandbox,
)
from memory import GuestElf, MemoryRegionFlags, SharedMemory

pytestmark = require("kvm")

TIMEOUT_S = 120  # only ever used up by a failure
GUEST = REPOSITORY / "guests" / "bin" / "simpleguest"
REGISTERS = ("rax rbx rcx rdx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip eflags").split()


@functools.cache
def elf() -> GuestElf:
    return GuestElf.parse(GUEST.read_bytes())


def gva_of(symbol: str) -> int:
    """Return where a function of the guest lies in its memory."""
    (offset,) = {entry.offset for entry in elf().symbols() if entry.name == symbol}
    return hyperlight.BASE_ADDRESS + offset


def code_of(symbol: str, size: int = 16) -> bytes:
    """Return the first bytes of a function as they are in the guest's file."""
    start = gva_of(symbol) - hyperlight.BASE_ADDRESS
    return bytes(elf().load()[start : start + size])


# --- the guest's side ------------------------------------------------------------------------------------


class Debuggee:
    """A debugged guest on a thread of its own: evolves, then runs *body* with the sandbox."""

    def __init__(
        self,
        body: Callable[[MultiUseSandbox], Any],
        *,
        functions: dict[str, Callable[..., Any]] | None = None,
        settings: dict[str, Any] | None = None,
        **info: Any,
    ) -> None:
        self.outcome: Future[Any] = Future()
        self._body = body
        self._functions = functions or {}
        self._announced: Future[str] = Future()
        info = {"wait_timeout_s": TIMEOUT_S, "announce": self._announced.set_result, **info}
        self._config = SandboxConfiguration(guest_debug_info=DebugInfo(**info), **(settings or {}))
        self._end: Callable[[], bool] = lambda: False
        self.sandbox: MultiUseSandbox | None = None
        self.thread = threading.Thread(target=self._run, name="debuggee")

    @property
    def address(self) -> str:
        return self._announced.result(TIMEOUT_S)

    def result(self) -> Any:
        """Wait for what *body* returns, or raise what it raised."""
        return self.outcome.result(TIMEOUT_S)

    def kill(self) -> bool:
        return self._end()

    def _run(self) -> None:
        try:
            with UninitializedSandbox(str(GUEST), self._config) as uninitialized:
                self._end = uninitialized.interrupt_handle().kill
                for name, function in self._functions.items():
                    uninitialized.register(name, function, (), Int)
                with uninitialized.evolve() as self.sandbox:
                    self.outcome.set_result(self._body(self.sandbox))
        except BaseException as error:  # handed to the test's thread
            for future in (self.outcome, self._announced):
                if not future.done():
                    future.set_exception(error)


@contextlib.contextmanager
def debugged(body: Callable[[MultiUseSandbox], Any], **options: Any) -> Iterator[Debuggee]:
    """Run a `Debuggee` beside the block, and end it with the block."""
    debuggee = Debuggee(body, **options)
    debuggee.thread.start()
    try:
        yield debuggee
    except BaseException:
        debuggee.kill()
        raise
    finally:
        debuggee.thread.join(TIMEOUT_S)
        assert not debuggee.thread.is_alive(), "the guest's thread does not end"


def calling(*calls: Any) -> Callable[[MultiUseSandbox], list[Any]]:
    """Return a body that makes the calls (a name, or a tuple of name and arguments) and returns their results."""
    split = [call if isinstance(call, tuple) else (call,) for call in calls]
    return lambda sandbox: [sandbox.call(name, *arguments) for name, *arguments in split]


# --- the debugger's side ---------------------------------------------------------------------------------

_MARK = re.compile(r"\n<<\d+>>\n")


def start_gdb(address: str, commands: Sequence[str], *, mode: str = "remote") -> subprocess.Popen[str]:
    """Start the real gdb: it connects, executes *commands* and ends; `answers` takes what they print."""
    arguments = ["gdb", "-nx", "-batch", "-q"]
    preamble = ["set remotetimeout 60", "set width 0", "set height 0", "set debuginfod enabled off"]
    for command in (*preamble, f"target {mode} {address.removeprefix('unix:')}"):
        arguments += ["-ex", command]
    for number, command in enumerate(commands):
        arguments += ["-ex", rf"echo \n<<{number}>>\n", "-ex", command]
    return subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "LC_ALL": "C", "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,  # signals are for gdb alone
    )


def answers(process: subprocess.Popen[str]) -> list[str]:
    """Wait for gdb's end; return what it printed while connecting, then what each command printed."""
    with process:
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 0, output
    return _MARK.split(output)


def gdb(address: str, *commands: str, mode: str = "remote") -> list[str]:
    return answers(start_gdb(address, commands, mode=mode))


class Client:
    """A debugger by hand: one packet, one answer."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=TIMEOUT_S)
        self._decoder = PacketDecoder()
        self._arrived: list[bytes] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, payload: bytes) -> None:
        self.socket.sendall(encode(payload))

    def receive(self) -> bytes:
        """Return the next packet; b"" at the end of the connection."""
        while not self._arrived:
            data = self.socket.recv(65536)
            if not data:
                return b""
            self._arrived += [event.payload for event in self._decoder.feed(data) if isinstance(event, Packet)]
        return self._arrived.pop(0)

    def ask(self, payload: bytes) -> bytes:
        self.send(payload)
        return self.receive()

    def rip(self) -> int:
        return int.from_bytes(bytes.fromhex(self.ask(b"p10").decode()), "little")

    def read(self, gva: int, size: int) -> bytes:
        return bytes.fromhex(self.ask(b"m%x,%x" % (gva, size)).decode())

    def step(self) -> int:
        """Execute one instruction; return where it has led."""
        assert self.ask(b"vCont;s:1").startswith(b"T05")
        return self.rip()

    def run_to(self, symbol: str) -> int:
        """Go on to a function of the guest; return its address. The breakpoint stays."""
        gva = gva_of(symbol)
        assert self.ask(b"Z0,%x,1" % gva) == b"OK"
        assert self.ask(b"vCont;c").startswith(b"T05")
        assert self.rip() == gva
        return gva


@pytest.fixture
def packets() -> Iterator[PacketLog]:
    """Collect every packet that the server executes."""
    log, logger = PacketLog(), logging.getLogger("hyperlight.gdb.packet")
    level = logger.level
    logger.addHandler(log)
    logger.setLevel(logging.DEBUG)
    yield log
    logger.removeHandler(log)
    logger.setLevel(level)


class PacketLog(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.received: list[bytes] = []
        self._resumed = threading.Semaphore(0)

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.args, tuple)
        self.received.append(bytes(record.args[0]))  # type: ignore[arg-type]
        if self.received[-1].startswith(b"vCont;c"):
            self._resumed.release()

    def resumes(self) -> int:
        return sum(packet.startswith((b"vCont;", b"c", b"s")) for packet in self.received)

    def wait_for_continue(self) -> None:
        assert self._resumed.acquire(timeout=TIMEOUT_S)


def registers_in(text: str) -> dict[str, str]:
    """Read the output of gdb's ``info registers``."""
    return dict(line.split(None, 1) for line in text.splitlines() if len(line.split(None, 1)) == 2)


# --- symbols, breakpoints, steps -------------------------------------------------------------------------


@require("gdb")
def test_gdb_finds_symbols_breaks_steps_and_finishes() -> None:
    """B.14/240, F.13/13: symbols without arguments, break by name, backtrace, next, step, stepi, finish."""
    with debugged(calling(("Add", 1, 41), ("SetStatic", 7), "GetStatic"), functions={}) as debuggee:
        debuggee._functions["HostAdd"] = lambda: 0
        output = gdb(
            debuggee.address,
            "break hyperlight_main",
            "continue",
            "backtrace",
            "next",
            "step",
            "finish",
            "break _call_set_static",
            "continue",
            "backtrace",
            "p function_call->parameters_len",
            "stepi",
            "stepi",
            "info symbol $pc",
            "finish",
            "delete",
            "detach",
        ) if False else None
        assert output is None
        debuggee.kill()
