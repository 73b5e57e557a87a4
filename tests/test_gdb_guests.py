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
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import gdb_machine
import pytest
from conftest import KERNEL_GUESTS, REPOSITORY, missing, require
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_gdb_session import ANY_PACKET, CONSOLE, SILENT

import hyperlight
from gdb_rsp import Session, State, Stop
from hyperlight import (
    DebugInfo,
    DebugServerError,
    EndedByDebugger,
    ExecutionCanceledByHost,
    GuestAborted,
    GuestFailure,
    Int,
    MultiUseSandbox,
    PoisonedSandbox,
    SandboxConfiguration,
    ULong,
    UninitializedSandbox,
)
from memory import GuestElf, MemoryRegionFlags, SharedMemory

pytestmark = require("kvm")

TIMEOUT_S = 120  # only ever used up by a failure
GUESTS = {"user": REPOSITORY / "guests" / "bin" / "simpleguest", "kernel": KERNEL_GUESTS / "simpleguest"}
KERNEL_MODE_ON_A_REAL_CPL0 = pytest.param("kernel", marks=require("real_cpl0"))
USER_MODE_ON_AN_EMULATED_CPL0 = pytest.param("user", marks=require("emulated_cpl0"))
in_both_modes = pytest.mark.parametrize("guest", list(GUESTS), indirect=True)
NOWHERE = ULong(0x7000_0000_0000)
REGISTERS = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip", "eflags"]


@pytest.fixture(params=list(GUESTS) if missing("real_cpl0") else ["kernel"], autouse=True)
def guest(request: pytest.FixtureRequest) -> Path:
    """Run a test with the same guest built for either kind of privilege.

    Where KVM reports debug events from both alike, one will do, except for the tests that are `in_both_modes`.
    """
    global GUEST
    GUEST = GUESTS[request.param]
    return GUEST


GUEST = Path()


@functools.cache
def _parsed(guest: Path) -> GuestElf:
    return GuestElf.parse(guest.read_bytes())


def elf() -> GuestElf:
    return _parsed(GUEST)


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
        functions: dict[str, tuple[Callable[..., Any], tuple[Any, ...], Any]] | None = None,
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
                for name, (function, parameters, returns) in self._functions.items():
                    uninitialized.register(name, function, parameters, returns)
                with uninitialized.evolve() as self.sandbox:
                    self.outcome.set_result(self._body(self.sandbox))
        except BaseException as error:  # handed to the test's thread
            for future in (self.outcome, self._announced):
                if not future.done():
                    future.set_exception(error)


_D = TypeVar("_D", bound=Debuggee)


@contextlib.contextmanager
def debugged(body: Callable[[MultiUseSandbox], Any], **options: Any) -> Iterator[Debuggee]:
    """Run a `Debuggee` beside the block, and end it with the block."""
    with running(Debuggee(body, **options)) as debuggee:
        yield debuggee


@contextlib.contextmanager
def running(debuggee: _D) -> Iterator[_D]:
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
    return [text.strip() for text in _MARK.split(output)]


def gdb(address: str, *commands: str, mode: str = "remote") -> list[str]:
    return answers(start_gdb(address, commands, mode=mode))


class Client(gdb_machine.Client):
    """A debugger by hand, of a real guest."""

    def __enter__(self) -> Client:
        return self

    def rip(self) -> int:
        return int.from_bytes(bytes.fromhex(self.ask(b"p10").decode()), "little")

    def read(self, gva: int, size: int) -> bytes:
        return bytes.fromhex(self.ask(b"m%x,%x" % (gva, size)).decode())

    def monitor(self, command: str) -> str:
        """Execute a monitor command; return what it prints."""
        self.send(b"qRcmd," + command.encode().hex().encode())
        text = ""
        while (reply := self.receive()).startswith(b"O") and reply != b"OK":
            text += bytes.fromhex(reply[1:].decode()).decode()
        assert reply == b"OK"
        return text

    def number_of(self, register: str) -> int:
        """Return a register's number in the description."""
        description, part = b"", b"m"
        while part[:1] == b"m":
            part = self.ask(b"qXfer:features:read:target.xml:%x,4000" % len(description))
            description += part[1:]
        return re.findall(rb'<reg name="([^"]+)"', description).index(register.encode())

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
    logger.propagate = False  # a failure's report would show the guest's file
    yield log
    logger.removeHandler(log)
    logger.setLevel(level)
    logger.propagate = True


class PacketLog(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.received: list[bytes] = []
        self._resumed = threading.Semaphore(0)

    def emit(self, record: logging.LogRecord) -> None:
        if not record.msg.startswith("<-"):
            return
        assert isinstance(record.args, tuple)
        self.received.append(bytes(record.args[0]))  # type: ignore[arg-type]
        if self.received[-1].startswith(b"vCont;c"):
            self._resumed.release()

    def resumes(self) -> int:
        return sum(packet.startswith(b"vCont;") for packet in self.received)

    def wait_for_continue(self) -> None:
        assert self._resumed.acquire(timeout=TIMEOUT_S)


def registers_in(text: str) -> dict[str, str]:
    """Read the output of gdb's ``info registers``."""
    return dict(line.split(None, 1) for line in text.splitlines() if len(line.split(None, 1)) == 2)


# --- symbols, breakpoints, steps -------------------------------------------------------------------------


@in_both_modes
@require("gdb")
def test_gdb_finds_symbols_breaks_steps_and_finishes() -> None:
    """B.14/240, F.13/13: symbols without arguments, break by name, backtrace, next, step, finish; both end well."""
    with debugged(calling(("SetStatic", 7), "GetStatic")) as debuggee:
        connected, _, main, main_trace, _, step, finish, _, stop, trace, value, _, where, finished, _, _ = gdb(
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
            "info symbol $pc",
            "finish",
            "delete",
            "detach",
        )
        assert debuggee.result() == [7, 7]
    assert "Reading symbols from target:" in connected and "entrypoint ()" in connected
    assert re.search(r"Breakpoint 1, hyperlight_main \(\)", main)
    assert "hyperlight_main" in main_trace and re.search(r"(initialise|entrypoint) \(\)", main_trace)
    assert "register_" in step
    assert "Run till exit" in finish or "hyperlight_main" in finish
    assert re.search(r"Breakpoint 2, _call_set_static \(function_call=0x", stop)
    assert "_call_set_static" in trace and "hl_runtime_dispatch" in trace
    assert value.endswith("= 1")
    assert where.startswith("_call_set_static + ")
    assert "Value returned is" in finished or "hl_runtime_dispatch" in finished


@require("gdb")
def test_command_line_serves_the_real_gdb(tmp_path: Path) -> None:
    """B.14/240: over a Unix socket, from the command line; both processes end with 0."""
    address = tmp_path / "gdb.sock"
    command = [sys.executable, "-m", "hyperlight", "gdb", "--listen", f"unix:{address}", str(GUEST), "Echo", "hi"]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    ) as guest:
        try:
            assert guest.stderr is not None and guest.stdout is not None
            assert "waits for a debugger" in guest.stderr.readline()
            paste = guest.stderr.readline()
            output = gdb(f"unix:{address}", "break hyperlight_main", "continue", "backtrace", "continue")
            assert guest.stdout.read() == "hi\n"
            assert guest.wait(TIMEOUT_S) == 0
        finally:
            guest.kill()
    assert paste == f"  gdb -q -ex 'target extended-remote {address}'\n"
    assert "hyperlight_main" in output[3] and "exited normally" in output[4]


@require("gdb")
def test_gdb_starts_the_guest_at_the_other_end_of_a_pipe() -> None:
    """Issue 4: ``target remote | hyperlight gdb --stdio``."""
    pipe = f"| {sys.executable} -m hyperlight gdb --stdio {GUEST} Add 1 41"
    output = gdb(pipe, "break _call_add", "continue", "backtrace", "delete", "continue")
    assert "Breakpoint 1, _call_add" in output[2] and "hl_runtime_dispatch" in output[3]
    assert "exited normally" in output[5]


@require("gdb")
def test_conditional_breakpoint_is_evaluated_beside_the_guest(packets: PacketLog) -> None:
    """Issue 4, item 1: hit on the 1,000th pass without 999 stops at gdb."""

    def body(sandbox: MultiUseSandbox) -> int:
        for _ in range(1000):
            sandbox.call("AddToStatic", 1)
        return sandbox.call("GetStatic")

    with debugged(body) as debuggee:
        output = gdb(
            debuggee.address, "break _call_add_to_static if counter == 999", "continue", "p counter", "delete", "detach"
        )
        assert debuggee.result() == 1000
    assert "Breakpoint 1, _call_add_to_static" in output[2] and output[3] == "$1 = 999"
    assert packets.resumes() == 1


def out_before(sandbox: MultiUseSandbox) -> int:
    """Return where the OUT or HLT is that has just left the guest: KVM's rip is there, or already behind it."""
    assert sandbox._guest is not None
    rip = sandbox._guest.vm.vcpu.get_regs().rip
    before = elf().load()[rip - hyperlight.BASE_ADDRESS - 2 :][:2]
    if before[1] in (0xEE, 0xEF, 0xF4):
        return rip - 1
    return rip - 2 if before[0] in (0xE6, 0xE7) else rip


def test_step_leads_over_a_breakpoint_and_over_a_host_call() -> None:
    """F.13/13: a step over a software breakpoint, and over the OUT of a host call, ends at the next instruction."""
    idle, go_on = threading.Event(), threading.Event()
    outs: list[int] = []
    sandboxes: list[MultiUseSandbox] = []

    def host_function() -> int:
        outs.append(out_before(sandboxes[0]))
        return 5

    def body(sandbox: MultiUseSandbox) -> list[int]:
        sandboxes.append(sandbox)
        results = [sandbox.call("HostCallRepeat", "HostFunc", 1)]
        idle.set()
        assert go_on.wait(TIMEOUT_S)
        return [*results, sandbox.call("HostCallRepeat", "HostFunc", 2)]

    with debugged(body, functions={"HostFunc": (host_function, (), Int)}, wait=False) as debuggee:
        assert idle.wait(TIMEOUT_S)
        with Client(debuggee.address) as client:
            assert client.ask(b"?").startswith(b"T")
            go_on.set()
            start = client.run_to("_call_host_call_repeat")
            assert start < client.step() < start + 16
            assert client.ask(b"Z0,%x,1" % outs[0]) == b"OK"
            for passes in (2, 3):
                assert client.ask(b"vCont;c").startswith(b"T05")
                while len(outs) < passes:  # the OUT may serve other ports, too
                    assert client.rip() == outs[0]
                    after = client.step()
                    assert outs[0] < after <= outs[0] + 2
                    if len(outs) < passes:
                        assert client.ask(b"vCont;c").startswith(b"T05")
            assert client.ask(b"D") == b"OK"
        assert debuggee.result() == [5, 10]


def test_step_at_the_end_of_a_call_is_not_lost() -> None:
    """F.13/13: a step at the OUT that ends the call, ends behind it or in the next call."""
    idle, go_on = threading.Event(), threading.Event()
    halts: list[int] = []

    def body(sandbox: MultiUseSandbox) -> list[Any]:
        first = sandbox.call("SetStatic", 7)
        halts.append(out_before(sandbox))
        idle.set()
        assert go_on.wait(TIMEOUT_S)
        return [first, sandbox.call("GetStatic"), sandbox.call("GetStatic")]

    with debugged(body, wait=False) as debuggee:
        assert idle.wait(TIMEOUT_S)
        with Client(debuggee.address) as client:
            assert client.ask(b"Z0,%x,1" % halts[0]) == b"OK"
            go_on.set()
            assert client.ask(b"vCont;c").startswith(b"T05")
            assert client.rip() == halts[0]
            assert client.ask(b"vCont;s:1").startswith(b"T05")
            entry = client.rip()
            assert entry != halts[0]
            assert client.ask(b"D") == b"OK"
        assert debuggee.result() == [7, 7, 7]


def test_reads_over_an_inserted_breakpoint_show_the_program() -> None:
    """F.13/12: before it is hit, while standing on it, and through a step over it."""
    with debugged(calling("GetStatic", "GetStatic")) as debuggee, Client(debuggee.address) as client:
        gva = client.run_to("_call_get_static")
        assert client.read(gva, 16) == code_of("_call_get_static")
        client.step()
        assert client.read(gva, 16) == code_of("_call_get_static")
        assert client.ask(b"vCont;c").startswith(b"T05")
        assert (client.rip(), client.read(gva, 16)) == (gva, code_of("_call_get_static"))
        assert client.ask(b"D") == b"OK"
        assert debuggee.result() == [0, 0]


# --- registers -------------------------------------------------------------------------------------------


@require("gdb")
def test_registers_are_the_guests_and_change_one_at_a_time() -> None:
    """F.13/1, B.14/234: rbx is not rbp; setting rax leaves every other register, x87 and MXCSR alone."""
    with debugged(calling("GetStatic")) as debuggee:
        output = gdb(
            debuggee.address,
            "break _call_get_static",
            "continue",
            "set $rbx = 0x1111222233334444",
            "set $rbp = 0x5555666677778888",
            "info registers",
            "info all-registers",
            "set $rax = 1",
            "info registers",
            "info all-registers",
            "p/x $rax",
            "kill",
        )
        with pytest.raises(EndedByDebugger):
            debuggee.result()
    general, every = registers_in(output[5]), registers_in(output[6])
    assert set(REGISTERS) < set(general)
    assert general["rbx"].startswith("0x1111222233334444") and general["rbp"].startswith("0x5555666677778888")
    assert {"st0", "fctrl", "mxcsr", "cr0", "cr3", "efer", "dr7", "idtr_base"} < set(every)
    assert {"xmm15", "ymm15"} & set(every)  # gdb shows an xmm register as part of its ymm, if there are any
    rax = re.compile(r"^(rax|eax|ax|al|ah) .*\n", re.MULTILINE)
    assert rax.sub("", output[6]) == rax.sub("", output[9])
    assert general.pop("rax") != registers_in(output[8]).pop("rax")
    assert output[10] == "$1 = 0x1"


@require("gdb")
def test_segments_and_floating_point_registers_read_and_write() -> None:
    """F.13/2: segments and bases, xmm, x87, mxcsr, and ymm where the processor has it."""
    with debugged(calling("GetStatic")) as debuggee:
        output = gdb(
            debuggee.address,
            "break _call_get_static",
            "continue",
            "p/x $cs",
            "p/x $ss",
            "p/x $fs_base",
            "p/x $gs_base",
            "p/x $mxcsr",
            "p $st0",
            "monitor sregs",
            "set $xmm3.v2_int64[1] = 0x0123456789abcdef",
            "p/x $xmm3.uint128",
            "p/x $xmm2.uint128",
            "set $mxcsr = 0x1fa0",
            "p/x $mxcsr",
            "set $st2 = 1.5",
            "p $st2",
            "p $st1",
            "set $fs_base = 0x1234000",
            "p/x $fs_base",
            "monitor sregs",
            "kill",
        )
        with pytest.raises(EndedByDebugger):
            debuggee.result()
    values = [text.rpartition(" = ")[2] for text in output]
    assert int(values[3], 16) & 3 == int(values[4], 16) & 3 and int(values[3], 16) != 0
    for name, value in zip(("fs_base", "gs_base"), values[5:7], strict=True):
        assert re.search(rf"^{name} +{value}$", output[9], re.MULTILINE)
    assert values[7:9] == ["0x1f80", "0"]
    assert values[11] == "0x123456789abcdef0000000000000000"
    assert values[12] == "0x0"
    assert values[14] == "0x1fa0"
    assert (values[16], values[17]) == ("1.5", "0")
    assert values[19] == "0x1234000" and re.search(r"fs_base +0x1234000", output[20])


def test_no_value_of_a_register_breaks_anything() -> None:
    """F.13/6, F.13/15: KVM refuses many; the debugger then gets an error, and every register is as it was."""
    ready, go_on = threading.Event(), threading.Event()

    def body(sandbox: MultiUseSandbox) -> int:
        ready.set()
        assert go_on.wait(TIMEOUT_S)
        return sandbox.call("GetStatic")

    with debugged(body, wait=False) as debuggee:
        assert ready.wait(TIMEOUT_S)
        with Client(debuggee.address) as client:  # which the server's own thread serves
            before = client.ask(b"g")
            number = refused = 0
            while (old := client.ask(b"p%x" % number)) != b"E16":
                size = len(old) // 2
                for value in (bytes(size), b"\xff" * size, b"\x55" * size, bytes(size - 1) + b"\x80"):
                    reply = client.ask(b"P%x=%b" % (number, value.hex().encode()))
                    assert reply == b"OK" or re.fullmatch(rb"E[0-9a-f]{2}|E\..+", reply), (number, value, reply)
                    refused += reply != b"OK"
                    if reply == b"OK":
                        assert client.ask(b"P%x=%b" % (number, old)) == b"OK"
                number += 1
            assert number > 80 and refused > 20
            assert client.ask(b"g") == before
            assert client.ask(b"D") == b"OK"
        go_on.set()
        assert debuggee.result() == 0


_MONITOR = st.sampled_from(["regs", "sregs", "msr", "cpuid", "pt", "layout", "exits", "snapshot", "restore", "phys", "trace", "help"])
_MONITOR_ARGUMENTS = st.sampled_from(["", "0", "0x1000", "-1", "0x" + "f" * 17, "on", "off", "nonsense", "\udc80"])
_MONITOR_PACKET = st.tuples(_MONITOR, _MONITOR_ARGUMENTS).map(
    lambda words: b"qRcmd," + " ".join(words).encode("utf-8", "surrogateescape").hex().encode()
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(ANY_PACKET, _MONITOR_PACKET), max_size=20))
def test_no_packets_break_a_real_guests_target_and_a_restore_mends_all(packets: list[bytes]) -> None:
    """F.13/15: exactly one reply to each, whatever registers and memory have become."""
    with MultiUseSandbox.from_snapshot(undebugged_snapshot()) as sandbox:
        session = Session(hyperlight._DebugTarget(sandbox, sandbox._guest))
        for packet in packets:
            replies = [reply for reply in session.handle(packet) if not CONSOLE.fullmatch(reply)]
            stop_reply_too = packet == b"vCtrlC" and len(replies) == 2
            assert len(replies) == 1 or stop_reply_too or (not replies and SILENT.match(packet))
            if session.state is State.RUNNING:
                session.resume()
                session.stopped(Stop())
        session.detach()
        sandbox.restore(undebugged_snapshot())
        assert sandbox.call("GetStatic") == 0
        assert sandbox.call("ReadMemory", ULong(hyperlight.BASE_ADDRESS), ULong(4096)) == elf().load()[:4096]


@pytest.mark.parametrize("register", ["rip", "rsp"])
def test_guest_sent_astray_fails_and_can_be_restored(register: str) -> None:
    """F.13/5: whatever the debugger does to a guest is the guest's trouble, not the host's."""

    def body(sandbox: MultiUseSandbox) -> int:
        snapshot = sandbox.snapshot()
        with pytest.raises(GuestFailure):
            sandbox.call("GetStatic")
        sandbox.restore(snapshot)
        return sandbox.call("GetStatic")

    with debugged(body) as debuggee, Client(debuggee.address) as client:
        client.run_to("_call_get_static")
        assert client.ask(b"P%x=%b" % (REGISTERS.index(register), bytes.fromhex("0000000000000080").hex().encode())) == b"OK"
        stop = client.ask(b"vCont;c")
        assert stop.startswith((b"T0b", b"T0a")), stop
        assert client.ask(b"D") == b"OK"
        assert debuggee.result() == 0


def test_what_the_debugger_changes_between_calls_is_in_the_next_snapshot() -> None:
    """F.13/8: though no call has been made since the last one."""
    ready, go_on = threading.Event(), threading.Event()
    place = gva_of("spin")

    def body(sandbox: MultiUseSandbox) -> list[Any]:
        first = sandbox.snapshot()
        assert sandbox.snapshot() is first
        ready.set()
        assert go_on.wait(TIMEOUT_S)
        second = sandbox.snapshot()
        found = []
        for snapshot in (first, second):
            sandbox.restore(snapshot)
            found.append(sandbox.call("ReadMemory", ULong(place), ULong(3)))
        return found

    with debugged(body, wait=False) as debuggee:
        assert ready.wait(TIMEOUT_S)
        with Client(debuggee.address) as client:
            assert client.ask(b"M%x,3:010203" % place) == b"OK"
            assert client.ask(b"D") == b"OK"
        go_on.set()
        assert debuggee.result() == [code_of("spin", 3), b"\1\2\3"]


@require("gdb")
@pytest.mark.parametrize("guest", [KERNEL_MODE_ON_A_REAL_CPL0, USER_MODE_ON_AN_EMULATED_CPL0], indirect=True)
def test_avx_registers_of_running_code() -> None:
    """F.13/2: read, written, and used by the code; the guest enables AVX with the debugger connected, if it must."""
    enable = (
        "0f20e0 0d00000400 0f22e0"  # mov %cr4, %rax; or $OSXSAVE, %eax; mov %rax, %cr4
        "31c9 31d2 b807000000 0f01d1"  # xsetbv: XCR0 = x87, SSE, AVX
    )
    compare = bytes.fromhex("c5f576c9")  # vpcmpeqd %ymm1, %ymm1, %ymm1
    copy = bytes.fromhex("c5fd6fd1")  # vmovdqa %ymm1, %ymm2
    code = (b"" if GUEST is GUESTS["user"] else bytes.fromhex(enable)) + compare
    with debugged(calling("GetStatic")) as debuggee:
        output = gdb(
            debuggee.address,
            "break _call_get_static",
            "continue",
            *(f"set var ((unsigned char *)$pc)[{offset}] = {byte}" for offset, byte in enumerate(code + copy)),
            f"break *($pc + {len(code)})",
            "p $ymm1.v8_int32",
            "continue",
            "p/x $ymm1.v8_int32",
            "set var $ymm1.v8_int32[5] = 0x12345678",
            "p/x $ymm1.v8_int32",
            "stepi",
            "p/x $ymm2.v8_int32",
            "p/x $xmm2.v4_int32",
            "kill",
        )
        with pytest.raises(EndedByDebugger):
            debuggee.result()
    before, stop, compared, _, changed, _, copied, lower, _ = output[-9:]
    ones = ["0xffffffff"] * 8
    assert before.endswith("= {0, 0, 0, 0, 0, 0, 0, 0}") and "Breakpoint 2" in stop
    assert compared.endswith(f"= {{{', '.join(ones)}}}")
    ones[5] = "0x12345678"
    for shown in (changed, copied):
        assert shown.endswith(f"= {{{', '.join(ones)}}}")
    assert lower.endswith(f"= {{{', '.join(ones[:4])}}}")


@require("gdb")
@pytest.mark.parametrize("guest", ["user", KERNEL_MODE_ON_A_REAL_CPL0], indirect=True)
def test_sse_registers_of_running_code() -> None:
    """B.14/241: xmm1 before and after the instruction that sets it."""
    with debugged(calling("UseSse")) as debuggee:
        output = gdb(
            debuggee.address, "break use_sse", "continue", "p $xmm1.v4_float", "finish",
            "p $xmm1.v4_float", "delete", "detach",
        )  # fmt: skip
        assert debuggee.result() == [0]
    assert output[3].endswith("= {0, 0, 0, 0}") and output[5].endswith("= {1.20000005, 0, 0, 0}")


# --- memory ----------------------------------------------------------------------------------------------


def test_bad_addresses_are_errors_that_change_nothing() -> None:
    """F.13/6: and the connection survives them."""
    with debugged(calling("GetStatic")) as debuggee, Client(debuggee.address) as client:
        registers = client.ask(b"g")
        for packet in (b"m700000000000,8", b"M700000000000,1:cc", b"Z0,700000000000,1", b"m8000000000000000,1"):
            assert re.fullmatch(rb"E[0-9a-f]{2}", client.ask(packet)), packet
        code = client.read(gva_of("hyperlight_main"), 16)
        assert code == code_of("hyperlight_main")
        assert client.ask(b"g") == registers
        assert client.ask(b"D") == b"OK"
        assert debuggee.result() == [0]


def test_mapped_regions_are_read_only_and_scratch_is_not() -> None:
    """B.14/235, B.14/236, B.14/237, B.14/238, B.14/239: 1 byte and 16 bytes each."""
    idle, go_on = threading.Event(), threading.Event()
    content = bytes(range(256)) * 16

    def body(sandbox: MultiUseSandbox) -> bytes:
        with SharedMemory(4096) as region:
            region.write(0, content)
            sandbox.map_region(0x1_0000_0000, region, MemoryRegionFlags.READ)
            sandbox.call("MapGpa", ULong(0x1_0000_0000), ULong(0x1_0000_0000), ULong(4096), hyperlight.UInt(0))
            idle.set()
            assert go_on.wait(TIMEOUT_S)
            return region.read(0, 4096)

    with debugged(body, wait=False) as debuggee:
        assert idle.wait(TIMEOUT_S)
        with Client(debuggee.address) as client:
            assert client.read(0x1_0000_0000, 1) == content[:1]
            assert client.read(0x1_0000_0003, 16) == content[3:19]
            assert re.fullmatch(rb"E[0-9a-f]{2}", client.ask(b"M100000000,1:55"))
            assert re.fullmatch(rb"E[0-9a-f]{2}", client.ask(b"M100000003,10:" + b"55" * 16))
            assert client.read(0x1_0000_0000, 19) == content[:19]
            stack = int.from_bytes(bytes.fromhex(client.ask(b"p7").decode()), "little") - 256
            for data in (b"\x5a", bytes(range(1, 17))):
                assert client.ask(b"M%x,%x:%b" % (stack, len(data), data.hex().encode())) == b"OK"
                assert client.read(stack, len(data)) == data
            assert client.ask(b"D") == b"OK"
        go_on.set()
        assert debuggee.result() == content


@require("gdb")
def test_addresses_keep_all_their_64_bits() -> None:
    """F.13/14: scratch, at the upper end of the address space, is readable; nothing is cut."""
    with debugged(calling("GetStatic")) as debuggee:
        layout = gdb(debuggee.address, "monitor layout", "detach")
        (scratch,) = {int(row.split()[0], 16) for row in layout[1].splitlines() if " scratch" in row}
        assert debuggee.result() == [0]
    assert scratch >= 0xFFFF_8000_0000_0000
    with debugged(calling("GetStatic")) as debuggee:
        output = gdb(
            debuggee.address,
            "break _call_get_static",
            "continue",
            f"x/gx {scratch:#x}",
            f"monitor pt {scratch:#x}",
            "p/x *(unsigned long *)(unsigned long)$sp",
            "p/x $sp",
            "detach",
        )
        assert debuggee.result() == [0]
    assert re.match(rf"{scratch:#x}:\t0x[0-9a-f]{{16}}$", output[3])
    assert f"gva {scratch:#x} -> gpa" in output[4]
    assert re.search(r"= 0x[0-9a-f]+$", output[5])
    assert re.search(r"= 0xffff[0-9a-f]{12}$", output[6])


def test_malformed_packets_do_not_end_the_connection() -> None:
    """F.13/15: bad checksum, oversize, truncated escape, unknown names."""
    with debugged(calling("GetStatic")) as debuggee, Client(debuggee.address) as client:
        assert client.ask(b"qSupported:swbreak+").startswith(b"PacketSize=")
        client.socket.sendall(b"$g#00")
        for nonsense in (b"", b"vNonsense", b"qNonsense", b"m", b"mzz,1", b"Z9,0,1", b"P,", b"Mffff,ff:0", b"vCont;x"):
            reply = client.ask(nonsense)
            assert reply == b"" or re.fullmatch(rb"E[0-9a-f]{2}|E\..*", reply), nonsense
        client.socket.sendall(b"$" + b"a" * 100_000 + b"#00")
        client.socket.sendall(b"$X1000,1:}#da")
        client.send(b"qC")
        while client.receive() != b"QC1":  # errors may come before it
            pass
        assert client.ask(b"D") == b"OK"
        assert debuggee.result() == [0]


# --- what the debug registers can do ----------------------------------------------------------------------


@in_both_modes
@require("real_cpl0")
@require("gdb")
def test_watchpoints_stop_at_the_access() -> None:
    """F.13/7, B.14/246: write, and read or write."""
    with debugged(calling(("SetStatic", 7), "GetStatic", "GetStatic")) as debuggee:
        output = gdb(
            debuggee.address,
            "break hyperlight_main",
            "continue",
            "delete",
            "watch counter",
            "continue",
            "delete",
            "awatch counter",
            "continue",
            "info registers rip",
            "delete",
            "detach",
        )
        assert debuggee.result() == [7, 7, 7]
    assert "Hardware watchpoint 2: counter" in output[4]
    assert "Old value = 0" in output[5] and "New value = 7" in output[5]
    assert "access (read/write) watchpoint 3" in output[8] and "Value = 7" in output[8]


@require("real_cpl0")
def test_four_debug_registers_are_shared() -> None:
    """F.13/6, F.13/7, B.14/246: a fifth hardware breakpoint is refused, a freed one can be used again."""
    with debugged(calling("GetStatic")) as debuggee, Client(debuggee.address) as client:
        gva = gva_of("_call_get_static")
        counter = gva_of("hyperlight_main")
        for packet in (b"Z1,%x,1" % gva, b"Z2,%x,4" % counter, b"Z1,3000,1", b"Z1,3001,1"):
            assert client.ask(packet) == b"OK"
        assert re.fullmatch(rb"E[0-9a-f]{2}|E\..*", client.ask(b"Z1,3002,1"))
        assert client.ask(b"z1,3001,1") == b"OK"
        assert client.ask(b"Z1,3002,1") == b"OK"
        client.ask(b"qSupported:hwbreak+")
        stop = client.ask(b"vCont;c")
        assert stop.startswith(b"T05") and (b"hwbreak" in stop or b"watch" in stop)
        assert client.ask(b"D") == b"OK"
        assert debuggee.result() == [0]


@require("emulated_cpl0")
@require("gdb")
def test_debug_registers_that_do_not_work_are_refused() -> None:
    """F.13/6: and gdb watches by stepping, when told to."""
    with debugged(calling(("SetStatic", 7), "GetStatic")) as debuggee:
        output = gdb(
            debuggee.address,
            "hbreak _call_get_static",
            "continue",
            "delete",
            "break _call_set_static",
            "continue",
            "set can-use-hw-watchpoints 0",
            "watch counter",
            "continue",
            "delete",
            "detach",
        )
        assert debuggee.result() == [7, 7]
    assert "Cannot insert hardware breakpoint" in output[2]
    assert "Breakpoint 2, _call_set_static" in output[5]
    assert "Old value = 0" in output[8] and "New value = 7" in output[8]
    with debugged(calling("GetStatic")) as debuggee, Client(debuggee.address) as client:
        for kind in b"1234":
            assert client.ask(b"Z%c,%x,1" % (kind, gva_of("hyperlight_main"))) == b""
        assert client.ask(b"D") == b"OK"
        assert debuggee.result() == [0]


@require("gdb")
@pytest.mark.parametrize("guest", [KERNEL_MODE_ON_A_REAL_CPL0, USER_MODE_ON_AN_EMULATED_CPL0], indirect=True)
@pytest.mark.parametrize("step", [False, True])
def test_guests_own_int3_is_shown_and_then_handled_by_the_guest(step: bool) -> None:
    """B.14/246: it stops like a breakpoint; going on delivers it, as if there were no debugger."""
    with debugged(calling(("InstallHandler", 3), "TriggerInt3", "GetExceptionHandlerCallCount")) as debuggee:
        output = gdb(
            debuggee.address, "break handler_call_count", "continue", "info symbol $pc",
            *(("stepi", "p/x $cs & 3") if step else ()), "continue", "p handled_count", "delete", "detach",
        )  # fmt: skip
        assert debuggee.result() == [None, None, 1]
    assert "received signal SIGTRAP" in output[2] and output[3].startswith("trigger_int3")
    if step:
        assert output[5].endswith("= 0x0")  # in the handler
    assert "Breakpoint 1, handler_call_count" in output[-4] and output[-3].endswith("= 1")


@pytest.mark.parametrize("guest", [USER_MODE_ON_AN_EMULATED_CPL0], indirect=True)
def test_breakpoint_where_the_guests_breakpoint_handler_begins() -> None:
    """F.13/15: which is where stops are noticed on this KVM; neither breakpoint is lost or mistaken."""
    with debugged(calling(("InstallHandler", 3), "GetStatic", "TriggerInt3", "GetStatic")) as debuggee:
        with Client(debuggee.address) as client:
            called = client.run_to("_call_get_static")
            idt = int.from_bytes(bytes.fromhex(client.ask(b"p%x" % client.number_of("idtr_base")).decode()), "little")
            gate = client.read(idt + 3 * 16, 16)
            handler = int.from_bytes(gate[:2] + gate[6:12], "little")
            assert client.ask(b"Z0,%x,1" % handler) == b"OK"
            stops = []
            for _ in range(2):
                assert client.ask(b"vCont;c").startswith(b"T05")
                stops.append(client.rip())
            assert stops == [handler, called]
            assert client.ask(b"D") == b"OK"
        assert debuggee.result() == [None, 0, None, 0]


# --- Ctrl-C ----------------------------------------------------------------------------------------------


@in_both_modes
@require("gdb")
def test_ctrl_c_stops_a_spinning_guest_and_the_same_call_goes_on(packets: PacketLog) -> None:
    """F.13/3: SIGINT stop, continue, stop again; a kill() by the host then cancels the call."""
    with debugged(calling("Spin")) as debuggee:
        commands = ["break spin", "continue", "delete", "continue", "backtrace", "continue", "info symbol $pc", "detach"]
        process = start_gdb(debuggee.address, commands)
        for number in range(3):
            packets.wait_for_continue()
            if number > 0:
                os.kill(process.pid, signal.SIGINT)
        output = answers(process)
        assert debuggee.kill()
        with pytest.raises(ExecutionCanceledByHost):
            debuggee.result()
    assert "Breakpoint 1, spin" in output[2]
    assert "received signal SIGINT" in output[4] and "spin (call=" in output[5]
    assert "received signal SIGINT" in output[6] and output[7].startswith("spin")


@require("gdb")
def test_ctrl_c_during_a_host_function_stops_at_the_next_entry(packets: PacketLog) -> None:
    """F.13/4: and the call finishes after it."""
    interrupted = threading.Event()

    def host_function() -> int:
        assert debuggee.sandbox is not None and debuggee.sandbox._guest.debugger is not None
        target = debuggee.sandbox._guest.debugger.target
        interrupt = target.interrupt

        def noticing() -> None:
            interrupt()
            interrupted.set()

        target.interrupt = noticing  # type: ignore[method-assign]
        os.kill(process.pid, signal.SIGINT)
        assert interrupted.wait(TIMEOUT_S)
        return 5

    host = {"HostFunc": (host_function, (), Int)}
    started = threading.Event()

    def body(sandbox: MultiUseSandbox) -> list[Any]:
        assert started.wait(TIMEOUT_S)
        return [sandbox.call("HostCallRepeat", "HostFunc", 1), sandbox.call("GetStatic")]

    with debugged(body, functions=host) as debuggee:
        process = start_gdb(debuggee.address, ["continue", "backtrace", "detach"])
        packets.wait_for_continue()
        started.set()
        output = answers(process)
        assert debuggee.result() == [5, 0]
    assert "received signal SIGINT" in output[1] and "host_call_repeat" in output[2]


@require("gdb")
def test_ctrl_c_between_calls_stops_the_idle_guest(packets: PacketLog) -> None:
    """F.13/4, B.14/233: requests are served while no call is in progress; the next call waits for continue."""
    idle, go_on = threading.Event(), threading.Event()

    def body(sandbox: MultiUseSandbox) -> list[Any]:
        first = sandbox.call("SetStatic", 7)
        idle.set()
        assert go_on.wait(TIMEOUT_S)
        return [first, sandbox.call("GetStatic")]

    with debugged(body) as debuggee:
        process = start_gdb(debuggee.address, ["continue", "p counter", "break _call_get_static", "continue", "detach"])
        packets.wait_for_continue()
        assert idle.wait(TIMEOUT_S)
        os.kill(process.pid, signal.SIGINT)
        packets.wait_for_continue()
        go_on.set()
        output = answers(process)
        assert debuggee.result() == [7, 7]
    assert "received signal SIGINT" in output[1] and output[2] == "$1 = 7"
    assert "Breakpoint 1, _call_get_static" in output[4]


class Disturbed(Debuggee):
    """A guest whose call waits for `go_on`, and begins with *disturb*, called when the debugger's *moment* is over."""

    def __init__(self, call: tuple[Any, ...], moment: str, disturb: Callable[[Any], None]) -> None:
        super().__init__(self._call, wait=False)
        self.idle, self.go_on = threading.Event(), threading.Event()
        self._name, self._moment, self._disturb = call, moment, disturb

    def _call(self, sandbox: MultiUseSandbox) -> Any:
        debugger = sandbox._guest.debugger
        assert debugger is not None
        owner = debugger if self._moment == "entered" else debugger.target
        moment = getattr(owner, self._moment)

        def disturbed(**arguments: Any) -> Any:
            result = moment(**arguments)
            self._disturb(debugger)
            return result

        setattr(owner, self._moment, disturbed)
        self.idle.set()
        assert self.go_on.wait(TIMEOUT_S)
        return sandbox.call(*self._name)


def test_ctrl_c_between_the_debuggers_answer_and_the_guests_entry_is_not_lost() -> None:
    """F.13/3, F.13/4: the smallest window there is."""

    def interrupt(debugger: Any) -> None:
        nudged = threading.Event()
        nudge = debugger.target.interrupt
        debugger.target.interrupt = lambda: (nudge(), nudged.set())
        client.socket.sendall(b"\x03")
        assert nudged.wait(TIMEOUT_S)

    with running(Disturbed(("Spin",), "entered", interrupt)) as debuggee:
        assert debuggee.idle.wait(TIMEOUT_S)
        with Client(debuggee.address) as client:
            assert client.ask(b"?").startswith(b"T05")
            client.send(b"vCont;c")
            debuggee.go_on.set()
            assert client.receive().startswith(b"T02")
            assert debuggee.kill()
            client.send(b"vCont;c")
            with pytest.raises(ExecutionCanceledByHost):
                debuggee.result()


def test_kill_of_a_stopped_guest_is_not_undone_by_run() -> None:
    """F.13/3: the host's wish counts, whatever the debugger does in between."""
    with debugged(calling("Spin")) as debuggee, Client(debuggee.address) as client:
        client.run_to("spin")
        assert debuggee.kill()
        assert client.ask(b"vRun;").startswith(b"T05")
        assert client.ask(b"z0,%x,1" % gva_of("spin")) == b"OK"
        client.send(b"vCont;c")
        with pytest.raises(ExecutionCanceledByHost):
            debuggee.result()


def test_nudge_that_comes_late_does_not_keep_the_guest_from_running() -> None:
    """F.13/10: what it was about has been served already."""
    late = Disturbed(("SpinFor", ULong(1000)), "prepare", lambda debugger: debugger.target.interrupt())
    with running(late) as debuggee:
        debuggee.go_on.set()
        assert debuggee.result() == 1000


# --- crashes ---------------------------------------------------------------------------------------------

CRASHES = {
    "divide error": (("DivideByZero", 1), "SIGFPE", "divide_by_zero"),
    "page fault": (("ReadUnmapped",), "SIGSEGV", "read_unmapped"),
    "jump to nowhere": (("JumpTo", NOWHERE), "SIGSEGV", "jump_to|hl_runtime_dispatch|0x0*700000000000"),
    "invalid instruction": (("TriggerException",), "SIGILL", "trigger_exception"),
    "panic": (("GuestPanic", "oh no"), "SIGABRT", "guest_panic"),
    "abort": (("Abort",), "SIGABRT", "plain_abort"),
    "stack overflow": (("InfiniteRecursion",), "SIGSEGV", "recurse|infinite_recursion"),
}


@in_both_modes
@require("gdb")
@pytest.mark.parametrize("crash", CRASHES)
def test_crash_stops_with_a_backtrace_and_the_true_error_comes_back(crash: str) -> None:
    """F.13/5, B.14/244: a fitting signal; read only; a step stops again; detach or continue lets the error out."""
    call, signal_name, function = CRASHES[crash]
    last = "continue" if crash in ("divide error", "panic") else "detach"
    with debugged(calling(call)) as debuggee:
        output = gdb(
            debuggee.address,
            "continue",
            "backtrace 16",
            "p/x $rip",
            "stepi",
            "p/x $rip",
            "set var counter = 5",
            "set $rax = 5",
            "p counter",
            last,
        )
        with pytest.raises(GuestAborted) as caught:
            debuggee.result()
    assert f"received signal {signal_name}" in output[1]
    assert re.search(function, output[2]), output[2]
    assert f"received signal {signal_name}" in output[4]
    assert output[3].partition("=")[2] == output[5].partition("=")[2]
    assert re.search("Cannot access memory|can only be read|Could not", output[6] + output[7]) and output[8].endswith("= 0")
    with MultiUseSandbox.from_snapshot(undebugged_snapshot()) as sandbox, pytest.raises(GuestAborted) as expected:
        sandbox.call(*call)
    assert (caught.value.code, caught.value.vector) == (expected.value.code, expected.value.vector)


def undebugged_snapshot() -> hyperlight.Snapshot:
    return _undebugged_snapshot(GUEST)


@functools.cache
def _undebugged_snapshot(guest: Path) -> hyperlight.Snapshot:
    with UninitializedSandbox(str(guest)) as uninitialized, uninitialized.evolve() as sandbox:
        return sandbox.snapshot()


@require("gdb")
def test_run_after_a_crash_starts_the_call_again() -> None:
    """F.13/5: and it can end well this time."""
    with debugged(calling(("ReadByte", NOWHERE))) as debuggee:
        output = gdb(
            debuggee.address,
            "continue",
            "break read_byte",
            "run",
            "info symbol $pc",
            f"set var call->parameters[0].value.ULong = {gva_of('read_byte'):#x}",
            "delete",
            "detach",
            mode="extended-remote",
        )
        assert debuggee.result() == [code_of("read_byte")[0]]
    assert "received signal SIGSEGV" in output[1]
    assert "Breakpoint 1, read_byte" in output[3] and output[4].startswith("read_byte")


@require("gdb")
def test_monitor_restore_goes_back_to_before_a_crash() -> None:
    """Issue 4: `monitor snapshot` within a call, and `monitor restore`."""
    with debugged(calling(("SetStatic", 7), ("ReadByte", NOWHERE), "GetStatic")) as debuggee:
        output = gdb(
            debuggee.address,
            "monitor restore",
            "break read_byte",
            "continue",
            "monitor snapshot",
            "set var counter = 8",
            "continue",
            "monitor snapshot",
            "monitor restore",
            "maintenance flush register-cache",
            "info symbol $pc",
            f"set var call->parameters[0].value.ULong = {gva_of('read_byte'):#x}",
            "delete",
            "detach",
        )
        assert debuggee.result() == [7, code_of("read_byte")[0], 7]
    assert "nothing has been kept" in output[1] and output[4] == "kept"
    assert "received signal SIGSEGV" in output[6]
    assert "can only be read" in output[7] and "restored" in output[8]
    assert output[10].startswith("read_byte")


def test_monitor_restore_refuses_what_is_of_another_call() -> None:
    """Issue 4: and changes nothing then."""
    with debugged(calling("GetStatic", "GetStatic")) as debuggee, Client(debuggee.address) as client:
        gva = client.run_to("_call_get_static")
        assert "kept" in client.monitor("snapshot")
        client.step()
        assert "restored" in client.monitor("restore")
        for _ in range(2):  # the breakpoint where the guest stands now, then the same in the next call
            assert client.rip() == gva
            assert client.ask(b"vCont;c").startswith(b"T05")
        registers = client.ask(b"g")
        assert "another call" in client.monitor("restore")
        assert client.ask(b"g") == registers
        assert client.ask(b"D") == b"OK"
        assert debuggee.result() == [0, 0]


# --- life: detach, drop, kill, run again ------------------------------------------------------------------


@require("gdb")
def test_detach_and_attach_again(packets: PacketLog) -> None:
    """F.13/9, B.14/245: the guest goes on past earlier breakpoints; another gdb can come later."""
    idle, go_on = threading.Event(), threading.Event()

    def body(sandbox: MultiUseSandbox) -> list[Any]:
        first = [sandbox.call("GetStatic") for _ in range(3)]
        idle.set()
        assert go_on.wait(TIMEOUT_S)
        return [*first, sandbox.call("SetStatic", 9)]

    with debugged(body) as debuggee:
        first = gdb(debuggee.address, "break _call_get_static", "continue", "detach")
        packets.wait_for_continue()
        assert idle.wait(TIMEOUT_S)
        process = start_gdb(debuggee.address, ["p counter", "break _call_set_static", "continue", "backtrace 1", "detach"])
        packets.wait_for_continue()  # the second one's: it has set its breakpoint by then
        go_on.set()
        second = answers(process)
        assert debuggee.result() == [0, 0, 0, 9]
    assert "Breakpoint 1, _call_get_static" in first[2] and "detached" in first[3]
    assert second[1] == "$1 = 0" and "Breakpoint 1, _call_set_static" in second[3]


@pytest.mark.parametrize("when", ["stopped", "running"])
def test_dropped_connection_lets_the_guest_go_on_without_breakpoints(when: str, packets: PacketLog) -> None:
    """F.13/9, F.13/10: whatever the guest was doing."""
    with debugged(calling(("SpinFor", ULong(20_000)), "GetStatic", ("ReadMemory", ULong(gva_of("_call_get_static")), ULong(16)))) as debuggee:
        with Client(debuggee.address) as client:
            assert client.ask(b"Z0,%x,1" % gva_of("_call_get_static")) == b"OK"
            if when == "running":
                client.send(b"vCont;c")
                packets.wait_for_continue()
        assert debuggee.result() == [20_000, 0, code_of("_call_get_static")]


@require("gdb")
def test_kill_ends_the_call_and_poisons_the_sandbox() -> None:
    """F.13/9: a clear error, and a restore mends it."""

    def body(sandbox: MultiUseSandbox) -> list[Any]:
        snapshot = sandbox.snapshot()
        with pytest.raises(EndedByDebugger, match="debugger ended"):
            sandbox.call("SetStatic", 7)
        poisoned = sandbox.poisoned
        with pytest.raises(PoisonedSandbox):
            sandbox.call("GetStatic")
        sandbox.restore(snapshot)
        return [poisoned, sandbox.call("GetStatic")]

    with debugged(body) as debuggee:
        output = gdb(debuggee.address, "break _call_set_static", "continue", "kill")
        assert debuggee.result() == [True, 0]
    assert "killed" in output[3]


@require("gdb")
def test_run_starts_the_guest_again() -> None:
    """Issue 4: ``run`` in extended mode is a restore of the first snapshot, and of the call in progress."""
    with debugged(calling(("SetStatic", 7), "GetStatic")) as debuggee:
        output = gdb(
            debuggee.address,
            "break _call_set_static",
            "continue",
            "run",
            "p counter",
            "bt",
            "delete",
            "detach",
            mode="extended-remote",
        )
        assert debuggee.result() == [7, 7]
    assert "Breakpoint 1, _call_set_static" in output[2]
    assert "Breakpoint 1, _call_set_static" in output[3]
    assert output[4].endswith("= 0") and "_call_set_static" in output[5]


@require("gdb")
def test_sandbox_from_a_snapshot_is_debugged() -> None:
    """B.14/242: it stops at the first call's entry; break in a guest function."""
    snapshot = undebugged_snapshot()
    announced: Future[str] = Future()
    info = DebugInfo(announce=announced.set_result, wait_timeout_s=TIMEOUT_S)
    results: list[Any] = []

    def run() -> None:
        config = SandboxConfiguration(guest_debug_info=info)
        with MultiUseSandbox.from_snapshot(snapshot, config=config) as sandbox:
            results.append(sandbox.call("SetStatic", 7))

    thread = threading.Thread(target=run)
    thread.start()
    output = gdb(announced.result(TIMEOUT_S), "break _call_set_static", "continue", "bt", "delete", "detach")
    thread.join(TIMEOUT_S)
    assert results == [7]
    assert "Breakpoint 1, _call_set_static" in output[2] and "hl_runtime_dispatch" in output[3]


def test_two_sandboxes_cannot_share_a_port() -> None:
    """F.13/11, B.14/243: the second is refused at once, with a line that says what to do."""
    with debugged(calling("GetStatic")) as debuggee, Client(debuggee.address) as client:
        config = SandboxConfiguration(guest_debug_info=DebugInfo(listen=debuggee.address))
        with UninitializedSandbox(str(GUEST), config) as second, pytest.raises(DebugServerError, match=debuggee.address):
            second.evolve()
        assert client.ask(b"D") == b"OK"
        assert debuggee.result() == [0]


def test_failure_before_the_debugger_comes_leaves_no_server_behind(no_leaks: None) -> None:
    """F.13/10: a Ctrl-C while waiting, for example."""

    def announce(address: str) -> None:
        raise KeyboardInterrupt

    config = SandboxConfiguration(guest_debug_info=DebugInfo(announce=announce))
    with UninitializedSandbox(str(GUEST), config) as uninitialized, pytest.raises(KeyboardInterrupt):
        uninitialized.evolve()


def test_waiting_for_a_debugger_has_an_end(caplog: pytest.LogCaptureFixture) -> None:
    """F.13/10: the guest runs without, and the log says so."""
    with debugged(calling("GetStatic"), wait_timeout_s=0.01) as debuggee:
        assert debuggee.result() == [0]
    assert "no debugger came to" in caplog.text


def test_running_guest_costs_the_servers_thread_nothing() -> None:
    """F.13/10: with a debugger connected, the server's thread does not wake up even once during a call."""
    started, settled = threading.Event(), threading.Event()
    woken: list[object] = []

    def body(sandbox: MultiUseSandbox) -> int:
        started.set()
        sandbox.call("Add", 1, 41)  # its host function waits until the server has nothing left to do
        before = len(woken)
        sandbox.call("SpinFor", ULong(100_000))
        return len(woken) - before

    host = {"HostAdd": (lambda left, right: left + right + 0 * settled.wait(TIMEOUT_S), (Int, Int), Int)}
    with debugged(body, functions=host) as debuggee, Client(debuggee.address) as client:
        client.send(b"vCont;c")
        assert started.wait(TIMEOUT_S)
        assert debuggee.sandbox is not None and debuggee.sandbox._guest.debugger is not None
        selector = debuggee.sandbox._guest.debugger.server._selector
        select = selector.select

        def counted(timeout: float | None = None) -> Any:
            assert timeout is None  # it sleeps until there is something to do
            found = select(timeout)
            woken.append(found)
            return found

        selector.select = counted  # type: ignore[method-assign]
        for _ in range(2):  # the first wakes the select() that is not counted
            client.socket.sendall(b"$damaged#00")  # what the server's own thread answers
            while not client.socket.recv(1024).endswith(b"-"):
                pass
        settled.set()
        assert debuggee.result() == 0


def test_debugged_call_enters_the_guest_as_often_as_any_other() -> None:
    """Issue 4, item 4: without breakpoints the debugger adds no exit and no ioctl to a call."""

    def ioctls(sandbox: MultiUseSandbox) -> list[str]:
        seen: list[str] = []
        vcpu = sandbox._guest.vm.vcpu
        names = [name for name in dir(vcpu) if name == "run" or name.startswith(("get_", "set_"))]
        for name in names:
            def noted(*arguments: Any, _name: str = name, _real: Callable[..., Any] = getattr(vcpu, name)) -> Any:
                seen.append(_name)
                return _real(*arguments)

            setattr(vcpu, name, noted)
        sandbox.call("GetStatic")
        return seen

    with UninitializedSandbox(str(GUEST)) as uninitialized, uninitialized.evolve() as sandbox:
        expected = ioctls(sandbox)
    with debugged(ioctls, wait=False) as debuggee:
        unattached = debuggee.result()
    with debugged(lambda sandbox: (sandbox.call("GetStatic"), ioctls(sandbox))[1]) as debuggee:
        with Client(debuggee.address) as client:
            client.send(b"vCont;c")
            attached = debuggee.result()
    assert unattached == attached == expected
    assert "run" in expected


# --- snapshots, core dumps --------------------------------------------------------------------------------


def test_breakpoints_survive_a_restore_and_never_enter_a_snapshot_or_a_dump(tmp_path: Path) -> None:
    """F.13/8: the restored guest stops; a snapshot, and a core dump, hold the program's own bytes."""
    gva, code = gva_of("_call_get_static"), code_of("_call_get_static")

    def body(sandbox: MultiUseSandbox) -> list[Any]:
        sandbox.call("GetStatic")
        snapshot = sandbox.snapshot()
        found = [bytes(snapshot.memory.read(0, snapshot.memory.size)).count(code)]
        path = sandbox.generate_crashdump_to_dir(tmp_path)
        assert path is not None
        found.append(Path(path).read_bytes().count(code))
        with MultiUseSandbox.from_snapshot(snapshot) as other:
            found.append(other.call("ReadMemory", ULong(gva), ULong(16)))
        sandbox.restore(snapshot)
        sandbox.call("GetStatic")
        found.append(sandbox.call("ReadMemory", ULong(gva), ULong(1)))
        return found

    with debugged(body) as debuggee, Client(debuggee.address) as client:
        client.run_to("_call_get_static")
        assert client.ask(b"vCont;c").startswith(b"T05")  # after the restore
        assert client.rip() == gva
        assert client.ask(b"z0,%x,1" % gva) == b"OK"
        client.send(b"vCont;c")
        assert debuggee.result() == [1, 1, code, code[:1]]


# --- monitor, lldb ----------------------------------------------------------------------------------------


@require("gdb")
def test_monitor_commands() -> None:
    """Issue 4: what the protocol has no packets for."""
    with debugged(calling("GetStatic")) as debuggee:
        output = gdb(
            debuggee.address,
            "break hyperlight_main",
            "continue",
            "monitor help",
            "monitor regs",
            "monitor sregs",
            "monitor msr 0xc0000080",
            "monitor msr 0xdeadbeef",
            "monitor cpuid 0",
            f"monitor pt {gva_of('hyperlight_main'):#x}",
            "monitor pt 0x700000000000",
            "monitor layout",
            "monitor exits",
            "monitor trace",
            "monitor nonsense",
            "info threads",
            "info auxv",
            "detach",
        )
        assert debuggee.result() == [0]
    expected = (
        "layout +where everything", "rip +0x", "cr3 +0x", "= 0x[0-9a-f]+$", "cannot be read", "eax .* ebx",
        "-> gpa 0x", "700000000000", "scratch", "KVM_EXIT_", "<- '", "no such command", "vcpu 0",
        "AT_PAGESZ .*4096\n.*AT_ENTRY", "detached",
    )  # fmt: skip
    for text, pattern in zip(output[3:], expected, strict=True):
        assert re.search(pattern, text), (pattern, text)


@require("lldb")
def test_lldb_breaks_reads_and_goes_on() -> None:
    """Issue 4, item 2: Debian's lldb over ``gdb-remote``."""
    with debugged(calling(("SetStatic", 7), "GetStatic")) as debuggee:
        gva = gva_of("_call_get_static")
        commands = [
            f"gdb-remote {debuggee.address}",
            f"breakpoint set -a {gva:#x}",
            "continue",
            "register read rip rbx xmm0",
            f"memory read {gva:#x} {gva + 8:#x}",
            "thread step-inst",
            "register read rip",
            "breakpoint delete -f",
            "process detach",
        ]
        finished = subprocess.run(
            ["lldb", "--no-lldbinit", "-b", *(option for command in commands for option in ("-o", command))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert debuggee.result() == [7, 7], finished.stdout
    assert re.search(r"stop reason = breakpoint 1\.1", finished.stdout), finished.stdout
    assert re.search(rf"rip = 0x0*{gva:x}\b", finished.stdout)
    assert code_of("_call_get_static", 4).hex(" ") in finished.stdout
    assert "instruction step into" in finished.stdout and "detached" in finished.stdout
