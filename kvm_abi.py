"""Speak to Linux KVM on x86-64: the kernel's structs, ioctls and constants, and a handle for each kind of fd.

A whole virtual machine, ready to paste. It multiplies 6 by 7 and writes the product to a port::

    import ctypes
    import mmap

    from kvm_abi import Kvm, KvmExit, describe_exit, kvm_regs

    CODE = bytes.fromhex("0fafc3 e710 f4")  # imul ax, bx; out 0x10, ax; hlt

    # 1. Open /dev/kvm and create a VM: an address space with no memory and no processor yet.
    with Kvm() as kvm, kvm.create_vm() as vm:

        # 2. Give it one page of memory, our own, at guest-physical address 0x1000.
        memory = mmap.mmap(-1, 0x1000)
        memory[: len(CODE)] = CODE
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        vm.set_user_memory_region(0, 0, guest_phys_addr=0x1000, memory_size=0x1000, userspace_addr=address)

        # 3. Add a processor. It wakes up in 16-bit real mode, about to run at F000:FFF0.
        with vm.create_vcpu() as vcpu:

            # 4. Point it at the code instead. Bit 1 of rflags is always set.
            sregs = vcpu.get_sregs()
            sregs.cs.base = sregs.cs.selector = 0
            vcpu.set_sregs(sregs)
            vcpu.set_regs(kvm_regs(rip=0x1000, rax=6, rbx=7, rflags=2))

            # 5. Run. KVM comes back when the guest does something that only we can serve:
            #    kvm_run.exit_reason says what, and a member of the kvm_run page has the details.
            while vcpu.run() == 0 and vcpu.kvm_run.exit_reason == KvmExit.IO:
                io = vcpu.kvm_run.io
                data = bytes(vcpu.page[io.data_offset : io.data_offset + io.size])
                print(f"port {io.port:#x}: {int.from_bytes(data, 'little')}")

            # 6. Stop at any other exit. HLT is how this guest says that it has finished.
            print(describe_exit(vcpu.kvm_run))

It prints ``port 0x10: 42`` and ``KVM_EXIT_HLT``.

What this is not: it holds no policy. Nothing is retried, emulated, laid out or checked against the guest's
intent; every ioctl either works or raises `KvmError` with its own name and errno. All sizes and lengths are
in bytes unless a name says pages, and `guest_phys_addr` and `userspace_addr` are a guest-physical and a host
virtual address. One vCPU belongs to one thread at a time: KVM makes the first ioctl from another thread slow,
and two threads in `Vcpu.run` wait for each other. Only `kvm_run.immediate_exit` is meant to be set from
outside.

Names are the kernel's, against PEP 8: `kvm_sregs`, `exit_reason`, `KVM_SET_SREGS`. Inside an enum the common
prefix is dropped: `KvmExit.MMIO` is KVM_EXIT_MMIO, `Cap.SYNC_REGS` is KVM_CAP_SYNC_REGS.

Sources: <linux/kvm.h>, <asm/kvm.h> and <asm/processor-flags.h> of Linux 6.1, compared with 6.12 and 7.2
(tests/test_kvm_abi.py lets the C compiler compare them with the installed headers); the kernel's
Documentation/virt/kvm/api.rst; AMD64 Architecture Programmer's Manual, volume 2, for the processor's flags.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from ctypes import c_int32 as s32
from ctypes import c_uint8 as u8
from ctypes import c_uint16 as u16
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

__version__ = "0.14.0"

# fmt: off
__all__ = [  # noqa: RUF022 -- in the order of the chapters
    # handles, errors, and how to read an exit
    "Kvm", "Vm", "Vcpu", "KvmError", "describe_exit", "failed_instruction", "deny_msrs_except", "ioctl",
    "PreparedIoctl", "make_ioctls", "msrs",
    "Ioctl", "Struct", "FlexibleStruct",
    # constants
    "KVM_API_VERSION", "KVM_MSR_FILTER_MAX_RANGES", "KvmExit", "IoDirection", "InternalError", "SystemEvent",
    "MsrExitReason", "RunFlag", "MemoryFaultFlag", "SyncRegs", "MemFlag", "GuestDebug", "MpState",
    "VcpuEventValid", "CpuidFlag", "MsrFilterAccess", "MsrFilterDefault", "DirtyLogFlag", "IrqfdFlag",
    "IoeventfdFlag", "Irqchip", "PitFlag", "DisableExit", "Quirk", "Vector", "Cap",
    "Cr0", "Cr4", "Efer", "Rflags", "Msr",
    # structs
    "kvm_regs", "kvm_segment", "kvm_dtable", "kvm_sregs", "kvm_sregs2", "kvm_fpu", "kvm_xsave", "kvm_xcr",
    "kvm_xcrs", "kvm_debugregs", "kvm_vcpu_events", "kvm_mp_state", "kvm_sync_regs", "kvm_debug_exit_arch",
    "kvm_guest_debug_arch", "kvm_guest_debug", "kvm_translation", "kvm_interrupt", "kvm_signal_mask",
    "kvm_lapic_state", "kvm_run", "kvm_msr_entry", "kvm_msrs", "kvm_msr_list", "kvm_msr_filter_range",
    "kvm_msr_filter", "kvm_cpuid_entry2", "kvm_cpuid2", "kvm_userspace_memory_region",
    "kvm_userspace_memory_region2", "kvm_dirty_log", "kvm_clear_dirty_log", "kvm_enable_cap", "kvm_irq_level",
    "kvm_pic_state", "kvm_ioapic_state", "kvm_irqchip", "kvm_pit_config", "kvm_irqfd", "kvm_ioeventfd",
    # ioctls
    "KVM_GET_API_VERSION", "KVM_CREATE_VM", "KVM_GET_MSR_INDEX_LIST", "KVM_CHECK_EXTENSION",
    "KVM_GET_VCPU_MMAP_SIZE", "KVM_GET_SUPPORTED_CPUID", "KVM_GET_EMULATED_CPUID",
    "KVM_GET_MSR_FEATURE_INDEX_LIST", "KVM_CREATE_VCPU", "KVM_GET_DIRTY_LOG", "KVM_SET_USER_MEMORY_REGION",
    "KVM_SET_USER_MEMORY_REGION2", "KVM_CREATE_IRQCHIP", "KVM_IRQ_LINE", "KVM_GET_IRQCHIP", "KVM_SET_IRQCHIP",
    "KVM_IRQFD", "KVM_CREATE_PIT2", "KVM_IOEVENTFD", "KVM_RUN", "KVM_GET_REGS", "KVM_SET_REGS",
    "KVM_GET_SREGS", "KVM_SET_SREGS", "KVM_TRANSLATE", "KVM_INTERRUPT", "KVM_GET_MSRS", "KVM_SET_MSRS",
    "KVM_SET_SIGNAL_MASK", "KVM_GET_FPU", "KVM_SET_FPU", "KVM_GET_LAPIC", "KVM_SET_LAPIC", "KVM_SET_CPUID2",
    "KVM_GET_CPUID2", "KVM_GET_MP_STATE", "KVM_SET_MP_STATE", "KVM_NMI", "KVM_SET_GUEST_DEBUG",
    "KVM_GET_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS", "KVM_GET_DEBUGREGS", "KVM_SET_DEBUGREGS",
    "KVM_SET_TSC_KHZ", "KVM_GET_TSC_KHZ", "KVM_ENABLE_CAP", "KVM_GET_XSAVE", "KVM_SET_XSAVE", "KVM_GET_XCRS",
    "KVM_SET_XCRS", "KVM_CLEAR_DIRTY_LOG", "KVM_X86_SET_MSR_FILTER", "KVM_GET_SREGS2", "KVM_SET_SREGS2",
    "KVM_GET_XSAVE2",
]
# fmt: on


# ======================================================================================================
# 1. Exits: why KVM_RUN came back
# ======================================================================================================


class KvmExit(IntEnum):
    """KVM_EXIT_*: the values of kvm_run.exit_reason that an x86 host can see."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    NMI = 16
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26
    HYPERV = 27
    X86_RDMSR = 29
    X86_WRMSR = 30
    DIRTY_RING_FULL = 31
    AP_RESET_HOLD = 32
    X86_BUS_LOCK = 33
    XEN = 34
    NOTIFY = 37
    MEMORY_FAULT = 39


class IoDirection(IntEnum):
    """KVM_EXIT_IO_*: kvm_run.io.direction, as the guest sees it."""

    IN = 0
    OUT = 1


class InternalError(IntEnum):
    """KVM_INTERNAL_ERROR_*: kvm_run.internal.suberror."""

    EMULATION = 1
    SIMUL_EX = 2
    DELIVERY_EV = 3
    UNEXPECTED_EXIT_REASON = 4


class SystemEvent(IntEnum):
    """KVM_SYSTEM_EVENT_*: kvm_run.system_event.type."""

    SHUTDOWN = 1
    RESET = 2
    CRASH = 3
    WAKEUP = 4
    SUSPEND = 5
    SEV_TERM = 6


class MsrExitReason(IntFlag):
    """KVM_MSR_EXIT_REASON_*: kvm_run.msr.reason, and the argument of Cap.X86_USER_SPACE_MSR."""

    INVAL = 1 << 0
    UNKNOWN = 1 << 1
    FILTER = 1 << 2


class RunFlag(IntFlag):
    """KVM_RUN_X86_*: kvm_run.flags."""

    SMM = 1 << 0
    BUS_LOCK = 1 << 1
    GUEST_MODE = 1 << 2


class MemoryFaultFlag(IntFlag):
    """KVM_MEMORY_EXIT_FLAG_*: kvm_run.memory_fault.flags."""

    PRIVATE = 1 << 3


class SyncRegs(IntFlag):
    """KVM_SYNC_X86_*: kvm_run.kvm_valid_regs and kvm_dirty_regs; what Cap.SYNC_REGS answers."""

    REGS = 1 << 0
    SREGS = 1 << 1
    EVENTS = 1 << 2


# ======================================================================================================
# 2. Flags and small numbers of the ioctls
# ======================================================================================================

KVM_API_VERSION = 12
"""The only answer of KVM_GET_API_VERSION since 2007."""

KVM_MSR_FILTER_MAX_RANGES = 16
KVMIO = 0xAE


class MemFlag(IntFlag):
    """KVM_MEM_*: kvm_userspace_memory_region.flags."""

    LOG_DIRTY_PAGES = 1 << 0
    READONLY = 1 << 1
    GUEST_MEMFD = 1 << 2


class GuestDebug(IntFlag):
    """KVM_GUESTDBG_*: kvm_guest_debug.control."""

    ENABLE = 1 << 0
    SINGLESTEP = 1 << 1
    USE_SW_BP = 1 << 16
    USE_HW_BP = 1 << 17
    INJECT_DB = 1 << 18
    INJECT_BP = 1 << 19
    BLOCKIRQ = 1 << 20


class MpState(IntEnum):
    """KVM_MP_STATE_*: kvm_mp_state.mp_state."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4
    AP_RESET_HOLD = 9


class VcpuEventValid(IntFlag):
    """KVM_VCPUEVENT_VALID_*: kvm_vcpu_events.flags."""

    NMI_PENDING = 1 << 0
    SIPI_VECTOR = 1 << 1
    SHADOW = 1 << 2
    SMM = 1 << 3
    PAYLOAD = 1 << 4
    TRIPLE_FAULT = 1 << 5


class CpuidFlag(IntFlag):
    """KVM_CPUID_FLAG_*: kvm_cpuid_entry2.flags (SIGNIFCANT is the kernel's spelling)."""

    SIGNIFCANT_INDEX = 1 << 0
    STATEFUL_FUNC = 1 << 1
    STATE_READ_NEXT = 1 << 2


class MsrFilterAccess(IntFlag):
    """KVM_MSR_FILTER_*: kvm_msr_filter_range.flags, the accesses that the range's bitmap rules."""

    READ = 1 << 0
    WRITE = 1 << 1


class MsrFilterDefault(IntEnum):
    """KVM_MSR_FILTER_DEFAULT_*: kvm_msr_filter.flags, what holds outside the ranges."""

    ALLOW = 0
    DENY = 1


class DirtyLogFlag(IntFlag):
    """KVM_DIRTY_LOG_*: the argument of Cap.MANUAL_DIRTY_LOG_PROTECT2."""

    MANUAL_PROTECT_ENABLE = 1 << 0
    INITIALLY_SET = 1 << 1


class IrqfdFlag(IntFlag):
    """KVM_IRQFD_FLAG_*: kvm_irqfd.flags."""

    DEASSIGN = 1 << 0
    RESAMPLE = 1 << 1


class IoeventfdFlag(IntFlag):
    """KVM_IOEVENTFD_FLAG_*: kvm_ioeventfd.flags. Without PIO the address is guest-physical (MMIO)."""

    DATAMATCH = 1 << 0
    PIO = 1 << 1
    DEASSIGN = 1 << 2


class Irqchip(IntEnum):
    """KVM_IRQCHIP_*: kvm_irqchip.chip_id."""

    PIC_MASTER = 0
    PIC_SLAVE = 1
    IOAPIC = 2


class PitFlag(IntFlag):
    """KVM_PIT_*: kvm_pit_config.flags."""

    SPEAKER_DUMMY = 1 << 0


class DisableExit(IntFlag):
    """KVM_X86_DISABLE_EXITS_*: the argument of Cap.X86_DISABLE_EXITS."""

    MWAIT = 1 << 0
    HLT = 1 << 1
    PAUSE = 1 << 2
    CSTATE = 1 << 3


class Quirk(IntFlag):
    """KVM_X86_QUIRK_*: the argument of Cap.DISABLE_QUIRKS2."""

    LINT0_REENABLED = 1 << 0
    CD_NW_CLEARED = 1 << 1
    LAPIC_MMIO_HOLE = 1 << 2
    OUT_7E_INC_RIP = 1 << 3
    MISC_ENABLE_NO_MWAIT = 1 << 4
    FIX_HYPERCALL_INSN = 1 << 5
    MWAIT_NEVER_UD_FAULTS = 1 << 6


class Vector(IntEnum):
    """*_VECTOR: the processor's exceptions, by their two-letter names."""

    DE = 0
    DB = 1
    BP = 3
    OF = 4
    BR = 5
    UD = 6
    NM = 7
    DF = 8
    TS = 10
    NP = 11
    SS = 12
    GP = 13
    PF = 14
    MF = 16
    AC = 17
    MC = 18
    XM = 19
    VE = 20


class Cap(IntEnum):
    """KVM_CAP_*: the capabilities that concern an x86 host; ask with `check_extension`."""

    IRQCHIP = 0
    HLT = 1
    MMU_SHADOW_CACHE_CONTROL = 2
    USER_MEMORY = 3
    SET_TSS_ADDR = 4
    VAPIC = 6
    EXT_CPUID = 7
    CLOCKSOURCE = 8
    NR_VCPUS = 9
    NR_MEMSLOTS = 10
    PIT = 11
    NOP_IO_DELAY = 12
    PV_MMU = 13
    MP_STATE = 14
    COALESCED_MMIO = 15
    SYNC_MMU = 16
    DESTROY_MEMORY_REGION_WORKS = 21
    USER_NMI = 22
    SET_GUEST_DEBUG = 23
    REINJECT_CONTROL = 24
    IRQ_ROUTING = 25
    IRQ_INJECT_STATUS = 26
    JOIN_MEMORY_REGIONS_WORKS = 30
    MCE = 31
    IRQFD = 32
    PIT2 = 33
    SET_BOOT_CPU_ID = 34
    PIT_STATE2 = 35
    IOEVENTFD = 36
    SET_IDENTITY_MAP_ADDR = 37
    XEN_HVM = 38
    ADJUST_CLOCK = 39
    INTERNAL_ERROR_DATA = 40
    VCPU_EVENTS = 41
    HYPERV = 44
    INTR_SHADOW = 49
    DEBUGREGS = 50
    X86_ROBUST_SINGLESTEP = 51
    ENABLE_CAP = 54
    XSAVE = 55
    XCRS = 56
    ASYNC_PF = 59
    TSC_CONTROL = 60
    GET_TSC_KHZ = 61
    MAX_VCPUS = 66
    ONE_REG = 70
    TSC_DEADLINE_TIMER = 72
    SYNC_REGS = 74
    KVMCLOCK_CTRL = 76
    SIGNAL_MSI = 77
    READONLY_MEM = 81
    IRQFD_RESAMPLE = 82
    DEVICE_CTRL = 89
    EXT_EMUL_CPUID = 95
    ENABLE_CAP_VM = 98
    IOEVENTFD_NO_LENGTH = 100
    VM_ATTRIBUTES = 101
    CHECK_EXTENSION_VM = 105
    DISABLE_QUIRKS = 116
    X86_SMM = 117
    MULTI_ADDRESS_SPACE = 118
    GUEST_DEBUG_HW_BPS = 119
    GUEST_DEBUG_HW_WPS = 120
    SPLIT_IRQCHIP = 121
    IOEVENTFD_ANY_LENGTH = 122
    VCPU_ATTRIBUTES = 127
    MAX_VCPU_ID = 128
    X2APIC_API = 129
    IMMEDIATE_EXIT = 136
    X86_DISABLE_EXITS = 143
    GET_MSR_FEATURES = 153
    NESTED_STATE = 157
    MSR_PLATFORM_INFO = 159
    COALESCED_PIO = 162
    EXCEPTION_PAYLOAD = 164
    MANUAL_DIRTY_LOG_PROTECT2 = 168
    PMU_EVENT_FILTER = 173
    HALT_POLL = 182
    ASYNC_PF_INT = 183
    LAST_CPU = 184
    SMALLER_MAXPHYADDR = 185
    STEAL_TIME = 187
    X86_USER_SPACE_MSR = 188
    X86_MSR_FILTER = 189
    ENFORCE_PV_FEATURE_CPUID = 190
    DIRTY_LOG_RING = 192
    X86_BUS_LOCK_EXIT = 193
    SET_GUEST_DEBUG2 = 195
    SREGS2 = 200
    EXIT_HYPERCALL = 201
    BINARY_STATS_FD = 203
    EXIT_ON_EMULATION_FAILURE = 204
    VM_GPA_BITS = 207
    XSAVE2 = 208
    SYS_ATTRIBUTES = 209
    PMU_CAPABILITY = 212
    DISABLE_QUIRKS2 = 213
    VM_TSC_CONTROL = 214
    SYSTEM_EVENT_DATA = 215
    X86_TRIPLE_FAULT_EVENT = 218
    X86_NOTIFY_VMEXIT = 219
    VM_DISABLE_NX_HUGE_PAGES = 220
    DIRTY_LOG_RING_ACQ_REL = 223
    DIRTY_LOG_RING_WITH_BITMAP = 225
    PMU_EVENT_MASKED_EVENTS = 226
    USER_MEMORY2 = 231
    MEMORY_FAULT_INFO = 232
    MEMORY_ATTRIBUTES = 233
    GUEST_MEMFD = 234
    VM_TYPES = 235
    PRE_FAULT_MEMORY = 236
    X86_APIC_BUS_CYCLES_NS = 237
    X86_GUEST_MODE = 238


# ======================================================================================================
# 3. The processor's own flags (AMD64 manual, volume 2, section 3.1)
# ======================================================================================================


class Cr0(IntFlag):
    """X86_CR0_*: kvm_sregs.cr0."""

    PE = 1 << 0  # protected mode
    MP = 1 << 1
    EM = 1 << 2
    TS = 1 << 3
    ET = 1 << 4
    NE = 1 << 5
    WP = 1 << 16  # read-only pages bind the kernel too
    AM = 1 << 18
    NW = 1 << 29
    CD = 1 << 30
    PG = 1 << 31  # paging


class Cr4(IntFlag):
    """X86_CR4_*: kvm_sregs.cr4."""

    VME = 1 << 0
    PVI = 1 << 1
    TSD = 1 << 2
    DE = 1 << 3
    PSE = 1 << 4
    PAE = 1 << 5  # 64-bit page-table entries; long mode needs it
    MCE = 1 << 6
    PGE = 1 << 7
    PCE = 1 << 8
    OSFXSR = 1 << 9  # SSE
    OSXMMEXCPT = 1 << 10
    UMIP = 1 << 11
    LA57 = 1 << 12
    VMXE = 1 << 13
    SMXE = 1 << 14
    FSGSBASE = 1 << 16
    PCIDE = 1 << 17
    OSXSAVE = 1 << 18
    SMEP = 1 << 20
    SMAP = 1 << 21
    PKE = 1 << 22
    CET = 1 << 23


class Efer(IntFlag):
    """EFER_*: kvm_sregs.efer. The exported headers do not have it (kernel: asm/msr-index.h)."""

    SCE = 1 << 0  # syscall
    LME = 1 << 8  # long mode enabled
    LMA = 1 << 10  # long mode active: LME and paging
    NX = 1 << 11  # the no-execute bit of page-table entries
    SVME = 1 << 12
    LMSLE = 1 << 13
    FFXSR = 1 << 14
    TCE = 1 << 15
    AUTOIBRS = 1 << 21


class Rflags(IntFlag):
    """X86_EFLAGS_*: kvm_regs.rflags."""

    CF = 1 << 0
    FIXED = 1 << 1  # always set
    PF = 1 << 2
    AF = 1 << 4
    ZF = 1 << 6
    SF = 1 << 7
    TF = 1 << 8
    IF = 1 << 9
    DF = 1 << 10
    OF = 1 << 11
    IOPL = 3 << 12
    NT = 1 << 14
    RF = 1 << 16
    VM = 1 << 17
    AC = 1 << 18
    VIF = 1 << 19
    VIP = 1 << 20
    ID = 1 << 21


class Msr(IntEnum):
    """MSR_*: model-specific registers, by index (kernel: asm/msr-index.h, not exported)."""

    IA32_TSC = 0x10
    IA32_APICBASE = 0x1B
    IA32_TSC_ADJUST = 0x3B
    IA32_SYSENTER_CS = 0x174
    IA32_SYSENTER_ESP = 0x175
    IA32_SYSENTER_EIP = 0x176
    IA32_MISC_ENABLE = 0x1A0
    IA32_CR_PAT = 0x277
    MTRRdefType = 0x2FF
    IA32_TSC_DEADLINE = 0x6E0
    IA32_XSS = 0xDA0
    EFER = 0xC0000080
    STAR = 0xC0000081
    LSTAR = 0xC0000082
    CSTAR = 0xC0000083
    SYSCALL_MASK = 0xC0000084
    FS_BASE = 0xC0000100
    GS_BASE = 0xC0000101
    KERNEL_GS_BASE = 0xC0000102
    TSC_AUX = 0xC0000103


# ======================================================================================================
# 4. Structs, in the order of the headers
# ======================================================================================================

if TYPE_CHECKING:

    class _AnyField:
        """Tell the type checker that the fields of a struct are made at run time."""

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

else:
    _AnyField = object


class Struct(ctypes.Structure, _AnyField):
    """A struct of the kernel's. `bytes(struct)` copies it out, `Type.from_buffer_copy(data)` copies it in.

    Raises:
        AttributeError: a field is set that the struct does not have.
        OverflowError: a number is set that its field cannot hold. (Plain ctypes drops the high bits.)
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(type(self), name):
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        super().__setattr__(name, value)
        if isinstance(value, int) and getattr(self, name) != value:
            raise OverflowError(f"{type(self).__name__}.{name} cannot hold {value:#x}")

    def __repr__(self) -> str:
        fields = ((field[0], getattr(self, field[0])) for field in self._fields_)
        return f"{type(self).__name__}({', '.join(f'{name}={_show(value)}' for name, value in fields)})"


def _show(value: object) -> str:
    """Show a field: numbers in hex, structs in full, arrays and unions not at all."""
    return f"{value:#x}" if isinstance(value, int) else repr(value) if isinstance(value, Struct) else "..."


class FlexibleStruct(Struct):
    """A struct that ends in an array of any length (a C flexible array member).

    The class itself is the bare header, as the compiler measures it: its array has no elements.
    """

    _count_field_: str | None = None

    @classmethod
    def sized(cls: type[_Flexible], count: int) -> _Flexible:
        """Make one, all zeros, whose array has *count* elements and whose count field says so."""
        struct: _Flexible = _sized_type(cls, count)()
        if cls._count_field_:
            setattr(struct, cls._count_field_, count)
        return struct

    def check_count(self) -> None:
        """Raise ValueError if the count field promises elements that are not there for the kernel to read."""
        claimed = getattr(self, self._count_field_) if self._count_field_ else 0
        present = len(getattr(self, self._fields_[-1][0]))
        if claimed > present:
            field = f"{type(self).__name__}.{self._count_field_}"
            raise ValueError(f"{field} is {claimed}, of {present} elements")


_Flexible = TypeVar("_Flexible", bound=FlexibleStruct)
_Struct = TypeVar("_Struct", bound=Struct)


@functools.lru_cache(maxsize=64)
def _sized_type(cls: type[_Flexible], count: int) -> type[_Flexible]:
    """Derive the type of *cls* with *count* elements: the array that it adds hides the empty one."""
    name: str = cls._fields_[-1][0]
    element: Any = getattr(cls(), name)._type_
    return type(cls.__name__, (cls,), {"_fields_": ((name, element * count),)})


def _struct(*anonymous: str, **fields: Any) -> type[Struct]:
    """Declare a struct without a name of its own; members of its *anonymous* fields count as its own."""
    return type("struct", (Struct,), {"_anonymous_": anonymous, "_fields_": tuple(fields.items())})


def _union(*anonymous: str, **fields: Any) -> type[ctypes.Union]:
    """Declare a union, in the same way."""
    return type("union", (ctypes.Union,), {"_anonymous_": anonymous, "_fields_": tuple(fields.items())})


def _each(kind: Any, names: str) -> tuple[tuple[str, Any], ...]:
    """Declare several fields of one type, as C does in `__u64 rax, rbx, rcx;`."""
    return tuple((name, kind) for name in names.split())


class kvm_userspace_memory_region(Struct):
    """A slot of guest memory; memory_size 0 deletes it."""

    _fields_ = (
        ("slot", u32),
        ("flags", u32),  # MemFlag
        ("guest_phys_addr", u64),
        ("memory_size", u64),
        ("userspace_addr", u64),
    )


class kvm_userspace_memory_region2(Struct):
    """The same with memory from a guest_memfd."""

    _fields_ = (
        *kvm_userspace_memory_region._fields_,
        ("guest_memfd_offset", u64),
        ("guest_memfd", u32),
        ("pad1", u32),
        ("pad2", u64 * 14),
    )


class kvm_irq_level(Struct):
    """One interrupt line (a GSI) and its level, 0 or 1."""

    _anonymous_ = ("u",)
    _fields_ = (("u", _union(irq=u32, status=s32)), ("level", u32))


class kvm_pic_state(Struct):
    """One of the two 8259 interrupt controllers."""

    _fields_ = _each(
        u8,
        "last_irr irr imr isr priority_add irq_base read_reg_select poll special_mask init_state auto_eoi "
        "rotate_on_auto_eoi special_fully_nested_mode init4 elcr elcr_mask",
    )


class kvm_ioapic_state(Struct):
    """The I/O APIC. The header splits each entry of redirtbl into bit-fields; here it is its 64 bits."""

    _fields_ = (("base_address", u64), *_each(u32, "ioregsel id irr pad"), ("redirtbl", u64 * 24))


class kvm_irqchip(Struct):
    """The state of one interrupt controller; chip_id (Irqchip) says which."""

    _fields_ = (
        ("chip_id", u32),
        ("pad", u32),
        ("chip", _union(dummy=ctypes.c_char * 512, pic=kvm_pic_state, ioapic=kvm_ioapic_state)),
    )


class kvm_pit_config(Struct):
    """The 8254 timer that KVM_CREATE_PIT2 makes."""

    _fields_ = (("flags", u32), ("pad", u32 * 15))  # PitFlag


class kvm_regs(Struct):
    """The general-purpose registers."""

    _fields_ = _each(u64, "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags")


class kvm_lapic_state(Struct):
    """The registers of the local APIC, one in 16 bytes."""

    _fields_ = (("regs", ctypes.c_char * 0x400),)


class kvm_segment(Struct):
    """A segment register with the descriptor that it was loaded from."""

    _fields_ = (
        ("base", u64),
        ("limit", u32),
        ("selector", u16),
        *_each(u8, "type present dpl db s l g avl unusable padding"),
    )


class kvm_dtable(Struct):
    """GDTR or IDTR."""

    _fields_ = (("base", u64), ("limit", u16), ("padding", u16 * 3))


_SYSTEM_REGISTERS = (
    *_each(kvm_segment, "cs ds es fs gs ss tr ldt"),
    *_each(kvm_dtable, "gdt idt"),
    *_each(u64, "cr0 cr2 cr3 cr4 cr8 efer apic_base"),
)


class kvm_sregs(Struct):
    """The system registers: segments, descriptor tables, control registers."""

    _fields_ = (*_SYSTEM_REGISTERS, ("interrupt_bitmap", u64 * 4))


class kvm_sregs2(Struct):
    """The system registers, with the page-directory pointers of 32-bit PAE paging."""

    _fields_ = (*_SYSTEM_REGISTERS, ("flags", u64), ("pdptrs", u64 * 4))


class kvm_fpu(Struct):
    """The x87 and SSE registers. KVM_SET_FPU ignores mxcsr; kvm_xsave does not."""

    _fields_ = (
        ("fpr", u8 * 16 * 8),
        ("fcw", u16),
        ("fsw", u16),
        ("ftwx", u8),
        ("pad1", u8),
        ("last_opcode", u16),
        ("last_ip", u64),
        ("last_dp", u64),
        ("xmm", u8 * 16 * 16),
        ("mxcsr", u32),
        ("pad2", u32),
    )


class kvm_msr_entry(Struct):
    """One model-specific register and its value."""

    _fields_ = (("index", u32), ("reserved", u32), ("data", u64))


class kvm_msrs(FlexibleStruct):
    """Model-specific registers to read or write."""

    _count_field_ = "nmsrs"
    _fields_ = (("nmsrs", u32), ("pad", u32), ("entries", kvm_msr_entry * 0))


class kvm_msr_list(FlexibleStruct):
    """Indices of model-specific registers."""

    _count_field_ = "nmsrs"
    _fields_ = (("nmsrs", u32), ("indices", u32 * 0))


class kvm_msr_filter_range(Struct):
    """The MSRs base to base + nmsrs - 1: bit i of the bitmap allows (1) or denies (0) base + i."""

    _fields_ = (
        ("flags", u32),  # MsrFilterAccess
        ("nmsrs", u32),
        ("base", u32),
        ("bitmap", ctypes.POINTER(u8)),
    )


class kvm_msr_filter(Struct):
    """Which MSRs the guest may touch."""

    _fields_ = (
        ("flags", u32),  # MsrFilterDefault
        ("ranges", kvm_msr_filter_range * KVM_MSR_FILTER_MAX_RANGES),
    )


class kvm_cpuid_entry2(Struct):
    """What CPUID answers for one leaf (function) and subleaf (index)."""

    _fields_ = (
        ("function", u32),
        ("index", u32),
        ("flags", u32),  # CpuidFlag
        *_each(u32, "eax ebx ecx edx"),
        ("padding", u32 * 3),
    )


class kvm_cpuid2(FlexibleStruct):
    """The CPUID table of a vCPU."""

    _count_field_ = "nent"
    _fields_ = (("nent", u32), ("padding", u32), ("entries", kvm_cpuid_entry2 * 0))


class kvm_debug_exit_arch(Struct):
    """What stopped a debugged guest. Do not trust dr7: not every KVM fills it."""

    _fields_ = (("exception", u32), ("pad", u32), ("pc", u64), ("dr6", u64), ("dr7", u64))


class kvm_guest_debug_arch(Struct):
    """DR0 to DR7 while the host debugs."""

    _fields_ = (("debugreg", u64 * 8),)


class kvm_vcpu_events(Struct):
    """Exceptions, interrupts and NMIs that are pending or being delivered."""

    _fields_ = (
        ("exception", _struct(injected=u8, nr=u8, has_error_code=u8, pending=u8, error_code=u32)),
        ("interrupt", _struct(injected=u8, nr=u8, soft=u8, shadow=u8)),
        ("nmi", _struct(injected=u8, pending=u8, masked=u8, pad=u8)),
        ("sipi_vector", u32),
        ("flags", u32),  # VcpuEventValid
        ("smi", _struct(smm=u8, pending=u8, smm_inside_nmi=u8, latched_init=u8)),
        ("triple_fault", _struct(pending=u8)),
        ("reserved", u8 * 26),
        ("exception_has_payload", u8),
        ("exception_payload", u64),
    )


class kvm_debugregs(Struct):
    """The guest's own debug registers; db is DR0 to DR3."""

    _fields_ = (("db", u64 * 4), ("dr6", u64), ("dr7", u64), ("flags", u64), ("reserved", u64 * 9))


class kvm_xsave(FlexibleStruct):
    """The XSAVE area: x87, SSE, AVX... On CPUs with dynamic features (AMX) a longer one may be needed.

    `region` is the first 4096 bytes as 32-bit words: MXCSR is word 6, XSTATE_BV words 128 and 129.
    """

    _fields_ = (("region", u32 * 1024), ("extra", u32 * 0))


class kvm_xcr(Struct):
    """One extended control register."""

    _fields_ = (("xcr", u32), ("reserved", u32), ("value", u64))


class kvm_xcrs(Struct):
    """The extended control registers: so far only XCR0."""

    _fields_ = (("nr_xcrs", u32), ("flags", u32), ("xcrs", kvm_xcr * 16), ("padding", u64 * 16))


class kvm_sync_regs(Struct):
    """Registers that travel in the kvm_run page instead of by ioctls."""

    _fields_ = (("regs", kvm_regs), ("sregs", kvm_sregs), ("events", kvm_vcpu_events))


class kvm_run(Struct):
    """The page that a vCPU shares with its host: read an exit here, and answer it here.

    Only the member that belongs to exit_reason is valid, and only until the next `Vcpu.run`.
    """

    _anonymous_ = ("exit",)
    _fields_ = (
        ("request_interrupt_window", u8),
        ("immediate_exit", u8),
        ("padding1", u8 * 6),
        ("exit_reason", u32),  # KvmExit
        ("ready_for_interrupt_injection", u8),
        ("if_flag", u8),
        ("flags", u16),  # RunFlag
        ("cr8", u64),
        ("apic_base", u64),
        (
            "exit",
            _union(
                hw=_struct(hardware_exit_reason=u64),  # UNKNOWN
                fail_entry=_struct(hardware_entry_failure_reason=u64, cpu=u32),
                ex=_struct(exception=u32, error_code=u32),  # EXCEPTION
                # The data of an IO exit, size * count bytes, lies data_offset bytes into the page.
                io=_struct(direction=u8, size=u8, port=u16, count=u32, data_offset=u64),
                debug=_struct(arch=kvm_debug_exit_arch),
                mmio=_struct(phys_addr=u64, data=u8 * 8, len=u32, is_write=u8),
                hypercall=_struct("u", nr=u64, args=u64 * 6, ret=u64, u=_union(longmode=u32, flags=u64)),
                tpr_access=_struct(rip=u64, is_write=u32, pad=u32),
                internal=_struct(suberror=u32, ndata=u32, data=u64 * 16),  # INTERNAL_ERROR
                emulation_failure=_struct(  # the same, for InternalError.EMULATION: see failed_instruction
                    suberror=u32, ndata=u32, flags=u64, insn_size=u8, insn_bytes=u8 * 15
                ),
                system_event=_struct("u", type=u32, ndata=u32, u=_union(flags=u64, data=u64 * 16)),
                eoi=_struct(vector=u8),  # IOAPIC_EOI
                # X86_RDMSR and X86_WRMSR: the host fills data, or sets error to make the guest take a #GP.
                msr=_struct(error=u8, pad=u8 * 7, reason=u32, index=u32, data=u64),
                notify=_struct(flags=u32),
                memory_fault=_struct(flags=u64, gpa=u64, size=u64),
                padding=u8 * 256,
            ),
        ),
        ("kvm_valid_regs", u64),  # SyncRegs: which members of s.regs KVM fills at an exit
        ("kvm_dirty_regs", u64),  # SyncRegs: which members of s.regs KVM loads at the next entry
        ("s", _union(regs=kvm_sync_regs, padding=u8 * 2048)),
    )


class kvm_translation(Struct):
    """The question "where does this guest-virtual address lead?" and KVM's answer."""

    _fields_ = (
        ("linear_address", u64),
        ("physical_address", u64),
        *_each(u8, "valid writeable usermode"),
        ("pad", u8 * 5),
    )


class kvm_interrupt(Struct):
    """An interrupt vector to inject."""

    _fields_ = (("irq", u32),)


class kvm_dirty_log(Struct):
    """Where KVM_GET_DIRTY_LOG stores its bitmap, one bit for each page of the slot."""

    _anonymous_ = ("u",)
    _fields_ = (("slot", u32), ("padding1", u32), ("u", _union(dirty_bitmap=ctypes.c_void_p, padding2=u64)))


class kvm_clear_dirty_log(Struct):
    """Which pages of a slot KVM_CLEAR_DIRTY_LOG marks clean."""

    _anonymous_ = ("u",)
    _fields_ = (
        ("slot", u32),
        ("num_pages", u32),
        ("first_page", u64),
        ("u", _union(dirty_bitmap=ctypes.c_void_p, padding2=u64)),
    )


class kvm_signal_mask(FlexibleStruct):
    """The kernel's sigset_t: 8 bytes on x86-64, bit n - 1 for signal n."""

    _count_field_ = "len"
    _fields_ = (("len", u32), ("sigset", u8 * 0))


class kvm_mp_state(Struct):
    """What a vCPU is doing, as other vCPUs' INIT and SIPI see it (MpState)."""

    _fields_ = (("mp_state", u32),)


class kvm_guest_debug(Struct):
    """How the host debugs the guest; control is a GuestDebug."""

    _fields_ = (("control", u32), ("pad", u32), ("arch", kvm_guest_debug_arch))


class kvm_ioeventfd(Struct):
    """A guest address whose writes signal an eventfd instead of causing an exit."""

    _fields_ = (
        ("datamatch", u64),
        ("addr", u64),
        ("len", u32),
        ("fd", s32),
        ("flags", u32),  # IoeventfdFlag
        ("pad", u8 * 36),
    )


class kvm_enable_cap(Struct):
    """A capability to switch on, with its arguments."""

    _fields_ = (("cap", u32), ("flags", u32), ("args", u64 * 4), ("pad", u8 * 64))


class kvm_irqfd(Struct):
    """An eventfd whose signal raises a guest interrupt line (a GSI); flags is an IrqfdFlag."""

    _fields_ = (*_each(u32, "fd gsi flags resamplefd"), ("pad", u8 * 16))


# ======================================================================================================
# 5. Ioctls, in numeric order
# ======================================================================================================


class Ioctl(int):
    """An ioctl number that knows its name, the struct that it passes and the capability that it needs.

    A bare `nr` is no identity: 0x9f is KVM_GET_PIT2 for a VM and KVM_GET_VCPU_EVENTS for a vCPU.
    """

    argument: type[ctypes.Structure] | None = None
    capability: Cap | None = None

    @property
    def name(self) -> str:
        """The kernel's name, such as "KVM_RUN"."""
        return _IOCTL_NAMES[self]


def _ioc(direction: int, nr: int, argument: type[ctypes.Structure] | None, capability: Cap | None) -> Ioctl:
    size = ctypes.sizeof(argument) if argument else 0
    request = Ioctl(direction << 30 | size << 16 | KVMIO << 8 | nr)
    request.argument, request.capability = argument, capability
    return request


def _IO(nr: int, capability: Cap | None = None) -> Ioctl:
    return _ioc(0, nr, None, capability)


def _IOW(nr: int, argument: type[ctypes.Structure], capability: Cap | None = None) -> Ioctl:
    return _ioc(1, nr, argument, capability)


def _IOR(nr: int, argument: type[ctypes.Structure], capability: Cap | None = None) -> Ioctl:
    return _ioc(2, nr, argument, capability)


def _IOWR(nr: int, argument: type[ctypes.Structure], capability: Cap | None = None) -> Ioctl:
    return _ioc(3, nr, argument, capability)


# The system fd, /dev/kvm.
KVM_GET_API_VERSION = _IO(0x00)
KVM_CREATE_VM = _IO(0x01)
KVM_GET_MSR_INDEX_LIST = _IOWR(0x02, kvm_msr_list)
KVM_CHECK_EXTENSION = _IO(0x03)  # for a VM fd too, with Cap.CHECK_EXTENSION_VM
KVM_GET_VCPU_MMAP_SIZE = _IO(0x04)
KVM_GET_SUPPORTED_CPUID = _IOWR(0x05, kvm_cpuid2, Cap.EXT_CPUID)
KVM_GET_EMULATED_CPUID = _IOWR(0x09, kvm_cpuid2, Cap.EXT_EMUL_CPUID)
KVM_GET_MSR_FEATURE_INDEX_LIST = _IOWR(0x0A, kvm_msr_list, Cap.GET_MSR_FEATURES)

# The fd of a VM.
KVM_CREATE_VCPU = _IO(0x41)
KVM_GET_DIRTY_LOG = _IOW(0x42, kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION = _IOW(0x46, kvm_userspace_memory_region, Cap.USER_MEMORY)
KVM_SET_USER_MEMORY_REGION2 = _IOW(0x49, kvm_userspace_memory_region2, Cap.USER_MEMORY2)
KVM_CREATE_IRQCHIP = _IO(0x60, Cap.IRQCHIP)
KVM_IRQ_LINE = _IOW(0x61, kvm_irq_level, Cap.IRQCHIP)
KVM_GET_IRQCHIP = _IOWR(0x62, kvm_irqchip, Cap.IRQCHIP)
KVM_SET_IRQCHIP = _IOR(0x63, kvm_irqchip, Cap.IRQCHIP)  # _IOR is the kernel's slip, now ABI
KVM_IRQFD = _IOW(0x76, kvm_irqfd, Cap.IRQFD)
KVM_CREATE_PIT2 = _IOW(0x77, kvm_pit_config, Cap.PIT2)
KVM_IOEVENTFD = _IOW(0x79, kvm_ioeventfd, Cap.IOEVENTFD)

# The fd of a vCPU; KVM_ENABLE_CAP and the two after 0xbf are for a VM.
KVM_RUN = _IO(0x80)
KVM_GET_REGS = _IOR(0x81, kvm_regs)
KVM_SET_REGS = _IOW(0x82, kvm_regs)
KVM_GET_SREGS = _IOR(0x83, kvm_sregs)
KVM_SET_SREGS = _IOW(0x84, kvm_sregs)
KVM_TRANSLATE = _IOWR(0x85, kvm_translation)
KVM_INTERRUPT = _IOW(0x86, kvm_interrupt)
KVM_GET_MSRS = _IOWR(0x88, kvm_msrs)
KVM_SET_MSRS = _IOW(0x89, kvm_msrs)
KVM_SET_SIGNAL_MASK = _IOW(0x8B, kvm_signal_mask)
KVM_GET_FPU = _IOR(0x8C, kvm_fpu)
KVM_SET_FPU = _IOW(0x8D, kvm_fpu)
KVM_GET_LAPIC = _IOR(0x8E, kvm_lapic_state, Cap.IRQCHIP)
KVM_SET_LAPIC = _IOW(0x8F, kvm_lapic_state, Cap.IRQCHIP)
KVM_SET_CPUID2 = _IOW(0x90, kvm_cpuid2, Cap.EXT_CPUID)
KVM_GET_CPUID2 = _IOWR(0x91, kvm_cpuid2, Cap.EXT_CPUID)
KVM_GET_MP_STATE = _IOR(0x98, kvm_mp_state, Cap.MP_STATE)
KVM_SET_MP_STATE = _IOW(0x99, kvm_mp_state, Cap.MP_STATE)
KVM_NMI = _IO(0x9A, Cap.USER_NMI)
KVM_SET_GUEST_DEBUG = _IOW(0x9B, kvm_guest_debug, Cap.SET_GUEST_DEBUG)
KVM_GET_VCPU_EVENTS = _IOR(0x9F, kvm_vcpu_events, Cap.VCPU_EVENTS)
KVM_SET_VCPU_EVENTS = _IOW(0xA0, kvm_vcpu_events, Cap.VCPU_EVENTS)
KVM_GET_DEBUGREGS = _IOR(0xA1, kvm_debugregs, Cap.DEBUGREGS)
KVM_SET_DEBUGREGS = _IOW(0xA2, kvm_debugregs, Cap.DEBUGREGS)
KVM_SET_TSC_KHZ = _IO(0xA2, Cap.TSC_CONTROL)
KVM_GET_TSC_KHZ = _IO(0xA3, Cap.GET_TSC_KHZ)
KVM_ENABLE_CAP = _IOW(0xA3, kvm_enable_cap, Cap.ENABLE_CAP)  # for a VM: Cap.ENABLE_CAP_VM
KVM_GET_XSAVE = _IOR(0xA4, kvm_xsave, Cap.XSAVE)
KVM_SET_XSAVE = _IOW(0xA5, kvm_xsave, Cap.XSAVE)
KVM_GET_XCRS = _IOR(0xA6, kvm_xcrs, Cap.XCRS)
KVM_SET_XCRS = _IOW(0xA7, kvm_xcrs, Cap.XCRS)
KVM_CLEAR_DIRTY_LOG = _IOWR(0xC0, kvm_clear_dirty_log, Cap.MANUAL_DIRTY_LOG_PROTECT2)
KVM_X86_SET_MSR_FILTER = _IOW(0xC6, kvm_msr_filter, Cap.X86_MSR_FILTER)
KVM_GET_SREGS2 = _IOR(0xCC, kvm_sregs2, Cap.SREGS2)
KVM_SET_SREGS2 = _IOW(0xCD, kvm_sregs2, Cap.SREGS2)
KVM_GET_XSAVE2 = _IOR(0xCF, kvm_xsave, Cap.XSAVE2)

_IOCTL_NAMES = {request: name for name, request in dict(globals()).items() if isinstance(request, Ioctl)}

libc = ctypes.CDLL(None, use_errno=True)
# Not libc.ioctl: an attribute is shared, and its argtypes with it. CDLL (not PyDLL) releases the GIL.
_ioctl = libc["ioctl"]
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)
_ioctl.restype = ctypes.c_int
# The same for callers that pass an int, a request and a reference, or None: a call without argtypes is a third
# faster. An int argument would lose its upper half.
_quick_ioctl = libc["ioctl"]
_quick_ioctl.restype = ctypes.c_int


class KvmError(OSError):
    """A system call on a KVM file descriptor failed.

    Accessible attributes: `errno`; `ioctl`, the name of the ioctl (or "open" or "mmap"); `detail`, what is
    known beyond the errno, or "".
    """

    def __init__(self, ioctl: str, number: int, detail: str = "") -> None:
        super().__init__(number, os.strerror(number))
        self.ioctl = ioctl
        self.detail = detail

    def __str__(self) -> str:
        symbol = errno.errorcode.get(self.errno or 0, str(self.errno))
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.ioctl} failed: {symbol} ({self.strerror}){detail}"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.ioctl, self.errno, self.detail)


def ioctl(fd: int, request: Ioctl, argument: Struct | int | None = None) -> int:
    """Make one ioctl, without the GIL, and return its result (not negative).

    Raises:
        KvmError: the kernel refused. EINTR and EAGAIN are errors like any other: nothing is retried.
        TypeError: the struct is not the one that this request passes, so that the kernel would read or write
            beyond its end.
        ValueError: the struct promises more array elements than it has: the same.
    """
    reference: object = argument
    if isinstance(argument, ctypes.Structure):
        if request.argument is None or not isinstance(argument, request.argument):
            raise TypeError(f"{request.name} does not take a {type(argument).__name__}")
        if isinstance(argument, FlexibleStruct):
            argument.check_count()
        reference = ctypes.byref(argument)
    result: int = _ioctl(fd, request, reference)
    if result < 0:
        raise KvmError(request.name, ctypes.get_errno())
    return result


class PreparedIoctl:
    """An ioctl to be made many times with the same struct, which is checked once and must not change afterwards.

    Raises as `ioctl`. A result less than *least* is an error of `make_ioctls`.
    """

    def __init__(self, request: Ioctl, argument: Struct, *, least: int = 0) -> None:
        if request.argument is None or not isinstance(argument, request.argument):
            raise TypeError(f"{request.name} does not take a {type(argument).__name__}")
        if isinstance(argument, FlexibleStruct):
            argument.check_count()
        self.name = request.name
        self.call = int(request), ctypes.byref(argument), least  # for make_ioctls; the reference keeps the struct


def make_ioctls(fd: int, prepared: Iterable[PreparedIoctl]) -> None:
    """Make them on *fd*, one after the other; raises KvmError at the first that the kernel refuses."""
    for each in prepared:
        request, reference, least = each.call
        if _quick_ioctl(fd, request, reference) < least:
            raise KvmError(each.name, ctypes.get_errno() or errno.EINVAL)


# ======================================================================================================
# 6. Handles: one class for each kind of file descriptor
# ======================================================================================================


class _Handle:
    """An owned file descriptor.

    It closes at the end of a `with` block, by `close()`, which may be called twice, or when it is forgotten.
    Afterwards `fd` is -1, so that a late ioctl fails with EBADF and cannot hit another file that was given
    the old number.
    """

    _fd = -1

    @property
    def fd(self) -> int:
        """The file descriptor, still owned by the handle; -1 once closed."""
        return self._fd

    def close(self) -> None:
        """Close the file descriptor."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self: _AnyHandle) -> _AnyHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._fd >= 0:
            self.close()

    def __repr__(self) -> str:
        state = f"fd {self._fd}" if self._fd >= 0 else "closed"
        return f"<{type(self).__name__} {state}>"

    def _get(self, request: Ioctl, kind: type[_Struct]) -> _Struct:
        struct = kind()
        ioctl(self._fd, request, struct)
        return struct

    def _get_list(self, request: Ioctl, kind: type[_Flexible], count: int = 64) -> _Flexible:
        """Read a struct with a list of unknown length: E2BIG means "more room", without saying how much."""
        while True:
            struct = kind.sized(count)
            try:
                ioctl(self._fd, request, struct)
            except KvmError as error:
                if error.errno != errno.E2BIG or count >= _MAX_LIST:
                    raise
                count *= 2
                continue
            # The count field now says how much of the room is filled: give back exactly that.
            filled = getattr(struct, str(kind._count_field_))
            exact: _Flexible = _sized_type(kind, filled).from_buffer_copy(struct)
            return exact


_AnyHandle = TypeVar("_AnyHandle", bound=_Handle)
_MAX_LIST = 1 << 14  # far beyond any list that KVM has: a kernel that still says E2BIG there is broken


class Kvm(_Handle):
    """The system handle: what this host's KVM can do, and new VMs.

    Raises:
        KvmError: the device cannot be opened (its `ioctl` is "open").
    """

    def __init__(self, path: str = "/dev/kvm") -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise KvmError("open", error.errno or 0, path) from error

    def api_version(self) -> int:
        """Return the API version: KVM_API_VERSION, or this is no KVM to work with."""
        return ioctl(self._fd, KVM_GET_API_VERSION)

    def check_extension(self, cap: int) -> int:
        """Ask about a capability (Cap): 0 is no, 1 is yes, and for some the number means more."""
        return ioctl(self._fd, KVM_CHECK_EXTENSION, cap)

    def vcpu_mmap_size(self) -> int:
        """Return how many bytes of a vCPU's fd to map: kvm_run and the pages that follow it."""
        return ioctl(self._fd, KVM_GET_VCPU_MMAP_SIZE)

    def supported_cpuid(self) -> kvm_cpuid2:
        """Return, afresh, the CPUID table that this KVM can give a vCPU; `entries` has nent elements."""
        return self._get_list(KVM_GET_SUPPORTED_CPUID, kvm_cpuid2)

    def emulated_cpuid(self) -> kvm_cpuid2:
        """Return the CPUID features that KVM emulates although the processor lacks them."""
        return self._get_list(KVM_GET_EMULATED_CPUID, kvm_cpuid2)

    def msr_index_list(self) -> list[int]:
        """Return the MSRs that make up a guest's state: those to save and restore."""
        return list(self._get_list(KVM_GET_MSR_INDEX_LIST, kvm_msr_list).indices)

    def msr_feature_index_list(self) -> list[int]:
        """Return the MSRs that describe features of the host."""
        return list(self._get_list(KVM_GET_MSR_FEATURE_INDEX_LIST, kvm_msr_list).indices)

    def create_vm(self, type: int = 0) -> Vm:
        """Create a VM without memory and vCPUs.

        Raises:
            KvmError: EINTR if a signal was pending: the kernel gives up instead of waiting; try again.
        """
        mmap_size = self.vcpu_mmap_size()
        return Vm(ioctl(self._fd, KVM_CREATE_VM, type), mmap_size)


class Vm(_Handle):
    """A virtual machine: an address space, and interrupt controllers if asked for.

    Made by `Kvm.create_vm`; it outlives the handle that made it, as its vCPUs outlive it.
    """

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        self._fd = fd
        self._vcpu_mmap_size = vcpu_mmap_size
        self._slot_pages: dict[int, int] = {}

    def check_extension(self, cap: int) -> int:
        """Ask about a capability (Cap) of this VM, which may differ from the system's answer."""
        return ioctl(self._fd, KVM_CHECK_EXTENSION, cap)

    def set_user_memory_region(
        self, slot: int, flags: int, guest_phys_addr: int, memory_size: int, userspace_addr: int
    ) -> None:
        """Make [userspace_addr, + memory_size) appear at guest_phys_addr; memory_size 0 deletes the slot.

        All three are multiples of 4096. The host memory must stay mapped while the slot exists: the guest
        reaches whatever is at those addresses. `flags` is a MemFlag. Of an existing slot, only
        guest_phys_addr and LOG_DIRTY_PAGES may change: delete it first to change more.

        Raises:
            KvmError: EINVAL for sizes, alignment and flags; EEXIST if it overlaps another slot.
        """
        region = kvm_userspace_memory_region(slot, flags, guest_phys_addr, memory_size, userspace_addr)
        ioctl(self._fd, KVM_SET_USER_MEMORY_REGION, region)
        self._slot_pages[slot] = memory_size // mmap.PAGESIZE

    def create_vcpu(self, vcpu_id: int = 0) -> Vcpu:
        """Create a virtual processor. Create the irqchip, if there is to be one, before."""
        xsave_size = self.check_extension(Cap.XSAVE2)
        return Vcpu(ioctl(self._fd, KVM_CREATE_VCPU, vcpu_id), self._vcpu_mmap_size, xsave_size)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        """Switch on a capability of the VM, with up to four arguments."""
        ioctl(self._fd, KVM_ENABLE_CAP, _enable_cap(cap, args, flags))

    def set_msr_filter(self, msr_filter: kvm_msr_filter) -> None:
        """Decide which MSRs the guest may touch; see `deny_msrs_except`.

        A refused access is a #GP in the guest, or an exit with Cap.X86_USER_SPACE_MSR. x2APIC MSRs are not
        filtered, nor are those that VM entry, not the guest, loads.
        """
        ioctl(self._fd, KVM_X86_SET_MSR_FILTER, msr_filter)

    def get_dirty_log(self, slot: int) -> bytes:
        """Return a bitmap of the pages of *slot* written since the last call, and start anew.

        Bit i % 8 of byte i // 8 is page i; the bitmap is padded to a multiple of 8 bytes. The slot has
        MemFlag.LOG_DIRTY_PAGES. With Cap.MANUAL_DIRTY_LOG_PROTECT2 on, nothing starts anew until
        `clear_dirty_log`.

        Raises:
            KvmError: ENOENT if the slot has no log or was not set through this handle.
        """
        # KVM writes as much as the slot needs, whatever room there is: the caller must not choose the size.
        page_count = self._slot_pages.get(slot, 0)
        if not page_count:
            raise KvmError(KVM_GET_DIRTY_LOG.name, errno.ENOENT, f"there is no slot {slot}")
        bitmap = ctypes.create_string_buffer(_bitmap_size(page_count))
        ioctl(self._fd, KVM_GET_DIRTY_LOG, kvm_dirty_log(slot=slot, dirty_bitmap=ctypes.addressof(bitmap)))
        return bitmap.raw

    def clear_dirty_log(self, slot: int, first_page: int, num_pages: int, bitmap: bytes) -> None:
        """Mark pages clean: page first_page + i where bit i of *bitmap* is set, i < num_pages.

        first_page is a multiple of 64, and num_pages too unless it reaches the end of the slot.
        """
        padded = ctypes.create_string_buffer(bitmap, max(len(bitmap), _bitmap_size(num_pages)))
        log = kvm_clear_dirty_log(slot=slot, num_pages=num_pages, first_page=first_page)
        log.dirty_bitmap = ctypes.addressof(padded)
        ioctl(self._fd, KVM_CLEAR_DIRTY_LOG, log)

    def create_irqchip(self) -> None:
        """Create the PIC, the I/O APIC and a local APIC for each vCPU to come.

        HLT then waits in the kernel and exits no more. It is much quicker after the memory slots are set.
        """
        ioctl(self._fd, KVM_CREATE_IRQCHIP)

    def create_pit2(self, flags: int = 0) -> None:
        """Create the 8254 timer, on GSI 0 of an irqchip made before; `flags` is a PitFlag."""
        ioctl(self._fd, KVM_CREATE_PIT2, kvm_pit_config(flags=flags))

    def get_irqchip(self, chip_id: int) -> kvm_irqchip:
        """Read the state of one interrupt controller (Irqchip)."""
        chip = kvm_irqchip(chip_id=chip_id)
        ioctl(self._fd, KVM_GET_IRQCHIP, chip)
        return chip

    def set_irqchip(self, chip: kvm_irqchip) -> None:
        """Write the state of one interrupt controller."""
        ioctl(self._fd, KVM_SET_IRQCHIP, chip)

    def irq_line(self, irq: int, level: int) -> None:
        """Set the level, 0 or 1, of the interrupt line *irq* (a GSI)."""
        ioctl(self._fd, KVM_IRQ_LINE, kvm_irq_level(irq=irq, level=level))

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None:
        """Let the eventfd *fd* raise interrupt line *gsi*; IrqfdFlag.DEASSIGN undoes it."""
        ioctl(self._fd, KVM_IRQFD, kvm_irqfd(fd=fd, gsi=gsi, flags=flags, resamplefd=resamplefd))

    def ioeventfd(
        self, fd: int, addr: int, length: int, *, datamatch: int | None = None, flags: int = 0
    ) -> None:
        """Let guest writes of *length* bytes to *addr* signal the eventfd *fd* instead of causing an exit.

        *length* is 1, 2, 4 or 8, or 0 for any. *addr* is a guest-physical address, or a port with
        IoeventfdFlag.PIO. With *datamatch*, only writes of that value count. Undo it by the same call with
        IoeventfdFlag.DEASSIGN.
        """
        if datamatch is not None:
            flags |= IoeventfdFlag.DATAMATCH
        event = kvm_ioeventfd(datamatch=datamatch or 0, addr=addr, len=length, fd=fd, flags=flags)
        ioctl(self._fd, KVM_IOEVENTFD, event)


_MAX_CR8 = 0xF  # the task priority has four bits
_KvmRun: TypeAlias = kvm_run  # inside Vcpu, kvm_run is the property


_RUN = int(KVM_RUN)  # a plain int: on the path of every exit


class Vcpu(_Handle):
    """A virtual processor. Made by `Vm.create_vcpu`; to be used by one thread at a time.

    `kvm_run` and `page` are two views of the memory that it shares with the host. A view that is still held
    when the handle closes stays safe to use: it keeps the memory, and in the kernel the vCPU, alive.
    """

    def __init__(self, fd: int, mmap_size: int, xsave_size: int = 0) -> None:
        self._fd = fd
        self._xsave_size = max(xsave_size, ctypes.sizeof(kvm_xsave))
        self._page: memoryview | None = None
        try:
            self._page = memoryview(mmap.mmap(fd, mmap_size))
        except (OSError, ValueError) as error:
            self.close()
            raise KvmError("mmap", getattr(error, "errno", None) or errno.EINVAL, "kvm_run") from error
        self._kvm_run: kvm_run | None = kvm_run.from_buffer(self._page)

    def close(self) -> None:
        """Close the file descriptor and give up the shared memory, which goes with the last view of it."""
        self._kvm_run = self._page = None
        super().close()

    @property
    def kvm_run(self) -> _KvmRun:
        """The shared memory as a struct: exit_reason and its details, immediate_exit, synced registers."""
        if self._kvm_run is None:
            raise KvmError("kvm_run", errno.EBADF, "the vCPU is closed")
        return self._kvm_run

    @property
    def page(self) -> memoryview:
        """All of the shared memory as bytes, writable: the data of an IO exit is in it, at io.data_offset."""
        if self._page is None:
            raise KvmError("kvm_run", errno.EBADF, "the vCPU is closed")
        return self._page

    def run(self) -> int:
        """Run the guest until it needs the host; the GIL is free meanwhile.

        Returns 0 when kvm_run.exit_reason says what it needs; EINTR after a signal to this thread or with
        immediate_exit set; EAGAIN when the vCPU was not ready to run. Nothing is retried.

        Raises:
            KvmError: any other errno.
        """
        if _quick_ioctl(self._fd, _RUN, None) >= 0:
            return 0
        number = ctypes.get_errno()
        if number == errno.EINTR or number == errno.EAGAIN:
            return number
        raise KvmError("KVM_RUN", number)

    def get_regs(self) -> kvm_regs:
        """Read the general-purpose registers."""
        return self._get(KVM_GET_REGS, kvm_regs)

    def set_regs(self, regs: kvm_regs) -> None:
        """Write the general-purpose registers; this also drops a pending exception."""
        ioctl(self._fd, KVM_SET_REGS, regs)

    def get_sregs(self) -> kvm_sregs:
        """Read the system registers."""
        return self._get(KVM_GET_SREGS, kvm_sregs)

    def set_sregs(self, sregs: kvm_sregs) -> None:
        """Write the system registers; EINVAL if they contradict each other or the CPUID table."""
        ioctl(self._fd, KVM_SET_SREGS, sregs)
        self._share_cr8(sregs.cr8)

    def get_sregs2(self) -> kvm_sregs2:
        """Read the system registers, with the PAE page-directory pointers."""
        return self._get(KVM_GET_SREGS2, kvm_sregs2)

    def set_sregs2(self, sregs2: kvm_sregs2) -> None:
        """Write the system registers, with the PAE page-directory pointers."""
        ioctl(self._fd, KVM_SET_SREGS2, sregs2)
        self._share_cr8(sregs2.cr8)

    def _share_cr8(self, cr8: int) -> None:
        """Put CR8 where the next KVM_RUN takes it from if there is no irqchip (api.rst, kvm_run)."""
        if cr8 <= _MAX_CR8:  # KVM ignored what is more
            self.kvm_run.cr8 = cr8

    def get_fpu(self) -> kvm_fpu:
        """Read the x87 and SSE registers."""
        return self._get(KVM_GET_FPU, kvm_fpu)

    def set_fpu(self, fpu: kvm_fpu) -> None:
        """Write the x87 and SSE registers, but not mxcsr.

        On a fresh vCPU they can get lost, because nothing marks them as in use: `set_xsave` does.
        """
        ioctl(self._fd, KVM_SET_FPU, fpu)

    def get_xsave(self) -> kvm_xsave:
        """Read the XSAVE area, as long as this vCPU's is (4096 bytes, more with dynamic features)."""
        extra = self._xsave_size - ctypes.sizeof(kvm_xsave)
        if not extra:
            return self._get(KVM_GET_XSAVE, kvm_xsave)
        xsave = kvm_xsave.sized(extra // 4)
        ioctl(self._fd, KVM_GET_XSAVE2, xsave)
        return xsave

    def set_xsave(self, xsave: kvm_xsave) -> None:
        """Write the XSAVE area; what has its bit in XSTATE_BV clear is reset, whatever its bytes say."""
        if ctypes.sizeof(xsave) < self._xsave_size:
            raise KvmError(KVM_SET_XSAVE.name, errno.EINVAL, f"needs {self._xsave_size} bytes")
        ioctl(self._fd, KVM_SET_XSAVE, xsave)

    def get_xcrs(self) -> kvm_xcrs:
        """Read the extended control registers."""
        return self._get(KVM_GET_XCRS, kvm_xcrs)

    def set_xcrs(self, xcrs: kvm_xcrs) -> None:
        """Write the extended control registers."""
        ioctl(self._fd, KVM_SET_XCRS, xcrs)

    def get_debugregs(self) -> kvm_debugregs:
        """Read the guest's debug registers."""
        return self._get(KVM_GET_DEBUGREGS, kvm_debugregs)

    def set_debugregs(self, debugregs: kvm_debugregs) -> None:
        """Write the guest's debug registers."""
        ioctl(self._fd, KVM_SET_DEBUGREGS, debugregs)

    def get_vcpu_events(self) -> kvm_vcpu_events:
        """Read what is pending: exceptions, interrupts, NMIs."""
        return self._get(KVM_GET_VCPU_EVENTS, kvm_vcpu_events)

    def set_vcpu_events(self, events: kvm_vcpu_events) -> None:
        """Write what is pending; `events.flags` (VcpuEventValid) says which optional members count."""
        ioctl(self._fd, KVM_SET_VCPU_EVENTS, events)

    def get_mp_state(self) -> kvm_mp_state:
        """Read whether the vCPU runs, is halted or waits for INIT or SIPI."""
        return self._get(KVM_GET_MP_STATE, kvm_mp_state)

    def set_mp_state(self, state: kvm_mp_state) -> None:
        """Write whether the vCPU runs, is halted or waits; other than RUNNABLE needs an irqchip."""
        ioctl(self._fd, KVM_SET_MP_STATE, state)

    def get_lapic(self) -> kvm_lapic_state:
        """Read the local APIC of a VM with an irqchip."""
        return self._get(KVM_GET_LAPIC, kvm_lapic_state)

    def set_lapic(self, lapic: kvm_lapic_state) -> None:
        """Write the local APIC of a VM with an irqchip."""
        ioctl(self._fd, KVM_SET_LAPIC, lapic)

    def get_cpuid2(self) -> kvm_cpuid2:
        """Read the CPUID table that the guest sees."""
        return self._get_list(KVM_GET_CPUID2, kvm_cpuid2)

    def set_cpuid2(self, cpuid: kvm_cpuid2) -> None:
        """Set the CPUID table that the guest sees, before its first run."""
        ioctl(self._fd, KVM_SET_CPUID2, cpuid)

    def get_tsc_khz(self) -> int:
        """Return the frequency of the guest's time-stamp counter, in kHz."""
        return ioctl(self._fd, KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """Set the frequency of the guest's time-stamp counter, in kHz."""
        ioctl(self._fd, KVM_SET_TSC_KHZ, khz)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """Read model-specific registers, at most 255 at a time; return their values by index.

        Raises:
            KvmError: EINVAL at the first that cannot be read; the message names it.
        """
        wanted = msrs(dict.fromkeys(indices, 0))
        self._move_msrs(KVM_GET_MSRS, wanted)
        return {entry.index: entry.data for entry in wanted.entries}

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Write model-specific registers, at most 255 at a time, in the mapping's order.

        Raises:
            KvmError: EINVAL at the first that cannot be written; the message names it. Those before it are
                written.
        """
        self._move_msrs(KVM_SET_MSRS, msrs(values))

    def _move_msrs(self, request: Ioctl, msrs: kvm_msrs) -> None:
        done = ioctl(self._fd, request, msrs)
        if done < msrs.nmsrs:
            raise KvmError(request.name, errno.EINVAL, f"MSR {_msr_name(msrs.entries[done].index)}")

    def set_guest_debug(self, debug: kvm_guest_debug) -> None:
        """Let the host debug the guest: single steps and breakpoints become KVM_EXIT_DEBUG.

        Success is no proof: there are KVMs that accept every mode and honour few (kvm_pvm).
        """
        ioctl(self._fd, KVM_SET_GUEST_DEBUG, debug)

    def translate(self, gva: int) -> kvm_translation:
        """Look up a guest-virtual address in the guest's page tables; `valid` is 0 if it is not mapped."""
        translation = kvm_translation(linear_address=gva)
        ioctl(self._fd, KVM_TRANSLATE, translation)
        return translation

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> None:
        """Switch on a capability of the vCPU, with up to four arguments."""
        ioctl(self._fd, KVM_ENABLE_CAP, _enable_cap(cap, args, flags))

    def set_signal_mask(self, signals: Iterable[int] | None) -> None:
        """Block exactly *signals* while `run` is in the kernel; None: keep the thread's own mask.

        Signals blocked in the thread but not here end a run with EINTR and stay pending.
        """
        if signals is None:
            ioctl(self._fd, KVM_SET_SIGNAL_MASK)
            return
        bits = sum({1 << (signal - 1) for signal in signals})
        mask = kvm_signal_mask.sized(8)
        mask.sigset[:] = bits.to_bytes(8, "little")
        ioctl(self._fd, KVM_SET_SIGNAL_MASK, mask)

    def interrupt(self, irq: int) -> None:
        """Inject interrupt vector *irq* at the next run; not with an irqchip.

        Raises:
            KvmError: EEXIST if one is already waiting, ENXIO with an irqchip.
        """
        ioctl(self._fd, KVM_INTERRUPT, kvm_interrupt(irq=irq))

    def nmi(self) -> None:
        """Inject a non-maskable interrupt at the next run."""
        ioctl(self._fd, KVM_NMI)


def deny_msrs_except(indices: Iterable[int]) -> kvm_msr_filter:
    """Make the filter that lets the guest read and write these MSRs and refuses all others.

    Raises:
        ValueError: more than KVM_MSR_FILTER_MAX_RANGES (16) indices.
    """
    allowed = list(indices)
    if len(allowed) > KVM_MSR_FILTER_MAX_RANGES:
        raise ValueError(f"an MSR filter has {KVM_MSR_FILTER_MAX_RANGES} ranges, not {len(allowed)}")
    msr_filter = kvm_msr_filter(flags=MsrFilterDefault.DENY)
    # Without any range KVM refuses to deny by default. So the first one is there in any case: it allows the
    # first MSR, or denies MSR 0.
    for entry, index in zip(msr_filter.ranges, allowed or [0], strict=False):
        entry.flags = MsrFilterAccess.READ | MsrFilterAccess.WRITE
        entry.base, entry.nmsrs = index, 1
        entry.bitmap = (u8 * 8)(1 if allowed else 0)  # KVM copies whole 64-bit words
    return msr_filter


def _bitmap_size(page_count: int) -> int:
    """Return the bytes of a dirty bitmap: a bit for each page, in whole 64-bit words."""
    return (page_count + 63) // 64 * 8


def _enable_cap(cap: int, args: tuple[int, ...], flags: int) -> kvm_enable_cap:
    return kvm_enable_cap(cap=cap, flags=flags, args=args)


def msrs(values: Mapping[int, int]) -> kvm_msrs:
    """Make the struct that holds model-specific registers: values by index."""
    struct = kvm_msrs.sized(len(values))
    for entry, (index, data) in zip(struct.entries, values.items(), strict=True):
        entry.index, entry.data = index, data
    return struct


def _msr_name(index: int) -> str:
    return f"{index:#x} ({Msr(index).name})" if index in Msr._value2member_map_ else f"{index:#x}"


# ======================================================================================================
# 7. Exits in words
# ======================================================================================================

_INSTRUCTION_BYTES = 1  # KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES


def describe_exit(run: kvm_run) -> str:
    """Return one line for errors and logs: the name of the exit and what is known about it."""
    try:
        reason = KvmExit(run.exit_reason)
    except ValueError:
        return f"KVM exit reason {run.exit_reason}"
    detail = _DETAILS[reason](run) if reason in _DETAILS else ""
    return f"KVM_EXIT_{reason.name}" + (f": {detail}" if detail else "")


def failed_instruction(run: kvm_run) -> bytes:
    """Return the instruction that KVM could not emulate, and what follows it (up to 15 bytes).

    Empty if the last exit was not an emulation failure, or KVM does not tell.
    """
    failure = run.emulation_failure
    is_emulation = run.exit_reason == KvmExit.INTERNAL_ERROR and failure.suberror == InternalError.EMULATION
    # ndata counts 64-bit words: the flags, and two that hold insn_size and insn_bytes.
    if not is_emulation or failure.ndata < 3 or not failure.flags & _INSTRUCTION_BYTES:
        return b""
    return bytes(failure.insn_bytes[: failure.insn_size])


def _describe_io(run: kvm_run) -> str:
    direction = "OUT" if run.io.direction == IoDirection.OUT else "IN"
    times = f", {run.io.count} times" if run.io.count != 1 else ""
    return f"{direction}, port {run.io.port:#x}, {run.io.size} bytes{times}"


def _describe_mmio(run: kvm_run) -> str:
    if not run.mmio.is_write:
        return f"read of {run.mmio.len} bytes at gpa {run.mmio.phys_addr:#x}"
    return f"write of {bytes(run.mmio.data[: run.mmio.len]).hex(' ')} at gpa {run.mmio.phys_addr:#x}"


def _describe_internal_error(run: kvm_run) -> str:
    names = {int(error): error.name for error in InternalError}
    words = f"suberror {run.internal.suberror} ({names.get(run.internal.suberror, 'unknown')})"
    if instruction := failed_instruction(run):
        return f"{words}, instruction bytes {instruction.hex(' ')}"
    return words + "".join(f" {word:#x}" for word in run.internal.data[: min(run.internal.ndata, 16)])


_DETAILS: dict[KvmExit, Callable[[kvm_run], str]] = {
    KvmExit.UNKNOWN: lambda run: f"hardware exit reason {run.hw.hardware_exit_reason:#x}",
    KvmExit.EXCEPTION: lambda run: f"vector {run.ex.exception}, error code {run.ex.error_code:#x}",
    KvmExit.IO: _describe_io,
    KvmExit.HYPERCALL: lambda run: f"number {run.hypercall.nr:#x}",
    KvmExit.DEBUG: lambda run: f"exception {run.debug.arch.exception} at rip {run.debug.arch.pc:#x}",
    KvmExit.MMIO: _describe_mmio,
    KvmExit.FAIL_ENTRY: lambda run: f"hardware reason {run.fail_entry.hardware_entry_failure_reason:#x}",
    KvmExit.TPR_ACCESS: lambda run: f"at rip {run.tpr_access.rip:#x}",
    KvmExit.INTERNAL_ERROR: _describe_internal_error,
    KvmExit.SYSTEM_EVENT: lambda run: f"type {run.system_event.type}",
    KvmExit.IOAPIC_EOI: lambda run: f"vector {run.eoi.vector}",
    KvmExit.X86_RDMSR: lambda run: f"MSR {_msr_name(run.msr.index)}, reason {run.msr.reason}",
    KvmExit.X86_WRMSR: lambda run: (
        f"MSR {_msr_name(run.msr.index)}, data {run.msr.data:#x}, reason {run.msr.reason}"
    ),
    KvmExit.NOTIFY: lambda run: f"flags {run.notify.flags:#x}",
    KvmExit.MEMORY_FAULT: lambda run: f"{run.memory_fault.size:#x} bytes at gpa {run.memory_fault.gpa:#x}",
}
