"""The handles of kvm_abi.py on the real /dev/kvm: small guests of a few bytes, run to each kind of exit.

The guests are 16-bit real-mode code at guest-physical 0x1000, because that needs no tables and runs on every
KVM, and a 64-bit one where paging matters.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import inspect
import mmap
import os
import signal
import struct
import textwrap
import threading
from collections.abc import Iterator

import pytest
from conftest import require

import kvm_abi
from kvm_abi import (
    Cap,
    Cr0,
    Cr4,
    Efer,
    IoDirection,
    IoeventfdFlag,
    Kvm,
    KvmError,
    KvmExit,
    MemFlag,
    MpState,
    Msr,
    Rflags,
    SyncRegs,
    Vcpu,
    Vm,
    describe_exit,
    failed_instruction,
    kvm_regs,
)

pytestmark = require("kvm")

CODE_GPA = 0x1000
MEMORY_SIZE = 0x10000
HOLE_GPA = 0x20000  # no memory there

HLT = "f4"
SPIN = "ebfe"  # jmp to itself


class Machine:
    """One VM with 64 KiB of memory at 0 and one vCPU in real mode, about to run *code* at 0x1000."""

    def __init__(self, code: str, flags: int = 0) -> None:
        self.memory = mmap.mmap(-1, MEMORY_SIZE)
        self.memory[CODE_GPA : CODE_GPA + len(bytes.fromhex(code))] = bytes.fromhex(code)
        self.kvm = Kvm()
        self.vm = self.kvm.create_vm()
        self.hva = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.vm.set_user_memory_region(0, flags, 0, MEMORY_SIZE, self.hva)
        self.vcpu = self.vm.create_vcpu()
        sregs = self.vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs(kvm_regs(rip=CODE_GPA, rsp=0x8000, rflags=Rflags.FIXED))

    def run_to(self, reason: KvmExit) -> kvm_abi.kvm_run:
        """Run to the next exit and check its reason."""
        assert self.vcpu.run() == 0
        assert self.vcpu.kvm_run.exit_reason == reason, describe_exit(self.vcpu.kvm_run)
        return self.vcpu.kvm_run

    def close(self) -> None:
        for handle in (self.vcpu, self.vm, self.kvm):
            handle.close()


@contextlib.contextmanager
def machine(code: str, flags: int = 0) -> Iterator[Machine]:
    with contextlib.closing(Machine(code, flags)) as made:
        yield made


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    with Kvm() as handle:
        yield handle


def open_fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


# ---- The example of the module's docstring -------------------------------------------------------------


def test_the_example_of_the_docstring_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert kvm_abi.__doc__ is not None
    block = kvm_abi.__doc__.split("::\n", 1)[1].split("\nIt prints", 1)[0]
    exec(compile(textwrap.dedent(block), "kvm_abi.__doc__", "exec"), {})
    assert capsys.readouterr().out == "port 0x10: 42\nKVM_EXIT_HLT\n"


# ---- The system ----------------------------------------------------------------------------------------


def test_the_system_answers(kvm: Kvm) -> None:
    assert kvm.api_version() == kvm_abi.KVM_API_VERSION
    assert kvm.check_extension(Cap.USER_MEMORY) == 1
    assert kvm.vcpu_mmap_size() >= ctypes.sizeof(kvm_abi.kvm_run)
    assert Msr.IA32_TSC in kvm.msr_index_list()
    assert len(set(kvm.msr_feature_index_list())) == len(kvm.msr_feature_index_list())


def test_the_supported_cpuid_has_exactly_its_entries_and_is_fresh_each_time(kvm: Kvm) -> None:
    cpuid = kvm.supported_cpuid()
    assert len(cpuid.entries) == cpuid.nent > 0
    assert {0, 1, 0x80000000} <= {entry.function for entry in cpuid.entries}
    cpuid.entries[0].eax = 0x1234
    assert kvm.supported_cpuid().entries[0].eax != 0x1234


def test_a_list_grows_until_the_kernel_has_room(kvm: Kvm) -> None:
    expected = kvm.supported_cpuid()
    grown = kvm._get_list(kvm_abi.KVM_GET_SUPPORTED_CPUID, kvm_abi.kvm_cpuid2, count=1)
    assert [entry.function for entry in grown.entries] == [entry.function for entry in expected.entries]
    assert kvm._get_list(kvm_abi.KVM_GET_MSR_INDEX_LIST, kvm_abi.kvm_msr_list, count=1).nmsrs > 1


def test_opening_what_is_not_there_names_the_path() -> None:
    with pytest.raises(
        KvmError, match=r"open failed: ENOENT \(No such file or directory\): /dev/no-kvm"
    ) as caught:
        Kvm("/dev/no-kvm")
    assert (caught.value.ioctl, caught.value.errno) == ("open", errno.ENOENT)


def test_another_device_is_not_kvm() -> None:
    with Kvm("/dev/null") as null, pytest.raises(KvmError, match="KVM_GET_API_VERSION failed: ENOTTY"):
        null.api_version()


def test_a_failed_creation_leaves_no_file_descriptor(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    with kvm.create_vm() as vm:
        before = open_fds()
        with pytest.raises(KvmError, match="KVM_CREATE_VM failed"):
            kvm.create_vm(type=0x7FFF)
        with pytest.raises(KvmError, match="KVM_CREATE_VCPU failed: EINVAL"):
            vm.create_vcpu(1 << 30)
        monkeypatch.setattr(vm, "_vcpu_mmap_size", 1 << 62)
        with pytest.raises(KvmError, match=r"mmap failed: .*: kvm_run"):
            vm.create_vcpu()
        assert open_fds() == before


# ---- Life and death of handles -------------------------------------------------------------------------


def test_handles_give_their_file_descriptors_back() -> None:
    before = open_fds()
    with machine(HLT) as made:
        made.run_to(KvmExit.HLT)
        assert open_fds() != before
    assert open_fds() == before


def test_forgotten_handles_give_their_file_descriptors_back() -> None:
    gc.collect()  # of what other tests forgot
    before = open_fds()
    made = Machine(HLT)
    del made
    gc.collect()
    assert open_fds() == before


def test_closing_twice_does_not_close_somebody_elses_file() -> None:
    kvm = Kvm()
    number = kvm.fd
    kvm.close()
    with open("/dev/null") as other:
        assert other.fileno() == number
        kvm.close()
        os.fstat(number)
    assert (kvm.fd, repr(kvm)) == (-1, "<Kvm closed>")


def test_a_closed_handle_says_ebadf_even_when_its_number_is_in_use_again() -> None:
    made = Machine(HLT)
    vcpu, vm, kvm = made.vcpu, made.vm, made.kvm
    made.close()
    calls = [
        vcpu.run,
        vcpu.get_regs,
        lambda: vcpu.kvm_run,
        lambda: vcpu.page,
        vm.create_vcpu,
        vm.create_irqchip,
        kvm.create_vm,
        kvm.supported_cpuid,
    ]
    with machine(HLT):
        for call in calls:
            with pytest.raises(KvmError) as caught:
                call()
            assert caught.value.errno == errno.EBADF


def test_views_held_beyond_close_are_harmless() -> None:
    before = open_fds()
    made = Machine(HLT)
    run, page = made.vcpu.kvm_run, made.vcpu.page[:64]
    made.close()
    run.immediate_exit = 1
    assert page[1] == 1
    del run, page
    assert open_fds() == before


def test_a_vm_outlives_the_system_handle_and_a_vcpu_both() -> None:
    made = Machine(HLT)
    made.kvm.close()
    made.vm.close()
    made.run_to(KvmExit.HLT)
    made.close()


def test_the_handles_have_a_short_repr(kvm: Kvm) -> None:
    assert repr(kvm) == f"<Kvm fd {kvm.fd}>"


def test_every_public_method_of_a_handle_has_a_docstring() -> None:
    for handle in (Kvm, Vm, Vcpu):
        for name, item in inspect.getmembers(handle):
            if not name.startswith("_"):
                assert inspect.getdoc(item), f"{handle.__name__}.{name}"


# ---- Exits ---------------------------------------------------------------------------------------------


def test_out_then_hlt() -> None:
    with machine("b82a00 e710" + HLT) as made:  # mov ax, 42; out 0x10, ax; hlt
        run = made.run_to(KvmExit.IO)
        assert (run.io.direction, run.io.port, run.io.size, run.io.count) == (IoDirection.OUT, 0x10, 2, 1)
        assert struct.unpack_from("<H", made.vcpu.page, run.io.data_offset) == (42,)
        assert describe_exit(run) == "KVM_EXIT_IO: OUT, port 0x10, 2 bytes"
        made.run_to(KvmExit.HLT)
        assert made.vcpu.get_regs().rax == 42


def test_in_reads_what_the_host_put_into_the_page() -> None:
    with machine("e460" + HLT) as made:  # in al, 0x60
        run = made.run_to(KvmExit.IO)
        assert (run.io.direction, run.io.port, run.io.size) == (IoDirection.IN, 0x60, 1)
        made.vcpu.page[run.io.data_offset] = 0x5A
        made.run_to(KvmExit.HLT)
        assert made.vcpu.get_regs().rax & 0xFF == 0x5A


def test_memory_that_is_not_there_is_mmio() -> None:
    # mov ax, 0x2000; mov ds, ax; mov word [0x34], 0x1234; mov bx, [0x38]; hlt
    with machine("b80020 8ed8 c70634003412 8b1e3800" + HLT) as made:
        run = made.run_to(KvmExit.MMIO)
        assert (run.mmio.phys_addr, run.mmio.len, run.mmio.is_write) == (HOLE_GPA + 0x34, 2, 1)
        assert bytes(run.mmio.data[:2]) == b"\x34\x12"
        run = made.run_to(KvmExit.MMIO)
        assert (run.mmio.phys_addr, run.mmio.len, run.mmio.is_write) == (HOLE_GPA + 0x38, 2, 0)
        run.mmio.data[0], run.mmio.data[1] = 0xCD, 0xAB
        made.run_to(KvmExit.HLT)
        assert made.vcpu.get_regs().rbx == 0xABCD


def test_a_guest_msr_access_outside_the_filter_exits() -> None:
    with machine("66b9820000000f32" + HLT) as made:  # mov ecx, ...; rdmsr; hlt
        code = bytes.fromhex("66b9") + struct.pack("<I", Msr.LSTAR) + bytes.fromhex("0f32" + HLT)
        made.memory[CODE_GPA : CODE_GPA + len(code)] = code
        made.vm.enable_cap(Cap.X86_USER_SPACE_MSR, kvm_abi.MsrExitReason.FILTER)
        made.vm.set_msr_filter(kvm_abi.deny_msrs_except([Msr.KERNEL_GS_BASE]))
        run = made.run_to(KvmExit.X86_RDMSR)
        assert (run.msr.index, run.msr.reason) == (Msr.LSTAR, kvm_abi.MsrExitReason.FILTER)
        run.msr.data = 0x1_0000_0002
        made.run_to(KvmExit.HLT)
        regs = made.vcpu.get_regs()
        assert (regs.rax, regs.rdx) == (2, 1)


# ---- Stopping a run ------------------------------------------------------------------------------------


def test_immediate_exit_ends_a_run_before_the_guest_moves() -> None:
    with machine(HLT) as made:
        made.vcpu.kvm_run.immediate_exit = 1
        assert made.vcpu.run() == errno.EINTR
        assert made.vcpu.get_regs().rip == CODE_GPA
        made.vcpu.kvm_run.immediate_exit = 0
        made.run_to(KvmExit.HLT)


@pytest.fixture
def kick_signal() -> Iterator[int]:
    """A signal with a handler that does nothing: it ends a system call, and no more."""
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    yield signal.SIGUSR1
    signal.signal(signal.SIGUSR1, previous)


def test_a_signal_ends_the_run_of_a_guest_that_spins_while_other_threads_go_on(kick_signal: int) -> None:
    """The guest tells through an ioeventfd that it runs: so the signal cannot come before KVM_RUN."""
    results: list[int] = []
    event = os.eventfd(0)
    with machine("e710" + SPIN) as made:  # out 0x10, ax; then spin
        made.vm.ioeventfd(event, 0x10, 2, flags=IoeventfdFlag.PIO)
        thread = threading.Thread(target=lambda: results.append(made.vcpu.run()))
        thread.start()
        assert os.eventfd_read(event) == 1
        made.vcpu.kvm_run.immediate_exit = 1
        assert thread.ident is not None
        signal.pthread_kill(thread.ident, kick_signal)
        thread.join()
        assert results == [errno.EINTR]
        assert made.vcpu.get_regs().rip == CODE_GPA + 2
    os.close(event)


def test_a_signal_blocked_in_the_thread_but_not_in_the_vcpus_mask_ends_the_run(kick_signal: int) -> None:
    with machine(SPIN) as made:
        old = signal.pthread_sigmask(signal.SIG_BLOCK, [kick_signal])
        try:
            made.vcpu.set_signal_mask([signal.SIGTERM])
            signal.pthread_kill(threading.get_ident(), kick_signal)
            assert made.vcpu.run() == errno.EINTR
            assert signal.sigtimedwait([kick_signal], 0) is not None
            made.vcpu.set_signal_mask(None)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)


# ---- Registers -----------------------------------------------------------------------------------------


def test_every_general_register_round_trips() -> None:
    """B.11/208: each register has a value of its own, so that two cannot be swapped unseen."""
    regs = kvm_regs(*range(0x1111, 0x1111 * 17, 0x1111), 0x9999, Rflags.FIXED | Rflags.ZF)
    with machine(HLT) as made:
        made.vcpu.set_regs(regs)
        assert bytes(made.vcpu.get_regs()) == bytes(regs)


@pytest.mark.parametrize("name", ["sregs2", "xsave", "xcrs", "vcpu_events", "mp_state"])
def test_state_round_trips(name: str) -> None:
    with machine(HLT) as made:
        state = getattr(made.vcpu, f"get_{name}")()
        getattr(made.vcpu, f"set_{name}")(state)
        assert bytes(getattr(made.vcpu, f"get_{name}")()) == bytes(state)


def test_a_new_vcpu_is_runnable() -> None:
    with machine(HLT) as made:
        assert made.vcpu.get_mp_state().mp_state == MpState.RUNNABLE


def test_special_registers_round_trip() -> None:
    """B.11/209: what can have a value of its own has one."""
    with machine(HLT) as made:
        sregs = made.vcpu.get_sregs()
        for number, name in enumerate(("cs", "ds", "es", "fs", "gs", "ss"), 1):
            segment = getattr(sregs, name)
            segment.base, segment.selector = 0x1110 * number, 0x111 * number
        sregs.gdt.base, sregs.gdt.limit, sregs.idt.base, sregs.idt.limit = 0x8880, 0x88, 0x9990, 0x99
        sregs.cr2, sregs.cr8 = 0x1234_5678, 5
        made.vcpu.set_sregs(sregs)
        assert bytes(made.vcpu.get_sregs()) == bytes(sregs)


def test_cr8_survives_the_entry_of_the_guest() -> None:
    """Without an irqchip KVM_RUN takes it from the page."""
    with machine(HLT) as made:
        sregs = made.vcpu.get_sregs()
        for wanted, kept in ((5, 5), (0x100, 5), (0, 0)):
            sregs.cr8 = wanted
            made.vcpu.set_sregs(sregs)
            made.run_to(KvmExit.HLT)
            made.vcpu.set_regs(kvm_regs(rip=CODE_GPA, rflags=Rflags.FIXED))
            assert made.vcpu.get_sregs().cr8 == kept


def test_fpu_round_trips() -> None:
    """B.11/210: no two bytes that could be mistaken for each other; MXCSR does not travel this way."""
    fpu = kvm_abi.kvm_fpu(fcw=0x27F, fsw=0x3901, ftwx=0x5A, last_opcode=0x123)
    fpu.last_ip, fpu.last_dp = 0x11_2233_4455, 0x66_7788_99AA
    for number, register in enumerate(fpu.fpr):
        register[:10] = range(10 * number + 1, 10 * number + 11)
    for number, register in enumerate(fpu.xmm):
        register[:] = range(16 * number, 16 * number + 16)
    with machine(HLT) as made:
        made.vcpu.set_fpu(fpu)
        read = made.vcpu.get_fpu()
        read.mxcsr = fpu.mxcsr
        assert bytes(read) == bytes(fpu)


def test_debug_registers_round_trip() -> None:
    """B.11/211."""
    debugregs = kvm_abi.kvm_debugregs(dr6=0xFFFF_0FF5, dr7=0x455)
    debugregs.db[:] = 0x1111, 0x2222, 0x3333, 0x4444
    with machine(HLT) as made:
        made.vcpu.set_debugregs(debugregs)
        assert bytes(made.vcpu.get_debugregs()) == bytes(debugregs)


def test_registers_travel_in_the_page_when_asked() -> None:
    with machine("40 e710" + HLT) as made:  # inc ax; out 0x10, ax
        assert made.vm.check_extension(Cap.SYNC_REGS) & SyncRegs.REGS
        run = made.vcpu.kvm_run
        run.kvm_valid_regs = SyncRegs.REGS | SyncRegs.SREGS
        run.kvm_dirty_regs = SyncRegs.REGS
        run.s.regs.regs = kvm_regs(rax=41, rip=CODE_GPA, rflags=Rflags.FIXED)
        made.run_to(KvmExit.IO)
        assert run.s.regs.regs.rax == 42
        assert run.s.regs.sregs.cs.selector == 0


def test_the_cpuid_of_a_vcpu_is_what_was_set(kvm: Kvm) -> None:
    with kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
        cpuid = kvm.supported_cpuid()
        for entry in cpuid.entries:
            if entry.function == 0x80000008:
                entry.eax = entry.eax & ~0xFF | 36
        vcpu.set_cpuid2(cpuid)
        (answer,) = [entry for entry in vcpu.get_cpuid2().entries if entry.function == 0x80000008]
        assert answer.eax & 0xFF == 36


def test_msrs_are_read_and_written_by_index() -> None:
    with machine(HLT) as made:
        made.vcpu.set_msrs({Msr.LSTAR: 0x1000, Msr.KERNEL_GS_BASE: 0x2000})
        read = made.vcpu.get_msrs([Msr.KERNEL_GS_BASE, Msr.LSTAR])
        assert read == {Msr.KERNEL_GS_BASE: 0x2000, Msr.LSTAR: 0x1000}
        assert made.vcpu.get_msrs([]) == {}


def test_an_msr_that_fails_is_named() -> None:
    nonsense = 0xDEAD0000
    with machine(HLT) as made:
        with pytest.raises(KvmError, match=r"KVM_GET_MSRS failed: EINVAL .*: MSR 0xdead0000$"):
            made.vcpu.get_msrs([Msr.LSTAR, nonsense, Msr.STAR])
        with pytest.raises(KvmError, match=r"KVM_SET_MSRS failed: EINVAL .*: MSR 0xc0000080 \(EFER\)$"):
            made.vcpu.set_msrs({Msr.LSTAR: 0x3000, Msr.EFER: 1 << 63})
        assert made.vcpu.get_msrs([Msr.LSTAR]) == {Msr.LSTAR: 0x3000}


def test_an_xsave_area_too_short_for_the_vcpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with machine(HLT) as made:
        xsave = made.vcpu.get_xsave()
        monkeypatch.setattr(made.vcpu, "_xsave_size", 8192)
        with pytest.raises(KvmError, match=r"KVM_SET_XSAVE failed: EINVAL .*: needs 8192 bytes"):
            made.vcpu.set_xsave(xsave)
        if made.vm.check_extension(Cap.XSAVE2):
            longer = made.vcpu.get_xsave()
            assert ctypes.sizeof(longer) == 8192
            assert bytes(longer)[:4096] == bytes(xsave)


def test_too_many_arguments_of_a_capability_are_refused() -> None:
    with machine(HLT) as made, pytest.raises(RuntimeError):
        made.vm.enable_cap(Cap.X86_USER_SPACE_MSR, 1, 2, 3, 4, 5)


# ---- Memory --------------------------------------------------------------------------------------------


def test_a_slot_comes_and_goes() -> None:
    with machine("b80020 8ed8 a00000 a00000" + HLT) as made:  # ds = 0x2000; mov al, [0], twice
        run = made.run_to(KvmExit.MMIO)
        run.mmio.data[0] = 1
        made.vcpu.kvm_run.immediate_exit = 1
        assert made.vcpu.run() == errno.EINTR  # finishes the first read and stops before the second
        made.vcpu.kvm_run.immediate_exit = 0
        page = mmap.mmap(-1, mmap.PAGESIZE)
        page[0] = 0x77
        hva = ctypes.addressof(ctypes.c_char.from_buffer(page))
        made.vm.set_user_memory_region(1, MemFlag.READONLY, HOLE_GPA, mmap.PAGESIZE, hva)
        made.run_to(KvmExit.HLT)
        assert made.vcpu.get_regs().rax & 0xFF == 0x77
        made.vm.set_user_memory_region(1, 0, HOLE_GPA, 0, 0)
        made.vcpu.set_regs(kvm_regs(rip=CODE_GPA, rflags=Rflags.FIXED))
        made.run_to(KvmExit.MMIO)


@pytest.mark.parametrize(
    ("gpa", "size", "error"),
    [(0x8000, 0x1000, "EEXIST"), (0x20001, 0x1000, "EINVAL"), (0x20000, 7, "EINVAL")],
)
def test_a_slot_that_overlaps_or_is_not_whole_pages_is_refused(gpa: int, size: int, error: str) -> None:
    with machine(HLT) as made, pytest.raises(KvmError, match=f"KVM_SET_USER_MEMORY_REGION failed: {error}"):
        made.vm.set_user_memory_region(1, 0, gpa, size, made.hva)


def test_a_slot_size_beyond_64_bits_does_not_become_a_deletion() -> None:
    with machine(HLT) as made:
        with pytest.raises(OverflowError, match="memory_size cannot hold 0x10000000000000000"):
            made.vm.set_user_memory_region(0, 0, 0, 1 << 64, made.hva)
        made.run_to(KvmExit.HLT)


def test_the_dirty_log_has_the_page_that_the_guest_wrote_and_starts_anew() -> None:
    with machine("c606005001" + HLT, MemFlag.LOG_DIRTY_PAGES) as made:  # mov byte [0x5000], 1
        made.run_to(KvmExit.HLT)
        bitmap = made.vm.get_dirty_log(0)
        assert len(bitmap) == 8
        assert int.from_bytes(bitmap, "little") >> 5 & 1
        assert made.vm.get_dirty_log(0) == bytes(8)


def test_the_dirty_log_of_a_slot_that_is_not_there_is_refused_before_the_kernel_writes() -> None:
    with machine(HLT) as made:
        with pytest.raises(KvmError, match=r"KVM_GET_DIRTY_LOG failed: ENOENT .*: there is no slot 3"):
            made.vm.get_dirty_log(3)
        with pytest.raises(KvmError, match="KVM_GET_DIRTY_LOG failed: ENOENT"):
            made.vm.get_dirty_log(0)


def test_the_dirty_log_can_be_cleared_by_hand() -> None:
    with machine("c606005001" + HLT) as made:
        manual = kvm_abi.DirtyLogFlag.MANUAL_PROTECT_ENABLE
        made.vm.enable_cap(Cap.MANUAL_DIRTY_LOG_PROTECT2, manual)
        made.vm.set_user_memory_region(0, MemFlag.LOG_DIRTY_PAGES, 0, MEMORY_SIZE, made.hva)
        made.run_to(KvmExit.HLT)
        dirty = made.vm.get_dirty_log(0)
        assert made.vm.get_dirty_log(0) == dirty != bytes(8)
        made.vm.clear_dirty_log(0, 0, MEMORY_SIZE // mmap.PAGESIZE, dirty)
        assert made.vm.get_dirty_log(0) == bytes(8)


# ---- Long mode -----------------------------------------------------------------------------------------


def enter_long_mode(made: Machine) -> None:
    """Map [0, 2 MiB) to itself with three tables at 0x2000 and switch the vCPU to 64-bit CPL 0."""
    for table, entry in ((0x2000, 0x3003), (0x3000, 0x4003), (0x4000, 0x83)):
        made.memory[table : table + 8] = struct.pack("<Q", entry)
    sregs = made.vcpu.get_sregs()
    sregs.cr0, sregs.cr4, sregs.cr3 = Cr0.PE | Cr0.ET | Cr0.PG, Cr4.PAE, 0x2000
    sregs.efer = Efer.LME | Efer.LMA
    sregs.cs.type, sregs.cs.l, sregs.cs.db, sregs.cs.present, sregs.cs.s = 0xB, 1, 0, 1, 1
    made.vcpu.set_sregs(sregs)


def test_a_64_bit_guest_runs_and_its_addresses_are_translated() -> None:
    with machine("48b8efcdab8967452301" + HLT) as made:  # mov rax, 0x0123456789abcdef
        enter_long_mode(made)
        mapped, unmapped = made.vcpu.translate(0x1234), made.vcpu.translate(0x200000)
        assert (mapped.valid, mapped.physical_address) == (1, 0x1234)
        assert unmapped.valid == 0
        made.run_to(KvmExit.HLT)
        assert made.vcpu.get_regs().rax == 0x0123456789ABCDEF


def test_a_fault_without_a_handler_is_a_shutdown() -> None:
    with machine("0f0b") as made:  # ud2
        enter_long_mode(made)
        sregs = made.vcpu.get_sregs()
        sregs.idt.limit = 0
        made.vcpu.set_sregs(sregs)
        made.run_to(KvmExit.SHUTDOWN)


def test_an_instruction_that_kvm_cannot_emulate_is_shown() -> None:
    """Where CPL 0 is emulated, SSE is refused with the instruction's bytes; elsewhere it simply runs."""
    with machine("0f57c0" + HLT) as made:  # xorps xmm0, xmm0
        enter_long_mode(made)
        sregs = made.vcpu.get_sregs()
        sregs.cr4 |= Cr4.OSFXSR
        made.vcpu.set_sregs(sregs)
        assert made.vcpu.run() == 0
        run = made.vcpu.kvm_run
        if run.exit_reason == KvmExit.INTERNAL_ERROR:
            assert failed_instruction(run).startswith(b"\x0f\x57\xc0\xf4")
            assert "(EMULATION), instruction bytes 0f 57 c0 f4" in describe_exit(run)
        else:
            assert describe_exit(run) == "KVM_EXIT_HLT"
            assert failed_instruction(run) == b""


def test_system_registers_that_contradict_each_other_are_refused() -> None:
    with machine(HLT) as made:
        sregs = made.vcpu.get_sregs()
        sregs.cr0, sregs.efer = Cr0.PE | Cr0.PG, Efer.LME | Efer.LMA  # long mode without PAE
        with pytest.raises(KvmError, match="KVM_SET_SREGS failed: EINVAL"):
            made.vcpu.set_sregs(sregs)


# ---- Interrupts ----------------------------------------------------------------------------------------


def test_an_injected_interrupt_reaches_the_real_mode_handler() -> None:
    with machine(HLT) as made:
        made.memory[0x20 * 4 : 0x20 * 4 + 4] = struct.pack("<HH", 0x3000, 0)
        made.memory[0x3000:0x3003] = bytes.fromhex("e710" + HLT)
        made.vcpu.set_regs(kvm_regs(rip=CODE_GPA, rsp=0x8000, rflags=Rflags.FIXED | Rflags.IF))
        made.vcpu.interrupt(0x20)
        made.run_to(KvmExit.IO)


def test_an_nmi_reaches_the_real_mode_handler() -> None:
    with machine(HLT) as made:
        made.memory[2 * 4 : 2 * 4 + 4] = struct.pack("<HH", 0x3000, 0)
        made.memory[0x3000:0x3003] = bytes.fromhex("e710" + HLT)
        made.vcpu.nmi()
        made.run_to(KvmExit.IO)


def test_an_irqchip_has_chips_lapics_lines_and_a_timer(kvm: Kvm) -> None:
    event = os.eventfd(0)
    with kvm.create_vm() as vm:
        vm.create_irqchip()
        vm.create_pit2()
        with vm.create_vcpu() as vcpu:
            chip = vm.get_irqchip(kvm_abi.Irqchip.IOAPIC)
            assert chip.chip.ioapic.base_address == 0xFEC00000
            vm.set_irqchip(chip)
            vm.irq_line(3, 1)
            assert vm.get_irqchip(kvm_abi.Irqchip.PIC_MASTER).chip.pic.irr & 1 << 3
            vm.irqfd(event, 4)
            vm.irqfd(event, 4, kvm_abi.IrqfdFlag.DEASSIGN)
            lapic = vcpu.get_lapic()
            vcpu.set_lapic(lapic)
            with pytest.raises(KvmError, match="KVM_INTERRUPT failed: ENXIO"):
                vcpu.interrupt(0x20)
    os.close(event)


def test_single_step_stops_after_one_instruction() -> None:
    with machine("90 90" + HLT) as made:
        control = kvm_abi.GuestDebug.ENABLE | kvm_abi.GuestDebug.SINGLESTEP
        made.vcpu.set_guest_debug(kvm_abi.kvm_guest_debug(control=control))
        run = made.run_to(KvmExit.DEBUG)
        assert run.debug.arch.pc == CODE_GPA + 1


def test_the_frequency_of_the_time_stamp_counter_is_known() -> None:
    with machine(HLT) as made:
        assert made.vcpu.get_tsc_khz() > 1000
