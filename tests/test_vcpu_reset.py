"""A restore puts every register of the vCPU back, as the host sees them and as the guest does (abi.md 6.4, 6.5).

The guest is a raw one at CPL 0: at the beginning of each call it writes down its registers, and one of its
functions fills them. What needs instructions of SSE, x87 or AVX runs where CPL 0 is not emulated.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Iterator, Mapping

import pytest
from conftest import require
from rawguest import ANSWER, GOOD, SCRATCH_GPA, build

import kvm_abi
import memory
from hyperlight import DebugInfo, MultiUseSandbox, SandboxConfiguration, Snapshot, UninitializedSandbox
from kvm_abi import Cr0, Cr4, Rflags, Vcpu, kvm_debugregs, kvm_fpu, kvm_regs, kvm_xsave

pytestmark = [require("kvm"), require("gcc")]

FILL = "Fill the registers"
GENERAL = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *(f"r{number}" for number in range(8, 16)))
SYSTEM = ("cr0", "cr2", "cr4", "cr8", "dr0", "dr1", "dr2", "dr3", "dr6", "dr7")
SEEN = ("rax", "rsp", "rflags", *GENERAL[1:], *SYSTEM)
"""What the guest writes down, in that order, 8 bytes each, at FREE; its FXSAVE image follows."""
FXSAVE_OFFSET = (8 * len(SEEN) + 15) // 16 * 16

WRITE_DOWN = f"""
    movabs %rax, FREE                   # the only store without a register for the address
    movabs $FREE, %rax
    mov %rsp, 8(%rax)
    movabs $STACK_TOP, %rsp
    pushfq
    popq 16(%rax)
    {"; ".join(f"mov %{name}, {8 * SEEN.index(name)}(%rax)" for name in GENERAL[1:])}
    {"; ".join(f"mov %{name}, %rbx; mov %rbx, {8 * SEEN.index(name)}(%rax)" for name in SYSTEM)}
    fxsave64 {FXSAVE_OFFSET}(%rax)
"""
FIXED_IN_DR6, FIXED_IN_DR7 = 0xFFFF_0FF0, 0x400
"""Bits that read as ones on most processors, whatever is written."""

FILL_GENERAL = "; ".join(
    f"movabs ${0x1111_1111_1111_1111 * index:#x}, %{name}" for index, name in enumerate(GENERAL, 1)
)
FILL_DEBUG = "; ".join(
    f"mov ${value:#x}, %rax; mov %rax, %{name}"
    for name, value in zip(SYSTEM[4:], (0x7111, 0x7222, 0x7333, 0x7444, 0xFFFF_4FF5, 0x4AA), strict=True)
)
FILL_SYSTEM = f"""
    mov %cr0, %rax; and ${~Cr0.WP & 0xFFFF_FFFF:#x}, %eax; mov %rax, %cr0
    mov %cr4, %rax; or ${Cr4.TSD:#x}, %rax; mov %rax, %cr4
    mov $0xDEAD, %eax; mov %rax, %cr2
    mov $9, %eax; mov %rax, %cr8
"""
FILL_FPU_BY_FXRSTOR = """
    lea fpu_image(%rip), %rax
    movabs $FREE + 0x1000, %rdi         # FXRSTOR wants 16 bytes of alignment
    mov %rax, %rsi
    mov $512 / 8, %ecx
    rep movsq
    movabs $FREE + 0x1000, %rax
    fxrstor64 (%rax)
"""
FILL_FPU_BY_INSTRUCTIONS = f"""
    pcmpeqd %xmm0, %xmm0
    {"; ".join(f"movaps %xmm0, %xmm{number}" for number in range(1, 16))}
    movabs $FREE + 0x1000, %rax
    movl $0x3F80, (%rax); ldmxcsr (%rax)
    fninit
    {"fldpi; " * 7}
    movw $0x0F7F, (%rax); fldcw (%rax)
"""
FILL_AVX = f"""
    mov %cr4, %rax; or ${Cr4.OSXSAVE:#x}, %rax; mov %rax, %cr4
    xor %ecx, %ecx; xor %edx, %edx; mov $7, %eax; xsetbv
    vpcmpeqd %xmm0, %xmm0, %xmm0
    vinsertf128 $1, %xmm0, %ymm0, %ymm0
    vmovaps %ymm0, %ymm15
"""
END = "out %eax, $108; hlt"

FCW, FSW, MXCSR = 0x0F7F, 1 << 11, 0x3F80
"""What the guest makes of them; TOP is 1."""


def fxsave_image() -> bytes:
    """Return an FXSAVE image with nothing as it is after a reset: FCW, FSW, tags, FOP, FIP, FDP, MXCSR, registers."""
    header = struct.pack("<HHBxHQQII", FCW, FSW, 0x7F, 0x123, 0x1111_2222, 0x3333_4444, MXCSR, 0xFFFF)
    st = b"".join(bytes(range(10 * index + 1, 10 * index + 11)) + bytes(6) for index in range(8))
    xmm = bytes(range(1, 256)) + b"\xff"
    return (header + st + xmm).ljust(512, b"\0")


@contextlib.contextmanager
def filled(*fill: str) -> Iterator[tuple[MultiUseSandbox, Snapshot]]:
    """Boot a guest and fill its registers by the code *fill*; yields it before the restore, and the snapshot."""
    guest = build("\n".join([*fill, END]), enter=WRITE_DOWN, fpu_image=fxsave_image())
    with UninitializedSandbox(guest) as uninitialized, uninitialized.evolve() as sandbox:
        before = sandbox.snapshot()
        with pytest.raises(memory.IoStackError):  # the call ends without a result
            sandbox.call(FILL)
        yield sandbox, before


def seen_by_guest(sandbox: MultiUseSandbox) -> tuple[dict[str, int], bytes]:
    """Make one more call and return the registers, and the FXSAVE image, that the guest found at its beginning."""
    assert sandbox.call(GOOD) == ANSWER
    free = sandbox.layout.scratch_size - 16 * memory.PAGE_SIZE
    data = sandbox._guest.physical.read_phys(SCRATCH_GPA + free, FXSAVE_OFFSET + 512)
    return dict(zip(SEEN, struct.unpack_from(f"<{len(SEEN)}Q", data), strict=True)), data[FXSAVE_OFFSET:]


def vcpu_of(sandbox: MultiUseSandbox) -> Vcpu:
    """Return the vCPU, with everything in it that would otherwise go there with the next entry."""
    sandbox._guest.vm.settle()
    return sandbox._guest.vm.vcpu


def assert_fpu_is_reset(image: bytes) -> None:
    """FCW 0x37F, MXCSR 0x1F80, and zero in FSW, FTW, FOP, FIP, FDP, ST0 to ST7 and XMM0 to XMM15."""
    expected = bytearray(512)
    struct.pack_into("<H", expected, 0, 0x37F)
    struct.pack_into("<I", expected, 24, 0x1F80)
    assert image[:28] + image[32:416] == expected[:28] + expected[32:416]  # but MXCSR_MASK and what is reserved


# -- as the host sees them -----------------------------------------------------------------


def supported_xstate() -> Mapping[int, range]:
    """Return where the XSAVE area of a guest has each extended component, AVX and up, by its number."""
    with kvm_abi.Kvm() as kvm:
        leaves = {(entry.function, entry.index): entry for entry in kvm.supported_cpuid().entries}
    components = leaves[0xD, 0].eax if (0xD, 0) in leaves else 0
    numbers = [number for number in range(2, 32) if components >> number & 1]
    sizes = {number: leaves[0xD, number] for number in numbers}
    return {number: range(leaf.ebx, leaf.ebx + leaf.eax) for number, leaf in sizes.items()}


def dirty_xsave() -> kvm_xsave:
    """Return an XSAVE area with all components in use and nothing at its initial value."""
    area = bytearray(ctypes.sizeof(kvm_xsave))
    area[:512] = fxsave_image()
    components = supported_xstate()
    struct.pack_into("<Q", area, 512, 3 | sum(1 << number for number in components))
    for place in components.values():
        area[place.start : place.stop] = bytes(offset % 31 + 1 for offset in place)
    return kvm_xsave.from_buffer_copy(area)


@pytest.fixture
def idle() -> Iterator[tuple[MultiUseSandbox, Snapshot]]:
    """A sandbox whose vCPU a test fills with ioctls, and looks at between calls, as a debugger could."""
    config = SandboxConfiguration(guest_debug_info=DebugInfo(wait=False))
    with UninitializedSandbox("simpleguest", config) as uninitialized, uninitialized.evolve() as sandbox:
        yield sandbox, sandbox.snapshot()


def test_general_registers_are_zero(idle: tuple[MultiUseSandbox, Snapshot]) -> None:
    """B.11/198."""
    sandbox, before = idle
    dirty = kvm_regs(**{name: 0x1111 * index for index, name in enumerate((*GENERAL, "rsp", "rip"), 1)}, rflags=0x8D7)
    vcpu_of(sandbox).set_regs(dirty)
    assert bytes(vcpu_of(sandbox).get_regs()) == bytes(dirty)
    sandbox.restore(before)
    assert bytes(vcpu_of(sandbox).get_regs()) == bytes(kvm_regs(rflags=Rflags.FIXED))


def test_fpu_is_as_after_a_reset(idle: tuple[MultiUseSandbox, Snapshot]) -> None:
    """B.11/199."""
    sandbox, before = idle
    vcpu_of(sandbox).set_xsave(dirty_xsave())
    assert vcpu_of(sandbox).get_fpu().fcw == FCW
    sandbox.restore(before)
    fpu = vcpu_of(sandbox).get_fpu()
    fpu.mxcsr = 0  # KVM's FPU ioctls leave it out
    assert bytes(fpu) == bytes(kvm_fpu(fcw=0x37F))


def test_debug_registers_are_zero(idle: tuple[MultiUseSandbox, Snapshot]) -> None:
    """B.11/200: in all bits that can be written."""
    sandbox, before = idle
    dirty = kvm_debugregs(dr6=0xFFFF_4FF5, dr7=0x4AA)
    dirty.db[:] = 0x1111, 0x2222, 0x3333, 0x4444
    vcpu_of(sandbox).set_debugregs(dirty)
    assert bytes(vcpu_of(sandbox).get_debugregs()) == bytes(dirty)
    sandbox.restore(before)
    clean = vcpu_of(sandbox).get_debugregs()
    assert (list(clean.db), clean.dr6 & ~FIXED_IN_DR6, clean.dr7 & ~FIXED_IN_DR7) == ([0] * 4, 0, 0)


def test_extended_state_is_initial(idle: tuple[MultiUseSandbox, Snapshot]) -> None:
    """B.11/201: all of the XSAVE area, AVX and whatever else there is included."""
    sandbox, before = idle
    dirty = dirty_xsave()
    vcpu_of(sandbox).set_xsave(dirty)
    written = bytes(vcpu_of(sandbox).get_xsave())
    for place in supported_xstate().values():
        assert written[place.start] == bytes(dirty)[place.start]
    sandbox.restore(before)
    area = bytearray(vcpu_of(sandbox).get_xsave())
    hypervisors_own = (range(28, 32), range(464, 512))  # MXCSR_MASK; XCR0 as the kernel's core files have it
    for place in hypervisors_own:
        area[place.start : place.stop] = bytes(len(place))
    expected = bytearray(len(area))
    struct.pack_into("<H", expected, 0, 0x37F)
    struct.pack_into("<I", expected, 24, 0x1F80)
    area[512:520] = bytes(8)  # which components the area spells out, although initial
    assert area == expected


def test_special_registers_are_the_snapshots(idle: tuple[MultiUseSandbox, Snapshot]) -> None:
    """B.11/202: with CR3 at the tables of the snapshot."""
    sandbox, before = idle
    assert before.sregs is not None
    expected = kvm_abi.kvm_sregs.from_buffer_copy(before.sregs)
    expected.cr3 = before.layout.pt_base_gpa
    dirty = kvm_abi.kvm_sregs.from_buffer_copy(before.sregs)
    dirty.cr0, dirty.cr2, dirty.cr3, dirty.cr4, dirty.cr8 = dirty.cr0 ^ Cr0.WP, 0xDEAD, 0x5000, dirty.cr4 | Cr4.TSD, 9
    dirty.fs.base, dirty.gs.base, dirty.gdt.base, dirty.idt.limit, dirty.ds.selector = 0x1110, 0x2220, 0x3330, 0x44, 8
    vcpu_of(sandbox).set_sregs(dirty)
    assert bytes(vcpu_of(sandbox).get_sregs()) == bytes(dirty)
    sandbox.restore(before)
    assert bytes(vcpu_of(sandbox).get_sregs()) == bytes(expected)
    assert sandbox.call("Echo", "x") == "x"


def test_extended_control_registers_are_the_snapshots(idle: tuple[MultiUseSandbox, Snapshot]) -> None:
    """features.md C.6, item 9: the guest had switched AVX on while it initialised."""
    sandbox, before = idle
    wanted = vcpu_of(sandbox).get_xcrs()
    dirty = vcpu_of(sandbox).get_xcrs()
    assert wanted.xcrs[0].value & 7 == 7
    dirty.xcrs[0].value = 3
    vcpu_of(sandbox).set_xcrs(dirty)
    assert vcpu_of(sandbox).get_xcrs().xcrs[0].value == 3
    sandbox.restore(before)
    assert bytes(vcpu_of(sandbox).get_xcrs()) == bytes(wanted)


# -- as the guest sees them ----------------------------------------------------------------


def test_guest_finds_general_registers_zero() -> None:
    """B.11/203, and abi.md 6.4: after a restore, with ZF set, and at any other call."""
    with filled(FILL_GENERAL, "std; stc") as (sandbox, before):
        left = sandbox._guest.vm.registers()
        assert [left[name] for name in GENERAL] == [0x1111_1111_1111_1111 * index for index in range(1, 16)]
        for restored in (False, True):
            if restored:
                sandbox.restore(before)
            seen, _ = seen_by_guest(sandbox)
            assert [seen[name] for name in GENERAL] == [0] * 15
            assert seen["rflags"] == (Rflags.FIXED | Rflags.ZF if restored else Rflags.FIXED)
            assert seen["rsp"] == before.stack_top


@pytest.mark.parametrize(
    "fill",
    [
        pytest.param(FILL_FPU_BY_FXRSTOR, id="by FXRSTOR"),
        pytest.param(FILL_FPU_BY_INSTRUCTIONS, id="by its instructions", marks=require("real_cpl0")),
    ],
)
def test_guest_finds_the_fpu_as_after_a_reset(fill: str) -> None:
    """B.11/204 and B.11/207: XMM0 to XMM15, seven numbers on the x87 stack, FCW, MXCSR."""
    with filled(fill) as (sandbox, before):
        left = bytes(vcpu_of(sandbox).get_xsave())  # MXCSR is in no other ioctl
        fcw, fsw = struct.unpack_from("<HH", left)
        (mxcsr,) = struct.unpack_from("<I", left, 24)
        assert (fcw, fsw & 0x3800, mxcsr) == (FCW, FSW, MXCSR)
        assert all(left[160 + 16 * number : 176 + 16 * number] != bytes(16) for number in range(16))
        sandbox.restore(before)
        (mxcsr,) = struct.unpack_from("<I", bytes(vcpu_of(sandbox).get_xsave()), 24)
        assert mxcsr == 0x1F80
        _, image = seen_by_guest(sandbox)
        assert_fpu_is_reset(image)


def test_fpu_is_reset_at_every_call_but_for_mxcsr() -> None:
    """abi.md 6.4: KVM_SET_FPU leaves that out; a restore resets it."""
    with filled(FILL_FPU_BY_FXRSTOR) as (sandbox, _):
        _, image = seen_by_guest(sandbox)
        assert struct.unpack_from("<I", image, 24) == (MXCSR,)
        assert_fpu_is_reset(image[:24] + struct.pack("<I", 0x1F80) + image[28:])


def test_guest_finds_debug_registers_zero() -> None:
    """B.9/171 and B.11/205: in all bits that can be written."""
    with filled(FILL_DEBUG) as (sandbox, before):
        left = vcpu_of(sandbox).get_debugregs()
        assert (list(left.db), left.dr6, left.dr7) == ([0x7111, 0x7222, 0x7333, 0x7444], 0xFFFF_4FF5, 0x4AA)
        sandbox.restore(before)
        seen, _ = seen_by_guest(sandbox)
        assert [seen[name] for name in ("dr0", "dr1", "dr2", "dr3")] == [0] * 4
        assert (seen["dr6"] & ~FIXED_IN_DR6, seen["dr7"] & ~FIXED_IN_DR7) == (0, 0)


def test_guest_finds_control_registers_as_the_snapshot_has_them() -> None:
    """B.11/206: CR0.WP, CR2, CR4.TSD, CR8."""
    with filled(FILL_SYSTEM) as (sandbox, before):
        left = vcpu_of(sandbox).get_sregs()
        assert (left.cr0 & Cr0.WP, left.cr2, left.cr4 & Cr4.TSD, left.cr8) == (0, 0xDEAD, Cr4.TSD, 9)
        sandbox.restore(before)
        assert before.sregs is not None
        clean = kvm_abi.kvm_sregs.from_buffer_copy(before.sregs)
        seen, _ = seen_by_guest(sandbox)
        seen["cr4"] &= ~Cr4.MCE  # kvm_amd shows the guest the host's
        assert [seen[name] for name in ("cr0", "cr2", "cr4", "cr8")] == [clean.cr0, clean.cr2, clean.cr4, clean.cr8]


@require("real_cpl0")
def test_guest_cannot_keep_avx() -> None:
    """features.md C.6, item 9: neither the upper halves of YMM registers nor XCR0."""
    with filled(FILL_AVX) as (sandbox, before):
        vcpu = vcpu_of(sandbox)
        upper = supported_xstate()[2]
        assert vcpu.get_xcrs().xcrs[0].value == 7
        assert bytes(vcpu.get_xsave())[upper.start : upper.stop] == b"\xff" * 16 + bytes(14 * 16) + b"\xff" * 16
        sandbox.restore(before)
        assert vcpu.get_xcrs().xcrs[0].value == 1
        assert bytes(vcpu.get_xsave())[upper.start : upper.stop] == bytes(256)
        seen, _ = seen_by_guest(sandbox)
        assert not seen["cr4"] & Cr4.OSXSAVE
