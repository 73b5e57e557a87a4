"""kvm_abi.py against the kernel's headers: every size, offset, ioctl number and constant.

One C program is generated, compiled against the system's <linux/kvm.h> and asked for all of them. Where
there is no compiler, the literals at the end still bite.
"""

from __future__ import annotations

import ctypes
import errno
import pickle
import subprocess
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import pytest
from conftest import require

import kvm_abi
from kvm_abi import Ioctl, KvmError, KvmExit, Struct, describe_exit, failed_instruction, kvm_regs, kvm_run

# Each enum and how the header spells its members.
SPELLING: dict[type[IntEnum], str] = {
    kvm_abi.KvmExit: "KVM_EXIT_{}",
    kvm_abi.IoDirection: "KVM_EXIT_IO_{}",
    kvm_abi.InternalError: "KVM_INTERNAL_ERROR_{}",
    kvm_abi.SystemEvent: "KVM_SYSTEM_EVENT_{}",
    kvm_abi.MsrExitReason: "KVM_MSR_EXIT_REASON_{}",
    kvm_abi.RunFlag: "KVM_RUN_X86_{}",
    kvm_abi.MemoryFaultFlag: "KVM_MEMORY_EXIT_FLAG_{}",
    kvm_abi.SyncRegs: "KVM_SYNC_X86_{}",
    kvm_abi.MemFlag: "KVM_MEM_{}",
    kvm_abi.GuestDebug: "KVM_GUESTDBG_{}",
    kvm_abi.MpState: "KVM_MP_STATE_{}",
    kvm_abi.VcpuEventValid: "KVM_VCPUEVENT_VALID_{}",
    kvm_abi.CpuidFlag: "KVM_CPUID_FLAG_{}",
    kvm_abi.MsrFilterAccess: "KVM_MSR_FILTER_{}",
    kvm_abi.MsrFilterDefault: "KVM_MSR_FILTER_DEFAULT_{}",
    kvm_abi.DirtyLogFlag: "KVM_DIRTY_LOG_{}",
    kvm_abi.IrqfdFlag: "KVM_IRQFD_FLAG_{}",
    kvm_abi.IoeventfdFlag: "KVM_IOEVENTFD_FLAG_{}",
    kvm_abi.Irqchip: "KVM_IRQCHIP_{}",
    kvm_abi.PitFlag: "KVM_PIT_{}",
    kvm_abi.DisableExit: "KVM_X86_DISABLE_EXITS_{}",
    kvm_abi.Quirk: "KVM_X86_QUIRK_{}",
    kvm_abi.Vector: "{}_VECTOR",
    kvm_abi.Cap: "KVM_CAP_{}",
    kvm_abi.Cr0: "X86_CR0_{}",
    kvm_abi.Cr4: "X86_CR4_{}",
    kvm_abi.Rflags: "X86_EFLAGS_{}",
}

# The enums whose values no exported header has; their literals are below.
NOT_EXPORTED = {kvm_abi.Efer, kvm_abi.Msr}

# What is newer than the oldest headers that the comparison is for, and the Linux release that brought it.
# Nothing else may be missing; these may not be missing either from headers as new as that.
OLDEST_HEADERS = (6, 1)
NEWER = {
    "kvm_run.hypercall.flags": (6, 4),
    "KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP": (6, 2),
    "KVM_CAP_PMU_EVENT_MASKED_EVENTS": (6, 3),
    "KVM_RUN_X86_GUEST_MODE": (6, 10),
    "KVM_CAP_USER_MEMORY2": (6, 8),
    "KVM_CAP_MEMORY_FAULT_INFO": (6, 8),
    "KVM_CAP_MEMORY_ATTRIBUTES": (6, 8),
    "KVM_CAP_GUEST_MEMFD": (6, 8),
    "KVM_CAP_VM_TYPES": (6, 8),
    "KVM_CAP_PRE_FAULT_MEMORY": (6, 11),
    "KVM_CAP_X86_APIC_BUS_CYCLES_NS": (6, 11),
    "KVM_CAP_X86_GUEST_MODE": (6, 11),
    "KVM_EXIT_MEMORY_FAULT": (6, 8),
    "KVM_MEMORY_EXIT_FLAG_PRIVATE": (6, 8),
    "KVM_MEM_GUEST_MEMFD": (6, 8),
    "KVM_SET_USER_MEMORY_REGION2": (6, 8),
    "kvm_run.memory_fault": (6, 8),
    "kvm_userspace_memory_region2": (6, 8),
}

STRUCTS = {
    name: item
    for name, item in vars(kvm_abi).items()
    if name.startswith("kvm_") and isinstance(item, type) and issubclass(item, Struct)
}
IOCTLS = {name: item for name, item in vars(kvm_abi).items() if isinstance(item, Ioctl)}
CONSTANTS = {
    **{
        spelling.format(name): int(item)
        for enum, spelling in SPELLING.items()
        for name, item in enum.__members__.items()
    },
    **{name: getattr(kvm_abi, name) for name in ("KVM_API_VERSION", "KVM_MSR_FILTER_MAX_RANGES", "KVMIO")},
    "KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES": kvm_abi._INSTRUCTION_BYTES,
}


def fields(kind: Any, path: str = "", base: int = 0) -> Iterator[tuple[str, int, int]]:
    """Yield (path, offset, size) of every named field of *kind*, at any depth, through anonymous unions."""
    for name, field_kind, *_ in kind._fields_:
        offset = base + getattr(kind, name).offset
        anonymous = name in getattr(kind, "_anonymous_", ())
        inner = path if anonymous else f"{path}.{name}"
        if not anonymous:
            yield inner, offset, ctypes.sizeof(field_kind)
        if issubclass(field_kind, (ctypes.Structure, ctypes.Union)):
            yield from fields(field_kind, inner, offset)


def expected_of_struct(name: str) -> dict[str, int]:
    """Return what the compiler should say of one struct: its size, and the offset and size of each field."""
    expected = {f"sizeof {name}": ctypes.sizeof(STRUCTS[name])}
    for path, offset, size in fields(STRUCTS[name]):
        expected[f"offsetof {name}{path}"] = offset
        # C cannot measure a flexible array member.
        if size:
            expected[f"sizeof {name}{path}"] = size
    return expected


def newer(key: str) -> tuple[int, int]:
    """Return the Linux release that brought what *key* names ("KVM_RUN", "sizeof kvm_run.notify.flags")."""
    name = key.split()[-1]
    return next(
        (since for start, since in NEWER.items() if f"{name}.".startswith(f"{start}.")), OLDEST_HEADERS
    )


def c_line(key: str) -> str:
    """Return the C statement that prints "key = value" or nothing where the headers are too old."""
    measure, _, name = key.rpartition(" ")
    struct, _, path = name.partition(".")
    major, minor = newer(key)
    guard = f"#if LINUX_VERSION_CODE >= KERNEL_VERSION({major}, {minor}, 0)"
    if not measure:
        guard, value = f"#ifdef {name}", name
    elif measure == "offsetof":
        value = f"offsetof(struct {struct}, {path})"
    else:
        value = f"sizeof(((struct {struct} *)0)->{path})" if path else f"sizeof(struct {struct})"
    return f'{guard}\nprintf("{key} = %llu\\n", (unsigned long long)({value}));\n#endif\n'


EXPECTED = {
    **{key: value for name in STRUCTS for key, value in expected_of_struct(name).items()},
    **{name: int(number) for name, number in IOCTLS.items()},
    **CONSTANTS,
}

PROGRAM = """
#include <stddef.h>
#include <stdio.h>
#include <linux/version.h>
#include <linux/kvm.h>
#include <asm/processor-flags.h>

int main(void)
{
    printf("version = %%d\\n", LINUX_VERSION_CODE);
%s
    return 0;
}
"""


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Return what the system's headers say, by the keys of EXPECTED; what they do not know is absent."""
    directory = tmp_path_factory.mktemp("kvm_abi")
    source, program = directory / "kvm_abi.c", directory / "kvm_abi"
    source.write_text(PROGRAM % "".join(map(c_line, EXPECTED)))
    build = subprocess.run(["gcc", "-w", "-o", program, source], capture_output=True, text=True)
    if "linux/kvm.h: No such file" in build.stderr:
        pytest.skip("the kernel's headers (linux-libc-dev) are not installed")
    assert build.returncode == 0, build.stderr
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in (line.split(" = ") for line in output.splitlines())}
    if header_version(found) < OLDEST_HEADERS:
        pytest.skip(f"these kernel headers are older than {OLDEST_HEADERS}")
    return found


def header_version(found: dict[str, int]) -> tuple[int, int]:
    return found["version"] >> 16, found["version"] >> 8 & 0xFF


def compare(keys: dict[str, int], found: dict[str, int]) -> None:
    """Fail unless the headers agree on *keys*, apart from those too new for them."""
    wanted = {
        key: value for key, value in keys.items() if newer(key) <= header_version(found) or key in found
    }
    assert {key: found.get(key) for key in wanted} == wanted


@require("gcc")
@pytest.mark.parametrize("name", STRUCTS)
def test_the_compiler_agrees_on_the_struct(name: str, headers: dict[str, int]) -> None:
    if newer(name) > header_version(headers):
        pytest.skip(f"struct {name} needs the headers of Linux {newer(name)}")
    compare(expected_of_struct(name), headers)


@require("gcc")
def test_the_compiler_agrees_on_the_ioctl_numbers(headers: dict[str, int]) -> None:
    compare(IOCTLS, headers)


@require("gcc")
def test_the_compiler_agrees_on_the_constants(headers: dict[str, int]) -> None:
    compare(CONSTANTS, headers)


@require("gcc")
@pytest.mark.parametrize("name", NEWER)
def test_the_compiler_agrees_on_what_is_newer_than_the_oldest_headers(
    name: str, headers: dict[str, int]
) -> None:
    """Each is skipped by name, not passed, where the installed headers do not have it yet."""
    if NEWER[name] > header_version(headers):
        pytest.skip(
            f"{name} needs the headers of Linux {NEWER[name]}, these are of {header_version(headers)}"
        )
    keys = {key: value for key, value in EXPECTED.items() if f"{key.split()[-1]}.".startswith(f"{name}.")}
    assert keys
    compare(keys, headers)


def test_every_enum_is_compared() -> None:
    enums = {
        item for item in vars(kvm_abi).values() if isinstance(item, type) and issubclass(item, IntEnum | int)
    }
    enums = {item for item in enums if hasattr(item, "__members__") and item.__members__}
    assert enums == SPELLING.keys() | NOT_EXPORTED


def test_every_name_in_all_exists_and_every_public_name_is_in_all() -> None:
    defined = {
        name
        for name, item in vars(kvm_abi).items()
        if name in STRUCTS
        or isinstance(item, Ioctl)
        or (getattr(item, "__module__", "") == "kvm_abi" and not name.startswith("_"))
    }
    assert set(kvm_abi.__all__) - defined == {"KVM_API_VERSION", "KVM_MSR_FILTER_MAX_RANGES"}
    assert defined <= set(kvm_abi.__all__)


# ---- Literals, from the kernel's documentation and headers: no compiler needed ------------------------

SIZES = {
    "kvm_regs": 144,
    "kvm_segment": 24,
    "kvm_dtable": 16,
    "kvm_sregs": 312,
    "kvm_sregs2": 320,
    "kvm_fpu": 416,
    "kvm_run": 2352,
    "kvm_guest_debug": 72,
    "kvm_debugregs": 128,
    "kvm_vcpu_events": 64,
    "kvm_sync_regs": 520,
    "kvm_xsave": 4096,
    "kvm_xcrs": 392,
    "kvm_msrs": 8,
    "kvm_msr_list": 4,
    "kvm_msr_entry": 16,
    "kvm_msr_filter": 392,
    "kvm_cpuid2": 8,
    "kvm_cpuid_entry2": 40,
    "kvm_userspace_memory_region": 32,
    "kvm_userspace_memory_region2": 160,
    "kvm_translation": 24,
    "kvm_mp_state": 4,
    "kvm_enable_cap": 104,
    "kvm_irqchip": 520,
    "kvm_irqfd": 32,
    "kvm_ioeventfd": 64,
    "kvm_pit_config": 64,
    "kvm_dirty_log": 16,
    "kvm_clear_dirty_log": 24,
    "kvm_signal_mask": 4,
    "kvm_lapic_state": 1024,
}
NUMBERS = {
    "KVM_GET_API_VERSION": 0xAE00,
    "KVM_CREATE_VM": 0xAE01,
    "KVM_CHECK_EXTENSION": 0xAE03,
    "KVM_GET_VCPU_MMAP_SIZE": 0xAE04,
    "KVM_GET_SUPPORTED_CPUID": 0xC008AE05,
    "KVM_CREATE_VCPU": 0xAE41,
    "KVM_SET_USER_MEMORY_REGION": 0x4020AE46,
    "KVM_CREATE_IRQCHIP": 0xAE60,
    "KVM_IRQFD": 0x4020AE76,
    "KVM_RUN": 0xAE80,
    "KVM_GET_REGS": 0x8090AE81,
    "KVM_SET_REGS": 0x4090AE82,
    "KVM_GET_SREGS": 0x8138AE83,
    "KVM_SET_SREGS": 0x4138AE84,
    "KVM_TRANSLATE": 0xC018AE85,
    "KVM_GET_FPU": 0x81A0AE8C,
    "KVM_SET_FPU": 0x41A0AE8D,
    "KVM_SET_CPUID2": 0x4008AE90,
    "KVM_SET_GUEST_DEBUG": 0x4048AE9B,
    "KVM_GET_DEBUGREGS": 0x8080AEA1,
    "KVM_SET_DEBUGREGS": 0x4080AEA2,
    "KVM_GET_XSAVE": 0x9000AEA4,
    "KVM_SET_XSAVE": 0x5000AEA5,
}
RUN_OFFSETS = {
    "immediate_exit": 1,
    "exit_reason": 8,
    "flags": 14,
    "io": 32,
    "mmio": 32,
    "debug": 32,
    "internal": 32,
    "kvm_valid_regs": 288,
    "kvm_dirty_regs": 296,
    "s": 304,
}
EXITS = {"IO": 2, "DEBUG": 4, "HLT": 5, "MMIO": 6, "SHUTDOWN": 8, "FAIL_ENTRY": 9, "INTERNAL_ERROR": 17}
PROCESSOR = {
    kvm_abi.Efer: {
        "SCE": 0x1, "LME": 0x100, "LMA": 0x400, "NX": 0x800, "SVME": 0x1000, "LMSLE": 0x2000, "FFXSR": 0x4000,
        "TCE": 0x8000, "AUTOIBRS": 0x200000,
    },
    kvm_abi.Msr: {
        "IA32_TSC": 0x10, "IA32_APICBASE": 0x1B, "IA32_TSC_ADJUST": 0x3B, "IA32_SYSENTER_CS": 0x174,
        "IA32_SYSENTER_ESP": 0x175, "IA32_SYSENTER_EIP": 0x176, "IA32_MISC_ENABLE": 0x1A0,
        "IA32_CR_PAT": 0x277, "MTRRdefType": 0x2FF, "IA32_TSC_DEADLINE": 0x6E0, "IA32_XSS": 0xDA0,
        "EFER": 0xC0000080, "STAR": 0xC0000081, "LSTAR": 0xC0000082, "CSTAR": 0xC0000083,
        "SYSCALL_MASK": 0xC0000084, "FS_BASE": 0xC0000100, "GS_BASE": 0xC0000101,
        "KERNEL_GS_BASE": 0xC0000102, "TSC_AUX": 0xC0000103,
    },
}  # fmt: skip


def test_sizes_are_the_literals() -> None:
    assert {name: ctypes.sizeof(STRUCTS[name]) for name in SIZES} == SIZES


def test_ioctl_numbers_are_the_literals() -> None:
    assert {name: int(IOCTLS[name]) for name in NUMBERS} == NUMBERS


def test_offsets_in_kvm_run_are_the_literals() -> None:
    assert {name: getattr(kvm_run, name).offset for name in RUN_OFFSETS} == RUN_OFFSETS


def test_exit_reasons_are_the_literals() -> None:
    assert {name: KvmExit[name] for name in EXITS} == EXITS


@pytest.mark.parametrize("enum", PROCESSOR)
def test_flags_that_no_header_exports_are_the_literals(enum: type[IntEnum]) -> None:
    assert dict(enum.__members__) == PROCESSOR[enum]


def test_hyperlight_initial_system_registers_spelt_with_the_flags() -> None:
    """abi.md 6.2: CR0 0x80050033, CR4 0x620, EFER 0xD01."""
    cr0, cr4, efer = kvm_abi.Cr0, kvm_abi.Cr4, kvm_abi.Efer
    assert cr0.PE | cr0.MP | cr0.ET | cr0.NE | cr0.WP | cr0.AM | cr0.PG == 0x80050033
    assert cr4.PAE | cr4.OSFXSR | cr4.OSXMMEXCPT == 0x620
    assert efer.SCE | efer.LME | efer.LMA | efer.NX == 0xD01


# ---- Structs, ioctls and errors as Python objects ------------------------------------------------------


def test_ioctls_come_in_numeric_order_and_no_number_twice() -> None:
    order = [number & 0xFF for number in IOCTLS.values()]
    assert order == sorted(order)
    assert len(set(IOCTLS.values())) == len(IOCTLS)


def test_an_ioctl_knows_its_name_struct_and_capability() -> None:
    assert kvm_abi.KVM_GET_XCRS.name == "KVM_GET_XCRS"
    assert kvm_abi.KVM_GET_XCRS.argument is kvm_abi.kvm_xcrs
    assert kvm_abi.KVM_GET_XCRS.capability is kvm_abi.Cap.XCRS
    assert kvm_abi.KVM_RUN.argument is None


def test_a_struct_of_another_kind_is_refused_before_the_kernel_sees_it() -> None:
    with pytest.raises(TypeError, match="KVM_SET_SREGS does not take a kvm_regs"):
        kvm_abi.ioctl(-1, kvm_abi.KVM_SET_SREGS, kvm_regs())
    with pytest.raises(TypeError, match="KVM_RUN does not take a kvm_regs"):
        kvm_abi.ioctl(-1, kvm_abi.KVM_RUN, kvm_regs())


def test_a_list_that_promises_more_than_it_has_is_refused_before_the_kernel_sees_it() -> None:
    cpuid = kvm_abi.kvm_cpuid2.sized(2)
    cpuid.nent = 3
    with pytest.raises(ValueError, match=r"kvm_cpuid2\.nent is 3, of 2 elements"):
        kvm_abi.ioctl(-1, kvm_abi.KVM_SET_CPUID2, cpuid)
    with pytest.raises(ValueError, match=r"kvm_msrs\.nmsrs is 1, of 0 elements"):
        kvm_abi.ioctl(-1, kvm_abi.KVM_SET_MSRS, kvm_abi.kvm_msrs(nmsrs=1))


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(AttributeError, match="kvm_regs has no field 'rpi'"):
        kvm_regs().rpi = 1
    with pytest.raises(AttributeError):
        kvm_regs(rpi=1)


@pytest.mark.parametrize("value", [1 << 64, -1])
def test_a_number_that_does_not_fit_its_field_is_refused(value: int) -> None:
    with pytest.raises(OverflowError, match=r"kvm_regs\.rip cannot hold"):
        kvm_regs(rip=value)


def test_every_register_is_its_own_field() -> None:
    regs = kvm_regs(*range(1, 19))
    assert [getattr(regs, field[0]) for field in kvm_regs._fields_] == list(range(1, 19))
    assert repr(regs).startswith(
        "kvm_regs(rax=0x1, rbx=0x2, rcx=0x3, rdx=0x4, rsi=0x5, rdi=0x6, rsp=0x7, rbp=0x8,"
    )


def test_a_flexible_struct_has_the_asked_number_of_elements_after_its_header() -> None:
    msrs = kvm_abi.kvm_msrs.sized(3)
    assert (msrs.nmsrs, len(msrs.entries), ctypes.sizeof(msrs)) == (3, 3, 8 + 3 * 16)
    assert isinstance(msrs, kvm_abi.kvm_msrs)
    assert type(msrs).entries.offset == kvm_abi.kvm_msrs.entries.offset == 8
    assert ctypes.sizeof(kvm_abi.kvm_xsave.sized(2)) == 4096 + 8


def test_an_error_names_the_ioctl_and_the_errno() -> None:
    error = KvmError("KVM_CREATE_VM", errno.EINVAL)
    assert isinstance(error, OSError)
    assert (error.ioctl, error.errno, error.detail) == ("KVM_CREATE_VM", errno.EINVAL, "")
    assert str(error) == "KVM_CREATE_VM failed: EINVAL (Invalid argument)"
    assert str(KvmError("open", errno.ENOENT, "/x")) == "open failed: ENOENT (No such file or directory): /x"
    assert str(pickle.loads(pickle.dumps(KvmError("open", errno.ENOENT, "/x")))).endswith("directory): /x")


def test_the_msr_filter_allows_its_msrs_and_no_others() -> None:
    msr_filter = kvm_abi.deny_msrs_except([0x10, 0xC0000102])
    used = [(entry.base, entry.nmsrs, entry.bitmap[0]) for entry in msr_filter.ranges if entry.nmsrs]
    assert used == [(0x10, 1, 1), (0xC0000102, 1, 1)]
    assert msr_filter.flags == kvm_abi.MsrFilterDefault.DENY
    nothing = kvm_abi.deny_msrs_except([])
    assert [(entry.nmsrs, entry.bitmap[0]) for entry in nothing.ranges if entry.nmsrs] == [(1, 0)]
    with pytest.raises(ValueError, match="16 ranges, not 17"):
        kvm_abi.deny_msrs_except(range(17))


# ---- Exits in words ------------------------------------------------------------------------------------


def exited(exit_reason: int, member: str = "hw", **values: object) -> kvm_run:
    """Return a kvm_run page as KVM leaves it after an exit."""
    run = kvm_run(exit_reason=exit_reason)
    for name, value in values.items():
        target = getattr(run, member)
        if isinstance(value, bytes):
            ctypes.memmove(ctypes.addressof(getattr(target, name)), value, len(value))
        else:
            setattr(target, name, value)
    return run


XORPS = bytes.fromhex("0f57c0f4")
DESCRIPTIONS = [
    (exited(KvmExit.HLT), "KVM_EXIT_HLT"),
    (exited(KvmExit.SHUTDOWN), "KVM_EXIT_SHUTDOWN"),
    (exited(4711), "KVM exit reason 4711"),
    (
        exited(KvmExit.IO, "io", direction=1, size=4, port=0x6C, count=1),
        "KVM_EXIT_IO: OUT, port 0x6c, 4 bytes",
    ),
    (exited(KvmExit.IO, "io", size=1, port=0x60, count=8), "KVM_EXIT_IO: IN, port 0x60, 1 bytes, 8 times"),
    (exited(KvmExit.MMIO, "mmio", phys_addr=0x5000, len=2), "KVM_EXIT_MMIO: read of 2 bytes at gpa 0x5000"),
    (
        exited(KvmExit.MMIO, "mmio", phys_addr=0x5000, len=2, is_write=1, data=b"\x01\x02\x03"),
        "KVM_EXIT_MMIO: write of 01 02 at gpa 0x5000",
    ),
    (
        exited(
            KvmExit.INTERNAL_ERROR,
            "emulation_failure",
            suberror=1,
            ndata=3,
            flags=1,
            insn_size=4,
            insn_bytes=XORPS,
        ),
        "KVM_EXIT_INTERNAL_ERROR: suberror 1 (EMULATION), instruction bytes 0f 57 c0 f4",
    ),
    (
        exited(KvmExit.INTERNAL_ERROR, "internal", suberror=1),
        "KVM_EXIT_INTERNAL_ERROR: suberror 1 (EMULATION)",
    ),
    (
        exited(KvmExit.INTERNAL_ERROR, "internal", suberror=3, ndata=2, data=b"\x05" + bytes(7) + b"\x06"),
        "KVM_EXIT_INTERNAL_ERROR: suberror 3 (DELIVERY_EV) 0x5 0x6",
    ),
    (exited(KvmExit.INTERNAL_ERROR, "internal", suberror=9), "KVM_EXIT_INTERNAL_ERROR: suberror 9 (unknown)"),
    (
        exited(KvmExit.X86_RDMSR, "msr", index=0x10, reason=4),
        "KVM_EXIT_X86_RDMSR: MSR 0x10 (IA32_TSC), reason 4",
    ),
    (
        exited(KvmExit.X86_WRMSR, "msr", index=0x99, data=7, reason=2),
        "KVM_EXIT_X86_WRMSR: MSR 0x99, data 0x7, reason 2",
    ),
    (
        exited(KvmExit.MEMORY_FAULT, "memory_fault", gpa=0x7000, size=0x1000),
        "KVM_EXIT_MEMORY_FAULT: 0x1000 bytes at gpa 0x7000",
    ),
]


@pytest.mark.parametrize(
    ("run", "text"), DESCRIPTIONS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_an_exit_is_described_in_one_line(run: kvm_run, text: str) -> None:
    assert describe_exit(run) == text


@pytest.mark.parametrize("reason", KvmExit)
@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_no_content_of_the_page_makes_the_description_fail(reason: KvmExit, byte: int) -> None:
    run = kvm_run.from_buffer_copy(bytes([byte]) * ctypes.sizeof(kvm_run))
    run.exit_reason = reason
    assert describe_exit(run).startswith(f"KVM_EXIT_{reason.name}")
    assert len(failed_instruction(run)) <= 15
