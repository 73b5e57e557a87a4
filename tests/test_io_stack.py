"""The input and output stacks: format, limits and a guest that writes what it likes (abi.md 9)."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memory import PAGE_SIZE, BoundsCheckFailed, IoStack, IoStackError, LayoutError, SharedMemory

BASE, SIZE = 0x123, 0x200  # neither page aligned nor at 0
U64 = st.one_of(
    st.integers(0, SIZE + 16), st.integers(0, 2**64 - 1), st.sampled_from([2**64 - 1, 2**63, 2**32])
)


def message(payload: bytes) -> bytes:
    """Return a size-prefixed message; a real one has a payload of at least 4 bytes, its root offset."""
    return struct.pack("<I", len(payload)) + payload


@pytest.fixture
def shared() -> Iterator[SharedMemory]:
    with SharedMemory.anonymous(PAGE_SIZE) as mapping:
        yield mapping


@pytest.fixture
def stack(shared: SharedMemory) -> IoStack:
    result = IoStack(shared, BASE, SIZE)
    result.reset()
    return result


def content(shared: SharedMemory) -> bytes:
    return shared.read(BASE, SIZE)


def test_push_then_pop_gives_the_message_back(stack: IoStack) -> None:
    """B.4/79."""
    stack.push(message(b"hello"))
    assert not stack.is_empty
    assert stack.pop() == message(b"hello")
    assert stack.is_empty


def test_bytes_of_a_stack_with_two_messages(shared: SharedMemory, stack: IoStack) -> None:
    """abi.md 9: nothing aligned, the back pointer right behind its message."""
    first, second = message(b"abc"), message(b"")
    stack.push(first)
    stack.push(second)
    expected = struct.pack("<Q", 8 + 7 + 8 + 4 + 8)
    expected += first + struct.pack("<Q", 8) + second + struct.pack("<Q", 8 + 7 + 8)
    assert content(shared) == expected.ljust(SIZE, b"\0")


def test_popped_bytes_are_zeroed(shared: SharedMemory, stack: IoStack) -> None:
    """B.4/90: and the stack pointer is where it was."""
    stack.push(message(b"stays"))
    before = content(shared)
    stack.push(message(b"secret"))
    stack.pop()
    assert content(shared) == before


def test_messages_leave_in_reverse_order(stack: IoStack) -> None:
    messages = [message(bytes([index]) * index) for index in range(4, 12)]
    for item in messages:
        stack.push(item)
    assert [stack.pop() for _ in messages] == messages[::-1]


def test_pop_gives_only_what_the_prefix_claims(shared: SharedMemory, stack: IoStack) -> None:
    stack.push(message(b"abcd") + b"padding")
    assert stack.pop() == message(b"abcd")
    assert stack.is_empty


def test_largest_message(shared: SharedMemory, stack: IoStack) -> None:
    """abi.md 9: size - 16 bytes."""
    largest = message(bytes(SIZE - 20))
    stack.push(largest)
    assert stack.pop() == largest
    with pytest.raises(IoStackError) as caught:
        stack.push(largest + b"x")
    assert str(caught.value) == (
        f"Not enough space in buffer to push data. Required: {SIZE - 7}, Available: {SIZE - 8}"
    )
    assert stack.is_empty


@pytest.mark.parametrize("pointer", [0, 7, 8, 15, SIZE + 1, 2**64 - 1])
def test_pop_with_a_stack_pointer_out_of_bounds(shared: SharedMemory, stack: IoStack, pointer: int) -> None:
    shared.write_u64(BASE, pointer)
    with pytest.raises(IoStackError) as caught:
        stack.pop()
    assert str(caught.value) == (
        "Unable to pop data from buffer: Stack pointer is out of bounds. "
        f"Stack pointer: {pointer}, Buffer size: {SIZE}"
    )


@pytest.mark.parametrize("pointer", [0, 7, SIZE + 1, 2**64 - 1])
def test_push_with_a_stack_pointer_out_of_bounds(shared: SharedMemory, stack: IoStack, pointer: int) -> None:
    shared.write_u64(BASE, pointer)
    before = content(shared)
    with pytest.raises(IoStackError) as caught:
        stack.push(message(b""))
    assert str(caught.value) == (
        "Unable to push data to buffer: Stack pointer is out of bounds. "
        f"Stack pointer: {pointer}, Buffer size: {SIZE}"
    )
    assert content(shared) == before


TOP = 8 + 4 + 16 + 8  # the stack pointer over one message with 16 bytes of payload


CLAIM = "Corrupt buffer size prefix: flatbuffer claims {} bytes but the element slot is only 20 bytes."
RANGE = "Corrupt buffer back-pointer: element offset {} is outside valid range [8, 20]."
OVERFLOW = "Corrupt buffer size prefix: value {} overflows when adding 4-byte header."


@pytest.mark.parametrize(
    ("back_pointer", "prefix", "text"),
    [
        pytest.param(8, 17, CLAIM.format(21), id="one byte too many (B.4/83)"),
        pytest.param(8, 0x7FFF_FFFF, CLAIM.format(2147483651), id="prefix beyond the slot (B.4/80)"),
        pytest.param(0, 16, RANGE.format(0), id="back pointer at 0 (B.4/81)"),
        pytest.param(7, 16, RANGE.format(7), id="back pointer below 8 (B.4/81)"),
        pytest.param(TOP + 8, 16, RANGE.format(44), id="back pointer above the top (B.4/82)"),
        pytest.param(TOP - 15, 16, RANGE.format(21), id="back pointer just under the top (B.4/84)"),
        pytest.param(TOP - 1, 16, RANGE.format(35), id="back pointer inside itself (B.4/84)"),
        pytest.param(2**64 - 1, 16, RANGE.format(2**64 - 1), id="back pointer at the end of all"),
        pytest.param(8, 0xFFFF_FFFC, OVERFLOW.format(0xFFFF_FFFC), id="prefix overflows (B.4/85)"),
        pytest.param(8, 0xFFFF_FFFF, OVERFLOW.format(0xFFFF_FFFF), id="largest prefix (B.4/85)"),
    ],
)
def test_corrupt_elements(
    shared: SharedMemory, stack: IoStack, back_pointer: int, prefix: int, text: str
) -> None:
    stack.push(message(bytes(16)))
    shared.write_u32(BASE + 8, prefix)
    shared.write_u64(BASE + TOP - 8, back_pointer)
    before = content(shared)
    with pytest.raises(IoStackError) as caught:
        stack.pop()
    assert str(caught.value) == text
    assert content(shared) == before


def test_largest_prefix_that_does_not_overflow_is_compared_with_the_slot(
    shared: SharedMemory, stack: IoStack
) -> None:
    stack.push(message(bytes(16)))
    shared.write_u32(BASE + 8, 0xFFFF_FFFB)
    with pytest.raises(IoStackError, match="claims 4294967295 bytes"):
        stack.pop()


def test_elements_of_less_than_eight_bytes_are_never_popped(shared: SharedMemory, stack: IoStack) -> None:
    """abi.md 9: the back pointer is at most sp - 16, so that such an element counts as corrupt."""
    stack.push(message(b"abc"))
    with pytest.raises(IoStackError, match=r"element offset 8 is outside valid range \[8, 7\]"):
        stack.pop()


def test_drain_pops_all(shared: SharedMemory, stack: IoStack) -> None:
    for index in range(5):
        stack.push(message(bytes(4 + index)))
    stack.drain()
    assert stack.is_empty
    assert content(shared) == struct.pack("<Q", 8).ljust(SIZE, b"\0")


def test_drain_stops_at_a_corrupt_element(shared: SharedMemory, stack: IoStack) -> None:
    stack.push(message(b"bottom"))
    corrupt = shared.read_u64(BASE)
    stack.push(message(b"above"))
    shared.write_u64(BASE + corrupt - 8, 0)
    stack.drain()
    assert shared.read_u64(BASE) == corrupt


def test_stacks_outside_their_memory_or_too_small_are_refused(shared: SharedMemory) -> None:
    for offset, size in ((-1, 64), (PAGE_SIZE - 63, 64), (0, PAGE_SIZE + 1), (2**64, 64)):
        with pytest.raises(BoundsCheckFailed):
            IoStack(shared, offset, size)
    for size in (-1, 0, 15):
        with pytest.raises(LayoutError):
            IoStack(shared, 0, size)


@given(st.binary(max_size=SIZE), U64, st.lists(st.tuples(st.integers(0, SIZE - 8), U64), max_size=4))
def test_no_content_makes_anything_else_come_out(
    data: bytes, pointer: int, words: list[tuple[int, int]]
) -> None:
    with SharedMemory.anonymous(PAGE_SIZE) as shared:
        stack = IoStack(shared, BASE, SIZE)
        shared.fill(0, PAGE_SIZE, 0x5A)
        shared.write(BASE, data)
        for offset, word in words:
            shared.write_u64(BASE + offset, word)
        shared.write_u64(BASE, pointer)
        before = content(shared)
        try:
            popped = stack.pop()
        except IoStackError:
            assert content(shared) == before
        else:
            assert popped in before
            assert shared.read_u64(BASE) < pointer
        stack.drain()
        outside = BASE * b"\x5a" + bytes(SIZE) + (PAGE_SIZE - BASE - SIZE) * b"\x5a"
        shared.fill(BASE, SIZE)
        assert shared.read(0, PAGE_SIZE) == outside


class StackMachine(RuleBasedStateMachine):
    """A stack against a list, until a guest scribbles; from then on only safety counts."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = SharedMemory.anonymous(PAGE_SIZE)
        self.shared.fill(0, PAGE_SIZE, 0x5A)
        self.stack = IoStack(self.shared, BASE, SIZE)
        self.reset()

    @rule()
    def reset(self) -> None:
        self.stack.reset()
        self.model: list[bytes] | None = []

    @rule(payload=st.binary(min_size=4, max_size=SIZE))
    def push(self, payload: bytes) -> None:
        data = message(payload)
        before = content(self.shared)
        try:
            self.stack.push(data)
        except IoStackError:
            assert content(self.shared) == before
            if self.model is not None:
                assert 8 + sum(len(item) + 8 for item in self.model) + len(data) + 8 > SIZE
        else:
            if self.model is not None:
                self.model.append(data)

    @rule()
    def pop(self) -> None:
        before = content(self.shared)
        try:
            data = self.stack.pop()
        except IoStackError:
            assert content(self.shared) == before
            assert not self.model
        else:
            if self.model is not None:
                assert data == self.model.pop()

    @rule()
    def drain(self) -> None:
        self.stack.drain()
        if self.model is not None:
            self.model = []

    @rule(offset=st.integers(0, SIZE - 8), word=U64)
    def scribble(self, offset: int, word: int) -> None:
        self.shared.write_u64(BASE + offset, word)
        self.model = None

    @invariant()
    def the_stack_pointer_follows(self) -> None:
        if self.model is not None:
            top = self.shared.read_u64(BASE)
            assert top == 8 + sum(len(item) + 8 for item in self.model)
            assert self.stack.is_empty == (not self.model)

    @invariant()
    def nothing_outside_changes(self) -> None:
        assert self.shared.read(0, BASE) == b"\x5a" * BASE
        rest = PAGE_SIZE - BASE - SIZE
        assert self.shared.read(BASE + SIZE, rest) == b"\x5a" * rest

    def teardown(self) -> None:
        self.shared.close()


TestStackMachine = StackMachine.TestCase
