"""The session of gdb_rsp.py: packets to replies, against a machine that is interpreted here.

Many tests are named for a defect of another stub: the spec's rsp.md, section 7, lists them.
"""

from __future__ import annotations

import binascii
import re
import struct
import xml.etree.ElementTree as ET
from collections.abc import Iterator

import pytest
from gdb_machine import (
    AFTER_LEAF,
    AGAIN,
    ALIAS,
    BASE,
    CALL_LEAF,
    CODE,
    COUNTER,
    CRASH,
    LEAF,
    LEAF_RET,
    SIZE,
    STACK_TOP,
    STORE,
    WORK,
    Machine,
    Plain,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

import gdb_rsp
from gdb_rsp import (
    PACKET_SIZE,
    REGISTERS,
    Access,
    HardwareBreakpoint,
    MemoryRange,
    PacketDecoder,
    Reason,
    Resume,
    Session,
    Signal,
    State,
    Stop,
    TargetError,
    TargetFault,
    encode,
    evaluate,
    target_description,
)

GDB_SUPPORTED = (
    b"qSupported:multiprocess+;swbreak+;hwbreak+;qRelocInsn+;fork-events+;vfork-events+;exec-events+;"
    b"vContSupported+;QThreadEvents+;no-resumed+;memory-tagging+;xmlRegisters=i386"
)


class Debugged:
    """A session and its machine, and the loop that an owner runs."""

    def __init__(self, machine: Plain | None = None, *, greet: bool = True) -> None:
        self.machine = machine if machine is not None else Machine()
        self.session = Session(self.machine)
        self.machine.runs = 0
        if greet:
            self.session.handle(GDB_SUPPORTED)

    def send(self, payload: bytes) -> list[bytes]:
        """Handle a packet, and run the machine until the session waits again."""
        replies = self.session.handle(payload)
        while not self.session.waiting:
            action = self.session.resume()
            if action is Resume.KILL or self.session.state is not State.RUNNING:
                return replies
            stop = self.machine.run(step=action is Resume.STEP)
            replies += self.session.interrupt() if stop is None else self.session.stopped(stop)
        return replies

    def ask(self, payload: bytes) -> bytes:
        """Send a packet that has exactly one reply, and return it."""
        (reply,) = self.send(payload)
        return reply

    def resume(self, payload: bytes) -> bytes:
        """Send a packet that resumes the machine; return the stop reply."""
        assert self.session.state is State.STOPPED
        return self.ask(payload)

    @property
    def rip(self) -> int:
        return self.machine.registers["rip"]


@pytest.fixture
def debugged() -> Debugged:
    return Debugged()


def number_of(name: str) -> int:
    return [register.name for register in REGISTERS].index(name)


# --- one reply for every form in the manual ----------------------------------------------------------

REPLIES = [
    # errno is hexadecimal: EINVAL 22 is E16, EFAULT 14 is E0e, ENOSPC 28 is E1c
    (b"", b""),
    (b"vMustReplyEmpty", b""),
    (b"qTStatus", b""),
    (b"qSymbol::", b""),
    (b"qC", b"QC1"),
    (b"qCX", b""),  # a longer name is another packet
    (b"!", b"OK"),
    (b"Hg0", b"OK"),
    (b"Hc-1", b"OK"),
    (b"Hgp1.1", b"OK"),
    (b"Hg2", b"E03"),
    (b"T1", b"OK"),
    (b"T01", b"OK"),
    (b"T7", b"E03"),
    (b"qAttached", b"1"),
    (b"qAttached:1", b"1"),
    (b"qfThreadInfo", b"m1"),
    (b"qsThreadInfo", b"l"),
    (b"qThreadExtraInfo,1", binascii.hexlify(b'vcpu 0 <in "leaf">')),
    (b"qOffsets", b"TextSeg=1000"),
    (b"vCont?", b"vCont;c;C;s;S;r"),
    (b"vCtrlC", b"OK"),  # stopped already
    (b"QStartNoAckMode", b"OK"),
    (b"?", b"T05thread:1;06:0*x;"),
    # memory
    (b"m1000,3", b"48c7c0"),
    (b"m1000,0", b""),
    (b"m0,1", b"E0e"),
    (b"mffffffffffffffff,2", b"E0e"),
    (b"mffff800000001000,3", b"48c7c0"),
    (b"m10000000000001000,1", b"E16"),  # 65 bits
    (b"m1000", b"E16"),
    (b"m1000,", b"E16"),
    (b"m+1000,1", b"E16"),
    (b"m0x1000,1", b"E16"),
    (b"m10_00,1", b"E16"),
    (b"x1000,3", b"b\x48\xc7\xc0"),
    (b"x0,1", b"E0e"),
    (b"M2000,2:1234", b"OK"),
    (b"M2000,2:123", b"E16"),
    (b"M2000,2:12", b"E16"),
    (b"M2000,1:zz", b"E16"),
    (b"M0,1:00", b"E0e"),
    (b"X2000,0:", b"OK"),  # gdb's probe
    (b"X2000,3::,;", b"OK"),  # the data is binary
    (b"X2000,2:abc", b"E16"),
    (b"Xffffffffffffffff,2:ab", b"E0e"),
    (b"qSearch:memory:1000;1000;\xe8\x02\x00", b"1,1007"),
    (b"qSearch:memory:1000;1000;nowhere", b"0"),
    (b"qSearch:memory:0;10;a", b"E0e"),
    (b"qSearch:memory:1000;10;", b"E16"),
    (b"qCRC:1000,0", b"Cffffffff"),
    (b"qCRC:0,1", b"E0e"),
    (b"qCRC:1000,ffffffffffff", b"E07"),
    (b"Qqemu.PhyMemMode:2", b"E16"),
    # registers
    (b"p999", b"E16"),
    (b"p", b"E16"),
    (b"P0=00", b"E16"),
    (b"P0", b"E16"),
    (b"P0=xxxxxxxxxxxxxxxx", b"E16"),
    (b"G00", b"E16"),
    # breakpoints
    (b"Z0,1000,1", b"OK"),
    (b"Z0,1000", b"E16"),
    (b"Z0,0,1", b"E0e"),
    (b"Z1,0,1", b"OK"),  # address 0 is an address like any other
    (b"Z2,2000,8", b"OK"),
    (b"Z2,2000,0", b"E16"),
    (b"Z2,2000,29", b"E1c"),
    (b"Z3,2000,8", b""),  # gdb then tries Z4
    (b"Z4,2000,8", b"OK"),
    (b"Z5,2000,8", b""),
    (b"z0,1000,1", b"OK"),  # never set: no error
    (b"z3,1000,1", b""),
    (b"z", b""),
    (b"Z0,1000,1;X3,2201", b"E16"),  # shorter than it says
    (b"Z0,1000,1;Xzz,22", b"E16"),
    (b"Z0,1000,1;cmds:1,X3,220127", b"E5f"),  # EOPNOTSUPP
    # resume, malformed
    (b"cxyz", b"E16"),
    (b"C", b"E16"),
    (b"C05;", b"E16"),
    (b"vCont;t", b"E16"),
    (b"vCont;c:2", b"E16"),
    (b"vCont;r1000", b"E16"),
    (b"vCont", b""),
    # files
    (b"vFile:setfs:0", b"F0"),
    (b"vFile:open:2f6574632f706173737764,0,0", b"F-1,2"),  # /etc/passwd: there is only one file
    (b"vFile:open:2f67756573742f746f792e656c66,1,0", b"F-1,d"),
    (b"vFile:open:2f67756573742f746f792e656c66", b"E16"),
    (b"vFile:pread:0,10,0", b"F-1,9"),
    (b"vFile:fstat:0", b"F-1,9"),
    (b"vFile:close:0", b"F-1,9"),
    (b"vFile:pwrite:0,0,ab", b"F-1,d"),
    (b"vFile:unlink:2f", b"F-1,d"),
    (b"vFile:readlink:2f", b"F-1,d"),
    (b"vFile:unknown:1", b""),
    # documents
    (b"qXfer:features:read:other.xml:0,10", b"E00"),
    (b"qXfer:features:read:target.xml:fffffffffffffff,10", b"l"),
    (b"qXfer:features:read:target.xml:0", b"E16"),
    (b"qXfer:features:read:target.xml", b"E16"),
    (b"qXfer:features:write:target.xml:0:ab", b""),
    (b"qXfer:exec-file:read::0,fff", b"l/guest/toy.elf"),
    (b"qXfer:exec-file:read:1:0,4", b"m/gue"),
    (b"qXfer:exec-file:read:1:7,fff", b"ltoy.elf"),
    (b"qXfer:memory-map:read::0,10", b""),  # not a capability of this machine
    (b"qRcmd,zz", b"E16"),
]


@pytest.mark.parametrize(("packet", "reply"), REPLIES)
def test_reply(packet, reply):
    if packet == b"?":
        reply = b"T05thread:1;06:0000000000000000;07:0050000000000000;10:0010000000000000;11:02000000;"
    assert Debugged().ask(packet) == reply


def test_bare_qsupported_is_answered():
    """pyOCD raises IndexError for it."""
    assert Debugged(greet=False).ask(b"qSupported").startswith(b"PacketSize=10000;")


def test_packet_size_is_hexadecimal():
    """m1n1 sends 65536, which gdb reads as 0x65536."""
    features = Debugged(greet=False).ask(b"qSupported").split(b";")
    assert int(features[0].removeprefix(b"PacketSize="), 16) == PACKET_SIZE


def features_of(machine: Plain) -> set[bytes]:
    return set(Session(machine).handle(b"qSupported:error-message+")[0].split(b";"))


class Mapped(Machine):
    def memory_map(self):
        return [MemoryRange("ram", BASE, 0x2000), MemoryRange("rom", 0x3000, 0x1000)]


PROBES = {
    b"PacketSize=10000": b"qSupported",
    b"QStartNoAckMode+": b"QStartNoAckMode",
    b"vContSupported+": b"vCont?",
    b"swbreak+": b"Z0,1000,1",
    b"ConditionalBreakpoints+": b"Z0,1000,1;X3,220127",
    b"hwbreak+": b"Z1,1000,1",
    b"binary-upload+": b"x1000,1",
    b"error-message+": b"m0,1",
    b"qXfer:features:read+": b"qXfer:features:read:target.xml:0,10",
    b"qXfer:threads:read+": b"qXfer:threads:read::0,10",
    b"qXfer:exec-file:read+": b"qXfer:exec-file:read::0,10",
    b"qXfer:libraries:read+": b"qXfer:libraries:read::0,10",
    b"qXfer:auxv:read+": b"qXfer:auxv:read::0,10",
    b"qXfer:memory-map:read+": b"qXfer:memory-map:read::0,10",
}


def test_every_advertised_feature_has_a_handler_and_no_other_is_advertised():
    """qiling advertises tracepoints, multiprocess and more, and handles none of them."""
    assert features_of(Mapped()) == set(PROBES)
    for machine in (Mapped, Machine, Plain):
        for feature in features_of(machine()):
            assert Debugged(machine()).ask(PROBES[feature]) != b""


def test_what_a_target_cannot_do_is_unknown():
    plain = Debugged(Plain())
    for packet in (b"Z1,1000,1", b"Z2,2000,8", b"qOffsets", b"R00", b"vRun;", b"vFile:setfs:0", b"Qqemu.PhyMemMode:1"):
        assert plain.ask(packet) == b""
    assert b"hwbreak+" not in features_of(Plain())


def test_text_errors_only_where_gdb_shows_them():
    """gdb 13 shows the text of P, and stumbles over that of m, unless it has said error-message+."""
    write_cr8 = b"P%x=%b" % (number_of("cr8"), b"00" * 8)
    old, new = Debugged(), Debugged()
    new.ask(b"qSupported:error-message+")
    assert old.ask(write_cr8) == new.ask(write_cr8) == b"E.cr8 cannot be written"
    assert old.ask(b"m0,1") == b"E0e"
    assert new.ask(b"m0,1") == b"E.0x0: not mapped"


# --- registers ---------------------------------------------------------------------------------------


def test_g_has_every_register_at_gdbs_offset(debugged):
    """A distinct value in every register: 0.14 of the Rust host puts RBP into the RBX slot."""
    block = binascii.unhexlify(debugged.ask(b"g"))
    values = debugged.machine.registers
    layout = [("rax", 0, 8), ("rbx", 8, 8), ("rbp", 0x30, 8), ("r15", 0x78, 8), ("rip", 0x80, 8)]
    layout += [("eflags", 0x88, 4), ("cs", 0x8C, 4), ("gs", 0xA0, 4), ("st0", 0xA4, 10), ("fctrl", 0xF4, 4)]
    layout += [("fop", 0x110, 4), ("xmm0", 0x114, 16), ("xmm15", 0x204, 16), ("mxcsr", 0x214, 4)]
    layout += [("ymm0h", 0x218, 16), ("fs_base", 0x318, 8), ("gs_base", 0x320, 8), ("cr0", 0x328, 8)]
    for name, offset, size in layout:
        assert block[offset : offset + size] == values[name].to_bytes(size, "little"), name
    assert len(block) == 0x358  # the system group is read with p only


def test_p_reads_every_register_of_the_description(debugged):
    for number, register in enumerate(REGISTERS):
        value = int.from_bytes(binascii.unhexlify(debugged.ask(b"p%x" % number)), "little")
        assert value == debugged.machine.registers[register.name]


@settings(deadline=None)
@given(st.sampled_from([number for number, reg in enumerate(REGISTERS) if reg.name != "cr8"]), st.data())
def test_p_reads_what_capital_p_wrote_and_nothing_else_changes(number, data):
    """qiling swaps bytes over the bit length, so that 1 stays 1; m1n1 writes x1 for sp."""
    debugged = Debugged()
    size = REGISTERS[number].bits // 8
    value = data.draw(st.binary(min_size=size, max_size=size).filter(any))
    before = dict(debugged.machine.registers)
    assert debugged.ask(b"P%x=%b" % (number, binascii.hexlify(value))) == b"OK"
    assert debugged.ask(b"p%x" % number) == binascii.hexlify(value)
    assert debugged.machine.registers == before | {REGISTERS[number].name: int.from_bytes(value, "little")}


def test_capital_g_writes_only_what_differs(debugged):
    """Written back unchanged, cr8, which this machine refuses to write, does no harm."""
    block = bytearray(binascii.unhexlify(debugged.ask(b"g")))
    block[8:16] = (0x1122334455667788).to_bytes(8, "little")
    before = dict(debugged.machine.registers)
    assert debugged.ask(b"G" + binascii.hexlify(block)) == b"OK"
    assert debugged.machine.registers == before | {"rbx": 0x1122334455667788}
    assert debugged.ask(b"G" + binascii.hexlify(block) + b"00") == b"E16"


def test_what_was_not_read_is_sent_as_xx_never_as_zero():
    """Firecracker and others send zeros for registers that they never read."""
    machine = Machine()
    for name in ("st0", "fctrl", "xmm3"):
        del machine.registers[name]
    debugged = Debugged(machine)
    reply = debugged.ask(b"g")
    assert reply[2 * 0xA4 : 2 * 0xAE] == b"xx" * 10
    assert reply[2 * 0xF4 : 2 * 0xF8] == b"xx" * 4
    assert debugged.ask(b"p%x" % number_of("xmm3")) == b"xx" * 16
    assert debugged.ask(b"G" + reply) == b"OK"
    assert "st0" not in machine.registers


def test_groups_that_a_target_never_reads_are_not_described():
    machine = Machine()
    for name in [name for name in machine.registers if name.startswith("ymm")]:
        del machine.registers[name]
    document = read_document(Debugged(machine), b"features", b"target.xml")
    assert b"org.gnu.gdb.i386.sse" in document
    assert b"org.gnu.gdb.i386.avx" not in document
    assert number_of("fs_base") - 16 == described_registers(document).index("fs_base")


def read_document(debugged: Debugged, what: bytes, annex: bytes = b"", size: int = 0x3FFF) -> bytes:
    document = b""
    while True:
        reply = debugged.ask(b"qXfer:%b:read:%b:%x,%x" % (what, annex, len(document), size))
        document += reply[1:]
        if reply[:1] == b"l":
            return document
        assert reply[:1] == b"m" and len(reply) > 1


def described_registers(document: bytes) -> list[str]:
    return [str(element.get("name")) for element in ET.fromstring(document).iter("reg")]


@pytest.mark.parametrize("size", [1, 7, 0xFFF, 0xFFFFFFFF])
def test_description_is_the_register_table_in_windows_of_any_size(debugged, size):
    document = read_document(debugged, b"features", b"target.xml", size)
    assert document.decode() == target_description()
    assert described_registers(document) == [register.name for register in REGISTERS]


def test_description_declares_every_type_it_uses():
    root = ET.fromstring(target_description())
    builtin = {"int32", "int64", "int", "data_ptr", "code_ptr", "i387_ext", "uint128"}
    for feature in root.iter("feature"):
        declared = {element.get("id") for element in feature if element.tag in ("flags", "union", "vector")}
        assert {element.get("type") for element in feature.iter("reg")} <= declared | builtin


# --- memory ------------------------------------------------------------------------------------------


def test_read_is_short_where_memory_ends_and_an_error_only_at_the_first_byte(debugged):
    end = BASE + SIZE
    assert debugged.ask(b"m%x,10" % (end - 4)) == b"00" * 4
    assert debugged.ask(b"x%x,10" % (end - 4)) == b"b" + bytes(4)
    assert debugged.ask(b"m%x,10" % end) == b"E0e"


def test_read_continues_over_the_pages_that_a_target_returns_one_by_one(debugged):
    assert binascii.unhexlify(debugged.ask(b"m1ffc,8")) == bytes(debugged.machine.memory[0xFFC:0x1004])


def test_read_is_bounded_by_the_packet_size(debugged):
    machine = debugged.machine
    machine.memory = bytearray(b"}" * SIZE)
    for packet in (b"m1000,ffffffff", b"x1000,ffffffff", b"m1000,ffffffffffffffff"):
        assert len(encode(debugged.ask(packet))) <= PACKET_SIZE


@settings(deadline=None)
@given(st.integers(0, 0x1FF0), st.binary(min_size=1, max_size=64), st.sampled_from(["M", "X"]))
def test_m_reads_what_was_written(offset, data, how):
    """qiling's M compares a length with a string, and always fails."""
    debugged = Debugged()
    address = BASE + offset
    body = binascii.hexlify(data) if how == "M" else data
    assert debugged.ask(b"%b%x,%x:%b" % (how.encode(), address, len(data), body)) == b"OK"
    assert debugged.ask(b"m%x,%x" % (address, len(data))) == binascii.hexlify(data)
    assert debugged.ask(b"m%x,%x" % (address + ALIAS, len(data))) == binascii.hexlify(data)


@settings(deadline=None)
@given(st.integers(0, SIZE), st.integers(0, SIZE), st.lists(st.sampled_from([0, 1]), min_size=1, max_size=4))
def test_search_finds_the_first_place(start, size, pattern):
    """A wrong address in the reply makes gdb loop for ever."""
    machine = Machine()
    machine.memory[:] = bytes(index * index % 7 == 0 for index in range(SIZE))
    size = min(size, SIZE - start)
    reply = Debugged(machine).ask(b"qSearch:memory:%x;%x;%b" % (BASE + start, size, bytes(pattern)))
    place = machine.memory[: start + size].find(bytes(pattern), start)
    assert reply == (b"0" if place < 0 else b"1,%x" % (BASE + place))


def test_search_finds_a_pattern_across_the_pieces_that_are_read(monkeypatch):
    monkeypatch.setattr(gdb_rsp, "_SCAN_CHUNK", 16)
    debugged = Debugged()
    for offset in range(8, 40):
        debugged.machine.memory[0x1000:0x1100] = bytes(offset) + b"needle" + bytes(250 - offset)
        assert debugged.ask(b"qSearch:memory:2000;100;needle") == b"1,%x" % (0x2000 + offset)


def test_crc_is_gdbs():
    """The check value of CRC-32/MPEG-2, which this is: 0x0376e6e7 for "123456789"."""
    debugged = Debugged()
    debugged.ask(b"X2000,9:123456789")
    assert debugged.ask(b"qCRC:2000,9") == b"C0376e6e7"


def test_physical_memory_mode_by_packet_and_by_monitor_command(debugged):
    assert debugged.ask(b"m0,3") == b"E0e"
    assert debugged.ask(b"Qqemu.PhyMemMode:1") == b"OK"
    assert debugged.ask(b"qqemu.PhyMemMode") == b"1"
    assert debugged.ask(b"m0,3") == b"48c7c0"
    assert debugged.ask(b"M1000,1:77") == b"OK" and debugged.machine.memory[0x1000] == 0x77
    assert monitor(debugged, "phys off") == "memory addresses are virtual\n"
    assert debugged.ask(b"m0,3") == b"E0e"
    assert monitor(debugged, "phys on") == "memory addresses are physical\n"
    assert debugged.ask(b"m0,3") == b"48c7c0"


# --- run control -------------------------------------------------------------------------------------


def test_step_reports_a_plain_trap_with_expedited_registers(debugged):
    reply = debugged.resume(b"s")
    assert reply.startswith(b"T05thread:1;")
    assert b"10:0710000000000000;" in reply  # rip, register 16, is 0x1007
    assert b"07:0050000000000000;" in reply  # rsp


@pytest.mark.parametrize("packet", [b"s", b"S05", b"vCont;s", b"vCont;s:1;c", b"vCont;S05:p1.1", b"vCont;c:2;s:-1"])
def test_forms_of_step(debugged, packet):
    debugged.resume(packet)
    assert debugged.rip == AGAIN


@pytest.mark.parametrize("packet", [b"c", b"C05", b"vCont;c", b"vCont;c:1", b"vCont;C0b:-1"])
def test_forms_of_continue(debugged, packet):
    debugged.ask(b"Z0,%x,1" % LEAF)
    assert debugged.resume(packet).startswith(b"T05swbreak:;")
    assert debugged.rip == LEAF


@pytest.mark.parametrize("packet", [b"c100e", b"C05;100e", b"s100e", b"S05;100e"])
def test_resume_at_an_address(debugged, packet):
    debugged.ask(b"Z0,100f,1")
    debugged.resume(packet)
    assert debugged.rip == 0x100F


def test_range_step_takes_one_round_trip_and_stops_outside(debugged):
    debugged.machine.registers["rip"] = WORK
    reply = debugged.resume(b"vCont;r%x,%x:1" % (WORK, CALL_LEAF))
    assert debugged.rip == CALL_LEAF
    assert reply.startswith(b"T05thread")
    assert debugged.machine.runs == 2


def test_range_step_stops_at_a_breakpoint_in_the_range(debugged):
    debugged.ask(b"Z0,%x,1" % 0x100F)
    debugged.machine.registers["rip"] = WORK
    debugged.resume(b"vCont;r%x,%x:1" % (WORK, CALL_LEAF))
    assert debugged.rip == 0x100F


def test_range_step_always_steps_once(debugged):
    debugged.resume(b"vCont;r0,0")
    assert debugged.rip == AGAIN


def test_interrupt_stops_with_sigint_and_the_same_run_goes_on(debugged):
    """F.13/3: the Rust host ends the guest call after a Ctrl-C."""
    debugged.ask(b"Z0,%x,1" % CRASH)
    debugged.machine.interrupt()
    assert debugged.resume(b"c").startswith(b"T02thread:1;")
    debugged.ask(b"Z0,%x,1" % LEAF)
    assert debugged.resume(b"c").startswith(b"T05swbreak:;")


def test_interrupt_of_a_stopped_machine_is_not_answered(debugged):
    assert debugged.session.interrupt() == []


def test_vctrlc_while_running_is_answered_before_its_stop_reply(debugged):
    assert debugged.session.handle(b"c") == []
    replies = debugged.session.handle(b"vCtrlC")
    assert replies[0] == b"OK" and replies[1].startswith(b"T02") and len(replies) == 2


@pytest.mark.parametrize("signal", list(Signal))
def test_question_mark_tells_the_real_reason(signal):
    """gdbstub, and with it the Rust host, always answers T05."""
    machine = Machine()
    assert Session(machine, Stop(signal)).handle(b"?")[0].startswith(b"T%02x" % signal)
    debugged = Debugged()
    debugged.session.handle(b"c")
    (reply,) = debugged.session.stopped(Stop(signal))
    assert debugged.ask(b"?") == reply


def test_crash_is_reported_where_it_happened(debugged):
    assert debugged.resume(b"c%x" % CRASH).startswith(b"T04thread:1;")
    assert debugged.rip == CRASH


def test_packets_are_answered_while_the_machine_runs_and_pauses(debugged):
    debugged.ask(b"Z0,%x,1" % LEAF)
    session = debugged.session
    assert session.handle(b"c") == []
    session.resume()
    assert debugged.machine.memory[LEAF - BASE] == 0xCC
    session.pause()
    assert session.handle(b"m%x,1" % LEAF) == [b"48"]
    assert session.handle(b"c") == [b"E10"]  # EBUSY
    assert session.resume() is Resume.CONTINUE
    assert debugged.machine.memory[LEAF - BASE] == 0xCC


# --- breakpoints -------------------------------------------------------------------------------------


def test_software_breakpoint_is_in_memory_only_while_the_machine_runs(debugged):
    """F.13/12: a debugger that reads over its breakpoint sees the program."""
    debugged.ask(b"Z0,%x,1" % LEAF)
    assert debugged.machine.memory == debugged.machine.first_memory
    assert debugged.resume(b"c").startswith(b"T05swbreak:;thread:1;")
    assert debugged.rip == LEAF
    assert debugged.ask(b"m%x,3" % LEAF) == b"48ffc0"
    assert debugged.machine.memory[: len(CODE)] == CODE


def test_write_over_a_breakpoint_changes_the_program_under_it(debugged):
    debugged.ask(b"Z0,%x,1" % AFTER_LEAF)
    debugged.ask(b"X%x,1:\x90" % AFTER_LEAF)
    debugged.ask(b"X%x,3:\x90\x90\x90" % LEAF)
    debugged.resume(b"c")
    assert debugged.ask(b"m%x,1" % AFTER_LEAF) == b"90"
    assert debugged.rip == AFTER_LEAF and debugged.machine.registers["rax"] == 0


def test_continue_from_a_breakpoint_goes_on_by_itself(debugged):
    """gdb lifts its breakpoints to step over them; a bare client need not."""
    debugged.ask(b"Z0,%x,1" % LEAF)
    for count in range(1, 4):
        debugged.resume(b"c")
        assert debugged.rip == LEAF and debugged.machine.registers["rax"] == count - 1


def test_step_over_a_breakpoint_ends_behind_it(debugged):
    """F.13/13"""
    debugged.ask(b"Z0,%x,1" % LEAF)
    debugged.resume(b"c")
    assert debugged.resume(b"s").startswith(b"T05thread")
    assert debugged.rip == STORE


def test_breakpoint_at_a_place_that_the_debugger_moved_to_is_hit(debugged):
    debugged.ask(b"Z0,%x,1" % LEAF)
    debugged.ask(b"P10=%b" % binascii.hexlify(LEAF.to_bytes(8, "little")))
    assert debugged.resume(b"c").startswith(b"T05swbreak")
    assert debugged.machine.registers["rax"] == REGISTER_RAX_AT_START


REGISTER_RAX_AT_START = Machine().registers["rax"]


def test_setting_and_removing_are_idempotent(debugged):
    for _ in range(3):
        assert debugged.ask(b"Z0,%x,1" % LEAF) == b"OK"
        assert debugged.ask(b"Z1,%x,1" % WORK) == b"OK"
    for _ in range(3):
        assert debugged.ask(b"z0,%x,1" % LEAF) == b"OK"
        assert debugged.ask(b"z1,%x,1" % WORK) == b"OK"
    debugged.ask(b"Z0,%x,1" % STORE)
    debugged.resume(b"c")
    assert debugged.rip == STORE


def test_swbreak_is_said_only_to_a_debugger_that_knows_it():
    debugged = Debugged(greet=False)
    debugged.ask(b"qSupported:hwbreak+")
    debugged.ask(b"Z0,%x,1" % LEAF)
    assert debugged.resume(b"c").startswith(b"T05thread:1;")


def test_hardware_breakpoint_says_hwbreak(debugged):
    debugged.ask(b"Z1,%x,1" % LEAF)
    assert debugged.resume(b"c").startswith(b"T05hwbreak:;thread:1;")
    assert debugged.resume(b"c").startswith(b"T05hwbreak:;thread:1;")
    assert debugged.machine.registers["rax"] == 1


def test_removed_hardware_breakpoint_does_not_stop_the_machine_any_more(debugged):
    debugged.ask(b"Z1,%x,1" % LEAF)
    debugged.resume(b"c")
    debugged.ask(b"z1,%x,1" % LEAF)
    debugged.resume(b"s")
    assert debugged.machine.debug_registers == ()


def test_hardware_breakpoint_at_address_zero(debugged):
    """The Rust host takes an empty slot for a breakpoint at 0."""
    assert debugged.ask(b"Z1,0,1") == b"OK"
    assert debugged.machine.debug_registers == (HardwareBreakpoint(Access.EXECUTE, 0, 1),)


def test_fifth_debug_register_is_an_error_and_nothing_changes(debugged):
    """F.13/6: errno 28 is E1c, hexadecimal."""
    for address in (1, 2, 3, 4):
        assert debugged.ask(b"Z1,%x,1" % address) == b"OK"
    before = debugged.machine.debug_registers
    assert debugged.ask(b"Z1,5,1") == b"E1c"
    assert debugged.ask(b"Z2,2000,8") == b"E1c"
    assert debugged.machine.debug_registers == before
    debugged.ask(b"z1,1,1")
    assert debugged.ask(b"Z2,2000,8") == b"OK"


@pytest.mark.parametrize(("kind", "key"), [(b"Z2", b"watch"), (b"Z4", b"awatch")])
def test_watchpoint_says_which_address_was_hit(debugged, kind, key):
    """F.13/7"""
    debugged.ask(b"%b,%x,8" % (kind, COUNTER))
    assert debugged.resume(b"c").startswith(b"T05%b:%x;thread:1;" % (key, COUNTER))
    assert debugged.rip == LEAF_RET


def test_unaligned_watchpoint_is_split_over_debug_registers(debugged):
    assert debugged.ask(b"Z2,2003,8") == b"OK"
    pieces = [(point.address, point.size) for point in debugged.machine.debug_registers]
    assert pieces == [(0x2003, 1), (0x2004, 4), (0x2008, 2), (0x200A, 1)]
    debugged.ask(b"z2,2003,8")
    assert debugged.ask(b"Z2,2001,7") == b"OK"


def test_what_the_debug_registers_cannot_do_is_unsupported():
    class Half(Machine):
        def hardware_access(self):
            return frozenset({Access.EXECUTE})

    debugged = Debugged(Half())
    assert debugged.ask(b"Z1,1000,1") == b"OK"
    assert debugged.ask(b"Z2,2000,8") == debugged.ask(b"Z4,2000,8") == b""


def test_breakpoint_in_read_only_memory_uses_a_debug_register_and_says_swbreak():
    """gdb ignores a hwbreak at a place where it set a software breakpoint."""
    machine = Machine(CODE.ljust(0x2000, b"\0") + b"\x90\x90\xeb\xfc")
    debugged = Debugged(machine)
    machine.registers["rip"] = 0x3000
    assert debugged.ask(b"Z0,3001,1") == b"OK"
    assert machine.debug_registers == (HardwareBreakpoint(Access.EXECUTE, 0x3001, 1),)
    assert debugged.resume(b"c").startswith(b"T05swbreak:;")
    assert debugged.resume(b"c").startswith(b"T05swbreak:;")
    assert Debugged(Plain(bytes(machine.first_memory))).ask(b"Z0,3001,1") == b"E0e"


def test_number_of_breakpoints_is_bounded(debugged):
    replies = [debugged.ask(b"Z0,%x,1" % (BASE + index)) for index in range(1100)]
    assert replies[:1024] == [b"OK"] * 1024
    assert set(replies[1024:]) == {b"E1c"}


def test_breakpoint_that_cannot_be_inserted_any_more_does_not_stop_the_others(debugged):
    debugged.ask(b"Z0,%x,1" % (BASE + SIZE - 1))
    debugged.ask(b"Z0,%x,1" % LEAF)
    del debugged.machine.memory[-0x1000:]
    offset = debugged.machine._offset

    def smaller(address, size):
        if address >= BASE + SIZE - 0x1000:
            raise TargetFault(address)
        return offset(address, size)

    debugged.machine._offset = smaller
    debugged.resume(b"c%x" % WORK)
    assert debugged.rip == LEAF


def test_a_target_may_insert_breakpoints_itself():
    class Inserting(Machine):
        def __init__(self):
            super().__init__()
            self.log = []

        def insert_breakpoint(self, address):
            self.log.append(("insert", address))

        def remove_breakpoint(self, address):
            self.log.append(("remove", address))

    debugged = Debugged(Inserting())
    debugged.ask(b"Z0,2000,1")
    assert debugged.machine.log == [("insert", 0x2000), ("remove", 0x2000)]  # tried out
    debugged.resume(b"vCont;s")
    assert debugged.machine.log[2:] == [("insert", 0x2000), ("remove", 0x2000)]


def test_restore_while_the_guest_is_not_running_loses_no_breakpoint(debugged):
    """F.13/8"""
    debugged.ask(b"Z0,%x,1" % LEAF)
    session = debugged.session
    session.handle(b"c")
    session.resume()
    session.left()  # the guest call is over
    assert debugged.machine.memory[: len(CODE)] == CODE  # what a snapshot would take
    debugged.machine.reset()  # a restore
    session.resume()
    stop = debugged.machine.run(step=False)
    assert stop is not None and session.stopped(stop)[0].startswith(b"T05swbreak")


def test_a_new_guest_call_hits_the_breakpoint_at_its_first_instruction_again(debugged):
    debugged.ask(b"Z0,%x,1" % BASE)
    debugged.resume(b"c")
    session = debugged.session
    session.handle(b"c")
    assert session.resume() is Resume.STEP  # over the breakpoint that it stands on
    session.left()
    assert session.resume() is Resume.CONTINUE
    assert debugged.machine.memory[0] == 0xCC


# --- conditions --------------------------------------------------------------------------------------

RAX_IS_7 = "260000164022071327"  # as gdb 13.1 compiles $rax == 7
RAX_IS_1000 = "26000016402303e8162013" + "27"


def condition(code: str) -> bytes:
    return b"X%x,%b" % (len(code) // 2, code.encode())


def test_condition_is_met_on_the_thousandth_pass_with_one_stop_reply(debugged):
    debugged.machine.registers["rax"] = 0
    debugged.ask(b"Z0,%x,1;%b" % (STORE, condition(RAX_IS_1000)))
    assert debugged.resume(b"c").startswith(b"T05swbreak")
    assert debugged.machine.registers["rax"] == 1000 and debugged.rip == STORE
    assert debugged.machine.runs == 1000 + 999  # one more to step over each of the 999


def test_condition_on_a_hardware_breakpoint(debugged):
    debugged.ask(b"Z1,%x,1;%b" % (STORE, condition(RAX_IS_7)))
    assert debugged.resume(b"c").startswith(b"T05hwbreak")
    assert debugged.machine.registers["rax"] == 7


@pytest.mark.parametrize("separator", [b"", b";"])
def test_any_of_several_conditions_suffices(debugged, separator):
    never = condition("220027")
    debugged.ask(b"Z0,%x,1;%b%b%b" % (STORE, never, separator, condition(RAX_IS_7)))
    debugged.resume(b"c")
    assert debugged.machine.registers["rax"] == 7


def test_number_of_conditions_is_bounded(debugged):
    """All of them are evaluated at every pass, on the guest's thread."""
    code = b";X3,220027"  # false
    assert debugged.ask(b"Z0,%x,1" % LEAF + code * 16) == b"OK"
    assert debugged.ask(b"Z0,%x,1" % LEAF + code * 17) == b"E16"


def test_setting_again_replaces_the_conditions(debugged):
    debugged.ask(b"Z0,%x,1;%b" % (STORE, condition("220027")))
    debugged.ask(b"Z0,%x,1" % STORE)
    debugged.resume(b"c")
    assert debugged.machine.registers["rax"] == 1


def test_false_condition_does_not_stop_a_range_step(debugged):
    debugged.ask(b"Z0,%x,1;%b" % (0x100F, condition("220027")))
    debugged.machine.registers["rip"] = WORK
    debugged.resume(b"vCont;r%x,%x" % (WORK, CALL_LEAF))
    assert debugged.rip == CALL_LEAF


def test_interrupt_between_false_conditions_is_reported(debugged):
    debugged.ask(b"Z0,%x,1;%b" % (STORE, condition("220027")))
    debugged.machine.registers["rip"] = STORE
    debugged.machine.interrupt()
    assert debugged.resume(b"c").startswith(b"T02")


@pytest.mark.parametrize("code", ["", "ff", "1327", "0527", "2200220005" + "27", "210000", "28" * 200])
def test_condition_that_cannot_be_evaluated_stops(debugged, code):
    debugged.ask(b"Z0,%x,1;%b" % (STORE, condition(code)))
    debugged.resume(b"c")
    assert debugged.machine.registers["rax"] == 1


MINUS_1 = "22ff1608"  # const8 0xff, ext 8
AGENT = [
    ("220122020227", 3),  # add
    ("220122020327", 2**64 - 1),  # sub wraps
    ("220322050427", 15),  # mul
    (MINUS_1 + "22020527", 0),  # -1 / 2 rounds to zero
    (MINUS_1 + "22020627", 2**63 - 1),  # unsigned
    (MINUS_1 + "22020727", 2**64 - 1),  # -1 % 2 is -1
    (MINUS_1 + "22020827", 1),
    ("220122040927", 16),  # lsh
    ("220122ff0927", 0),
    (MINUS_1 + "22040a27", 2**64 - 1),  # rsh_signed
    (MINUS_1 + "223c0b27", 15),  # rsh_unsigned
    (MINUS_1 + "22ff0b27", 0),
    ("22000e27", 1),  # log_not
    ("22050e27", 0),
    ("220c220a0f27", 8),  # bit_and
    ("220c220a1027", 14),  # bit_or
    ("220c220a1127", 6),  # bit_xor
    ("22001227", 2**64 - 1),  # bit_not
    ("220522051327", 1),  # equal
    (MINUS_1 + "22001427", 1),  # less_signed
    (MINUS_1 + "22001527", 0),  # less_unsigned
    ("22ff160827", 2**64 - 1),  # ext
    ("22ff164027", 255),
    ("22ff160027", 255),
    ("23ffff2a0827", 255),  # zero_ext
    ("2310001727", 0x48),  # ref8
    ("2310001827", 0xC748),
    ("2310001927", 0x00C0C748),
    ("23100f1a27", 0x3_E8E58948),
    ("24aabbccdd27", 0xAABBCCDD),  # const32
    ("25010203040506070827", 0x0102030405060708),
    ("26000627", 0),  # reg 6 is rbp
    ("22012000072209220727", 7),  # if_goto 7, over the push of 9
    ("2200200008220727220927", 7),  # if_goto with 0 falls through
    ("210006ffffff220927", 9),  # goto
    ("2205280227", 10),  # dup
    ("2205220629" + "27", 5),  # pop
    ("220522062b0327", 1),  # swap: 6 - 5
    ("2205220622073202" + "27", 5),  # pick 2
    ("220122022203330227", 3),  # rot: 1 2 3 -> 3 1 2; 1 + 2
]


@pytest.mark.parametrize(("code", "value"), AGENT)
def test_agent_expression(code, value):
    machine = Machine()
    registers = [machine.registers[register.name] for register in REGISTERS]
    assert evaluate(bytes.fromhex(code), registers.__getitem__, machine.read_memory) == value


@pytest.mark.parametrize(
    "code",
    ["27", "0227", "2205", "23", "2200170027", "32ff27", "2201320527", "0c000027", "30000027", "2c000027", "1b27"],
)
def test_agent_expression_that_is_wrong(code):
    assert evaluate(bytes.fromhex(code), lambda number: 0, Machine().read_memory) is None


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_agent_is_bounded_and_never_raises(code):
    def read_memory(address: int, size: int) -> bytes:
        return bytes(size)

    value = evaluate(code, lambda number: 1, read_memory)
    assert value is None or 0 <= value < 1 << 64


# --- documents, files, monitor -----------------------------------------------------------------------


def test_threads_document_is_well_formed_whatever_the_target_says(debugged):
    root = ET.fromstring(read_document(debugged, b"threads"))
    assert [(thread.get("id"), thread.text) for thread in root] == [("1", 'vcpu 0 <in "leaf">')]
    debugged.machine.thread_info = lambda: "a\x00b\udc80"
    assert ET.fromstring(read_document(debugged, b"threads"))[0].text == "a?b?"


def test_libraries_auxv_and_memory_map_documents():
    debugged = Debugged(Mapped())
    library = ET.fromstring(read_document(debugged, b"libraries"))[0]
    assert (library.get("name"), library[0].get("address")) == ("/guest/lib&more.so", "0x3000")
    assert read_document(debugged, b"auxv") == struct.pack("<4Q", 9, BASE, 0, 0)
    rows = ET.fromstring(read_document(debugged, b"memory-map"))
    assert [(row.get("type"), row.get("start"), row.get("length")) for row in rows] == [
        ("ram", "0x1000", "0x2000"),
        ("rom", "0x3000", "0x1000"),
    ]


def test_file_is_read_as_gdb_reads_it():
    content = bytes(range(256)) * 300
    debugged = Debugged(Machine(file=content))
    assert debugged.ask(b"vFile:setfs:0") == b"F0"
    assert debugged.ask(b"vFile:open:%b,0,1c0" % binascii.hexlify(b"/guest/toy.elf")) == b"F0"
    size, _, status = debugged.ask(b"vFile:fstat:0").partition(b";")
    assert size == b"F40" and len(status) == 64
    assert struct.unpack_from(">I", status, 8)[0] == 0o100444
    assert struct.unpack_from(">Q", status, 28)[0] == len(content)
    data = b""
    while True:
        count, _, part = debugged.ask(b"vFile:pread:0,ffff,%x" % len(data)).partition(b";")
        assert count == b"F%x" % len(part)
        if not part:
            break
        data += part
    assert data == content
    assert debugged.ask(b"vFile:close:0") == b"F0"
    assert debugged.ask(b"vFile:close:0") == b"F-1,9"


def test_number_of_open_files_is_bounded(debugged):
    opening = b"vFile:open:%b,0,0" % binascii.hexlify(b"/guest/toy.elf")
    assert [debugged.ask(opening) for _ in range(17)] == [b"F%x" % number for number in range(16)] + [b"F-1,18"]


def monitor(debugged: Debugged, command: str) -> str:
    *console, last = debugged.send(b"qRcmd," + binascii.hexlify(command.encode()))
    assert last == b"OK" and all(reply[:1] == b"O" for reply in console)
    return b"".join(binascii.unhexlify(reply[1:]) for reply in console).decode()


def test_monitor_help_lists_every_command(debugged):
    names = [line.split()[0] for line in monitor(debugged, "help").splitlines()]
    assert names == ["help", "trace", "phys", "layout", "echo", "fail"]
    assert monitor(debugged, "") == monitor(debugged, "help")
    assert "phys" not in monitor(Debugged(Plain()), "help")


def test_monitor_commands(debugged):
    assert monitor(debugged, "layout") == "code 0x1000\n"
    assert monitor(debugged, "echo  a b") == "a b\n"
    assert monitor(debugged, "fail") == "fail: does not work\n"
    assert monitor(debugged, "nonsense") == "nonsense: no such command; try 'monitor help'\n"
    assert monitor(debugged, "phys maybe") == "phys: on or off\n"


def test_monitor_output_is_cut_into_packets(debugged):
    text = "x" * 200_000
    debugged.machine.monitor_commands = lambda: {"long": gdb_rsp.MonitorCommand("", lambda arguments: text)}
    replies = debugged.send(b"qRcmd," + binascii.hexlify(b"long"))
    assert len(replies) > 2 and all(len(reply) <= PACKET_SIZE for reply in replies)
    assert monitor(debugged, "long") == text + "\n"


def test_monitor_trace_shows_packets_of_both_directions(debugged):
    debugged.ask(b"m1000,3")
    debugged.ask(b"X2000,%x:%b" % (500, bytes(500)))
    lines = monitor(debugged, "trace").splitlines()
    assert "<- 'm1000,3'" in lines and "-> '48c7c0'" in lines
    assert max(map(len, lines)) < 500  # long packets are shortened


# --- life cycle --------------------------------------------------------------------------------------


def test_detach_removes_all_breakpoints_and_lets_the_guest_go_on(debugged):
    debugged.ask(b"Z0,%x,1" % LEAF)
    debugged.ask(b"Z2,%x,8" % COUNTER)
    assert debugged.ask(b"D") == b"OK"
    assert debugged.session.state is State.DETACHED and not debugged.session.waiting
    assert debugged.machine.debug_registers == ()
    assert debugged.session.resume() is Resume.CONTINUE
    assert debugged.machine.memory == debugged.machine.first_memory
    assert debugged.session.stopped(Stop(Signal.SEGV)) == []  # nobody listens
    assert debugged.session.resume() is Resume.CONTINUE


def test_kill_has_no_reply_and_is_told_to_the_owner_once(debugged):
    """qiling's loop never sees it."""
    debugged.ask(b"Z0,%x,1" % LEAF)
    assert debugged.session.handle(b"k") == []
    assert debugged.session.resume() is Resume.KILL
    assert debugged.session.resume() is Resume.CONTINUE
    assert debugged.machine.memory == debugged.machine.first_memory


def test_vkill_is_answered(debugged):
    assert debugged.session.handle(b"vKill;1") == [b"OK"]
    assert debugged.session.resume() is Resume.KILL


def test_run_in_extended_mode_restarts_as_gdb_asks_for_it(debugged):
    """gdb 13.1 sends vKill, k, vRun and then R0; k and R have no reply."""
    debugged.ask(b"!")
    debugged.ask(b"s")
    assert debugged.session.handle(b"vKill;1") == [b"OK"]
    assert debugged.session.waiting  # the machine is kept for the run to come
    assert debugged.session.handle(b"k") == []
    assert debugged.ask(b"vRun;2f78;61").startswith(b"T05thread:1;")
    assert debugged.rip == BASE and debugged.machine.restarts == 1
    assert debugged.session.handle(b"R0") == []
    assert debugged.machine.restarts == 2
    assert debugged.session.state is State.STOPPED
    debugged.ask(b"s")
    assert debugged.rip == AGAIN


def test_disconnect_after_a_kill_in_extended_mode_kills(debugged):
    debugged.ask(b"!")
    debugged.session.handle(b"vKill;1")
    debugged.session.detach()
    assert debugged.session.resume() is Resume.KILL


def test_attach_after_detach_on_the_same_connection(debugged):
    debugged.ask(b"!")
    debugged.ask(b"D")
    assert debugged.ask(b"vAttach;1").startswith(b"T05")
    assert debugged.session.waiting


@pytest.mark.parametrize(("arguments", "reply"), [((0,), b"W00"), ((0x1FF,), b"Wff"), ((0, 6), b"X06")])
def test_exit_replies(debugged, arguments, reply):
    debugged.session.handle(b"c")
    debugged.session.resume()
    assert debugged.session.exited(*arguments) == [reply]
    assert debugged.session.handle(b"?") == [reply]
    assert debugged.session.handle(b"c") == [reply]
    assert debugged.session.resume() is Resume.KILL
    assert not debugged.session.waiting


def test_exit_is_not_reported_to_a_debugger_that_did_not_resume(debugged):
    assert debugged.session.exited(0) == []


def test_unknown_stops_of_a_target_that_cannot_tell_rip(debugged):
    def broken(names):
        raise TargetError("no registers")

    debugged.session.handle(b"c")
    debugged.machine.read_registers = broken
    assert debugged.session.stopped(Stop(reason=Reason.BREAKPOINT)) == [b"T05swbreak:;thread:1;"]
    assert debugged.ask(b"g") == b"E05"
    assert Debugged(debugged.machine).ask(b"?") == b"T05thread:1;"


# --- properties --------------------------------------------------------------------------------------

NAMES = sorted({packet.name for packet in gdb_rsp.PACKETS})
ARGUMENTS = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"0", b"1000,4", b"1000,4:", b",1000,1", b",1000,1;X3,220127", b"1;c:1", b"target.xml:0,10"]),
    st.text("0123456789abcdef,;:=-xX", max_size=30).map(str.encode),
)
ANY_PACKET = st.one_of(st.binary(max_size=60), st.tuples(st.sampled_from(NAMES), ARGUMENTS).map(b"".join))
SILENT = re.compile(rb"([cCsS]|vCont;|k$|R)", re.DOTALL)
CONSOLE = re.compile(rb"O([0-9a-f]{2})+", re.DOTALL)


@settings(deadline=None)
@given(st.lists(ANY_PACKET, max_size=20))
def test_exactly_one_reply_per_packet(packets):
    """QEMU's reverse handlers can send two; rr exits on a malformed packet."""
    session = Session(Machine())
    for packet in packets:
        replies = [reply for reply in session.handle(packet) if not CONSOLE.fullmatch(reply)]
        stop_reply_too = packet == b"vCtrlC" and len(replies) == 2
        assert len(replies) == 1 or stop_reply_too or (not replies and SILENT.match(packet))
        if session.state is State.RUNNING and len(packet) % 2:
            session.resume()
            session.stopped(Stop())


@settings(deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), ANY_PACKET.map(gdb_rsp.encode)), max_size=20).map(b"".join), st.data())
def test_arbitrary_bytes_through_codec_and_session_never_raise(stream, data):
    """However they are cut; whole packets are among them, or few bytes would get beyond the codec."""
    decoder, session = PacketDecoder(), Session(Machine())
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        for event in decoder.feed(stream[:cut]):
            if isinstance(event, gdb_rsp.Packet):
                session.handle(event.payload)
        stream = stream[cut:]


INSTRUCTIONS = [BASE, AGAIN, WORK, 0x100F, CALL_LEAF, AFTER_LEAF, LEAF, STORE, LEAF_RET]


class Checked(Machine):
    """A machine that checks, whenever it runs, that the right breakpoints are in memory."""

    expected: set[int] = frozenset()  # type: ignore[assignment]

    def run(self, *, step: bool, limit: int = 200) -> Stop | None:
        for address in INSTRUCTIONS:
            stepped_over = step and address == self.registers["rip"]
            is_patched = self.memory[address - BASE] == 0xCC
            assert is_patched == (address in self.expected and not stepped_over), hex(address)
        return super().run(step=step, limit=limit)


class BreakpointsAndMemory(RuleBasedStateMachine):
    """Breakpoints, writes, resumes and restores against a plain model: bytes and a set of addresses."""

    addresses = Bundle("addresses")

    @initialize()
    def start(self) -> None:
        self.debugged = Debugged(Checked())
        self.machine: Checked = self.debugged.machine  # type: ignore[assignment]
        self.machine.registers["rax"] = 0
        self.code = bytearray(self.machine.first_memory[: len(CODE)])

    @rule(target=addresses, address=st.sampled_from(INSTRUCTIONS))
    def set(self, address: int) -> int:
        assert self.debugged.ask(b"Z0,%x,1" % address) == b"OK"
        self.machine.expected = self.machine.expected | {address}
        return address

    @rule(address=addresses)
    def remove(self, address: int) -> None:
        assert self.debugged.ask(b"z0,%x,1" % address) == b"OK"
        self.machine.expected = self.machine.expected - {address}

    @rule(
        where=st.sampled_from([WORK + 1, LEAF]),
        what=st.sampled_from(["4889e5", "48ffc0"]),
        how=st.sampled_from(["M", "X", "host"]),
    )
    def write(self, where: int, what: str, how: str) -> None:
        """Put another instruction of the same size there: by either packet, or behind the debugger's back."""
        data = bytes.fromhex(what)
        self.code[where - BASE : where - BASE + 3] = data
        if how == "host":
            self.machine.memory[where - BASE : where - BASE + 3] = data
            return
        body = data if how == "X" else what.encode()
        assert self.debugged.ask(b"%b%x,3:%b" % (how.encode(), where, body)) == b"OK"

    @rule(packet=st.sampled_from([b"c", b"s", b"vCont;r100e,101a"]))
    def resume(self, packet: bytes) -> None:
        before = self.debugged.rip
        self.debugged.resume(packet)
        if packet == b"s":
            assert self.debugged.rip != before
        elif packet == b"c" and self.debugged.rip not in self.machine.expected:
            assert not self.machine.expected & set(INSTRUCTIONS[1:])  # else one of them is hit in the loop

    @rule()
    def leave_and_enter(self) -> None:
        """End a guest call and begin another, with a restore between them."""
        self.debugged.session.handle(b"c")
        self.debugged.session.resume()
        self.debugged.session.left()
        assert self.machine.memory[: len(CODE)] == self.code
        self.machine.memory[: len(CODE)] = self.code
        self.machine.registers.update(rip=BASE, rsp=STACK_TOP)
        self.debugged.session.interrupt()

    @invariant()
    def program_is_untouched(self) -> None:
        if hasattr(self, "debugged"):
            assert self.machine.memory[: len(CODE)] == self.code
            assert binascii.unhexlify(self.debugged.ask(b"m1000,%x" % len(CODE))) == self.code


BreakpointsAndMemory.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestBreakpointsAndMemory = BreakpointsAndMemory.TestCase


def test_a_guest_that_overwrites_a_breakpoint_keeps_what_it_wrote():
    machine = Machine()
    debugged = Debugged(machine)
    debugged.ask(b"Z0,%x,1" % COUNTER)  # data, as a debugger of a JIT might
    debugged.ask(b"Z0,%x,1" % LEAF_RET)
    debugged.resume(b"c")
    assert debugged.ask(b"m%x,8" % COUNTER) == b"0100000000000000"


def replies_of(debugged: Debugged, packets: list[bytes]) -> Iterator[bytes]:
    for packet in packets:
        yield from debugged.send(packet)


def test_gdbs_opening_is_answered_in_full():
    """The packets that gdb 13.1 sends to connect, in order."""
    opening = [GDB_SUPPORTED, b"vCont?", b"vMustReplyEmpty", b"QStartNoAckMode", b"!", b"Hg0"]
    opening += [b"qXfer:features:read:target.xml:0,ffb", b"qTStatus", b"?", b"qXfer:threads:read::0,1000"]
    opening += [b"qAttached", b"Hc-1", b"qOffsets", b"g", b"m1000,40", b"qSymbol::"]
    assert len(list(replies_of(Debugged(greet=False), opening))) == len(opening)
