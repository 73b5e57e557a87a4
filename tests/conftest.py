"""What the tests need from the machine, asked in one place.

A test that needs KVM, a compiler or a debugger says so with ``require("kvm")``, which is a pytest
mark: the test is skipped with the reason, or fails with it when the environment variable
``HYPERLIGHT_REQUIRE`` names the need (``HYPERLIGHT_REQUIRE=kvm,gcc,gdb``, as ``.ci/run`` sets it).
Each need is a mark as well: ``pytest -m kvm`` runs only what needs KVM.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    import hyperlight

REPOSITORY = Path(__file__).resolve().parent.parent
KERNEL_GUESTS = REPOSITORY / "tests" / "bin"
"""The prebuilt guests, built for kernel mode: all their code at CPL 0."""

hypothesis.settings.register_profile("any machine", deadline=None)  # an emulated one takes its time
hypothesis.settings.load_profile("any machine")


def _lacks_kvm() -> str | None:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    return None


def _lacks_program(name: str) -> Callable[[], str | None]:
    return lambda: None if shutil.which(name) else f"{name} is not installed"


def _lacks_real_cpl0() -> str | None:
    """Say why guest code at CPL 0 cannot use SSE, breakpoints and the like here (spec: kvm-hosts.md 1)."""
    if (reason := _lacks_kvm()) is not None:
        return reason
    import hyperlight

    return "this KVM emulates CPL 0" if hyperlight.cpl0_is_emulated() else None


def _lacks_emulated_cpl0() -> str | None:
    return _lacks_kvm() or (None if _lacks_real_cpl0() else "this KVM runs code at CPL 0 on the processor")


def _lacks_native_cpu() -> str | None:
    """Say why processor time tells nothing here: as in ``tests/run-in-kvm-amd``."""
    return "the processor is emulated" if "QEMU TCG" in Path("/proc/cpuinfo").read_text() else None


def _lacks_avx() -> str | None:
    return None if " avx " in Path("/proc/cpuinfo").read_text() else "the processor has no AVX"


def _lacks_musl() -> str | None:
    import hyperlight

    return None if hyperlight._installed_musl() else "musl's C library is not installed: apt install musl-dev"


def _lacks_msr_filter() -> str | None:
    if (reason := _lacks_kvm()) is not None:
        return reason
    import kvm_abi

    with kvm_abi.Kvm() as kvm:
        return None if kvm.check_extension(kvm_abi.Cap.X86_MSR_FILTER) else "this KVM has no filter for MSRs"


def _lacks_timer_interrupts() -> str | None:
    """Say why timer interrupts cannot be tested here, having tried one."""
    if (reason := _lacks_kvm()) is not None:
        return reason
    import hyperlight
    from memory import UInt, ULong

    timed = hyperlight.SandboxConfiguration(hardware_timer=True)
    with hyperlight.UninitializedSandbox("simpleguest", timed).evolve() as sandbox:
        watchdog = threading.Timer(20, sandbox.interrupt_handle().kill)
        watchdog.start()
        try:
            ticks = sandbox.call("TimerTicks", UInt(1000), 1, ULong(1_000_000))
        except hyperlight.GuestFailure as failure:
            return f"this KVM delivers no timer interrupt: {failure}"
        finally:
            watchdog.cancel()
            watchdog.join()
    return None if ticks else "this KVM delivers no timer interrupt"


def _lacks_wheels() -> str | None:
    import wheels

    return wheels.why_unavailable()


NEEDS: dict[str, Callable[[], str | None]] = {
    "kvm": _lacks_kvm,
    "real_cpl0": _lacks_real_cpl0,
    "emulated_cpl0": _lacks_emulated_cpl0,
    "timer_interrupts": _lacks_timer_interrupts,
    "msr_filter": _lacks_msr_filter,
    "native_cpu": _lacks_native_cpu,
    "avx": _lacks_avx,
    "gcc": _lacks_program("gcc"),
    "gdb": _lacks_program("gdb"),
    "lldb": _lacks_program("lldb"),
    "musl": _lacks_musl,
    "wheels": _lacks_wheels,
}


@functools.cache
def missing(need: str) -> str | None:
    """Return why *need* cannot be had on this machine, or None when it can."""
    return NEEDS[need]()


def require(need: str) -> pytest.MarkDecorator:
    """Mark a test that cannot run without *need*, a key of ``NEEDS``."""
    if need not in NEEDS:
        raise KeyError(f"unknown need {need!r}: one of {', '.join(NEEDS)}")
    return pytest.mark.require(need)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "require(need): skip, with the reason, where the machine lacks it")
    for name in NEEDS:
        config.addinivalue_line("markers", f"{name}: for -m; tests have it by require({name!r})")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in list(item.iter_markers("require")):
            item.add_marker(*mark.args)


def need(name: str) -> None:
    """Skip the test that runs if this machine lacks *name*, a key of ``NEEDS``; fail it if that was insisted on."""
    if (reason := missing(name)) is None:
        return
    if name in os.environ.get("HYPERLIGHT_REQUIRE", "").split(","):
        pytest.fail(f"HYPERLIGHT_REQUIRE names {name}, but {reason}", pytrace=False)
    pytest.skip(f"needs {name}: {reason}")


def rounds(count: int) -> int:
    """Return how many of *count* rounds to make on this machine: a twentieth where the processor is emulated."""
    return count if missing("native_cpu") is None else count // 20


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("require"):
        need(*mark.args)


PRIVILEGES = ("user", "kernel", "unaware")


@contextlib.contextmanager
def unaware_of_user_mode(really: bool) -> Iterator[None]:
    """Have this host skip the privilege note of the guests it loads, as other hosts do."""
    import memory

    with pytest.MonkeyPatch.context() as patch:
        if really:
            patch.setattr("memory._read_privilege", lambda *_: memory.PrivilegeNote())
            patch.setattr("hyperlight._parsed_guests", {})  # none that was read with its note, nor for others without
        yield


@contextlib.contextmanager
def booted(guest: str, privilege: str, **settings: Any) -> Iterator[hyperlight.MultiUseSandbox]:
    """Boot one of the prebuilt guests as it is ("user"), as built for kernel mode ("kernel"), or as on a host that does
    not know of user mode ("unaware"): such a host maps every page for the supervisor, and the guest copies.
    """
    import hyperlight

    if privilege == "unaware":
        settings["copy_on_write"] = "guest"
    path = str(KERNEL_GUESTS / guest) if privilege == "kernel" else guest
    with unaware_of_user_mode(privilege == "unaware"):
        uninitialized = hyperlight.UninitializedSandbox(path, hyperlight.SandboxConfiguration(**settings))
    with uninitialized, uninitialized.evolve() as sandbox:
        yield sandbox


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves behind an open file descriptor, a mapping or a thread."""
    gc.collect()
    before = process_resources()
    yield
    after = process_resources()
    assert after == before


def process_resources() -> tuple[int, int, int]:
    """Count this process's file descriptors, its KVM and memfd mappings, and Python's threads.

    Not the kernel's: KVM gives each VM a worker thread, which goes some time after the VM.
    """
    maps = Path("/proc/self/maps").read_text().splitlines()
    return (
        len(os.listdir("/proc/self/fd")),
        sum("kvm" in line or "memfd:hyperlight" in line for line in maps),
        threading.active_count(),
    )
