"""Core dumps: what is in the file, where it goes, when it is written, and what gdb makes of it.

Spec: coredump.md (its "Acceptance" as C/1 to C/6), acceptance.md B.15.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import rawguest
from conftest import require

import hyperlight
import kvm_abi
import memory
from hyperlight import (
    CoreDump,
    CoreSegment,
    CrashDumpError,
    GuestAborted,
    GuestFailure,
    MemoryRegionFlags,
    MultiUseSandbox,
    SandboxConfiguration,
    SandboxStatus,
    UninitializedSandbox,
    dump_all_sandboxes,
)
from memory import PAGE_SIZE, SharedMemory, UInt, ULong

SIMPLEGUEST = hyperlight.find_guest("simpleguest")
RW = MemoryRegionFlags.READ | MemoryRegionFlags.WRITE
NT_PRSTATUS, NT_PRPSINFO, NT_AUXV, NT_XSTATE, NT_SIGINFO = 1, 3, 6, 0x202, 0x53494749


class Segment(NamedTuple):
    gva: int
    size: int
    flags: int
    data: bytes


class Core(NamedTuple):
    """A core file, taken apart by the layout of abi.md 14."""

    notes: list[tuple[bytes, int, bytes]]
    segments: list[Segment]

    @classmethod
    def read(cls, path: str | Path) -> Core:
        data = Path(path).read_bytes()
        assert data[:20] == b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 4, 62)
        assert struct.unpack_from("<IQQQIHH", data, 20) == (1, 0, 64, 0, 0, 64, 56)
        (count,) = struct.unpack_from("<H", data, 56)
        headers = [struct.unpack_from("<IIQQQQQQ", data, 64 + 56 * index) for index in range(count)]
        kind, flags, offset, gva, gpa, size, _, align = headers[0]
        assert (kind, flags, gva, gpa, align) == (4, 0, 0, 0, 1)
        segments = []
        for kind, flags, place, gva, gpa, file_size, size_in_memory, align in headers[1:]:
            assert (kind, gpa, align, place % 4096) == (1, 0, 4096, 0) and file_size == size_in_memory
            segments.append(Segment(gva, file_size, flags, data[place : place + file_size]))
        return cls(list(cls._notes(data[offset : offset + size])), segments)

    @staticmethod
    def _notes(data: bytes) -> Iterator[tuple[bytes, int, bytes]]:
        while data:
            name_size, size, kind = struct.unpack_from("<III", data)
            name, data = data[12:20], data[20:]
            assert name == name.rstrip(b"\0").ljust(8, b"\0") and name_size == len(name.rstrip(b"\0")) + 1
            yield name.rstrip(b"\0"), kind, data[:size]
            data = data[size:]

    def note(self, kind: int) -> bytes:
        (content,) = [content for _, each, content in self.notes if each == kind]
        return content

    @property
    def registers(self) -> dict[str, int]:
        return dict(zip(CoreDump.REGISTERS, struct.unpack_from("<27Q", self.note(NT_PRSTATUS), 112), strict=True))

    def read_memory(self, gva: int, size: int) -> bytes:
        for segment in self.segments:
            if segment.gva <= gva and gva + size <= segment.gva + segment.size:
                return segment.data[gva - segment.gva :][:size]
        raise LookupError(f"{gva:#x} is not in the dump")


@pytest.fixture
def one_page() -> Iterator[CoreSegment]:
    with SharedMemory.anonymous(PAGE_SIZE) as page:
        page.write(0x10, b"sentinel")
        yield CoreSegment(0x5000, PAGE_SIZE, RW, page, 0)


def sandbox(guest: str | bytes = SIMPLEGUEST, dumps: Any = None, **settings: Any) -> MultiUseSandbox:
    config = SandboxConfiguration(guest_core_dump=dumps, **settings)
    return UninitializedSandbox(guest, config).evolve()


# -- the file, without a guest --------------------------------------------------------------


def test_one_page_and_no_extended_state_make_two_pages(tmp_path: Path, one_page: CoreSegment) -> None:
    """B.15/252"""
    path = CoreDump([one_page], {}).save(tmp_path)
    assert os.stat(path).st_size == 0x2000
    assert Core.read(path).segments == [Segment(0x5000, 0x1000, 6, one_page.mapping.read(0, 0x1000))]


def test_every_note_has_the_bytes_of_the_specification(tmp_path: Path, one_page: CoreSegment) -> None:
    registers = {name: 1 + index for index, name in enumerate(CoreDump.REGISTERS)}
    dump = CoreDump([one_page], registers, bytes(range(256)) * 16, entry=0x1234, path="/guests/some guest")
    core = Core.read(dump.save(tmp_path))
    assert [(name, kind, len(content)) for name, kind, content in core.notes] == [
        (b"CORE", NT_PRPSINFO, 136),
        (b"CORE", NT_PRSTATUS, 336),
        (b"LINUX", NT_XSTATE, 4096),
        (b"CORE", NT_SIGINFO, 128),
        (b"CORE", NT_AUXV, 32),
    ]
    info = bytes(24) + struct.pack("<I", 1) + bytes(12) + b"some guest".ljust(16, b"\0")
    assert core.note(NT_PRPSINFO) == info + b"/guests/some guest".ljust(80, b"\0")
    status = bytes(32) + struct.pack("<I", 1) + bytes(76) + struct.pack("<27QII", *registers.values(), 1, 0)
    assert core.note(NT_PRSTATUS) == status
    assert core.note(NT_XSTATE) == bytes(range(256)) * 16
    assert core.note(NT_SIGINFO) == bytes(128)
    assert core.note(NT_AUXV) == struct.pack("<4Q", 9, 0x1234, 0, 0)


def test_a_guest_from_bytes_is_called_unknown(tmp_path: Path, one_page: CoreSegment) -> None:
    info = Core.read(CoreDump([one_page], {}).save(tmp_path)).note(NT_PRPSINFO)
    assert info[40:] == b"<unknown>".ljust(16, b"\0") + b"<unknown>".ljust(80, b"\0")


def test_long_names_are_cut(tmp_path: Path, one_page: CoreSegment) -> None:
    info = Core.read(CoreDump([one_page], {}, path="/" + "a" * 100).save(tmp_path)).note(NT_PRPSINFO)
    assert info[40:] == b"a" * 16 + b"/" + b"a" * 79


def test_without_memory_there_is_nothing_to_write(tmp_path: Path) -> None:
    """B.15/251"""
    with pytest.raises(CrashDumpError, match="no memory to dump"):
        CoreDump([], {}).save(tmp_path)
    assert os.listdir(tmp_path) == []


def test_zeros_take_no_place_on_the_disk(tmp_path: Path) -> None:
    with SharedMemory.anonymous(64 << 20) as ram:
        ram.write(32 << 20, b"something")
        path = CoreDump([CoreSegment(0x1000, ram.size, RW, ram, 0)], {}).save(tmp_path)
    assert os.stat(path).st_size == (64 << 20) + 0x1000
    assert os.stat(path).st_blocks * 512 < 8 << 20  # a huge page of the kernel's is two megabytes
    with open(path, "rb") as file:
        file.seek((32 << 20) + 0x1000)
        assert file.read(9) == b"something"


# -- where it goes --------------------------------------------------------------------------


def test_the_directory_asked_for_comes_first(
    tmp_path: Path, one_page: CoreSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B.15/247"""
    monkeypatch.setenv("HYPERLIGHT_CORE_DUMP_DIR", tempfile.gettempdir())
    before = time.strftime("%Y%m%d_T%H%M%S")
    path = CoreDump([one_page], {}).save(tmp_path)
    assert Path(path).parent == tmp_path
    match = re.fullmatch(r"hl_core_(\d{8}_T\d{6})\.\d{3}\.elf", os.path.basename(path))
    assert match and before <= match[1] <= time.strftime("%Y%m%d_T%H%M%S")
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_the_environment_comes_second(
    tmp_path: Path, one_page: CoreSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYPERLIGHT_CORE_DUMP_DIR", str(tmp_path))
    assert Path(CoreDump([one_page], {}).save()).parent == tmp_path


def test_the_temporary_directory_comes_last(
    tmp_path: Path, one_page: CoreSegment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B.15/249"""
    monkeypatch.delenv("HYPERLIGHT_CORE_DUMP_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert Path(CoreDump([one_page], {}).save()).parent == tmp_path


def test_a_missing_directory_gives_way_to_the_temporary_one_with_a_warning(
    tmp_path: Path, one_page: CoreSegment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """B.15/248"""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert Path(CoreDump([one_page], {}).save(tmp_path / "missing")).parent == tmp_path
    assert f"{tmp_path}/missing is no directory" in caplog.text


def test_dumps_of_the_same_moment_get_names_of_their_own(tmp_path: Path, one_page: CoreSegment) -> None:
    dump = CoreDump([one_page], {})
    threads = [threading.Thread(target=lambda: [dump.save(tmp_path) for _ in range(25)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = os.listdir(tmp_path)
    assert len(names) == 100 and all(name.endswith(".elf") for name in names)


def test_a_file_that_cannot_be_finished_is_not_left_behind(tmp_path: Path, one_page: CoreSegment) -> None:
    broken = one_page._replace(gva=0x9000, offset=PAGE_SIZE)  # no such offset
    with pytest.raises(memory.BoundsCheckFailed):
        CoreDump([one_page, broken], {}).save(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_name_that_the_system_refuses_is_a_clear_error(one_page: CoreSegment, tmp_path: Path) -> None:
    """C/4: what a dump cannot do is an error of its own; here the name cannot even be made."""
    blocked = tmp_path / ("d" * 200)
    blocked.mkdir()
    deep = blocked
    while len(str(deep)) < 4096 - 240:
        deep = deep / ("d" * 200)
        os.mkdir(deep)
    with pytest.raises(CrashDumpError, match=r"cannot write a core dump to .*: File name too long"):
        CoreDump([one_page], {}).save(str(deep) + "/." * ((4096 - len(str(deep))) // 2 - 5))


# -- what of --------------------------------------------------------------------------------


def guest_memory(size: int) -> tuple[memory.GuestMemory, SharedMemory]:
    ram, physical = SharedMemory.anonymous(size), memory.GuestMemory()
    physical.add(0x10000, ram, RW)
    return physical, ram


def test_pages_that_continue_each_other_are_one_segment() -> None:
    physical, ram = guest_memory(0x10000)
    tables = memory.PageTableBuilder(0x10000)
    tables.map(0x5000, 0x18000, 0x2000, writable=True, executable=False)
    tables.map(0x7000, 0x1A000, 0x1000, writable=True, executable=False, user=True)
    tables.map(0x8000, 0x1B000, 0x1000, writable=False, executable=True)
    tables.map(0x9000, 0x1D000, 0x1000, writable=False, executable=True)
    tables.map(0xB000, 0x1E000, 0x1000, writable=False, executable=True, copy_on_write=True)
    tables.map(0xC000, 0x40000, 0x1000, writable=True, executable=True)  # nothing is there
    ram.write(0, tables.to_bytes())
    segments = hyperlight._core_segments(physical, 0x10000)
    rx = MemoryRegionFlags.READ | MemoryRegionFlags.EXECUTE
    assert [(each.gva, each.size, each.flags, each.offset) for each in segments] == [
        (0x5000, 0x3000, RW, 0x8000),  # whether user code may touch it makes no difference
        (0x8000, 0x1000, rx, 0xB000),
        (0x9000, 0x1000, rx, 0xD000),
        (0xB000, 0x1000, rx, 0xE000),
    ]


@pytest.mark.parametrize("shape", ["alias", "self-reference", "nothing"])
def test_hostile_page_tables_end_in_a_bounded_dump(shape: str, caplog: pytest.LogCaptureFixture) -> None:
    physical, ram = guest_memory(64 * PAGE_SIZE)
    entry = {"alias": 0x20000, "self-reference": 0x10000, "nothing": 0xF_0000_0000}[shape]
    for table in range(3):
        ram.write(table * PAGE_SIZE, struct.pack("<Q", 0x10000 + (table + 1) * PAGE_SIZE | 7) * 512)
    ram.write(3 * PAGE_SIZE, struct.pack("<Q", entry | 7) * 512)
    if shape == "self-reference":
        ram.write(0, struct.pack("<Q", entry | 7) * 512)
    begin = time.monotonic()
    segments = hyperlight._core_segments(physical, 0x10000)
    assert time.monotonic() - begin < 5
    assert sum(each.size for each in segments) <= 4 * ram.size
    assert len(caplog.records) == 1 and "core dump" in caplog.text


@require("kvm")
def test_a_dump_holds_all_that_the_guest_has_mapped(tmp_path: Path) -> None:
    (tmp_path / "mapped").write_bytes(b"from a file".ljust(PAGE_SIZE, b"."))
    with sandbox() as box:
        box.map_file_cow(tmp_path / "mapped", 0x1_0000_0000)
        box.call("ReadMappedBuffer", ULong(0x1_0000_0000), ULong(PAGE_SIZE), True)
        core = Core.read(box.generate_crashdump_to_dir(tmp_path) or "")
        layout, guest = box.layout, box._guest
        peb = guest.physical.read_phys(layout.peb_gpa, 64)
        scratch = guest.physical.read_phys(layout.scratch_base_gpa, layout.scratch_size)
    assert core.read_memory(0x1_0000_0000, PAGE_SIZE) == b"from a file".ljust(PAGE_SIZE, b".")
    assert core.read_memory(layout.peb_gpa, 64) == peb
    (whole,) = [each for each in core.segments if each.gva == layout.scratch_base_gva]
    assert scratch.startswith(whole.data) and whole.size >= layout.scratch_size - PAGE_SIZE


@require("kvm")
def test_the_entry_point_is_known_to_a_sandbox_from_a_snapshot(tmp_path: Path) -> None:
    """coredump.md, later releases: symbols resolve without the path of the ELF."""
    with sandbox() as original, MultiUseSandbox.from_snapshot(original.snapshot()) as box:
        core = Core.read(box.generate_crashdump_to_dir(tmp_path) or "")
        assert core.note(NT_AUXV) == struct.pack("<4Q", 9, 0x1000 + box.snapshot().elf.entry, 0, 0)
        assert core.note(NT_PRPSINFO)[56:].rstrip(b"\0") == SIMPLEGUEST.encode()


# -- registers ------------------------------------------------------------------------------

GENERAL = tuple(name for name, *_ in kvm_abi.kvm_regs._fields_ if name not in ("rip", "rflags"))


def distinct_registers(vcpu: kvm_abi.Vcpu) -> dict[str, int]:
    """Put a different value into every register and return them."""
    regs, sregs, xsave = vcpu.get_regs(), vcpu.get_sregs(), vcpu.get_xsave()
    expected = {name: 0x1111_0000_0000 + 0x1_0101 * index for index, name in enumerate(GENERAL, 1)}
    expected |= {"rip": 0x7777_1234, "rflags": 0xA93}
    for name, value in expected.items():
        setattr(regs, name, value)
    for index, name in enumerate(("cs", "ss", "ds", "es", "fs", "gs"), 1):
        getattr(sregs, name).selector = expected[name] = 8 * index
    sregs.fs.base, sregs.gs.base = 0x1234_5000, 0x6789_A000
    expected |= {"fs_base": sregs.fs.base, "gs_base": sregs.gs.base, "orig_rax": 0}
    area = bytearray(bytes(xsave))
    struct.pack_into("<HH", area, 0, 0x27F, 0)
    struct.pack_into("<I", area, 24, 0x1FA5)
    for index in range(8):
        struct.pack_into("<QH", area, 32 + 16 * index, 0x8000_0000_0000_0000 | index, 0x4000 + index)
    for index in range(16):
        struct.pack_into("<QQ", area, 160 + 16 * index, 0x1000 + index, 0x2000 + index)
    area[4] = 0xFF  # no x87 register is empty
    struct.pack_into("<Q", area, 512, 3)
    vcpu.set_regs(regs)
    vcpu.set_sregs(sregs)
    vcpu.set_xsave(kvm_abi.kvm_xsave.from_buffer_copy(area))
    return expected


@require("kvm")
def test_every_register_is_the_vcpus(tmp_path: Path) -> None:
    """C/5"""
    with sandbox() as box:
        vcpu = box._guest.vm.vcpu
        expected = distinct_registers(vcpu)
        core = Core.read(box.generate_crashdump_to_dir(tmp_path) or "")
        area, kernels = core.note(NT_XSTATE), bytes(vcpu.get_xsave())
    assert core.registers == expected
    assert len(set(expected.values())) == len(expected)
    assert area[:416] == kernels[:416] and area[512:] == kernels[512:]
    assert struct.unpack_from("<Q", area, 464)[0] & 3 == 3  # what gdb takes for XCR0
    assert struct.unpack_from("<I", area, 24) == (0x1FA5,)


@require("kvm")
@require("gdb")
def test_gdb_reads_every_register(tmp_path: Path) -> None:
    """C/5, B.15/253"""
    with sandbox() as box:
        expected = distinct_registers(box._guest.vm.vcpu)
        path = box.generate_crashdump_to_dir(tmp_path)
    del expected["orig_rax"]
    expected["eflags"] = expected.pop("rflags")
    shown = gdb(path, "echo >>>\\n", "info registers " + " ".join(expected)).split(">>>\n")[1]
    assert {name: int(value, 16) for name, value, *_ in map(str.split, shown.splitlines())} == expected
    shown = gdb(path, "p/x $mxcsr", "p/x $fctrl", "p/x $xmm5.v2_int64", "p/x $xmm15.v2_int64", "p $st6")
    assert "= 0x1fa5\n" in shown and "= 0x27f\n" in shown
    assert "{0x1005, 0x2005}" in shown and "{0x100f, 0x200f}" in shown
    assert "= 128" in shown  # 1.0 * 2 ** 7, and a last bit that is not shown


SAVED_BY_EXCEPTION = r"""
        lea frame(%rip), %rcx           # its address goes into the text, the highest digit first
        lea digits(%rip), %rdi
        mov $16, %edx
1:      rol $4, %rcx
        mov %ecx, %eax
        and $15, %eax
        lea alphabet(%rip), %rsi
        movb (%rsi, %rax), %al
        movb %al, (%rdi)
        inc %rdi
        dec %edx
        jnz 1b
        lea text(%rip), %rsi
2:      movzbl (%rsi), %eax             # a byte at a time to the abort port, which does not return from the last
        inc %rsi
        shl $8, %eax
        inc %eax
        out %eax, $102
        jmp 2b

alphabet: .ascii "0123456789abcdef"
text:   .byte 15, 6
        .ascii "Exception vector: 6\nFaulting Instruction: 0x1234\nBytes At Faulting Instruction: []\n"
        .ascii "Page Fault Address: 0x0\nError code: 0x0\nStack Pointer: 0x"
digits: .ascii "0123456789abcdef"
        .byte 0xff
        .balign 64
frame:  .quad 0x101, 0x102, 0x103, 0x104        # DS, GS, FS, ES
        .set i, 0
        .rept 512 / 4
        .long 0x5a000000 + i                    # FXSAVE
        .set i, i + 1
        .endr
        .set i, 0
        .rept 22
        .quad 0x7000 + i                        # r15 ... SS
        .set i, i + 1
        .endr
"""


@require("kvm")
@require("gcc")
def test_after_an_exception_the_registers_are_those_of_the_code_that_caused_it(tmp_path: Path) -> None:
    """C/1; the x87 and SSE registers too, which a handler may have used since."""
    with sandbox(rawguest.build(SAVED_BY_EXCEPTION)) as box:
        with pytest.raises(GuestAborted) as caught:
            box.call("any")
        assert caught.value.vector == 6
        core = Core.read(box.generate_crashdump_to_dir(tmp_path) or "")
    order = "r15 r14 r13 r12 r11 r10 r9 r8 rbp rdi rsi rdx rcx rbx rax padding error_code rip cs rflags rsp ss"
    saved = {name: 0x7000 + index for index, name in enumerate(order.split())}
    del saved["padding"], saved["error_code"]
    saved |= {"ds": 0x101, "gs": 0x102, "fs": 0x103, "es": 0x104}
    registers = core.registers
    assert {name: registers[name] for name in saved} == saved
    area = core.note(NT_XSTATE)
    assert area[:416] == b"".join(struct.pack("<I", 0x5A000000 + index) for index in range(104))
    assert struct.unpack_from("<Q", area, 512)[0] & 3 == 3


@require("kvm")
@require("gcc")
def test_a_frame_at_a_wild_address_leaves_the_vcpus_registers(tmp_path: Path) -> None:
    wild = SAVED_BY_EXCEPTION.replace("lea frame(%rip), %rcx", "mov $-64, %rcx")
    with sandbox(rawguest.build(wild)) as box:
        with pytest.raises(GuestAborted):
            box.call("any")
        live = box._guest.vm.registers()
        core = Core.read(box.generate_crashdump_to_dir(tmp_path) or "")
    assert core.registers["rip"] == live["rip"] and core.registers["rsp"] == live["rsp"]


# -- when one is written --------------------------------------------------------------------


@pytest.fixture
def no_dump_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYPERLIGHT_CORE_DUMP_DIR", raising=False)


@require("kvm")
def test_a_write_to_a_read_only_file_leaves_a_dump(tmp_path: Path) -> None:
    """B.15/255, part 1"""
    (tmp_path / "file").write_bytes(bytes(PAGE_SIZE))
    dumps = tmp_path / "dumps"
    dumps.mkdir()
    with sandbox(dumps=dumps) as box:
        box.map_file_cow(tmp_path / "file", 0x1_0000_0000)
        with pytest.raises(hyperlight.MemoryAccessViolation) as caught:
            box.call("WriteMappedBuffer", ULong(0x1_0000_0000), ULong(PAGE_SIZE))
    (name,) = os.listdir(dumps)
    assert caught.value.core_dump == str(dumps / name)
    registers = Core.read(dumps / name).registers
    assert {each: registers[each] for each in GENERAL} == {each: caught.value.registers[each] for each in GENERAL}
    if hasattr(caught.value, "__notes__"):
        assert caught.value.__notes__ == [f"core dump: {dumps / name}"]


@require("kvm")
def test_a_dump_can_be_had_after_ud2_and_the_sandbox_restored(tmp_path: Path, no_dump_directory: None) -> None:
    """B.15/255, part 2; C/2"""
    with sandbox() as box:
        before = box.snapshot()
        with pytest.raises(GuestAborted) as caught:
            box.call("TriggerException")
        assert caught.value.core_dump is None and box.poisoned
        core = Core.read(box.generate_crashdump_to_dir(tmp_path) or "")
        assert core.registers["rip"] == caught.value.instruction
        assert core.read_memory(core.registers["rip"], 2) == b"\x0f\x0b"
        assert box.poisoned
        box.restore(before)
        assert box.call("Echo", "alive") == "alive"
        core = Core.read(box.generate_crashdump_to_dir(tmp_path) or "")
        assert core.registers["rip"] != caught.value.instruction


@require("kvm")
def test_a_sandbox_may_say_no_to_dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B.15/250 and B.15/255, part 3"""
    monkeypatch.setenv("HYPERLIGHT_CORE_DUMP_DIR", str(tmp_path))
    with sandbox(dumps=False) as box:
        with pytest.raises(GuestAborted) as caught:
            box.call("TriggerException")
        assert caught.value.core_dump is None and caught.value.core_dump_failure is None
        assert box.generate_crashdump() is None
        assert box.generate_crashdump_to_dir(tmp_path) is None
    assert os.listdir(tmp_path) == []


@require("kvm")
def test_nobody_asked_nothing_is_written(
    tmp_path: Path, no_dump_directory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with sandbox() as box, pytest.raises(GuestAborted):
        box.call("TriggerException")
    assert os.listdir(tmp_path) == []


@require("kvm")
@pytest.mark.parametrize("call", [("GuestPanic", "no"), ("ExhaustHeap", 4096), ("OutbWithPort", UInt(5), UInt(1))])
def test_the_environment_asks_for_a_dump_of_every_failure(
    call: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """coredump.md: what 0.14 misses, aborts and errors of port handlers, is dumped too."""
    monkeypatch.setenv("HYPERLIGHT_CORE_DUMP_DIR", str(tmp_path))
    with sandbox() as box, pytest.raises(GuestFailure) as caught:
        box.call(*call)
    assert [str(tmp_path / name) for name in os.listdir(tmp_path)] == [caught.value.core_dump]


@require("kvm")
@require("gcc")
def test_a_guest_that_fails_to_initialise_is_dumped_too(tmp_path: Path) -> None:
    with pytest.raises(hyperlight.InitializeError) as caught:
        sandbox(rawguest.build("", initialise="out %eax, $7"), dumps=tmp_path)
    assert caught.value.core_dump is not None
    assert Core.read(caught.value.core_dump).registers["rip"] == caught.value.registers["rip"]


@require("kvm")
def test_a_cancelled_call_is_not_dumped(tmp_path: Path) -> None:
    """C/3"""
    with sandbox(dumps=tmp_path) as box:
        handle = box.interrupt_handle()
        box.register("Cancel", lambda: int(handle.kill()))
        with pytest.raises(hyperlight.ExecutionCanceledByHost):
            box.call("HostCallLoop", "Cancel")
    assert os.listdir(tmp_path) == []


@require("kvm")
@require("gcc")
def test_a_dump_that_fails_never_hides_the_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """C/4: with a wild CR3 there is nothing to dump, and the guest's failure is what is raised."""
    guest = rawguest.build("mov $0x7000000000, %rax; mov %rax, %cr3; hlt")
    dumps = tmp_path / "dumps"
    dumps.mkdir()
    with sandbox(guest, dumps=dumps) as box:
        before = box.snapshot()
        with pytest.raises(GuestFailure) as caught:
            box.call("any")
        assert not isinstance(caught.value, CrashDumpError)
        assert box.poisoned
        if caught.value.core_dump is None:  # the vCPU may have been reset: then there are pages to dump
            assert isinstance(caught.value.core_dump_failure, CrashDumpError)
            assert "there is no core dump: the guest has no memory" in caplog.text
            assert os.listdir(dumps) == []
        box.restore(before)


@require("kvm")
def test_a_directory_that_cannot_be_written_does_not_hide_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C/4"""

    def refuse(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    with sandbox(dumps=tmp_path) as box:
        monkeypatch.setattr(os, "open", refuse)  # root may write anywhere
        with pytest.raises(GuestAborted, match="InvalidOpcode") as caught:
            box.call("TriggerException")
        monkeypatch.undo()
        assert str(caught.value.core_dump_failure) == f"cannot write a core dump to {tmp_path}: Permission denied"
        assert box.status is SandboxStatus.POISONED


# -- all sandboxes --------------------------------------------------------------------------


@require("kvm")
def test_all_sandboxes_are_dumped_but_those_in_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """coredump.md: upstream's script for gdb, as a function."""
    inside: list[list[str]] = []
    with sandbox() as idle, sandbox() as busy, sandbox() as closed:
        assert idle.poisoned is False
        closed.close()
        busy.register("HostAdd", lambda a, b: inside.append(dump_all_sandboxes(tmp_path)) or a + b)
        busy.call("Add", 1, 2)
        assert len(inside[0]) == 1 and "a thread is using it" in caplog.text
        assert len(dump_all_sandboxes(tmp_path)) == 2
    assert dump_all_sandboxes(tmp_path) == []


@require("kvm")
def test_from_a_host_function_its_own_sandbox_is_refused(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def dump() -> int:
        try:
            box.generate_crashdump_to_dir(tmp_path)
        except hyperlight.HyperlightError as error:
            failures.append(error)
        return 0

    with sandbox() as box:
        box.register("Dump", dump)
        box.call("TryCallHost", "Dump")
    assert isinstance(failures[0], hyperlight.GuestFunctionCallAlreadyInProgress)


# -- gdb ------------------------------------------------------------------------------------


def gdb(core: str | None, *commands: str, guest: str = SIMPLEGUEST) -> str:
    """Load *core* with the guest's ELF and return what gdb prints."""
    assert core is not None
    script = Path(core).with_suffix(".gdb")
    script.write_text("\n".join(commands) + "\n")
    arguments = ["gdb", "-nx", "-batch", guest, core, "-x", str(script)]
    environment = {**os.environ, "LC_ALL": "C", "DEBUGINFOD_URLS": ""}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def backtrace(core: str | None) -> list[str]:
    """Return the names of the functions on the stack, the innermost first."""
    shown = gdb(core, "echo >>>", "bt")
    return re.findall(r"^#\d+ +(?:0x[0-9a-f]+ in )?([\w<>? ]+?)(?: \(|$)", shown.split(">>>")[1], re.MULTILINE)


@require("kvm")
@require("gdb")
def test_gdb_reads_memory_and_the_backtrace_ends(tmp_path: Path) -> None:
    """B.15/254"""
    environment = hyperlight.GuestEnvironment(SIMPLEGUEST, init_data=b"sentinel string")
    with UninitializedSandbox(environment).evolve() as box:
        with pytest.raises(GuestAborted):
            box.call("TriggerException")
        path, gva = box.generate_crashdump_to_dir(tmp_path), box.layout.init_data_gpa
    assert f'{gva:#x}:\t"sentinel string"' in gdb(path, f"x/s {gva:#x}")
    assert backtrace(path)[-1] == "hl_dispatch"


@require("kvm")
@require("gdb")
@pytest.mark.parametrize(
    ("call", "function", "instruction"),
    [
        (("DivideByZero", 7), "divide_by_zero", "idiv"),
        (("ReadUnmapped",), "read_unmapped", "0x700000000000"),
        (("WriteUnmapped",), "write_unmapped", "movb"),
        (("TriggerException",), "trigger_exception", "ud2"),
    ],
)
def test_gdb_shows_the_faulting_instruction_and_how_it_came_there(
    call: tuple[Any, ...], function: str, instruction: str, tmp_path: Path
) -> None:
    """C/1, page fault and divide error"""
    with sandbox(dumps=tmp_path) as box, pytest.raises(GuestAborted) as caught:
        box.call(*call)
    names = backtrace(caught.value.core_dump)
    assert names[0] == function
    assert names[-2:] == ["hl_runtime_dispatch", "hl_dispatch"]
    shown = gdb(caught.value.core_dump, "x/i $rip", "p/x $rip")
    assert re.search(rf"=> {caught.value.instruction:#x} <{function}(\+\d+)?>:.*{instruction}", shown)


@require("kvm")
@require("gdb")
def test_gdb_shows_where_a_panic_was_raised(tmp_path: Path) -> None:
    """C/1, panic"""
    with sandbox(dumps=tmp_path) as box, pytest.raises(GuestAborted, match="panicked at") as caught:
        box.call("GuestPanic", "help")
    names = backtrace(caught.value.core_dump)
    assert "guest_panic" in names and names[-1] == "hl_dispatch"


@require("kvm")
@require("gdb")
def test_gdb_shows_the_recursion_that_overflowed_the_stack(tmp_path: Path) -> None:
    """C/1, stack overflow: across the guest's page-fault handler"""
    with sandbox(dumps=tmp_path) as box, pytest.raises(GuestAborted, match="Out of physical memory") as caught:
        box.call("InfiniteRecursion")
    shown = gdb(caught.value.core_dump, "bt 40")
    assert re.search(r"<signal handler called>\n(.*\n)*#\d+ .*\brecurse \(", shown)


@require("kvm")
@require("gdb")
def test_gdb_shows_a_wild_jump_and_its_caller(tmp_path: Path) -> None:
    with sandbox(dumps=tmp_path) as box, pytest.raises(GuestAborted) as caught:
        box.call("JumpTo", ULong(0x1234_5678_9000))
    assert backtrace(caught.value.core_dump)[:2] == ["??", "jump_to"]


@require("kvm")
def test_breakpoints_of_a_debugger_are_not_in_the_dump(tmp_path: Path) -> None:
    """C/6"""
    config = SandboxConfiguration(guest_debug_info=hyperlight.DebugInfo(wait=False))
    with UninitializedSandbox(SIMPLEGUEST, config).evolve() as box:
        debugger = box._guest.debugger
        assert debugger is not None
        entry = box._guest.snapshot.entry
        original = debugger.target.read_memory(entry, 16)
        debugger.target.insert_breakpoint(entry)
        assert debugger.target.read_memory(entry, 1) == b"\xcc" != original[:1]
        core = Core.read(box.generate_crashdump_to_dir(tmp_path) or "")
        assert core.read_memory(entry, 16) == original
        assert debugger.target.read_memory(entry, 1) == b"\xcc"
        debugger.target.remove_breakpoint(entry)
