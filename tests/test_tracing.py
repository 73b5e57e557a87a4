"""Tracing and memory profile: what a guest reports through registers and ports (acceptance.md B.17; abi.md 15)."""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rawguest
from conftest import require
from hypothesis import given
from hypothesis import strategies as st

import hyperlight
import kvm_abi
import memory
from hyperlight import (
    MemoryEvent,
    MemoryProfile,
    MultiUseSandbox,
    SandboxConfiguration,
    TraceRecord,
    TraceRecorder,
    UninitializedSandbox,
    _Tracer,
)
from memory import (
    BASE_ADDRESS,
    PAGE_SIZE,
    CloseSpan,
    EditSpan,
    GuestStart,
    KeyValue,
    LogEvent,
    MemoryRegionFlags,
    OpenSpan,
    SharedMemory,
    ULong,
)

RW = MemoryRegionFlags.READ | MemoryRegionFlags.WRITE


def batch_of(*events: memory.TraceEvent) -> bytes:
    return b"".join(map(memory.encode_trace_event, events))


# -- spans from events, without a guest -----------------------------------------------------

MHZ = 1000
"""kHz: a tick of the guest's clock is a microsecond."""
GVA = 0x5000


class Machine:
    """A tracer, a vCPU that is none, and a page of memory for batches."""

    def __init__(self, tsc_khz: int = MHZ) -> None:
        self.records: list[TraceRecord] = []
        self.regs = SimpleNamespace(r8=0, r9=0, r10=0)
        self.kvm_run = kvm_abi.kvm_run(exit_reason=kvm_abi.KvmExit.IO)
        self.kvm_run.io.port = 108
        self.ram = SharedMemory.anonymous(16 * PAGE_SIZE)
        self.physical = memory.GuestMemory()
        self.physical.add(0x1000, self.ram, RW)
        tables = memory.PageTableBuilder(0x1000)
        tables.map(GVA, 0x9000, 2 * PAGE_SIZE, writable=True, executable=False)
        self.ram.write(0, tables.to_bytes())
        vcpu: Any = SimpleNamespace(
            run=lambda: 0,
            kvm_run=self.kvm_run,
            get_regs=lambda: self.regs,
            get_sregs=lambda: SimpleNamespace(cr3=0x1000),
            get_tsc_khz=lambda: tsc_khz,
        )
        self.tracer = _Tracer(self.records.append, vcpu)
        self.tracer.entered()

    def exit_with(self, *events: memory.TraceEvent) -> None:
        self.exit_with_bytes(batch_of(*events))

    def exit_with_bytes(self, data: bytes, **registers: int) -> None:
        self.ram.write(0x8000, data)
        self.regs.__dict__.update(r8=104, r9=GVA, r10=len(data))
        self.regs.__dict__.update(registers)
        self.tracer.run(self.physical)

    def spans(self) -> list[TraceRecord]:
        return [record for record in self.records if record.category == "guest"]

    def events(self) -> list[TraceRecord]:
        return [record for record in self.records if record.category == "guest-event"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose host's clock advances a second each time somebody looks."""
    clock = itertools.count(0, 1_000_000_000)
    monkeypatch.setattr(hyperlight.time, "perf_counter_ns", lambda: next(clock))
    return Machine()


def test_without_a_batch_only_the_exit_is_reported(machine: Machine) -> None:
    """B.17/265: creation."""
    machine.regs.r8 = 103
    machine.tracer.run(machine.physical)
    machine.tracer.left("Function")
    assert [(record.category, record.name) for record in machine.records] == [
        ("vcpu", "KVM_RUN"),
        ("call-to-guest", "Function"),
    ]
    assert machine.records[0].fields == {"exit": "port HALT"}


def test_a_batch_of_the_start_alone_reports_nothing(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    """B.17/265: empty batch."""
    machine.exit_with(GuestStart(1000))
    assert machine.spans() == machine.events() == []
    assert caplog.records == []


def test_a_closed_span_has_the_times_that_the_guest_saw(machine: Machine) -> None:
    """B.17/265: closed span; entry is at second 0, a tick a microsecond."""
    fields = (KeyValue("key", "value"),)
    machine.exit_with(GuestStart(5000), OpenSpan(1, None, "work", "module", 5100, fields), CloseSpan(1, 5350))
    sandbox = machine.records[0].sandbox
    expected = TraceRecord("guest", "work", 100_000, 350_000, {"target": "module", "key": "value"}, sandbox, 1, 0)
    assert machine.spans() == [expected]


def test_an_open_span_ends_with_the_run(machine: Machine) -> None:
    """B.17/265: single open span."""
    machine.exit_with(GuestStart(0), OpenSpan(1, None, "work", "t", 100))
    assert machine.spans() == []
    machine.tracer.left("Function")
    (span,) = machine.spans()
    assert span.begin_ns == 100_000 and span.end_ns is not None and span.end_ns > 100_000
    assert span.fields["unfinished"] == "true"


def test_a_span_may_close_at_a_later_exit(machine: Machine) -> None:
    machine.exit_with(GuestStart(0), OpenSpan(7, None, "work", "t", 100))
    machine.exit_with(CloseSpan(7, 200))
    (span,) = machine.spans()
    assert (span.begin_ns, span.end_ns, span.fields) == (100_000, 200_000, {"target": "t"})


def test_events_belong_to_their_span(machine: Machine) -> None:
    """B.17/265: span with event."""
    event = LogEvent(1, "happened", 150, (KeyValue("k", "v"),))
    machine.exit_with(GuestStart(0), OpenSpan(1, None, "work", "t", 100), event, CloseSpan(1, 200))
    (record,) = machine.events()
    assert record[:5] == ("guest-event", "happened", 150_000, None, {"k": "v"})
    assert (record.id, record.parent) == (0, 1)


@pytest.mark.parametrize("closed", [(), (2,), (2, 1)])
def test_children_name_their_parent_however_many_are_closed(closed: Sequence[int], machine: Machine) -> None:
    """B.17/265: parent/child; closed parent/child; partially closed."""
    machine.exit_with(
        GuestStart(0),
        OpenSpan(1, None, "parent", "t", 100),
        OpenSpan(2, 1, "child", "t", 110),
        *(CloseSpan(number, 200) for number in closed),
    )
    assert [span.id for span in machine.spans()] == list(closed)
    machine.tracer.left("Function")
    assert [(span.id, span.parent, "unfinished" in span.fields) for span in machine.spans()] == [
        (2, 1, 2 not in closed),
        (1, 0, 1 not in closed),
    ]


def test_fields_can_be_added_to_an_open_span(machine: Machine) -> None:
    edit = EditSpan(1, (KeyValue("b", "2"), KeyValue("a", "3")))
    start = OpenSpan(1, None, "work", "t", 0, (KeyValue("a", "1"),))
    machine.exit_with(GuestStart(0), start, edit, CloseSpan(1, 1))
    assert machine.spans()[0].fields == {"target": "t", "a": "3", "b": "2"}


@pytest.mark.parametrize("event", [OpenSpan(1, None, "early", "t", 5), LogEvent(0, "early", 5)])
def test_what_comes_before_the_start_has_no_time(
    event: memory.TraceEvent, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    """B.17/265: span before GuestStart; and the start of the run before does not count."""
    machine.exit_with(event)
    machine.exit_with(GuestStart(0))
    machine.tracer.entered()
    machine.exit_with(event)
    assert machine.events() == [] and caplog.text.count("an event came before GuestStart") == 2
    machine.exit_with(GuestStart(0), event)
    machine.tracer.left("Function")
    assert len(machine.events() + machine.spans()) == 1


def test_times_are_measured_from_the_entry(machine: Machine) -> None:
    """B.17/265: wall start."""
    machine.tracer.entered()  # the clock's next look: a later second
    machine.exit_with(GuestStart(50), LogEvent(0, "e", 51))
    assert machine.events()[0].begin_ns % 1_000_000_000 == 1000
    assert machine.events()[0].begin_ns > 1_000_000_000


def test_where_kvm_does_not_know_the_frequency_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """B.17/265: time needs the TSC's frequency."""
    monkeypatch.setattr(hyperlight, "_measured_tsc_khz", lambda vcpu: 2 * MHZ)
    machine = Machine(tsc_khz=0)
    machine.exit_with(GuestStart(0), LogEvent(0, "a", 0), LogEvent(0, "b", 20))
    a, b = machine.events()
    assert b.begin_ns - a.begin_ns == 10_000


@pytest.mark.parametrize("tsc", [0, 1, 2**63, 2**64 - 1])
def test_times_stay_between_the_entry_and_now(tsc: int, machine: Machine) -> None:
    machine.exit_with(GuestStart(1 << 40), OpenSpan(1, None, "s", "t", tsc), CloseSpan(1, 0), LogEvent(0, "e", tsc))
    (span,), (event,) = machine.spans(), machine.events()
    assert span.end_ns is not None
    assert 0 <= span.begin_ns <= span.end_ns <= 60_000_000_000 and 0 <= event.begin_ns <= 60_000_000_000


def test_spans_that_are_not_open_are_only_mentioned(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    machine.exit_with(GuestStart(0), CloseSpan(5, 1), EditSpan(6, ()))
    assert "span 5, which is not open" in caplog.text and "span 6, which is not open" in caplog.text


@pytest.mark.parametrize(
    "registers", [{"r10": 0}, {"r10": 4097}, {"r10": 2**64 - 1}, {"r9": 0}, {"r9": 2**47}, {"r9": 2**64 - 1}, {"r9": GVA + 0x1FFF}]
)
def test_registers_that_lead_nowhere_are_only_mentioned(
    registers: dict[str, int], machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.exit_with_bytes(batch_of(GuestStart(0), LogEvent(0, "e", 1)), **registers)
    assert machine.events() == [] and len(caplog.records) == 1
    assert "the guest's trace data is left out" in caplog.text


CUT_BATCHES = st.integers(0, 100).map(lambda size: batch_of(GuestStart(0), OpenSpan(1, None, "a", "b", 3))[:size])


@given(st.binary(max_size=200) | CUT_BATCHES)
def test_no_batch_can_fail_a_run(data: bytes) -> None:
    """B.17/265-266."""
    machine = Machine()
    machine.exit_with_bytes(data)
    machine.tracer.left("Function")
    assert machine.records[0].category == "vcpu"


def test_open_spans_and_fields_are_limited(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    many = tuple(KeyValue(str(number), "") for number in range(100))
    machine.exit_with(GuestStart(0), OpenSpan(1, None, "s", "t", 0, many))
    machine.exit_with(EditSpan(1, many))
    for number in range(2, _Tracer.MAX_OPEN + 10):
        machine.exit_with(OpenSpan(number, None, "s", "t", 0))
    assert caplog.text.count("is left out") == 9
    machine.tracer.left("Function")
    assert len(machine.spans()) == _Tracer.MAX_OPEN
    assert max(len(span.fields) for span in machine.spans()) <= _Tracer.MAX_FIELDS + 2


def test_text_of_open_spans_is_limited(machine: Machine, caplog: pytest.LogCaptureFixture) -> None:
    """However a guest spreads it over spans and fields; and what is closed counts no more."""
    long = "x" * 3000
    machine.exit_with(GuestStart(0))
    for number in range(1, 401):
        machine.exit_with(OpenSpan(number, None, "s", "t", 0))
        machine.exit_with(EditSpan(number, (KeyValue("k", long),)))
    assert caplog.text.count("fields of the guest's span") == 400 - _Tracer.MAX_OPEN_TEXT // 3003
    machine.exit_with(OpenSpan(1000, None, long, "t", 0))
    assert "the guest's span 1000" in caplog.text
    machine.exit_with(CloseSpan(1, 0), OpenSpan(2000, None, long[:2900], "t", 0))
    assert "the guest's span 2000" not in caplog.text
    machine.tracer.left("Function")
    assert sum(len(field) for span in machine.spans() for field in span.fields.values()) < _Tracer.MAX_OPEN_TEXT + 10_000
    machine.exit_with(GuestStart(0), OpenSpan(3000, None, long, "t", 0))
    assert "the guest's span 3000" not in caplog.text


def test_a_callback_that_fails_does_not_fail_the_run(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine()
    machine.tracer._callback = lambda record: 1 / 0
    machine.exit_with(GuestStart(0), LogEvent(0, "e", 0))
    machine.tracer.left("Function")
    assert caplog.text.count("ZeroDivisionError") == 3


# -- real sandboxes -------------------------------------------------------------------------


@require("kvm")
def test_a_trace_of_an_ordinary_guest_shows_calls_host_calls_and_exits(tmp_path: Path) -> None:
    recorder = TraceRecorder()
    uninitialized = UninitializedSandbox("simpleguest", SandboxConfiguration(trace=recorder))
    uninitialized.register("HostAdd", lambda a, b: a + b)
    with uninitialized.evolve() as sandbox:
        recorder.records.clear()
        assert sandbox.call("Add", 1, 2) == 3
    assert [(record.category, record.name) for record in recorder.records] == [
        ("vcpu", "KVM_RUN"),
        ("call-to-host", "HostAdd"),
        ("vcpu", "KVM_RUN"),
        ("call-to-guest", "Add"),
    ]
    first, host, second, call = recorder.records
    assert (first.fields["exit"], second.fields["exit"]) == ("port CALL_FUNCTION", "port HALT")
    times = [call.begin_ns, first.begin_ns, first.end_ns, host.begin_ns, host.end_ns, second.begin_ns, second.end_ns]
    assert times == sorted(times) and call.end_ns is not None and call.end_ns >= second.end_ns

    recorder.write_chrome_trace(tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert [(event["name"], event["cat"]) for event in spans] == [(each.name, each.category) for each in recorder.records]
    assert spans[3]["ts"] <= spans[1]["ts"] and spans[1]["ts"] + spans[1]["dur"] <= spans[3]["ts"] + spans[3]["dur"]
    assert {event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"} == {
        f"sandbox {call.sandbox}",
        f"sandbox {call.sandbox}, the guest's spans",
    }


@require("kvm")
def test_a_failed_call_ends_its_span() -> None:
    recorder = TraceRecorder()
    with UninitializedSandbox("simpleguest", SandboxConfiguration(trace=recorder)).evolve() as sandbox:
        with pytest.raises(hyperlight.GuestAborted):
            sandbox.call("TriggerException")
    assert recorder.records[-1][:2] == ("call-to-guest", "TriggerException")


@require("kvm")
def test_sandboxes_are_told_apart() -> None:
    recorder = TraceRecorder()
    config = SandboxConfiguration(trace=recorder)
    with UninitializedSandbox("simpleguest", config).evolve(), UninitializedSandbox("simpleguest", config).evolve():
        pass
    assert len({record.sandbox for record in recorder.records}) == 2


def test_a_recorder_has_a_limit(tmp_path: Path) -> None:
    recorder = TraceRecorder(max_records=3)
    for number in range(5):
        recorder(TraceRecord("vcpu", str(number), 0, 1, {}, 1))
    recorder.write_chrome_trace(tmp_path / "trace.json")
    assert [record.name for record in recorder.records] == ["0", "1", "2"]
    assert json.loads((tmp_path / "trace.json").read_text())["otherData"] == {"dropped": "2"}


def test_a_recorder_has_a_limit_of_text() -> None:
    recorder = TraceRecorder(max_text=100)
    for size in (50, 60, 30):
        recorder(TraceRecord("guest", "n" * 10, 0, 1, {"k" * (size - 20): "v" * 10}, 1))
    assert [record.fields for record in recorder.records] == [{"k" * 30: "v" * 10}, {"k" * 10: "v" * 10}]
    assert recorder.dropped == 1


def tracing_guest(turns: int) -> bytes:
    """Return a guest that reports a span around an empty loop of so many turns, flushed by port 104."""
    marks = start, opened, closed = 0x1111_2222_3333_4444, 0x5555_6666_7777_8888, 0x1999_AAAA_BBBB_CCCC
    data = batch_of(GuestStart(start), OpenSpan(1, None, "loop", "raw", opened), CloseSpan(1, closed))
    stamps = [
        f"rdtsc; shl $32, %rdx; or %rdx, %rax; mov %rax, batch+{data.index(struct.pack('<Q', mark))}(%rip)"
        for mark in marks
    ]
    return rawguest.build(
        f"""
        {stamps[0]}
        {stamps[1]}
        mov ${turns}, %ecx
        1: loop 1b
        {stamps[2]}
        mov $104, %r8d
        lea batch(%rip), %r9
        mov ${len(data)}, %r10d
        out %al, $104
        xor %r8d, %r8d
        """,
        batch=data,
    )


@require("kvm")
@require("gcc")
def test_a_guests_own_span_lies_inside_the_run_that_it_measured() -> None:
    """abi.md 15.1, with the processor's time stamps."""
    recorder = TraceRecorder()
    with UninitializedSandbox(tracing_guest(20_000), SandboxConfiguration(trace=recorder)).evolve() as sandbox:
        recorder.records.clear()
        assert sandbox.call("any") == rawguest.ANSWER
    (span,) = [record for record in recorder.records if record.category == "guest"]
    run = recorder.records[0]
    assert run.fields["exit"] == "port TRACE_BATCH"
    assert run.end_ns is not None and span.end_ns is not None
    assert run.begin_ns <= span.begin_ns <= span.end_ns
    # GuestStart is a moment after the entry from which it counts: the span may end that moment late, or less early
    assert span.end_ns - span.begin_ns <= run.end_ns - run.begin_ns
    assert span.end_ns - span.begin_ns > (run.end_ns - run.begin_ns) / 100


@require("kvm")
@require("gcc")
def test_nobody_traces_the_port_is_invalid() -> None:
    """abi.md 8: as on a host without the feature."""
    with UninitializedSandbox(tracing_guest(1)).evolve() as sandbox, pytest.raises(hyperlight.InvalidPort) as caught:
        sandbox.call("any")
    assert caught.value.port == 104


@require("kvm")
def test_the_measured_frequency_is_that_of_kvm() -> None:
    with UninitializedSandbox("simpleguest").evolve() as sandbox:
        vcpu = sandbox._guest.vm.vcpu
        assert hyperlight._measured_tsc_khz(vcpu, 0.05) == pytest.approx(vcpu.get_tsc_khz(), rel=0.2)


# -- the host's view of guest-virtual memory ------------------------------------------------


@pytest.fixture(scope="module")
def reader() -> Iterator[MultiUseSandbox]:
    """A guest with two megabytes of heap to look at."""
    config = SandboxConfiguration(heap_size=2 << 20, scratch_size=1 << 20)
    with UninitializedSandbox("simpleguest", config).evolve() as sandbox:
        yield sandbox


@require("kvm")
@pytest.mark.parametrize(
    ("offset", "size"),
    [
        pytest.param(0x100, 128, id="single page"),  # B.17/260
        pytest.param(0, PAGE_SIZE, id="full page"),  # B.17/261
        pytest.param(0x123, PAGE_SIZE + 1, id="unaligned, across pages"),  # B.17/262
        pytest.param(0, 2 * PAGE_SIZE, id="two full pages"),  # B.17/263
        pytest.param(PAGE_SIZE - 100, 200, id="across a page's end"),  # B.17/264
    ],
)
def test_the_hosts_walk_sees_what_the_guest_sees(offset: int, size: int, reader: MultiUseSandbox) -> None:
    guest = reader._guest
    cr3, pattern = guest.vm.vcpu.get_sregs().cr3, bytes(range(1, 252)) * 40
    heap = reader.layout.heap_gpa + (1 << 20)
    guest.physical.write_virt(cr3, heap, pattern)
    privilege = guest.snapshot.elf.privilege
    runtime = BASE_ADDRESS + privilege.kernel_offset + privilege.kernel_size
    for base in (runtime, heap):
        seen = reader.call("ReadMemory", ULong(base + offset), ULong(size), returns=bytes)
        assert guest.physical.read_virt(cr3, base + offset, size) == seen
    assert seen == pattern[offset : offset + size]


# -- memory profile -------------------------------------------------------------------------


def profiled(*events: MemoryEvent) -> MemoryProfile:
    profile = MemoryProfile()
    for event in events:
        profile(event)
    return profile


def test_the_profile_adds_up_by_call_site() -> None:
    profile = profiled(
        MemoryEvent("alloc", 0x100, 10, (0x1, 0xA000)),
        MemoryEvent("alloc", 0x200, 20, (0x1, 0xB000, 0xC000)),
        MemoryEvent("alloc", 0x300, 30, (0x1, 0xA000)),
        MemoryEvent("free", 0x100, 10, (0x1,)),
        MemoryEvent("alloc", 0x400, 5, (0x1,)),
    )
    assert (profile.live_bytes, profile.peak_bytes) == (55, 60)
    assert {site: (each.live_bytes, each.live_count, each.total_count) for site, each in profile.sites.items()} == {
        0xA000: (30, 1, 2),
        0xB000: (20, 1, 1),
        0x1: (5, 1, 1),
    }
    first, largest, *_ = profile.report().splitlines()
    assert first == "55 bytes live, 60 at the peak, 0 blocks untracked"
    assert largest.split() == ["30", "bytes", "in", "1", "of", "2", "blocks", "0xa000"]


def test_the_report_names_functions() -> None:
    elf = UninitializedSandbox("simpleguest").snapshot().elf
    symbol = next(each for each in elf.symbols() if each.name == "hl_runtime_dispatch")
    profile = profiled(MemoryEvent("alloc", 1, 8, (0x1, memory.BASE_ADDRESS + symbol.offset + 3)))
    assert "(hl_runtime_dispatch+0x3)" in profile.report(elf)


def test_frees_of_unknown_blocks_and_reused_addresses_do_not_confuse_it() -> None:
    profile = profiled(
        MemoryEvent("free", 0x100, 10, ()),
        MemoryEvent("alloc", 0x100, 10, ()),
        MemoryEvent("alloc", 0x100, 7, ()),
        MemoryEvent("free", 0x100, 99, ()),
        MemoryEvent("free", 0x100, 99, ()),
    )
    assert (profile.live_bytes, profile.peak_bytes) == (0, 10)


def test_the_profile_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryProfile, "MAX_TRACKED", 10)
    profile = profiled(*(MemoryEvent("alloc", number, 1, (number,)) for number in range(15)))
    assert (profile.live_bytes, profile.untracked, len(profile.sites)) == (10, 5, 10)


CALLS_MALLOC = """
        call outer
        jmp good
outer:  push %rbp
        mov %rsp, %rbp
        call inner
        pop %rbp
        ret
inner:  push %rbp
        mov %rsp, %rbp
        mov $0x30, %eax
        mov $0x7000, %ecx
        out %al, $105
        mov $0x30, %eax
        mov $0x7000, %ecx
        out %al, $106
        pop %rbp
        ret
"""


@require("kvm")
@require("gcc")
def test_allocations_come_with_the_way_to_them() -> None:
    """abi.md 15.2."""
    events: list[MemoryEvent] = []
    with UninitializedSandbox(
        rawguest.build(CALLS_MALLOC), SandboxConfiguration(memory_profile=events.append)
    ).evolve() as sandbox:
        assert sandbox.call("any") == rawguest.ANSWER
        code = sandbox._guest.physical
        for event in events:
            inside, *callers = event.stack
            assert b"\xe6" in code.read_phys(inside - 2, 4)  # at the OUT or behind it
            assert len(callers) == 2
            for caller in callers:
                assert code.read_phys(caller - 5, 1) == b"\xe8"  # behind a call
    assert [event[:3] for event in events] == [("alloc", 0x7000, 0x30), ("free", 0x7000, 0x30)]


@require("kvm")
@require("gcc")
@pytest.mark.parametrize(
    "frame", ["mov $0x700000000000, %rbp", "mov $-1, %rbp", "lea here(%rip), %rbp; mov %rbp, (%rbp); mov %rbp, 8(%rbp)"]
)
def test_a_chain_of_frames_that_leads_nowhere_ends(frame: str) -> None:
    """A wild pointer, the end of the world, a frame that is its own caller."""
    events: list[MemoryEvent] = []
    guest = rawguest.build(f"{frame}; out %al, $105; jmp good; .balign 16; here: .quad 0, 0")
    with UninitializedSandbox(guest, SandboxConfiguration(memory_profile=events.append)).evolve() as sandbox:
        assert sandbox.call("any") == rawguest.ANSWER
    assert len(events[0].stack) == (2 if "here" in frame else 1)


@require("kvm")
@require("gcc")
def test_nobody_profiles_the_port_is_invalid() -> None:
    with UninitializedSandbox(rawguest.build("out %al, $105")).evolve() as sandbox:
        with pytest.raises(hyperlight.InvalidPort):
            sandbox.call("any")
