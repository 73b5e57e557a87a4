"""What a guest's code finds unchanged behind its back, at CPL 3 as at CPL 0: registers over page faults, services,
exceptions and handlers; and what a restore takes away, or gives anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import conftest
import pytest
from conftest import PRIVILEGES, require
from intruder import GUEST, KERNEL_GUEST, MAIN_STACK, Arena, Attempt, Host, State

import hyperlight
from hyperlight import MultiUseSandbox, UInt, ULong
from memory import PAGE_SIZE, MemoryRegionFlags, SharedMemory

pytestmark = require("kvm")

# -- registers -----------------------------------------------------------------------------

DISTURBANCES = {
    "a page of stack that was not there": "mov (%rsi), %al",
    "a page that is copied at the first write": "incb untouched(%rip)",
    "a handler": "movq $0x2a0, edit_offset(%rip); ud2",
    "a handler that uses the registers itself": "movq $-4, edit_offset(%rip); ud2",
    "a service": "mov $2, %edi; mov $hl_service, %rax; call *%rax",
}
NUMBERS = range(16)
KEPT = {
    "xmm": (
        "; ".join(f"movups pattern+{16 * number}(%rip), %xmm{number}" for number in NUMBERS),
        "; ".join(f"movups %xmm{number}, {16 * number}(%rdi)" for number in NUMBERS),
        "pattern",
        256,
    ),
    "ymm": (
        "; ".join(f"vmovups pattern+{32 * number}(%rip), %ymm{number}" for number in NUMBERS),
        "; ".join(f"vmovups %ymm{number}, {32 * number}(%rdi)" for number in NUMBERS) + "; vzeroupper",
        "pattern",
        512,
    ),
    "x87": (
        "fninit; fldcw x87(%rip); ldmxcsr x87+2(%rip); fldt x87+6(%rip); fldt x87+16(%rip); fldt x87+26(%rip)",
        "fnstcw (%rdi); stmxcsr 2(%rdi); fstpt 26(%rdi); fstpt 16(%rdi); fstpt 6(%rdi); fninit; ldmxcsr usual(%rip)",
        "x87",
        36,
    ),
    "red zone": (
        "mov %rsi, %rax; lea pattern(%rip), %rsi; lea -128(%rsp), %rdi; mov $16, %ecx; rep movsq; mov %rax, %rsi",
        "mov %rdi, %rax; lea -128(%rsp), %rsi; mov $16, %ecx; rep movsq",
        "pattern",
        128,
    ),
}
"""Fill from, store to RDI, what is stored then, and how many bytes of it."""
DATA = """
    jmp survived
    .balign 64
pattern: .rept 512; .byte 0x80 + (. - pattern) % 0x7F; .endr
x87: .word 0x27F; .long 0x7F80; .quad 0xC90FDAA22168C235; .word 0x4000; .quad 0xB8AA3B295C17F0BC; .word 0x3FFF
    .quad 0x9A209A84FBCFF799; .word 0x3FFD
usual: .long 0x1F80
"""
"""Pi, the binary logarithm of e and the decimal one of 2 are on the stack of the x87."""
SNIPPETS = {
    "data": DATA,
    **{
        f"{what} over {disturbance}": f"{fill}; {disturb}; lea zeros(%rip), %rdi; {store}; lea zeros(%rip), %rdi; "
        f"lea {expected}(%rip), %rsi; mov ${size}, %ecx; repe cmpsb; setne %al; movzx %al, %eax"
        for what, (fill, store, expected, size) in KEPT.items()
        for disturbance, disturb in DISTURBANCES.items()
    },
    "fill": "; ".join(KEPT[what][0] for what in ("ymm", "x87")),
    "see": "lea zeros(%rip), %rdi; "
    + KEPT["ymm"][1]
    + "; stmxcsr 512(%rdi); xorl $0x1F80, 512(%rdi); fnstcw 516(%rdi); "
    "xorw $0x37F, 516(%rdi); xor %eax, %eax; mov $65, %ecx; 1: or -8(%rdi,%rcx,8), %rax; dec %ecx; jnz 1b",
}
WHO: dict[str, tuple[Host, str]] = {
    "user": ("host", GUEST),
    "user, and copies itself": ("guest", GUEST),
    "unaware": ("unaware", GUEST),
    "kernel": ("host", KERNEL_GUEST),
}
STATES: tuple[State, ...] = ("fresh", "restored", "from a snapshot")


@pytest.fixture(scope="module", params=STATES)
def state(request: pytest.FixtureRequest) -> State:
    chosen: State = request.param
    return chosen


@pytest.fixture(scope="module", params=WHO)
def arena(request: pytest.FixtureRequest, state: State) -> Iterator[Arena]:
    host, guest = WHO[request.param]
    arena = Arena(host, state, SNIPPETS, guest=guest)
    yield arena
    arena.close()


@require("gcc")
@pytest.mark.parametrize("what", KEPT)
def test_what_is_behind_the_guests_back_leaves_registers_and_red_zone_alone(arena: Arena, what: str) -> None:
    """A service is called, so that the red zone is the caller's to give up. AVX is what user mode offers."""
    disturbances = list(DISTURBANCES)[: -1 if what == "red zone" else None]
    if what == "ymm":
        conftest.need("avx")
    if arena.guest == KERNEL_GUEST and what == "red zone":
        disturbances.remove("a handler that uses the registers itself")
    elif arena.guest == KERNEL_GUEST:
        conftest.need("real_cpl0")
    names = [f"{what} over {disturbance}" for disturbance in disturbances]
    found = arena.attack([Attempt(name, rsi=MAIN_STACK.stop - 24 * PAGE_SIZE) for name in names])
    arena.renew()
    expected = "#UD(0x0)" if what == "ymm" and arena.guest == KERNEL_GUEST else "survived with 0x0"
    assert dict(zip(names, map(str, found), strict=True)) == dict.fromkeys(names, expected)


@require("gcc")
@require("avx")
@pytest.mark.parametrize("who", ["user", "unaware"])
def test_registers_are_fresh_after_a_restore(who: str) -> None:
    """Those of AVX, too; at every other call all but the upper halves of those."""
    host, guest = WHO[who]
    arena = Arena(host, "restored", SNIPPETS, guest=guest)
    assert [str(outcome) for outcome in arena.attack([Attempt("fill"), Attempt("see")])] != ["survived with 0x0"] * 2
    arena.attack([Attempt("fill")])
    arena.renew()
    assert str(arena.attack([Attempt("see")])[0]) == "survived with 0x0"
    arena.close()


# -- time, memory and chance ---------------------------------------------------------------


@require("timer_interrupts")
@pytest.mark.parametrize("by_whom", ["host", "guest"])
@pytest.mark.parametrize("privilege", PRIVILEGES)
def test_the_timer_interrupts_also_after_a_snapshot(privilege: str, by_whom: str) -> None:
    """Installing the handler writes to the IDT, which the snapshot may have made copy-on-write."""
    config = hyperlight.SandboxConfiguration(hardware_timer=True)

    def ticks(sandbox: MultiUseSandbox) -> Any:
        return sandbox.call("TimerTicks", UInt(1000), 2, ULong(1 << 32))

    with conftest.booted("simpleguest", privilege, hardware_timer=True, copy_on_write=by_whom) as sandbox:
        before = sandbox.snapshot()
        assert ticks(sandbox) >= 2
        sandbox.restore(before)
        assert ticks(sandbox) >= 2
        after = sandbox.snapshot()
        with MultiUseSandbox.from_snapshot(before, config=config) as other:
            assert ticks(other) >= 2
            other.restore(after)
            assert ticks(other) >= 2


BASE, CONTENT = 0x2_0000_0000, b"what the host has mapped"


@pytest.mark.parametrize("privilege", PRIVILEGES)
def test_memory_that_the_host_maps(privilege: str) -> None:
    with SharedMemory.anonymous(2 * PAGE_SIZE) as region, conftest.booted("simpleguest", privilege) as sandbox:
        region.write(PAGE_SIZE, CONTENT)
        before = sandbox.snapshot()
        sandbox.map_region(BASE, region, MemoryRegionFlags.READ)
        size = ULong(2 * PAGE_SIZE)
        assert sandbox.call("ReadMappedBuffer", ULong(BASE), size, True)[PAGE_SIZE:].startswith(CONTENT)
        mapped = sandbox.snapshot()
        with pytest.raises(hyperlight.MemoryAccessViolation) as caught:
            sandbox.call("WriteMappedBuffer", ULong(BASE + PAGE_SIZE), ULong(PAGE_SIZE))
        assert (caught.value.address, caught.value.flags) == (BASE + PAGE_SIZE, MemoryRegionFlags.READ)
        sandbox.restore(mapped)
        assert sandbox.call("ReadMappedBuffer", ULong(BASE), size, False)[PAGE_SIZE:].startswith(CONTENT)
        sandbox.restore(before)
        assert sandbox.call("CheckMapped", ULong(BASE)) is False


DICE = """
#include "hyperlight_guest.h"
#include <stdlib.h>

static int32_t roll(void) { return rand(); }
HYPERLIGHT_WRAP_FUNCTION(roll, Int, 0)
void hyperlight_main(void) { HYPERLIGHT_REGISTER_FUNCTION("Roll", roll); }
hl_Vec *c_guest_dispatch_function(const hl_FunctionCall *call) { (void)call; return NULL; }
"""


@pytest.fixture(scope="module", params=["--user", "--kernel"])
def dice(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    conftest.need("gcc")
    conftest.need("musl")
    source = tmp_path_factory.mktemp("dice") / "dice.c"
    source.write_text(DICE)
    options = [] if request.param == "--user" else [request.param]
    assert hyperlight.main(["build", *options, str(source), "-o", str(source.with_suffix(""))]) == 0
    return source.with_suffix("")


@pytest.mark.parametrize("knows", [True, False])
def test_random_numbers_after_a_restore(dice: Path, knows: bool) -> None:
    """A host that knows this SDK's guests gives them a new seed; another does not, and they draw the same again."""
    with conftest.unaware_of_user_mode(not knows):
        uninitialized = hyperlight.UninitializedSandbox(dice)
    with uninitialized.evolve() as sandbox:
        snapshot, rolled = sandbox.snapshot(), []
        for _ in range(3):
            rolled.append((sandbox.call("Roll"), sandbox.call("Roll")))
            sandbox.restore(snapshot)
        with MultiUseSandbox.from_snapshot(snapshot) as other:
            rolled.append((other.call("Roll"), other.call("Roll")))
    assert all(first != second for first, second in rolled)
    assert len(set(rolled)) == (4 if knows else 1)
