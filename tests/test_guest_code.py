"""What the prebuilt guests' machine code may contain, and what their ELF files must look like.

On a KVM that emulates CPL 0 most of SSE and some newer integer instructions are refused, or silently wrong
(kvm-hosts.md 2.6). The kernel part of a guest is held to a list of what is known to be right; the rest of a
guest built for kernel mode, which runs at CPL 0 too, must not touch SSE unless it computes with floats.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import KERNEL_GUESTS, REPOSITORY, require
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection

USER_GUESTS = sorted((REPOSITORY / "guests" / "bin").iterdir())
GUESTS = [*USER_GUESTS, *sorted(KERNEL_GUESTS.iterdir())]

# The mnemonics of kvm-hosts.md 2.6, "Fine at CPL 0", as objdump spells them without size suffixes. Prefixes apart.
_INTEGER = """
    add adc sub sbb and or xor cmp test neg not inc dec lea mov movabs movzx movsx movsxd movzb movzw movsb
    movsw movsl bswap xchg cltq cqto cwtl cltd shl shr sal sar rol ror rcl rcr shld shrd mul imul div idiv
    bt bts btr btc bsf bsr movs lods stos cmps scas cld std push pop pushf popf call ret lret jmp leave xadd cmpxchg
    mfence lfence sfence fxsave fxrstor lgdt lidt sgdt sidt ltr str swapgs rdmsr wrmsr invlpg wbinvd iretq
    sti cli hlt ud2 in out nop pause cpuid rdtsc"""
INTEGER = frozenset(_INTEGER.split())
CONDITIONAL = re.compile(r"(j|set|cmov)(n?[abceglopsz]|n?[abgl]e|rcxz)$")
PREFIXES = {"lock", "rep", "repz", "repnz", "cs", "data16", "rex.W", "notrack"}

# Refused or wrong at CPL 0, whatever the operands.
_REFUSED = """
    popcnt lzcnt tzcnt movbe andn blsr blsi blsmsk bextr bzhi shlx shrx sarx rorx mulx pdep pext adcx adox crc32
    cmpxchg16b ldmxcsr stmxcsr fldcw fnstsw fnclex fwait emms xsave xsaveopt xsavec xrstor rdtscp xgetbv xsetbv int3
    int icebp syscall sysenter vmcall vmmcall stac clac invpcid lar lsl"""
REFUSED = frozenset(_REFUSED.split())
SSE_MOVES = {"movaps", "movups", "movapd", "movupd", "movdqa", "movdqu", "movntps", "movntdq"}
VECTOR_REGISTER = re.compile(r"%([xyz]mm|mm|st)")

# The functions of the prebuilt guests that are there to compute with floats, or to run an int3.
# Asks for AVX, where CPUID says that there is XSAVE: an emulated CPL 0 hides it.
MAY_USE_XSETBV = "hl_kernel_init"

MAY_USE_SSE = re.compile(r"(_call_)?(add_floats|add_doubles|matrix_product_trace|multiply|print_double|use_sse)$|trigger_int3$")


class Instruction(NamedTuple):
    function: str
    mnemonic: str
    operands: str


def disassemble(guest: Path, section: str) -> Iterator[Instruction]:
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-j", section, str(guest)],
        check=True, capture_output=True, text=True, env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
    ).stdout  # fmt: skip
    function = ""
    for line in listing.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            function = header[1]
        elif "\t" in line:
            words = line.split("\t")[1].split(None, 1)
            while words[0] in PREFIXES and len(words) > 1:
                words = words[1].split(None, 1)
            yield Instruction(function, words[0], words[1] if len(words) > 1 else "")


def is_known_integer(mnemonic: str) -> bool:
    return mnemonic in INTEGER or mnemonic[:-1] in INTEGER or CONDITIONAL.match(mnemonic) is not None


def name_of(guest: Path) -> str:
    return guest.name if guest in USER_GUESTS else f"{guest.name} for kernel mode"


@pytest.fixture(params=GUESTS, ids=name_of)
def guest(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@require("gcc")
def test_kernel_part_holds_only_instructions_that_an_emulated_cpl0_gets_right(guest: Path) -> None:
    code = [i for i in disassemble(guest, ".kernel") if i[:2] != (MAY_USE_XSETBV, "xsetbv")]
    assert {"entrypoint", "hl_vector_stubs", "hl_kernel_page_fault"} <= {i.function for i in code}
    assert [i for i in code if not is_known_integer(i.mnemonic) or VECTOR_REGISTER.search(i.operands)] == []


@require("gcc")
def test_kernel_part_calls_nothing_that_a_guest_could_have_changed(guest: Path) -> None:
    """A guest for user mode is entered by IRETQ alone."""
    code = list(disassemble(guest, ".kernel"))
    inside = {i.function for i in code}
    branches = [i.operands for i in code if i.mnemonic in ("call", "jmp")]
    targets = {found[1] for operands in branches if (found := re.search(r"<([^+>]+)", operands))}
    assert targets - inside == (set() if guest in USER_GUESTS else {"hl_runtime_init", "hl_runtime_dispatch"})


@require("gcc")
@pytest.mark.parametrize("guest", sorted(KERNEL_GUESTS.iterdir()), ids=name_of)
def test_code_that_does_not_compute_with_floats_needs_no_sse(guest: Path) -> None:
    code = [i for i in disassemble(guest, ".text") if not MAY_USE_SSE.match(i.function)]
    assert len(code) > 1000
    assert [i for i in code if i.mnemonic in REFUSED] == []
    assert [i for i in code if VECTOR_REGISTER.search(i.operands) and i.mnemonic not in SSE_MOVES] == []


def test_version_note_is_byte_for_byte_the_reference_guests(guest: Path) -> None:
    """abi.md 4.7."""
    with guest.open("rb") as file:
        section = ELFFile(file).get_section_by_name(".note.hyperlight-version")
        assert section.data() == bytes.fromhex("0b0000000700000001000000") + b"Hyperlight\0\0" + b"0.14.0\0\0"


def test_image_is_a_static_pie_that_every_host_loads(guest: Path) -> None:
    """abi.md 4.2 to 4.4: first segment at 0, ascending headers, RELATIVE relocations only."""
    with guest.open("rb") as file:
        elf = ELFFile(file)
        kinds = {segment["p_type"] for segment in elf.iter_segments()}
        loads = [segment["p_vaddr"] for segment in elf.iter_segments("PT_LOAD")]
        tables = [s for s in elf.iter_sections() if isinstance(s, RelocationSection)]
        assert elf["e_type"] == "ET_DYN"
        assert kinds == {"PT_LOAD", "PT_DYNAMIC"}
        assert loads[0] == 0 and loads == sorted(loads)
        assert [table.name for table in tables] == [".rela.dyn"]
        assert {relocation["r_info_type"] for relocation in tables[0].iter_relocations()} == {8}


def test_kernel_part_is_whole_pages_apart_from_everything_else(guest: Path) -> None:
    """The pages that a user-mode guest's tables keep to the supervisor."""
    with guest.open("rb") as file:
        elf = ELFFile(file)
        symbol = elf.get_section_by_name(".symtab").get_symbol_by_name
        start, end = (symbol(name)[0]["st_value"] for name in ("__hl_kernel_start", "__hl_kernel_end"))
        assert start % 4096 == end % 4096 == 0 and start < end
        for section in elf.iter_sections():
            if section["sh_flags"] & 2 and section["sh_size"]:
                inside = start <= section["sh_addr"] < end
                assert inside == section.name.startswith(".kernel")
                assert inside or section["sh_addr"] + section["sh_size"] <= start or section["sh_addr"] >= end


def test_prebuilt_guests_stay_small(guest: Path) -> None:
    assert guest.stat().st_size < 150_000
