"""The settings of a sandbox: defaults, minima, maxima, and what they make of its memory."""

from __future__ import annotations

import dataclasses
import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hyperlight
import memory
from hyperlight import HyperlightError, SandboxConfiguration, UninitializedSandbox
from memory import MemoryRequestTooBig, MemoryRequestTooSmall

MINIMUM = 0x2000
"""Of each of the two buffers."""
GIB = 1 << 30


def test_defaults_are_those_of_0_14() -> None:
    config = SandboxConfiguration()
    assert (config.input_data_size, config.output_data_size) == (0x4000, 0x4000)
    assert (config.heap_size, config.scratch_size) == (0x20000, 0x48000)
    assert (config.interrupt_vcpu_sigrtmin_offset, config.guest_debug_info) == (0, None)
    assert not config.executable_heap


def test_explicit_sizes_are_kept() -> None:
    """B.2/29: also those that are no multiple of the page size."""
    config = SandboxConfiguration(
        input_data_size=0x4001, output_data_size=0x4003, heap_size=0x50001, scratch_size=0x60000
    )
    assert (config.input_data_size, config.output_data_size) == (0x4001, 0x4003)
    assert (config.heap_size, config.scratch_size) == (0x50001, 0x60000)
    with UninitializedSandbox("hello", config) as uninitialized:
        layout = uninitialized.layout
        assert (layout.input_data_size, layout.output_data_size) == (0x4001, 0x4003)
        assert (layout.heap_size, layout.scratch_size) == (0x50001, 0x60000)


@pytest.mark.parametrize("size", [0, 1, 0x1000, MINIMUM - 1])
def test_small_buffers_are_raised_to_the_minimum(size: int) -> None:
    """B.2/30: in the constructor, and where a changed copy is made."""
    config = SandboxConfiguration(input_data_size=size, output_data_size=size)
    assert (config.input_data_size, config.output_data_size) == (MINIMUM, MINIMUM)
    changed = dataclasses.replace(SandboxConfiguration(), input_data_size=size, output_data_size=size)
    assert changed == config


def test_heap_size_zero_means_the_default() -> None:
    """B.2/30."""
    assert SandboxConfiguration(heap_size=0) == SandboxConfiguration()


@given(st.integers(MINIMUM, 10 * MINIMUM))
def test_any_input_size_from_the_minimum_on_is_kept(size: int) -> None:
    """B.2/31."""
    assert SandboxConfiguration(input_data_size=size).input_data_size == size


@given(st.integers(MINIMUM, 10 * MINIMUM))
def test_any_output_size_from_the_minimum_on_is_kept(size: int) -> None:
    """B.2/32."""
    assert SandboxConfiguration(output_data_size=size).output_data_size == size


@given(st.integers(0x1000, 0x10000))
def test_any_heap_size_is_kept(size: int) -> None:
    """B.2/33."""
    assert SandboxConfiguration(heap_size=size).heap_size == size


@given(st.integers(9000, 65535))
def test_any_debug_port_is_kept(port: int) -> None:
    """B.2/34."""
    config = SandboxConfiguration(guest_debug_info=hyperlight.DebugInfo(f"127.0.0.1:{port}"))
    assert config.guest_debug_info is not None
    assert config.guest_debug_info.listen == f"127.0.0.1:{port}"


@pytest.mark.parametrize("scratch_size", [0x48000, 0x4000])
def test_scratch_too_small_for_its_buffers_is_refused(scratch_size: int) -> None:
    """B.2/35."""
    config = SandboxConfiguration(
        input_data_size=0x24000, output_data_size=0x24000, scratch_size=scratch_size
    )
    needed = memory.min_scratch_size(0x24000, 0x24000)
    with pytest.raises(MemoryRequestTooSmall) as caught:
        UninitializedSandbox("hello", config)
    assert (caught.value.requested_size, caught.value.min_size) == (scratch_size, needed)
    assert str(caught.value) == (
        f"Memory requested {scratch_size} is less than the minimum size allowed {needed}"
    )


@pytest.mark.parametrize("setting", ["scratch_size", "heap_size"])
def test_17_gib_are_too_much(setting: str) -> None:
    """B.2/36."""
    with pytest.raises(MemoryRequestTooBig, match="exceeds maximum size allowed"):
        UninitializedSandbox("hello", SandboxConfiguration(**{setting: 17 * GIB}))


def test_heap_whose_page_tables_do_not_fit_into_scratch_is_refused() -> None:
    with pytest.raises(MemoryRequestTooSmall):
        UninitializedSandbox("hello", SandboxConfiguration(heap_size=GIB))


@pytest.mark.parametrize("scratch_size", [0x48001, 0x48800])
def test_scratch_that_is_no_multiple_of_the_page_size_is_refused(scratch_size: int) -> None:
    with pytest.raises(memory.LayoutError, match="multiple of 4096"):
        UninitializedSandbox("hello", SandboxConfiguration(scratch_size=scratch_size))


@pytest.mark.parametrize("heap_size", [1, 0x1000, 0x20000, 0x20001])
def test_memory_is_code_and_peb_and_heap(heap_size: int) -> None:
    """B.2/37: each in whole pages."""
    with UninitializedSandbox("hello", SandboxConfiguration(heap_size=heap_size)) as uninitialized:
        layout = uninitialized.layout
        whole_pages = memory.page_up(layout.code_size) + memory.PAGE_SIZE + memory.page_up(heap_size)
        assert layout.memory_size == whole_pages
        assert uninitialized.shared_mem_size() == whole_pages + layout.pt_size


@pytest.mark.parametrize("setting", ["input_data_size", "output_data_size", "heap_size", "scratch_size"])
@pytest.mark.parametrize("value", [-1, 1.5, "64K", None, True])
def test_size_that_is_no_size_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(memory.LayoutError, match=setting):
        SandboxConfiguration(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("copy_on_write", "nobody"),
        ("copy_on_write", None),
        ("guest_log_level", "loud"),
        ("guest_log_level", 6),
        ("guest_log_level", -1),
        ("interrupt_vcpu_sigrtmin_offset", -1),
        ("interrupt_vcpu_sigrtmin_offset", signal.SIGRTMAX - signal.SIGRTMIN + 1),
    ],
)
def test_option_out_of_range_is_refused(setting: str, value: Any) -> None:
    with pytest.raises(HyperlightError):
        SandboxConfiguration(**{setting: value})


def test_signal_beyond_the_last_is_refused_with_the_words_of_0_14() -> None:
    with pytest.raises(HyperlightError) as caught:
        SandboxConfiguration(interrupt_vcpu_sigrtmin_offset=100)
    expected = "Invalid SIGRTMIN offset: 100. It exceeds the maximum real-time signal number."
    assert str(caught.value) == expected


def test_configuration_cannot_change_under_a_sandbox() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SandboxConfiguration().heap_size = 1  # type: ignore[misc]
