"""The least that Python can do: the system calls of floor.c, made by ctypes with everything prepared.

No check, no object, no message that is encoded or decoded, no lock. What lies between floor.c and this is Python's own, and
no host in Python is without it; what lies between this and hyperlight.py is what a library does for its users.

    with hyperlight._benchmark_sandbox(SandboxConfiguration()) as sandbox:
        times_ns = Bare(sandbox).sampler("call")(1000)

SPDX-License-Identifier: Apache-2.0
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import floor

import hyperlight
import kvm_abi
import memory
from hyperlight import MultiUseSandbox

_MAP_FILE = memory._MAP_PRIVATE | memory._MAP_FIXED | memory._MAP_NORESERVE
_MAP_ZEROS = _MAP_FILE | memory._MAP_ANONYMOUS
_MAP_RESERVED = _MAP_ZEROS & ~memory._MAP_FIXED
_READ_WRITE = memory._PROT_READ | memory._PROT_WRITE

_ioctl = kvm_abi._quick_ioctl
_RUN, _CREATE_VM, _CREATE_VCPU = map(int, (kvm_abi.KVM_RUN, kvm_abi.KVM_CREATE_VM, kvm_abi.KVM_CREATE_VCPU))
_SET_REGION, _SET_CPUID2 = int(kvm_abi.KVM_SET_USER_MEMORY_REGION), int(kvm_abi.KVM_SET_CPUID2)

_mmap = memory._libc.mmap


class _Made(NamedTuple):
    """A VM, to be closed when its turn is over."""

    vm: int
    vcpu: int
    page: mmap.mmap
    outer: int


class Bare:
    """At work on the very vCPU and memory of *sandbox*, a simpleguest with ``HostAdd``, in user mode."""

    def __init__(self, sandbox: MultiUseSandbox) -> None:
        self._sandbox, self._snapshot = sandbox, sandbox.snapshot()
        self._echo = floor.recorded(lambda: sandbox.call("Echo", "hello\n", returns=str))
        self._add = floor.recorded(lambda: sandbox.call("Add", 1, 41, returns=hyperlight.Int))
        sandbox.restore(self._snapshot)
        sandbox.call("Echo", "hello\n", returns=str)
        sandbox.restore(self._snapshot)  # after which it is known what a call changes
        self._guest = sandbox._guest
        self._page = self._guest.vm.page
        self._guest.vm.load(self._guest._next_entry_registers)

    def sampler(self, operation: str) -> hyperlight.Sampler:
        """Return a sampler of one of "call", "call_host", "call_restore", "from_snapshot" and "interrupt"."""
        if operation == "from_snapshot":
            return hyperlight.timed(self._from_snapshot(), after=self._close)
        if operation == "interrupt":
            return lambda count: [self._interrupt_once() for _ in range(count)]
        call = self._call_host() if operation == "call_host" else self._call(self._echo.call)
        if operation == "call_restore":
            return hyperlight.timed(_both(call, self._restore()))
        return hyperlight.timed(call)

    def _call(self, message: bytes) -> Callable[[], object]:
        given, run = self._enter(message), self._run()
        output = self._guest._ram.output._view

        def call() -> None:
            given()
            run()
            output[:8] = memory._BOTTOM

        return call

    def _enter(self, message: bytes) -> Callable[[], object]:
        """Return what puts *message* on the empty input stack, with registers to enter the guest by."""
        put, page, dirty = self._put(message), self._page, hyperlight._DIRTY_REGS

        def enter() -> None:
            put()
            page[dirty] |= hyperlight._REGS

        return enter

    def _put(self, message: bytes) -> Callable[[], object]:
        content = _stack_of(message)
        place = self._guest._ram.input._view[: len(content)]

        def put() -> None:
            place[:] = content

        return put

    def _run(self) -> Callable[[], object]:
        fd, reason = self._guest.vm.vcpu.fd, self._guest.vm.exit_reason

        def run() -> None:
            if _ioctl(fd, _RUN, None) < 0 or reason[0] != hyperlight._EXIT_IO:
                raise OSError(ctypes.get_errno(), "KVM_RUN")

        return run

    def _call_host(self) -> Callable[[], object]:
        call, answer, run = self._call(self._add.call), self._put(self._add.answer), self._run()
        output = self._guest._ram.output._view

        def call_host() -> None:
            call()  # up to the OUT by which the guest calls
            answer()
            run()
            output[:8] = memory._BOTTOM

        return call_host

    def _restore(self) -> Callable[[], object]:
        ram, vm, page = self._guest._ram, self._guest.vm, self._page
        is_written_over = ram._harmless is not None and ram._harmless is ram._both._planned
        put_back = self._write_over() if is_written_over else self._discard()
        resets = vm._resets if is_written_over else vm._flushing_resets
        fd, ioctls = vm.vcpu.fd, [prepared.call[:2] for prepared in resets]
        begin, state = hyperlight._SYNC_SREGS, vm._reset_state
        end, dirty = begin + len(state), hyperlight._DIRTY_REGS

        def restore() -> None:
            put_back()
            for request, argument in ioctls:
                _ioctl(fd, request, argument)
            page[begin:end] = state
            page[dirty] |= hyperlight._SREGS_EVENTS

        return restore

    def _write_over(self) -> Callable[[], object]:
        """Return what looks for the pages that a call has changed, and writes over those that it always changes."""
        both = self._guest._ram._both
        assert both._pagemap is not None
        look, plan = both._pagemap._scan or both._pagemap._read, both._plan

        def write_over() -> None:
            look()
            for place, content in plan:
                place[:] = content

        return write_over

    def _discard(self) -> Callable[[], object]:
        """Return what drops all pages: page tables are among those that have changed (spec/kvm-hosts.md 2.9)."""
        both, madvise, dont_need = self._guest._ram._both, memory._libc.madvise, memory._MADV_DONTNEED
        ranges = [(mapping._address, mapping.size) for mapping in (both.scratch, both.image)]
        words = [(both.scratch.view(offset, len(data)), data) for offset, data in both._presets]

        def discard() -> None:
            for address, size in ranges:
                madvise(address, size, dont_need)
            for place, data in words:
                place[:] = data

        return discard

    def _from_snapshot(self) -> Callable[[], _Made]:
        snapshot, guest = self._snapshot, self._guest
        layout, image_size, file = snapshot.layout, snapshot.memory.size, snapshot.memory.fileno()
        scratch_size, page_size = layout.scratch_size, memory.PAGE_SIZE
        outer_size = scratch_size + image_size + 3 * page_size
        self._kvm = hyperlight._open_kvm()  # closed when this host is forgotten
        kvm = self._kvm.fd
        regions = [
            kvm_abi.kvm_userspace_memory_region(slot=slot, guest_phys_addr=gpa, memory_size=mapping.size)
            for slot, (gpa, mapping, _) in enumerate(guest._ram.slots())
        ]
        regions_at = [ctypes.byref(region) for region in regions]
        cpuid = ctypes.byref(hyperlight._guest_cpuid())
        filtering = [prepared.call[:2] for prepared in hyperlight._filtering(hyperlight._BASE_MSRS)]
        platform = [prepared.call[:2] for prepared in guest.vm._resets[2:]]
        run_size = guest.vm._vm._vcpu_mmap_size
        presets = [(offset, offset + len(data), data) for offset, data in guest._ram._both._presets]
        message = _stack_of(self._echo.call)
        registers, state = guest._next_entry_registers, guest.vm._reset_state
        regs_at, sregs_at = hyperlight._SYNC_REGS, hyperlight._SYNC_SREGS

        def from_snapshot() -> _Made:
            outer = _mmap(None, outer_size, memory._PROT_NONE, _MAP_RESERVED, -1, 0)
            scratch = outer + page_size
            image = scratch + scratch_size + page_size
            _mmap(scratch, scratch_size, _READ_WRITE, _MAP_ZEROS, -1, 0)
            _mmap(image, image_size, _READ_WRITE, _MAP_FILE, file, 0)
            tables = scratch + layout.page_table_scratch_offset
            _mmap(tables, layout.pt_size, _READ_WRITE, _MAP_FILE, file, layout.memory_size)
            view = memoryview((ctypes.c_char * scratch_size).from_address(scratch)).cast("B")
            for begin, end, data in presets:
                view[begin:end] = data
            vm = _ioctl(kvm, _CREATE_VM, None)
            regions[0].userspace_addr, regions[1].userspace_addr = image, scratch
            for region in regions_at:
                _ioctl(vm, _SET_REGION, region)
            vcpu = _ioctl(vm, _CREATE_VCPU, None)
            _ioctl(vcpu, _SET_CPUID2, cpuid)
            for request, argument in filtering:
                _ioctl(vm, request, argument)
            page = mmap.mmap(vcpu, run_size)
            for request, argument in platform:
                _ioctl(vcpu, request, argument)
            page[sregs_at : sregs_at + len(state)] = state
            page[regs_at : regs_at + len(registers)] = registers
            page[hyperlight._DIRTY_REGS] = hyperlight._REGS | hyperlight._SREGS_EVENTS
            view[: len(message)] = message
            if _ioctl(vcpu, _RUN, None) < 0 or page[hyperlight._EXIT_REASON] != hyperlight._EXIT_IO:
                raise OSError(ctypes.get_errno(), "KVM_RUN")
            return _Made(vm, vcpu, page, outer)

        self._outer_size = outer_size
        return from_snapshot

    def _close(self, made: _Made) -> None:
        made.page.close()
        os.close(made.vcpu)
        os.close(made.vm)
        memory._libc.munmap(made.outer, self._outer_size)

    def _interrupt_once(self) -> int:
        """From just before the kick in another thread to KVM_RUN's end, as Python notices it."""
        fd, page, caller = self._guest.vm.vcpu.fd, self._page, threading.get_ident()
        number = signal.SIGRTMIN + self._sandbox._config.interrupt_vcpu_sigrtmin_offset
        kicked_ns = 0
        ended = threading.Lock()
        ended.acquire()

        def kick() -> None:
            nonlocal kicked_ns
            time.sleep(0.01)  # as in the other two: the guest is well under way
            kicked_ns = time.perf_counter_ns()
            page[hyperlight._IMMEDIATE_EXIT] = 1
            signal.pthread_kill(caller, number)
            ended.acquire()

        thread = threading.Thread(target=kick)
        self._guest.vm.load(self._guest._next_entry_registers)
        self._enter(floor.spin().call)()
        thread.start()
        halted = _ioctl(fd, _RUN, None) >= 0
        ended_ns = time.perf_counter_ns()
        ended.release()
        thread.join()
        page[hyperlight._IMMEDIATE_EXIT] = 0
        if halted:
            raise hyperlight.HyperlightError("a guest that spins returned")
        self._sandbox.restore(self._snapshot)
        return ended_ns - kicked_ns


def _stack_of(message: bytes) -> bytes:
    """Return a stack that holds nothing but *message* (abi.md 9)."""
    return struct.pack("<Q", len(message) + 16) + message + memory._BOTTOM


def _both(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both
