"""The hardware-interrupt timer (acceptance.md B.16; abi.md 6.6, 8.6) and the MSR policy (features.md C.4)."""

from __future__ import annotations

import os
import select
import struct
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import rawguest
from conftest import require

import hyperlight
import kvm_abi
import memory
from hyperlight import MsrError, MultiUseSandbox, PlatformState, SandboxConfiguration, UninitializedSandbox, _Timer
from kvm_abi import Msr
from memory import UInt, ULong

TIMED = SandboxConfiguration(hardware_timer=True)


# -- the timer, without a guest -------------------------------------------------------------


@pytest.fixture
def timer() -> Iterator[_Timer]:
    """A timer whose ticks a test reads from the eventfd, instead of an interrupt controller."""
    no_vm: Any = SimpleNamespace(create_irqchip=lambda: None, irqfd=lambda fd, gsi: None)
    timer = _Timer(no_vm)
    yield timer
    timer.close()


def ticked(timer: _Timer, within_s: float) -> bool:
    return bool(select.select([timer._eventfd], [], [], within_s)[0])


@pytest.mark.parametrize(
    ("asked", "given"),
    [(1, 100), (99, 100), (100, 100), (1000, 1000), (10_000_000, 10_000_000), (2**32 - 1, 10_000_000)],
)
def test_a_period_is_clamped(asked: int, given: int) -> None:
    """B.16/259."""
    assert _Timer.clamp(asked) == given


def test_a_timer_ticks_until_it_is_set_to_nothing(timer: _Timer) -> None:
    """B.16/259: 0 stops."""
    timer.set(1)
    assert ticked(timer, 5)
    timer.set(0)
    os.eventfd_read(timer._eventfd)
    assert not ticked(timer, 0.01)
    assert threading.active_count() == 1


def test_the_first_tick_comes_after_one_period(timer: _Timer) -> None:
    begin = time.monotonic()
    timer.set(30_000)
    assert ticked(timer, 5)
    assert time.monotonic() - begin >= 0.03


def test_a_new_period_replaces_the_one_before(timer: _Timer) -> None:
    timer.set(10_000_000)
    timer.set(100)
    assert ticked(timer, 5)
    assert threading.active_count() == 2


def test_a_long_period_ends_at_once(timer: _Timer) -> None:
    timer.set(10_000_000)
    begin = time.monotonic()
    timer.stop()
    assert time.monotonic() - begin < 5


# -- the timer of a guest -------------------------------------------------------------------


@require("kvm")
@require("timer_interrupts")
def test_a_timer_of_a_millisecond_interrupts_the_guest() -> None:
    """B.16/256."""
    with UninitializedSandbox("simpleguest", TIMED).evolve() as sandbox:
        begin = time.monotonic()
        assert sandbox.call("TimerTicks", UInt(1000), 3, ULong(10_000_000)) >= 3  # several may come at once
        assert time.monotonic() - begin >= 0.003
        assert sandbox.call("Echo", "still here") == "still here"
        assert sandbox._guest.vm.platform.timer is not None
        assert sandbox._guest.vm.platform.timer._thread is None


@require("kvm")
@require("gcc")
@pytest.mark.parametrize("end", ["jmp good", "out %eax, $7"])
def test_the_timer_stops_when_the_run_ends(end: str) -> None:
    """abi.md 6.6: at the halt; and at any other end."""
    guest = rawguest.build(f"mov $100, %eax; out %eax, $107; {end}")
    with UninitializedSandbox(guest, TIMED).evolve() as sandbox:
        if end == "jmp good":
            assert sandbox.call("any") == rawguest.ANSWER
        else:
            with pytest.raises(hyperlight.InvalidPort):
                sandbox.call("any")
        assert threading.active_count() == 1


@require("kvm")
@require("gcc")
def test_a_period_of_less_than_four_bytes_is_ignored() -> None:
    """abi.md 8.6."""
    seen: list[int] = []
    guest = rawguest.build("mov $200, %eax; out %al, $107; out %ax, $107; out %eax, $107")
    with UninitializedSandbox(guest, TIMED).evolve() as sandbox:
        timer = sandbox._guest.vm.platform.timer
        assert timer is not None
        timer.set = seen.append  # type: ignore[method-assign]
        assert sandbox.call("any") == rawguest.ANSWER
    assert seen == [200]


@require("kvm")
@require("gcc")
def test_the_ports_of_a_pit_are_ignored() -> None:
    """abi.md 6.6."""
    ports = "".join(f"out %al, ${port};" for port in range(0x40, 0x44))
    with UninitializedSandbox(rawguest.build(ports), TIMED).evolve() as sandbox:
        assert sandbox.call("any") == rawguest.ANSWER
    with UninitializedSandbox(rawguest.build(ports)).evolve() as sandbox, pytest.raises(hyperlight.InvalidPort):
        sandbox.call("any")


@require("kvm")
@require("gcc")
def test_without_the_option_there_is_no_timer() -> None:
    """abi.md 8."""
    guest = rawguest.build("mov $1000, %eax; out %eax, $107")
    with UninitializedSandbox(guest).evolve() as sandbox, pytest.raises(hyperlight.InvalidPort) as caught:
        sandbox.call("any")
    assert caught.value.port == 107


def test_the_halt_port_is_no_standard_device() -> None:
    """B.16/257: PIC, PIT, keyboard and speaker, RTC, POST, DMA pages, slave PIC, COM ports."""
    devices = [range(0x20, 0x22), range(0x40, 0x44), range(0x60, 0x65), range(0x70, 0x72), range(0x80, 0x90)]
    devices += [range(0xA0, 0xA2), range(0x2F8, 0x300), range(0x3F8, 0x400)]
    for port in (hyperlight._Port.HALT, hyperlight._Port.PV_TIMER_CONFIG):
        assert not any(port in device for device in devices)


@require("kvm")
@require("gcc")
def test_hlt_waits_in_the_kernel_and_a_restore_ends_the_wait() -> None:
    """abi.md 6.6."""
    with UninitializedSandbox(rawguest.build("1: hlt; jmp 1b"), TIMED).evolve() as sandbox:
        before = sandbox.snapshot()
        for _ in range(3):
            kill = sandbox.interrupt_handle().kill
            killer = threading.Thread(target=lambda kill=kill: any(iter(kill, True)))
            killer.start()
            with pytest.raises(hyperlight.ExecutionCanceledByHost):
                sandbox.call("any")
            killer.join()
            sandbox.restore(before)
            assert sandbox.call(rawguest.GOOD) == rawguest.ANSWER


@require("kvm")
@require("gcc")
def test_a_restore_puts_the_interrupt_controllers_back() -> None:
    mask = "mov $0x5a, %al; out %al, $0x21; in $0x21, %al; cmp $0x5a, %al; jne fail"
    guest = rawguest.build(f"in $0x21, %al; cmp $0x5a, %al; je fail; {mask}; jmp good; fail: ud2")
    with UninitializedSandbox(guest, TIMED).evolve() as sandbox:
        before = sandbox.snapshot()
        for _ in range(2):
            assert sandbox.call("any") == rawguest.ANSWER
            sandbox.restore(before)
        sandbox.call("any")
        after = sandbox.snapshot()
        sandbox.restore(before)
        sandbox.restore(after)
        with pytest.raises(hyperlight.GuestFailure):
            sandbox.call("any")
        with MultiUseSandbox.from_snapshot(after, config=TIMED) as other, pytest.raises(hyperlight.GuestFailure):
            other.call("any")


@require("kvm")
def test_a_snapshot_with_a_timer_needs_a_sandbox_with_one() -> None:
    guest = "simpleguest"
    with UninitializedSandbox(guest, TIMED).evolve() as timed, UninitializedSandbox(guest).evolve() as plain:
        snapshot = timed.snapshot()
        with pytest.raises(hyperlight.SnapshotMismatch, match=r"hardware_timer=True"):
            plain.restore(snapshot)
        assert plain.call("Echo", "untouched") == "untouched"
        with pytest.raises(hyperlight.SnapshotMismatch):
            MultiUseSandbox.from_snapshot(snapshot)
        timed.restore(plain.snapshot())
        assert timed.call("Echo", "fits") == "fits"


@require("kvm")
@require("gcc")
def test_setting_the_timer_without_end_leaves_one_thread(no_leaks: None) -> None:
    storm = "mov $300, %ecx; 1: mov $100, %eax; out %eax, $107; loop 1b"
    with UninitializedSandbox(rawguest.build(storm), TIMED).evolve() as sandbox:
        assert sandbox.call("any") == rawguest.ANSWER


# -- model-specific registers ---------------------------------------------------------------


def accessing(code: str) -> bytes:
    """Return a guest that runs *code* and answers with the ULong in EDX:EAX."""
    mark = 0x1122_3344_5566_7788
    answer = rawguest.stack_with(memory.encode_return_value(memory.ReturnType.ULong, mark))
    place = answer.index(struct.pack("<Q", mark))
    return rawguest.build(
        f"""
        {code}
        mov %eax, result+{place}(%rip)
        mov %edx, result+{place + 4}(%rip)
        say result, 108
        """,
        result=answer,
    )


def read_msr(index: int) -> bytes:
    return accessing(f"mov ${index:#x}, %ecx; rdmsr")


def increment_msr(index: int) -> bytes:
    return accessing(f"mov ${index:#x}, %ecx; rdmsr; inc %eax; wrmsr")


LSTAR = int(Msr.LSTAR)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (range(17), "has 17 registers; a guest can have at most 16"),
        ((-1,), "a number of 32 bits, not -1"),
        ((1 << 32,), "a number of 32 bits"),
        (("LSTAR",), "a number of 32 bits, not 'LSTAR'"),
        ((0x802,), "0x802 belongs to the x2APIC"),
    ],
)
def test_impossible_msrs_are_refused(indices: Any, message: str) -> None:
    """features.md C.4: capacity."""
    with pytest.raises(MsrError, match=message):
        SandboxConfiguration(guest_msrs=indices)


def test_a_filter_allows_exactly_what_was_asked_for() -> None:
    allowed = (0, 1, 64, 0x2FFF, 0x3000, 0xC0000082, 0xC0000100, 0xFFFFFFFF)
    found = []
    for entry in hyperlight._msr_filter(allowed).ranges:
        assert entry.nmsrs <= 0x3000
        found += [entry.base + bit for bit in range(entry.nmsrs) if entry.bitmap[bit // 8] >> bit % 8 & 1]
    assert found == [*allowed]


def test_msrs_that_no_filter_can_hold_are_refused() -> None:
    with pytest.raises(MsrError, match="too far apart"):
        hyperlight._msr_filter(tuple(index << 16 for index in range(17)))


def test_msrs_are_normalised() -> None:
    assert SandboxConfiguration(guest_msrs=[LSTAR, LSTAR, 0x10]).guest_msrs == (LSTAR, 0x10)
    assert SandboxConfiguration().guest_msrs == ()
    assert SandboxConfiguration(guest_msrs=None).guest_msrs is None


@require("kvm")
@require("msr_filter")
@require("gcc")
@pytest.mark.parametrize(("access", "index"), [(read_msr, LSTAR), (increment_msr, LSTAR), (read_msr, Msr.IA32_TSC)])
def test_an_undeclared_msr_faults_in_the_guest(
    access: Callable[[int], bytes], index: int, caplog: pytest.LogCaptureFixture
) -> None:
    """features.md C.4. A raw guest has no IDT: its fault is a triple fault."""
    with UninitializedSandbox(access(index), SandboxConfiguration(guest_msrs=(Msr.CSTAR,))).evolve() as sandbox:
        before = sandbox.snapshot()
        for _ in range(2):
            with pytest.raises(hyperlight.UnexpectedVmExit, match="SHUTDOWN"):
                sandbox.call("any")
            sandbox.restore(before)
        assert sandbox.call(rawguest.GOOD) == rawguest.ANSWER
    (record,) = [each for each in caplog.records if "MSR" in each.message]
    assert f"the guest may not touch MSR {index:#x}" in record.message and f"guest_msrs=({index:#x}" in record.message


@require("kvm")
@require("msr_filter")
@require("gcc")
def test_no_msr_is_the_guests_by_default() -> None:
    with UninitializedSandbox(read_msr(LSTAR)).evolve() as sandbox, pytest.raises(hyperlight.UnexpectedVmExit):
        sandbox.call("any")


@require("kvm")
@require("msr_filter")
@require("gcc")
def test_a_declared_msr_is_captured_and_restored() -> None:
    """features.md C.4."""
    with UninitializedSandbox(increment_msr(LSTAR), SandboxConfiguration(guest_msrs=(LSTAR,))).evolve() as sandbox:
        zero = sandbox.snapshot()
        assert [sandbox.call("any") for _ in range(2)] == [1, 2]
        two = sandbox.snapshot()
        assert two.platform.msrs[LSTAR] == 2
        assert sandbox.call("any") == 3
        sandbox.restore(two)
        assert sandbox.call("any") == 3
        sandbox.restore(zero)
        assert sandbox.call("any") == 1
    with MultiUseSandbox.from_snapshot(two, config=SandboxConfiguration(guest_msrs=(LSTAR,))) as other:
        assert other.call("any") == 3


@require("kvm")
@require("msr_filter")
@require("gcc")
def test_a_snapshot_without_the_msr_gives_it_its_first_value() -> None:
    """features.md C.4: every other MSR goes back to what it was when the VM was made."""
    guest = increment_msr(LSTAR)
    with UninitializedSandbox(guest).evolve() as plain:
        snapshot = plain.snapshot()
    with UninitializedSandbox(guest, SandboxConfiguration(guest_msrs=(LSTAR,))).evolve() as sandbox:
        assert [sandbox.call("any") for _ in range(2)] == [1, 2]
        sandbox.restore(snapshot)
        assert sandbox.call("any") == 1


@require("kvm")
@require("gcc")
def test_what_swapgs_leaves_behind_does_not_survive_a_restore() -> None:
    """features.md C.4: KERNEL_GS_BASE is always captured."""
    exchange = "mov $0xC0000101, %ecx; swapgs; rdmsr; mov %eax, %ebx; mov $0x1234, %eax; wrmsr; swapgs; mov %ebx, %eax"
    with UninitializedSandbox(accessing(exchange)).evolve() as sandbox:
        before = sandbox.snapshot()
        assert [sandbox.call("any") for _ in range(2)] == [0, 0x1234]
        sandbox.restore(before)
        assert sandbox.call("any") == 0


@require("kvm")
@require("gcc")
def test_without_a_filter_msrs_are_as_in_release_0_14() -> None:
    """abi.md 6.1: they may be changed, and are not reset."""
    with UninitializedSandbox(increment_msr(LSTAR), SandboxConfiguration(guest_msrs=None)).evolve() as sandbox:
        before = sandbox.snapshot()
        assert sandbox.call("any") == 1
        sandbox.restore(before)
        assert sandbox.call("any") == 2


@require("kvm")
def test_a_snapshots_msrs_must_be_declared() -> None:
    """features.md C.4: its content is not trusted; refused before anything is touched."""
    guest, config = "simpleguest", SandboxConfiguration(guest_msrs=(LSTAR,))
    with UninitializedSandbox(guest, config).evolve() as declared, UninitializedSandbox(guest).evolve() as plain:
        snapshot = declared.snapshot()
        plain.call("SetStatic", 7)
        with pytest.raises(hyperlight.SnapshotMismatch, match=r"MSR 0xc0000082, which guest_msrs does not name"):
            plain.restore(snapshot)
        assert plain.call("GetStatic") == 7
        with pytest.raises(hyperlight.SnapshotMismatch):
            MultiUseSandbox.from_snapshot(snapshot)


@require("kvm")
@require("msr_filter")
def test_an_msr_that_kvm_does_not_have_is_a_clear_error(no_leaks: None) -> None:
    with pytest.raises(MsrError, match=r"this KVM does not have all of guest_msrs: .*0x12345"):
        UninitializedSandbox("simpleguest", SandboxConfiguration(guest_msrs=(0x12345,))).evolve()


@require("kvm")
def test_a_kvm_without_a_filter_cannot_allow_some(monkeypatch: pytest.MonkeyPatch) -> None:
    known = kvm_abi.Kvm.check_extension
    monkeypatch.setattr(
        kvm_abi.Kvm, "check_extension", lambda kvm, cap: 0 if cap == kvm_abi.Cap.X86_MSR_FILTER else known(kvm, cap)
    )
    monkeypatch.setattr(hyperlight, "_kvm_features", hyperlight._kvm_features.__wrapped__)
    with pytest.raises(MsrError, match="needs a KVM with a filter for MSRs"):
        UninitializedSandbox("simpleguest", SandboxConfiguration(guest_msrs=(LSTAR,))).evolve()
    with UninitializedSandbox("simpleguest").evolve() as sandbox:
        assert sandbox.call("Echo", "unfiltered") == "unfiltered"


@require("kvm")
def test_a_restore_that_fails_at_an_msr_leaves_the_sandbox_poisoned() -> None:
    """features.md C.4."""
    with UninitializedSandbox("simpleguest").evolve() as sandbox:
        good = sandbox.snapshot()
        state = PlatformState({int(Msr.KERNEL_GS_BASE): 0x8000_0000_0000_0000})  # not canonical
        bad = hyperlight.dataclasses.replace(good, platform=state)
        with pytest.raises(hyperlight.KvmError, match="KVM_SET_MSRS"):
            sandbox.restore(bad)
        assert sandbox.poisoned
        sandbox.restore(good)
        assert sandbox.call("Echo", "again") == "again"
