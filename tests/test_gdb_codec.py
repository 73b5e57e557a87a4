"""The codec of gdb_rsp.py: bytes to packets and back. Expected bytes are the manual's or were sent by gdb 13.1."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdb_rsp import PACKET_SIZE, Event, Link, Packet, PacketDecoder, encode

# (on the wire, payload): the decoder accepts the left side, the encoder makes it from the right side.
BOTH_WAYS = [
    (b"$#00", b""),
    (b"$OK#9a", b"OK"),
    (b"$?#3f", b"?"),
    (b"$g#67", b"g"),
    (b"$QStartNoAckMode#b0", b"QStartNoAckMode"),  # as gdb 13.1 sends it
    (b"$vMustReplyEmpty#3a", b"vMustReplyEmpty"),
    (b"$qXfer:features:read:target.xml:0,1000#0c", b"qXfer:features:read:target.xml:0,1000"),
    (b"$}\x03#80", b"#"),  # the checksum covers the escaped bytes: 0x7d + 0x03
    (b"$}\x04#81", b"$"),
    (b"$}]#da", b"}"),  # not #37: the escape character is summed once
    (b"$}\x0a#87", b"*"),
    (b'$0* #7a', b"0000"),  # the manual's example: "0* " is four zeros
    (b'$0*"#7c', b"000000"),
    (b"$\x03#03", b"\x03"),  # inside a packet 0x03 is data
    (b"$\x00\xff\x80#7f", b"\x00\xff\x80"),
]

# What only a decoder meets: another sender's choice of escapes and runs.
DECODE_ONLY = [
    (b"$OK#9A", Packet(b"OK")),
    (b"$000#90", Packet(b"000")),
    (b"$}a#de", Packet(b"A")),  # an escape may be followed by anything
    (b"$}}#fa", Packet(b"]")),
    (b"$}*#a7", Packet(b"\x0a")),
    (b"$a*~#09", Packet(b"a" * 98)),
    (b"$OK#9b", Event.BAD_CHECKSUM),
    (b"$OK#9", None),
    (b"$OK", None),
    (b"$OK#zz", Event.BAD_CHECKSUM),
    (b"$OK}#17", Event.INVALID),  # a truncated escape
    (b"$OK*#c4", Event.INVALID),  # a truncated run
    (b"$*a#8b", Event.INVALID),  # a run of nothing
    (b"$a*\x1f#aa", Event.INVALID),  # a count below the printable characters
    (b"$a*\x7f#0a", Event.INVALID),  # and one above
    (b"+", Event.ACK),
    (b"-", Event.NAK),
    (b"\x03", Event.INTERRUPT),
    (b"noise", None),
    (b"$cut short$OK#9a", Packet(b"OK")),  # an unescaped $ can only be a new packet
    (b"$oops#$OK#9a", Event.BAD_CHECKSUM),  # the packet after it is found: see the test of streams
]


def decode(*pieces: bytes) -> list[Packet | Event]:
    decoder = PacketDecoder()
    return [event for piece in pieces for event in decoder.feed(piece)]


def one_by_one(data: bytes) -> list[bytes]:
    return [data[index : index + 1] for index in range(len(data))]


@pytest.mark.parametrize(("wire", "payload"), BOTH_WAYS)
def test_encoder_writes_the_manuals_bytes(wire, payload):
    assert encode(payload) == wire


DECODING = [(wire, Packet(payload)) for wire, payload in BOTH_WAYS] + DECODE_ONLY


@pytest.mark.parametrize(("wire", "event"), DECODING)
def test_decoder_accepts_it_whole(wire, event):
    assert decode(wire)[:1] == ([] if event is None else [event])


@pytest.mark.parametrize(("wire", "event"), DECODING)
def test_decoder_accepts_it_a_byte_at_a_time_and_is_silent_until_it_is_complete(wire, event):
    decoder = PacketDecoder()
    events = [decoder.feed(piece) for piece in one_by_one(wire)]
    if event is not None and wire.count(b"$") < 2:
        assert all(not early for early in events[:-1])
        assert events[-1] == [event]
    assert list(itertools.chain(*events)) == decode(wire)


@pytest.mark.parametrize(("wire", "event"), [case for case in DECODING if case[1] is not None])
def test_decoder_leaves_what_follows_alone(wire, event):
    assert decode(wire + b"$m1,2#fc$un")[-1] == Packet(b"m1,2")
    assert decode(wire + b"$m1,2#fc$un", b"finished#2d")[-1] == Packet(b"unfinished")


def test_two_packets_acks_and_an_interrupt_in_one_read():
    assert decode(b"+$g#67+\x03-$OK#9a") == [
        Event.ACK,
        Packet(b"g"),
        Event.ACK,
        Event.INTERRUPT,
        Event.NAK,
        Packet(b"OK"),
    ]


def test_packet_behind_a_broken_checksum_is_found():
    assert decode(b"$oops#$OK#9a") == [Event.BAD_CHECKSUM, Packet(b"OK")]


def test_rle_avoids_hash():
    """Six more of a byte would be counted by '#', which ends a packet."""
    for length in range(1, 400):
        assert b"#" not in encode(b"x" * length)[1:-3]
        assert decode(encode(b"x" * length)) == [Packet(b"x" * length)]


def test_rle_avoids_dollar():
    """Seven more would be counted by '$', which begins one."""
    for length in range(1, 400):
        assert b"$" not in encode(b"x" * length)[1:]


def test_rle_counts_are_printable_and_longer_runs_never_cost_more_than_the_bytes_added():
    for length in range(2, 400):
        shorter, longer = encode(b"x" * (length - 1)), encode(b"x" * length)
        assert all(0x20 <= byte <= 0x7E for byte in longer)
        assert len(longer) <= len(shorter) + 1


def test_rle_never_repeats_the_second_byte_of_an_escape():
    """Readers disagree on what that would mean, so a run begins after the pair."""
    assert encode(b"}" + b"]" * 9)[1:-3] == b"}]" + b"]*%"  # 1 and 9, not 10


SMALL_ALPHABET = st.lists(st.sampled_from(list(b"}*#$\x03]a\x00")), max_size=300).map(bytes)


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=500), SMALL_ALPHABET), st.data())
def test_round_trip_of_every_byte_at_every_split(payload, data):
    wire = encode(payload)
    cut = data.draw(st.integers(0, len(wire)))
    assert decode(wire) == decode(wire[:cut], wire[cut:]) == decode(*one_by_one(wire)) == [Packet(payload)]


WIRE_PIECES = st.one_of(
    st.binary(max_size=8),
    st.sampled_from([b"$", b"#", b"}", b"*", b"+", b"-", b"\x03", b"$OK#9a", b"$}]#da", b"$g#00", b"$x*~#45"]),
)


@settings(deadline=None)
@given(st.lists(WIRE_PIECES, max_size=30).map(b"".join), st.randoms(use_true_random=False))
def test_any_input_means_the_same_however_it_is_cut(stream, chance):
    pieces, rest = [], stream
    while rest:
        size = chance.randint(1, 5)
        pieces.append(rest[:size])
        rest = rest[size:]
    assert decode(stream) == decode(*pieces)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_a_packet_after_any_garbage_is_found(garbage):
    garbage = garbage.replace(b"#", b"")  # a '#' could swallow the two bytes after it as its checksum
    assert decode(garbage + b"$OK#9a")[-1] == Packet(b"OK")


def test_advertised_packet_size_is_accepted_and_more_is_not():
    """PacketSize is hexadecimal in the protocol; here it is the size of the payload."""
    assert decode(b"$" + b"x" * PACKET_SIZE + b"#00") == [Packet(b"x" * PACKET_SIZE)]
    too_long = b"$" + b"x" * (PACKET_SIZE + 1000) + b"#00"
    assert decode(too_long) == decode(*one_by_one(too_long)) == [Event.INVALID]
    assert decode(too_long + b"$OK#9a")[-1] == Packet(b"OK")


def test_expansion_is_bounded():
    bomb = b"x" + b"*~" * (PACKET_SIZE // 4)
    assert decode(b"$%b#%02x" % (bomb, sum(bomb) & 0xFF)) == [Event.INVALID]


def test_unfinished_packet_does_not_grow_without_bound():
    decoder = PacketDecoder(limit=100)
    decoder.feed(b"$")
    for _ in range(1000):
        assert decoder.feed(b"x" * 50) == []
        assert len(decoder._buffer) <= 200
    assert decoder.feed(b"#00$OK#9a") == [Event.INVALID, Packet(b"OK")]


def test_feeding_byte_by_byte_is_linear():
    """Count the bytes looked at, not the time: each byte of a packet is searched for its end once."""
    searched = 0

    class CountingPattern:
        def __init__(self, pattern):
            self.pattern = pattern

        def search(self, buffer, start=0):
            nonlocal searched
            searched += len(buffer) - start
            return self.pattern.search(buffer, start)

    import gdb_rsp

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gdb_rsp, "_END_OR_RESTART", CountingPattern(gdb_rsp._END_OR_RESTART))
        wire = encode(random.Random(1).randbytes(20_000))
        assert len(decode(*one_by_one(wire))) == 1
    assert searched < 2 * len(wire)


# --- acknowledgements --------------------------------------------------------------------------------


def test_link_acknowledges_packets_and_asks_for_damaged_ones_again():
    link = Link()
    assert link.receive(b"$OK#9a") == ([Packet(b"OK")], b"+")
    assert link.receive(b"$OK#9b") == ([], b"-")
    assert link.receive(b"$OK}#17") == ([Event.INVALID], b"+")  # arrived well: the session refuses it
    assert link.receive(b"\x03") == ([Event.INTERRUPT], b"")


def test_nak_sends_the_last_packet_again():
    link = Link()
    assert link.receive(b"-") == ([], b"")  # nothing was ever sent
    sent = link.send(b"T05")
    assert link.receive(b"-") == ([], sent)
    assert link.receive(b"+-") == ([], sent)
    assert link.receive(b"-" * 1000) == ([], sent)  # once for one read: no amplifier


def test_no_ack_mode_begins_after_the_request_is_acknowledged():
    link = Link()
    assert link.receive(b"$QStartNoAckMode#b0") == ([Packet(b"QStartNoAckMode")], b"+")
    sent = link.send(b"OK")
    assert link.receive(b"+$g#67") == ([Packet(b"g")], b"")
    assert link.receive(b"$g#68") == ([], b"")
    assert link.receive(b"-") == ([], b"") and sent
