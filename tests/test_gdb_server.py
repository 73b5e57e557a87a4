"""The server of gdb_rsp.py over real sockets, then the real gdb and lldb against it. Nothing here sleeps or polls."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import resource
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import REPOSITORY, require
from gdb_machine import BASE, CODE, CRASH, LEAF, SOURCE, STORE, Client, Machine, Plain, load_elf

from gdb_rsp import (
    DebugServer,
    ListenError,
    PacketDecoder,
    Reason,
    Resume,
    RspUsageError,
    Signal,
    Stop,
    encode,
)

TIMEOUT_S = 30
TOY = REPOSITORY / "examples" / "gdb_toy_target.py"


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Fail a test after which a file descriptor is open or a thread is alive."""
    gc.collect()  # what earlier tests left lying about must not go in between
    before = set(os.listdir("/proc/self/fd")), set(threading.enumerate())
    yield
    assert (set(os.listdir("/proc/self/fd")), set(threading.enumerate())) == before


class Guest:
    """A thread that runs a machine under a server, as the thread of a vCPU would."""

    def __init__(self, machine: Plain, address: str = "127.0.0.1:0", *, wait: bool = False) -> None:
        self.machine = machine
        self.wait = wait  # for a debugger, before the first instruction
        self.runs = threading.Semaphore(0)  # one for each time that the machine begins to run
        self.finished = threading.Event()
        self.killed = threading.Event()
        self.server = DebugServer(machine, address)
        self.thread = threading.Thread(target=self._own)

    def _own(self) -> None:
        if self.wait:
            self.server.wait_for_client()
        action = self.server.entered()
        while not self.finished.is_set():
            if action is Resume.KILL:
                self.killed.set()
                break
            self.runs.release()
            stop = self.machine.run(step=action is Resume.STEP, limit=1 << 40)
            action = self.server.attend() if stop is None else self.server.stopped(stop)
        self.server.left()

    def wait_until_it_runs(self) -> None:
        assert self.runs.acquire(timeout=TIMEOUT_S)

    def resume(self, client: Client) -> None:
        """Have the debugger of a stopped guest say `c`, and wait until the guest runs."""
        while self.runs.acquire(blocking=False):  # what it ran before
            pass
        client.send(b"c")
        self.wait_until_it_runs()

    def __enter__(self) -> Guest:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.finished.set()
        self.server.close()
        self.machine.interrupt()
        self.thread.join()


class Idling(Machine):
    """A machine behind a lock, as a sandbox is: calls take it, and the server when there is no call."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.server: DebugServer | None = None

    def try_acquire(self) -> bool:
        return self.lock.acquire(blocking=False)

    def release(self) -> None:
        self.lock.release()

    def call(self, steps: int) -> list[Resume]:
        """Make a guest call of *steps* instructions; return how it was resumed."""
        server = self.server
        assert server is not None
        actions: list[Resume] = []
        try:
            with self.lock:
                try:
                    self._call(server, steps, actions)
                finally:
                    server.left()
        finally:
            server.released()
        return actions

    def _call(self, server: DebugServer, steps: int, actions: list[Resume]) -> None:
        actions.append(server.entered())
        for _ in range(steps):
            if actions[-1] is Resume.KILL:
                break
            stop = self.run(step=True)
            if stop is None:
                actions.append(server.attend())
            elif actions[-1] is Resume.STEP or stop.reason is not Reason.STEP:
                actions.append(server.stopped(stop))


# --- addresses ---------------------------------------------------------------------------------------


def test_default_is_loopback_at_a_free_port():
    with DebugServer(Machine()) as server:
        assert re.fullmatch(r"127\.0\.0\.1:[1-9][0-9]*", server.address)


@pytest.mark.parametrize("address", [":0", "127.0.0.1:0", "localhost:0", "[::1]:0"])
def test_tcp_addresses(address):
    if address == "[::1]:0" and not has_ipv6_loopback():
        pytest.skip("no IPv6 loopback here")
    with Guest(Machine(), address) as guest, Client(guest.server.address) as client:
        assert client.ask(b"qC") == b"QC1"


def has_ipv6_loopback() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("address", ["", "nonsense", "localhost", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536", "unix"])
def test_senseless_addresses_are_refused(address):
    with pytest.raises(RspUsageError, match="is not HOST:PORT, unix:PATH or stdio"):
        DebugServer(Machine(), address)


def test_second_server_on_a_port_gets_an_immediate_clear_error():
    """F.13/11, B.14/243"""
    with DebugServer(Machine()) as server:
        expected = f"cannot listen on {server.address}: Address already in use; another sandbox"
        with pytest.raises(ListenError, match=re.escape(expected)):
            DebugServer(Machine(), server.address)


def test_port_can_be_used_again_at_once_after_a_connection():
    with Guest(Machine()) as guest, Client(guest.server.address) as client:
        address = guest.server.address
        client.ask(b"qC")
    DebugServer(Machine(), address).close()


def test_unix_socket_is_private_and_removed_at_the_end(tmp_path):
    path = tmp_path / "gdb.sock"
    with Guest(Machine(), f"unix:{path}") as guest, Client(str(path)) as client:
        assert guest.server.address == str(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert client.ask(b"qC") == b"QC1"
    assert not path.exists()


def test_stale_unix_socket_is_replaced(tmp_path):
    path = tmp_path / "gdb.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    DebugServer(Machine(), f"unix:{path}").close()


def test_unix_socket_in_use_and_other_files_are_left_alone(tmp_path):
    path, file = tmp_path / "gdb.sock", tmp_path / "file"
    file.write_text("precious")
    with DebugServer(Machine(), f"unix:{path}") as server:
        with pytest.raises(ListenError, match="Address already in use"):
            DebugServer(Machine(), f"unix:{path}")
        assert path.exists()
        assert not server.wait_for_client(timeout_s=0.01)  # it was not taken for a debugger
    with pytest.raises(ListenError, match="Address already in use"):
        DebugServer(Machine(), f"unix:{file}")
    assert file.read_text() == "precious"
    with pytest.raises(ListenError, match="No such file or directory"):
        DebugServer(Machine(), f"unix:{tmp_path}/no/such/directory")


# --- connections -------------------------------------------------------------------------------------


def test_debugger_that_connects_before_the_guest_runs_stops_it_at_its_first_instruction():
    guest = Guest(Machine())
    with Client(guest.server.address) as client:
        client.send(b"?")
        assert guest.server.wait_for_client(TIMEOUT_S)
        with guest:
            assert b"10:0010000000000000;" in client.receive()


def test_debugger_that_connects_while_the_guest_runs_stops_it():
    with Guest(Machine()) as guest:
        guest.wait_until_it_runs()
        with Client(guest.server.address) as client:
            assert client.ask(b"?").startswith(b"T05thread:1;")


def test_wait_for_client_has_a_time_limit_and_ends_with_the_server():
    """F.13/10"""
    server = DebugServer(Machine())
    assert not server.wait_for_client(timeout_s=0.01)
    waiter = threading.Thread(target=server.wait_for_client)
    waiter.start()
    server.close()
    waiter.join()


def test_second_debugger_is_told_and_the_first_is_not_disturbed():
    with Guest(Machine()) as guest, Client(guest.server.address) as first:
        assert first.ask(b"qC") == b"QC1"
        for _ in range(20):
            with Client(guest.server.address) as second:
                assert second.ask(b"qSupported") == b"E.another debugger is connected to this guest"
                assert second.is_closed_by_peer()
        assert first.ask(b"m%x,3" % BASE) == b"48c7c0"


def test_refused_connections_are_bounded():
    with Guest(Machine()) as guest, Client(guest.server.address) as first:
        first.ask(b"qC")
        others = [Client(guest.server.address) for _ in range(20)]
        told = 0
        for other in others:
            try:
                told += other.receive().startswith(b"E.")
            except (EOFError, ConnectionError):
                continue
        assert told == 8
        for other in others:
            other.socket.close()


def test_disconnect_while_stopped_removes_all_breakpoints_and_the_guest_goes_on():
    """F.13/9"""
    machine = Machine()
    with Guest(machine) as guest:
        guest.wait_until_it_runs()
        with Client(guest.server.address) as client:
            assert client.ask(b"Z0,%x,1" % LEAF) == b"OK"
            assert client.ask(b"Z1,%x,1" % STORE) == b"OK"
        guest.wait_until_it_runs()
        assert machine.memory[: len(CODE)] == CODE and machine.debug_registers == ()


def test_disconnect_while_running_removes_all_breakpoints_and_the_guest_goes_on():
    machine = Machine()
    with Guest(machine) as guest:
        guest.wait_until_it_runs()
        with Client(guest.server.address) as client:
            client.ask(b"Z0,%x,1" % CRASH)  # never reached
            guest.resume(client)
            assert machine.memory[CRASH - BASE] == 0xCC
        guest.wait_until_it_runs()
        assert machine.memory[: len(CODE)] == CODE


def test_debuggers_come_and_go():
    with Guest(Machine()) as guest:
        for _ in range(5):
            with Client(guest.server.address) as client:
                client.ask(b"Z0,%x,1" % LEAF)
                assert b"10:1a10000000000000;" in client.ask(b"c")
                assert client.ask(b"D") == b"OK"
                assert client.socket.shutdown(socket.SHUT_WR) is None
                assert client.is_closed_by_peer()


def test_interrupt_stops_a_running_guest_and_it_can_go_on():
    """F.13/3"""
    with Guest(Machine()) as guest:
        guest.wait_until_it_runs()
        with Client(guest.server.address) as client:
            client.ask(b"?")
            for _ in range(3):
                guest.resume(client)
                client.interrupt()
                assert client.receive().startswith(b"T02thread:1;")
            client.ask(b"Z0,%x,1" % LEAF)
            assert client.ask(b"c").startswith(b"T05")


def test_interrupt_in_one_piece_with_continue_is_not_lost():
    with Guest(Machine()) as guest, Client(guest.server.address) as client:
        client.ask(b"?")
        client.socket.sendall(encode(b"c") + b"\x03")
        assert client.receive().startswith(b"T02")


def test_interrupt_during_a_host_function_is_reported_at_the_next_guest_entry():
    """F.13/4"""
    machine = Machine()
    with DebugServer(machine) as server, Client(server.address) as client:
        server.wait_for_client()
        client.send(b"vCont;c")
        assert server.entered() is Resume.CONTINUE
        machine.interrupted.clear()
        client.interrupt()  # the guest's thread is in a host function now
        assert machine.interrupted.wait(TIMEOUT_S)
        assert server.attention
        owner = threading.Thread(target=server.attend)  # and on its way back into the guest
        owner.start()
        assert client.receive().startswith(b"T02")
        client.ask(b"D")
        owner.join()


def test_kill_reaches_the_guests_thread():
    """F.13/9"""
    with Guest(Machine()) as guest, Client(guest.server.address) as client:
        client.ask(b"?")
        client.send(b"k")
        assert guest.killed.wait(TIMEOUT_S)


def test_close_tells_the_debugger_of_a_running_guest_that_it_has_exited():
    with Guest(Machine()) as guest:
        with Client(guest.server.address) as client:
            client.ask(b"?")
            guest.resume(client)
            guest.server.close()
            assert client.receive() == b"W00"
            assert client.is_closed_by_peer()
        guest.server.close()  # again: no error


def test_close_lets_a_stopped_guest_go_on():
    with Guest(Machine()) as guest, Client(guest.server.address) as client:
        client.ask(b"Z0,%x,1" % LEAF)
        guest.server.close()
        guest.wait_until_it_runs()
        assert guest.machine.memory[: len(CODE)] == CODE


def test_guest_runs_undebugged_after_close():
    machine = Machine()
    server = DebugServer(machine)
    server.close()
    assert server.entered() is server.stopped(Stop(Signal.SEGV)) is server.attend() is Resume.CONTINUE
    assert server.exited() is Resume.KILL
    server.left()
    server.released()


def test_exit_is_reported_and_run_starts_again_in_extended_mode():
    machine = Machine()
    answers: list[Resume] = []

    def program(server: DebugServer) -> None:
        server.wait_for_client()
        server.stopped(Stop())
        answers.append(server.exited(3))
        answers.append(server.exited(0, Signal.ABRT))

    with DebugServer(machine) as server:
        owner = threading.Thread(target=program, args=(server,))
        owner.start()
        with Client(server.address) as client:
            client.ask(b"!")
            assert client.ask(b"c") == b"W03"
            assert client.ask(b"vRun;") == client.ask(b"?")
            assert client.ask(b"vCont;c") == b"X06"
        owner.join()
    assert answers == [Resume.CONTINUE, Resume.KILL]
    assert machine.restarts == 1


# --- hostile peers -----------------------------------------------------------------------------------


def test_nak_is_answered_with_the_same_packet():
    with Guest(Machine()) as guest, Client(guest.server.address) as client:
        reply = client.ask(b"m%x,10" % BASE)
        client.socket.sendall(b"-")
        assert client.receive() == reply


def test_damaged_packet_is_asked_for_again():
    with Guest(Machine()) as guest, Client(guest.server.address) as client:
        client.socket.sendall(b"$qC#00")
        assert client.socket.recv(1) == b"-"


@pytest.mark.parametrize(
    "nonsense",
    [b"$qC#00", b"$m1#zz", b"$OK}#17", b"$a*\x1f#aa", b"junk\x00\xff", b"#", b"$" + b"x" * 200_000 + b"#00", b"$v#76"]
    + [encode(b"q" * 1000), encode(b"vFile:pread:ffffffffffffffff,f,f"), b"$half" + encode(b"\xff" * 300)],
)
def test_malformed_packets_never_end_the_connection(nonsense):
    """F.13/15"""
    with Guest(Machine()) as guest, Client(guest.server.address) as client:
        assert client.ask(b"qC") == b"QC1"
        client.socket.sendall(nonsense)
        client.send(b"qC")
        while client.receive() != b"QC1":
            pass


def test_packets_without_end_that_nobody_can_answer_end_the_connection():
    machine = Plain()
    with DebugServer(machine) as server, Client(server.address) as client:
        with pytest.raises(ConnectionError):
            while True:  # the guest's thread is in a host function and does not answer
                client.socket.sendall(encode(b"qC") * 100)
        assert not machine.memory.count(0xCC)


def test_browser_that_a_web_page_sends_here_is_hung_up_on():
    """A page may POST to any port of this machine, and its body may hold packets."""
    machine = Machine()
    with Guest(machine) as guest:
        with Client(guest.server.address) as browser:
            body = encode(b"M%x,1:cc" % CRASH)
            browser.socket.sendall(b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            assert browser.is_closed_by_peer()
        with Client(guest.server.address) as client:
            assert client.ask(b"m%x,1" % CRASH) == b"0f"


BIG = b"m%x,1000" % BASE  # the reply has 8 KiB
MANY = 60  # and is not waited for so often: more than socket buffers hold that are as small as these


def deaf_client(server: DebugServer) -> Client:
    """Connect with buffers that are soon full, and do not read."""
    server._listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # type: ignore[union-attr]
    client = Client.__new__(Client)
    client.socket = socket.socket()
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, _, port = server.address.rpartition(":")
    client.socket.settimeout(TIMEOUT_S)
    client.socket.connect((host, int(port)))
    client.decoder, client.arrived = PacketDecoder(), []
    client.ask(b"QStartNoAckMode")
    client.socket.sendall(encode(BIG) * MANY)
    return client


@pytest.mark.parametrize("machine", [Machine, Idling])
def test_peer_that_reads_late_gets_every_reply(machine):
    """Whoever answers: the guest's thread, or the server's own for an idle guest."""
    machine = machine()
    with contextlib.ExitStack() as undo:
        if isinstance(machine, Idling):
            server = machine.server = undo.enter_context(DebugServer(machine))
        else:
            server = undo.enter_context(Guest(machine)).server
        client = undo.enter_context(deaf_client(server))
        replies = [client.receive() for _ in range(MANY)]
        assert replies == [machine.memory[:0x1000].hex().encode()] * MANY
        assert client.ask(b"qC") == b"QC1"
        assert client.ask(b"D") == b"OK"


@pytest.mark.parametrize("machine", [Machine, Idling])
def test_peer_that_does_not_read_holds_up_nobody(machine):
    """Not the guest after it has gone, nor the end of the server, nor what another client is told."""
    machine = machine()
    with contextlib.ExitStack() as undo:
        if isinstance(machine, Idling):
            server = machine.server = undo.enter_context(DebugServer(machine))
        else:
            guest = undo.enter_context(Guest(machine))
            server = guest.server
        with deaf_client(server), Client(server.address) as other:
            assert other.receive().startswith(b"E.")
        if isinstance(machine, Idling):
            assert machine.call(1) == [Resume.CONTINUE]
        else:
            guest.wait_until_it_runs()
        with deaf_client(server):
            server.close()


def test_naks_are_answered_no_faster_than_they_are_read():
    """Each of a few bytes asks for 8 KiB: what the peer has not taken is not made again."""
    with Guest(Machine()) as guest, Client(guest.server.address) as client:
        reply = client.ask(BIG)
        for _ in range(100):
            client.socket.sendall(b"-" * 1000)
        unsent = guest.server._reader._unsent  # type: ignore[union-attr]
        assert client.receive() == reply
        assert len(unsent) < 64 * len(reply)


def test_what_a_debugger_said_and_did_not_wait_for_is_void_when_it_has_gone():
    """Nobody works for a debugger that is not there any more."""
    machine = Machine()
    noticed = threading.Semaphore(0)
    machine.interrupt = noticed.release  # type: ignore[method-assign]
    with DebugServer(machine) as server:
        with Client(server.address) as client:
            assert server.wait_for_client(TIMEOUT_S)
            owner = start(server.entered)
            assert client.ask(b"vCtrlC") == b"OK"  # the guest's thread has taken notice of it
            client.send(b"c")
            owner.join()
            while noticed.acquire(blocking=False):
                pass
            for _ in range(20):
                client.send(b"qCRC:1000,1000")
            client.socket.shutdown(socket.SHUT_WR)
            assert client.is_closed_by_peer()

        def read(address: int, size: int) -> bytes:
            raise AssertionError("somebody still works for it")

        machine.read_memory = read  # type: ignore[method-assign]
        assert server.attend() is Resume.CONTINUE
        assert not server.attention


def test_debugger_that_has_gone_before_it_was_noticed_leaves_nothing():
    """However many they are while the guest's thread is in a host function."""
    with DebugServer(Machine()) as server:
        for _ in range(50):
            with Client(server.address) as client:
                client.send(b"k")
                client.socket.shutdown(socket.SHUT_WR)
                assert client.is_closed_by_peer()
        assert not server.attention
        assert server.entered() is Resume.CONTINUE


def test_connection_for_which_there_is_no_fd_is_dropped_and_does_not_come_again(caplog):
    """The server would otherwise be woken for it at once, for ever."""
    with DebugServer(Machine()) as server:
        host, _, port = server.address.rpartition(":")
        unlucky, lucky = socket.socket(), socket.socket()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(map(int, os.listdir("/proc/self/fd")))
        fillers = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 16, hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    fillers.append(os.dup(0))
            unlucky.settimeout(TIMEOUT_S)
            unlucky.connect((host, int(port)))
            assert unlucky.recv(1) == b""
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for filler in fillers:
                os.close(filler)
        lucky.connect((host, int(port)))
        assert server.wait_for_client(TIMEOUT_S)
        unlucky.close()
        lucky.close()
    assert caplog.text.count("Too many open files") == 1


def test_host_that_is_no_name_is_refused():
    with pytest.raises(RspUsageError):
        DebugServer(Machine(), "a" * 70 + ".example:0")


# --- a guest that has nothing to do ------------------------------------------------------------------


@pytest.fixture
def idling() -> Iterator[Idling]:
    machine = Idling()
    with DebugServer(machine) as machine.server:
        yield machine
    assert machine.try_acquire()


def start(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_idle_guest_is_served_at_once(idling):
    with Client(idling.server.address) as client:
        assert client.ask(b"?").startswith(b"T05")
        assert client.ask(b"m%x,3" % BASE) == b"48c7c0"
        assert client.ask(b"M2000,1:77") == b"OK" and idling.memory[0x1000] == 0x77


def test_call_into_a_guest_that_is_stopped_while_idle_waits_for_continue(idling):
    with Client(idling.server.address) as client:
        client.ask(b"Z0,%x,1" % (BASE + 7))
        call = start(lambda: idling.call(2))
        assert client.ask(b"m%x,1" % (BASE + 7)) == b"e8"
        assert b"10:0710000000000000;" in client.ask(b"c")
        client.send(b"c")
        call.join()
    assert idling.memory[: len(CODE)] == CODE


def test_stepi_while_idle_steps_the_first_instruction_of_the_next_call(idling):
    with Client(idling.server.address) as client:
        client.ask(b"?")
        client.send(b"s")
        call = start(lambda: idling.call(3))
        assert b"10:0710000000000000;" in client.receive()
        client.send(b"c")
        call.join()


def test_step_that_ends_the_call_stops_in_the_next_one(idling):
    with Client(idling.server.address) as client:
        client.ask(b"?")
        client.send(b"s")
        start(lambda: idling.call(0)).join()
        call = start(lambda: idling.call(1))
        assert client.receive().startswith(b"T05")
        client.send(b"c")
        call.join()


def test_interrupt_between_calls_is_answered_at_once(idling):
    """F.13/4"""
    with Client(idling.server.address) as client:
        for _ in range(3):
            client.ask(b"?")
            client.send(b"c")
            client.interrupt()
            assert client.receive().startswith(b"T02")
    idling.call(1)


def test_debugger_that_comes_while_the_machine_is_taken_is_served_when_it_is_released(idling):
    with idling.lock:  # a snapshot is being taken, for instance
        client = Client(idling.server.address)
        client.send(b"?")
        assert idling.interrupted.wait(TIMEOUT_S)
    idling.server.released()
    with client:
        assert client.receive().startswith(b"T05")


def test_debugger_is_served_on_after_an_exception_in_the_guests_thread(idling):
    """A KeyboardInterrupt, for instance, while that thread waits for the debugger."""
    def call_that_breaks() -> None:
        with pytest.raises(KeyboardInterrupt):
            idling.call(1)

    with Client(idling.server.address) as client:
        client.ask(b"?")
        client.send(b"s")
        call = start(call_that_breaks)
        assert client.receive().startswith(b"T05")

        def interrupted(names):
            raise KeyboardInterrupt

        idling.read_registers = interrupted
        client.send(b"g")
        call.join()
        del idling.read_registers
        assert client.ask(b"qC") == b"QC1"


def test_disconnect_while_idle_releases_the_machine(idling):
    with Client(idling.server.address) as client:
        client.ask(b"Z0,%x,1" % BASE)
    assert idling.call(1) == [Resume.CONTINUE]


def test_kill_while_idle_ends_the_next_call_and_no_other(idling):
    with Client(idling.server.address) as client:
        client.ask(b"?")
        client.send(b"k")
        assert client.socket.shutdown(socket.SHUT_WR) is None
        assert client.is_closed_by_peer()
        assert idling.call(1) == [Resume.KILL]
        assert idling.call(1) == [Resume.CONTINUE]


def test_close_while_stopped_and_idle_releases_the_machine(idling):
    with Client(idling.server.address) as client:
        client.ask(b"?")
        idling.server.close()
        assert idling.call(1) == [Resume.CONTINUE]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_bug_in_a_target_ends_the_server_and_not_the_program():
    machine = Idling()

    def bug(address: int, size: int) -> bytes:
        raise ZeroDivisionError

    machine.read_memory = bug  # type: ignore[method-assign]
    with DebugServer(machine) as machine.server, Client(machine.server.address) as client:
        client.send(b"m1000,1")
        assert client.is_closed_by_peer()
        assert machine.call(1) == [Resume.CONTINUE]


# --- costs -------------------------------------------------------------------------------------------


def cpu_seconds_while(wait: Callable[[], object]) -> float:
    before = time.process_time()
    wait()
    return time.process_time() - before


def test_no_cpu_is_used_while_nobody_is_connected_while_stopped_and_while_running():
    """F.13/10, and 0.14's loop that spins at 100 %. The waits are those of the code under test."""
    nothing = threading.Event()
    with DebugServer(Machine()) as server:
        assert cpu_seconds_while(lambda: server.wait_for_client(timeout_s=0.5)) < 0.1
    with Guest(Machine()) as guest, Client(guest.server.address) as client:
        client.ask(b"?")
        assert cpu_seconds_while(lambda: nothing.wait(0.5)) < 0.1
    with DebugServer(Machine()) as server, Client(server.address) as client:
        server.wait_for_client()
        client.send(b"c")
        assert server.entered() is Resume.CONTINUE
        assert cpu_seconds_while(lambda: nothing.wait(0.5)) < 0.1


def test_entering_a_guest_without_breakpoints_does_not_touch_the_machine():
    machine = Machine()
    with DebugServer(machine) as server, Client(server.address) as client:
        server.wait_for_client()
        client.send(b"c")
        assert server.entered() is Resume.CONTINUE

        def untouchable(*_: object) -> None:
            raise AssertionError

        machine.read_registers = machine.read_memory = untouchable  # type: ignore[assignment, method-assign]
        for _ in range(100):
            assert server.entered() is Resume.CONTINUE
            server.left()
            server.released()
        del machine.read_registers, machine.read_memory


def test_module_stands_alone_and_does_nothing_when_imported():
    script = "import sys, gdb_rsp; print(*sorted({'hyperlight', 'memory', 'kvm_abi', 'elftools'} & set(sys.modules)))"
    script += "; import threading; print(threading.active_count())"
    output = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert output.split() == ["1"]


# --- the real gdb ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest as an ELF file with symbols, line numbers and frame information."""
    folder = tmp_path_factory.mktemp("guest")
    (folder / "guest.s").write_text(SOURCE)
    linking = ["-static", "-nostdlib", "-no-pie", "-Wl,-Ttext=0,-Tdata=0x1000,--build-id=none"]
    subprocess.run(["gcc", "-g", *linking, "-o", "guest.elf", "guest.s"], cwd=folder, check=True)
    assert load_elf(folder / "guest.elf")[: len(CODE)] == CODE
    return folder / "guest.elf"


def machine_with(program: Path) -> Machine:
    machine = Machine(load_elf(program), path="/guest/toy.elf", file=program.read_bytes())
    machine.modules = []
    return machine


def gdb(remote: str, *commands: str, before: tuple[str, ...] = (), connect: str = "target remote") -> str:
    """Run the commands in gdb, connected to *remote*; return what it printed, or fail if it had to be ended."""
    lines = ("set remotetimeout 20", "set width 0", *before, f"{connect} {remote}", *commands)
    options = [option for line in lines for option in ("-ex", line)]
    environment = dict(os.environ, PYTHONPATH=str(REPOSITORY), DEBUGINFOD_URLS="")
    finished = subprocess.run(
        ["gdb", "-nx", "-batch", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        env=environment,
    )
    return finished.stdout


def assert_in_order(output: str, *expected: str) -> None:
    position = 0
    for text in expected:
        found = re.compile(text).search(output, position)
        assert found is not None, f"{text!r} is missing after position {position} of:\n{output}"
        position = found.end()


needs_gdb = [require("gdb"), require("gcc")]


def marked(function: Callable[..., None]) -> Callable[..., None]:
    for mark in needs_gdb:
        function = mark(function)
    return function


@marked
@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_gdb_finds_symbols_by_itself_and_breaks_steps_finishes_and_unwinds(program, tmp_path, transport):
    """B.14/240, over both kinds of socket; no file is named on gdb's side."""
    address = "127.0.0.1:0" if transport == "tcp" else f"unix:{tmp_path}/gdb.sock"
    with Guest(machine_with(program), address, wait=True) as guest:
        output = gdb(
            guest.server.address,
            "break leaf",
            "continue",
            "backtrace",
            "print $rax",
            "stepi",
            "info symbol $pc",
            "next",
            "info symbol $pc",
            "finish",
            "info symbol $pc",
            "x/8xb leaf",
            "info breakpoints",
            "info threads",
            "detach",
        )
    assert "No executable has been specified" not in output
    assert_in_order(
        output,
        r"Breakpoint 1 at 0x101a",
        r"Breakpoint 1, leaf \(\)",
        r"#0 +leaf \(\)",
        r"#1 +0x0*1017 in work \(\)",
        r"\$1 = 0",
        r"leaf \+ 3 in section .text",
        r"leaf \+ 11 in section .text",
        r"work \+ 9 in section .text",
        r"0x101a.*0x48\s+0xff\s+0xc0",  # not 0xcc
        r"breakpoint already hit 1 time",
        r"vcpu 0 <in \"leaf\">",
        r"detached",
    )


@marked
def test_gdb_over_a_pipe():
    """`target remote | command`: no port and no race."""
    output = gdb(
        f"| {sys.executable} {TOY} stdio",
        "break *0x1003 if $rax == 1000",
        "continue",
        "print $rax",
        "info breakpoints",
        "stepi",
        "x/i $pc",
        "kill",
    )
    assert_in_order(output, r"Breakpoint 1, 0x0*1003", r"\$1 = 1000", r"hit 1 time", r"=> 0x1004:\s+jmp", r"killed")


@marked
def test_gdb_stops_once_for_a_condition_that_is_true_on_the_thousandth_pass(program):
    with Guest(machine_with(program), wait=True) as guest:
        output = gdb(
            guest.server.address,
            "break *(leaf + 3) if $rax == 1000 && *(long *)0x2000 == 999",
            "continue",
            "print $rax",
            "info breakpoints",
            "monitor trace",
            "detach",
        )
    assert_in_order(output, r"Breakpoint 1, ", r"\$1 = 1000", r"breakpoint already hit 1 time")
    assert len(re.findall(r"-> 'T0", output)) <= 2  # the answer to ? and one stop
    assert re.search(r"<- 'Z0,101d,1;X", output)


@marked
def test_gdb_watches_a_global_with_a_debug_register(program):
    with Guest(machine_with(program), wait=True) as guest:
        output = gdb(
            guest.server.address,
            "watch *(long *)&counter",
            "continue",
            "continue",
            "rwatch *(long *)&counter",  # Z3 is refused, gdb takes Z4
            "continue",
            "detach",
        )
    assert_in_order(
        output,
        r"Hardware watchpoint 1",
        r"Old value = 0\s+New value = 1",
        r"Old value = 1\s+New value = 2",
        r"Hardware read watchpoint 2",
        r"Old value = 2\s+New value = 3",
    )


@marked
def test_gdb_runs_out_of_debug_registers_and_stays_connected(program):
    """F.13/6"""
    with Guest(machine_with(program), wait=True) as guest:
        output = gdb(
            guest.server.address,
            *[f"hbreak *{address:#x}" for address in range(0x2000, 0x2005)],
            "continue",
            "print *(char *)0",
            "info registers rip",
            "detach",
        )
    assert_in_order(output, r"Cannot insert hardware breakpoint 5", r"Cannot access memory at address 0x0", r"rip +0x1000")


@marked
def test_gdb_shows_and_sets_all_registers(program):
    """F.13/1 and 2, B.14/241"""
    machine = machine_with(program)
    machine.registers.update(
        rbx=0x1111, rbp=0x2222, rdi=0x3333, eflags=0x246, fs_base=0x5555, gs_base=0x6666, mxcsr=0x1F80,
        st0=0x3FFF_8000_0000_0000_0000, xmm1=0x3F99999A, ymm1h=0x40000000, cr0=0x80000011, cr4=0x620, efer=0xD00,
        cs=8, msr_lstar=0x7777,
    )  # fmt: skip
    before = dict(machine.registers)
    with Guest(machine, wait=True) as guest:
        output = gdb(
            guest.server.address,
            "info registers rbx rbp rdi eflags cs fs_base gs_base",
            "print $xmm1.v4_float",
            "print $ymm1.v8_float",
            "print $st0",
            "print $mxcsr",
            "info registers cr0 cr4 efer",
            "info registers msr_lstar",
            "info all-registers",
            "set $rax = 1",
            "set $xmm1.v4_float[0] = 2",
            "set $ymm1.v8_float[4] = 4",
            "print $xmm1.v4_float",
            "set $cr8 = 5",
            "detach",
        )
    assert_in_order(
        output,
        r"rbx +0x1111 ", r"rbp +0x2222 ", r"rdi +0x3333 ", r"eflags +0x246 +\[.*ZF.*\]", r"cs +0x8 ",
        r"fs_base +0x5555 ", r"gs_base +0x6666 ",
        r"= \{1\.20000005, 0, 0, 0\}", r"= \{1\.20000005, 0, 0, 0, 2, 0, 0, 0\}", r"= 1\s", r"= \[ IM DM ZM OM UM PM .*\]",
        r"cr0 .*\[.*PG.*\]", r"cr4 .*\[.*OSFXSR.*\]", r"efer .*\[.*LMA.*\]", r"msr_lstar +0x7777",
        r"msr_apic_base",
        r"= \{2, 0, 0, 0\}",
        r"cr8 cannot be written",
    )  # fmt: skip
    assert "unavailable" not in output
    expected = before | {"rax": 1, "xmm1": 0x40000000, "ymm1h": 0x40800000}
    differs = {name for name in expected if machine.registers[name] != expected[name]}
    assert differs <= {"rip", "rsp", "rbp", "rax"}  # the guest ran on after the detach


@marked
def test_gdb_runs_monitor_commands_searches_and_compares(program):
    with Guest(machine_with(program), wait=True) as guest:
        output = gdb(
            guest.server.address,
            "monitor help",
            "monitor echo hello guest",
            "monitor fail",
            "find /b 0x1000, 0x1fff, 0x48, 0xff, 0xc0",
            "monitor phys on",
            "x/3xb 0x0",
            "compare-sections .text",  # gdb takes the addresses of the file: 0 is where the text is physically
            "monitor phys off",
            "x/3xb 0xffff800000001000",
            "info auxv",
            "info proc cmdline",
            "print $rip",
            "detach",
        )
    assert_in_order(
        output,
        r"help +show this list",
        r"hello guest",
        r"fail: does not work",
        r"0x101a <leaf>\n1 pattern found",
        r"physical",
        r"0x48\s+0xc7\s+0xc0",
        r"Section .text, range 0x0 -- 0x29: matched",
        r"virtual",
        r"0xffff800000001000:\s+0x48\s+0xc7\s+0xc0",
        r"AT_ENTRY",
    )


@marked
def test_gdb_sees_a_crash_with_its_signal_and_a_backtrace(program):
    """F.13/5"""
    with Guest(machine_with(program), wait=True) as guest:
        output = gdb(guest.server.address, "break leaf", "continue", "set $rip = crash", "continue", "bt", "detach")
    assert_in_order(output, r"Program received signal SIGILL", r"crash \(\)", r"#0 +0x0*1026|#0 +crash", r"detached")


@marked
def test_gdb_detaches_and_attaches_again_and_runs_again(program):
    machine = machine_with(program)
    with Guest(machine, wait=True) as guest:
        first = gdb(guest.server.address, "break leaf", "continue", "detach")
        again = gdb(
            guest.server.address,
            "break leaf",
            "continue",
            "ignore 1 4",
            "continue",
            "run",
            "print $rax",
            "print *(long *)&counter",
            "detach",
            before=(f"file {program}", "set remote exec-file /guest/toy.elf"),
            connect="target extended-remote",
        )
    assert_in_order(first, r"Breakpoint 1, leaf", r"detached")
    assert_in_order(again, r"Breakpoint 1, leaf", r"Breakpoint 1, leaf", r"Breakpoint 1, leaf", r"\$1 = 0", r"\$2 = 0")
    assert machine.restarts >= 1


@marked
def test_gdb_range_steps_over_a_line(program):
    with Guest(machine_with(program), wait=True) as guest:
        output = gdb(guest.server.address, "break work", "continue", "next", "next", "next", "info symbol $pc", "monitor trace")
    assert_in_order(output, r"Breakpoint 1, work", r"work \+ \d+ in section .text", r"vCont;r")


@marked
def test_gdb_ctrl_c_stops_and_continue_goes_on(program):
    """F.13/3, with SIGINT to gdb as a terminal sends it."""
    with Guest(machine_with(program), wait=True) as guest, interactive_gdb(guest.server.address) as session:
        session.type("continue", expect="Continuing")
        guest.wait_until_it_runs()
        session.process.send_signal(signal.SIGINT)
        session.expect("received signal SIGINT")
        session.type("break leaf", expect="Breakpoint 1 at")
        session.type("continue", expect="Breakpoint 1, leaf")
        session.type("detach", expect="detached")


class Interactive:
    """A gdb that is typed to; every wait ends with the text that it waits for, or with the test."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.output = b""

    def type(self, line: str, expect: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        self.expect(expect)

    def expect(self, text: str) -> None:
        assert self.process.stdout is not None
        while text.encode() not in self.output:
            ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_S)
            assert ready, f"{text!r} did not come; gdb said:\n{self.output.decode()}"
            data = os.read(self.process.stdout.fileno(), 65536)
            assert data, f"gdb ended before {text!r}:\n{self.output.decode()}"
            self.output += data
        self.output = self.output.partition(text.encode())[2]


@contextmanager
def interactive_gdb(remote: str) -> Iterator[Interactive]:
    command = ["gdb", "-nx", "-q", "-ex", "set confirm off", "-ex", "set pagination off", "-ex", f"target remote {remote}"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            yield Interactive(process)
        finally:
            process.kill()


@marked
def test_gdb_tells_why_a_second_one_cannot_connect(program):
    with Guest(machine_with(program), wait=True) as guest, Client(guest.server.address) as first:
        first.ask(b"?")
        output = gdb(guest.server.address)
        assert "another debugger is connected to this guest" in output
        assert first.ask(b"qC") == b"QC1"


@marked
@pytest.mark.parametrize("transport", ["tcp", "pipe"])
def test_toy_target_serves_gdb_from_a_folder_with_nothing_but_gdb_rsp(tmp_path, transport):
    """Issue 4, item 5"""
    shutil.copy(REPOSITORY / "gdb_rsp.py", tmp_path)
    shutil.copy(TOY, tmp_path)
    commands = ("info registers rip", "watch $rax", "continue", "x/2i 0x1000", "print $rbx", "kill")
    expected = (r"rip +0x1000", r"New value = 1", r"inc +%rax", r"<unavailable>", r"killed")
    if transport == "pipe":
        output = gdb(f"| env -u PYTHONPATH {sys.executable} {tmp_path}/gdb_toy_target.py stdio", *commands)
    else:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        with subprocess.Popen(
            [sys.executable, "gdb_toy_target.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment
        ) as toy:
            assert toy.stdout is not None
            found = re.fullmatch(r"gdb -ex 'target remote (.*)'\n", toy.stdout.readline())
            assert found is not None
            output = gdb(found.group(1), *commands)
            assert toy.wait(TIMEOUT_S) == 0
    assert_in_order(output, *expected)


# --- the real lldb -----------------------------------------------------------------------------------


@require("lldb")
@require("gcc")
def test_lldb_connects_breaks_reads_registers_and_memory_and_goes_on(program):
    """Issue 4, item 2"""
    commands = [
        "gdb-remote {address}",
        "register read rip rbx",
        "memory read 0x1000 0x1008",
        "breakpoint set -a 0x101a",
        "continue",
        "register read rip",
        "thread step-inst",
        "register read rip",
        "continue",
        "register write rbx 0x1234",
        "register read rbx",
        "watchpoint set expression -w write -s 8 -- 0x2000",
        "breakpoint delete -f",
        "continue",
        "memory read --size 8 --count 1 --format x 0x2000",
        "process plugin packet monitor echo hello",
        "process detach",
    ]
    with Guest(machine_with(program), wait=True) as guest:
        lines = [command.format(address=guest.server.address) for command in commands]
        finished = subprocess.run(
            ["lldb", "--no-lldbinit", "-b", *(option for line in lines for option in ("-o", line))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
    assert_in_order(
        finished.stdout,
        r"rip = 0x0*10",
        r"0x00001000: 48 c7 c0",
        r"Breakpoint 1: .*address = 0x0*101a",
        r"stop reason = breakpoint 1\.1",
        r"rip = 0x0*101a",
        r"stop reason = instruction step into",
        r"rip = 0x0*101d",
        r"stop reason = breakpoint 1\.1",
        r"rbx = 0x0*1234",
        r"Watchpoint created",
        r"stop reason = watchpoint 1",
        r"0x00002000: 0x0*\d",
        r"hello",
        r"detached",
    )
