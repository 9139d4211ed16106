"""Frames and the stream inside them: cut and merged as one likes, garbage, absurd lengths."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.tunnel.carrier.frames import (
    BINARY,
    CLOSE,
    CONTINUATION,
    DATAGRAM_LIMIT,
    FRAME_LIMIT,
    MAGIC,
    PING,
    TEXT,
    Framer,
    Frames,
    Stream,
    TooLong,
    masked,
)
from builder_orch.tunnel.machine import Datagrams, Malformed

KEY = b"\x9a\x01\xff\x42"
NOWHERE = ("192.0.2.1", 443)


def client() -> Framer:
    return Framer(lambda size: KEY[:size])


def train(count: int, segment: int, last: int) -> tuple[Datagrams, list[bytes]]:
    sent = [bytes([number % 256]) * segment for number in range(count)] + [b"z" * last] * bool(last)
    return Datagrams(b"".join(sent), segment, NOWHERE), sent


def item(octets: bytes) -> bytes:
    return struct.pack("!I", len(octets)) + octets


def cut(runs: list[tuple[bytes, int]]) -> list[bytes]:
    return [
        octets[at : at + segment]
        for octets, segment in runs
        for at in range(0, len(octets), segment)
    ]


@given(st.binary(max_size=300), st.binary(min_size=4, max_size=4))
def test_masking_is_the_specifications_octet_by_octet(octets: bytes, key: bytes) -> None:
    mixed = masked(octets, key)
    assert mixed == bytes(octet ^ key[at % 4] for at, octet in enumerate(octets))
    assert masked(mixed, key) == octets


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 300), st.integers(0, 299)), max_size=6),
    st.lists(st.integers(1, 5000), max_size=40),
    st.booleans(),
)
def test_trains_arrive_whole_however_the_connection_cuts_them(
    shapes: list[tuple[int, int, int]], cuts: list[int], from_client: bool
) -> None:
    framer = client() if from_client else Framer()
    wire, sent = framer.magic() if from_client else b"", []
    for count, segment, last in shapes:
        datagrams, each = train(count, segment, last % segment)
        wire += framer.train(datagrams) + framer.keepalive()
        sent += each
    frames, stream = Frames(from_client=from_client), Stream(magic=from_client)
    heard: list[bytes] = []
    while wire:
        size = cuts.pop() if cuts else len(wire)
        heard += cut(stream.receive(frames.receive(wire[:size])))
        wire = wire[size:]
    assert heard == sent


@given(
    st.lists(st.binary(min_size=1, max_size=100), max_size=20),
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from([TEXT, BINARY]), st.integers(1, 4))),
)
def test_a_stream_may_be_cut_into_any_messages_and_those_into_fragments(
    sent: list[bytes], shapes: list[tuple[int, int, int]]
) -> None:
    octets = MAGIC + b"".join(item(each) + bytes(4) for each in sent)
    wire = b""
    shapes = [*shapes, (len(octets), TEXT, 1)]
    for size, kind, parts in shapes:
        message, octets = octets[:size], octets[size:]
        step = max(1, -(-len(message) // parts))
        pieces = [message[at : at + step] for at in range(0, len(message), step)] or [b""]
        for number, piece in enumerate(pieces):
            frame = bytearray(client().message(CONTINUATION if number else kind, piece))
            if number < len(pieces) - 1:
                frame[0] &= 0x7F
            wire += bytes(frame) + client().message(PING, b"")
    frames, stream = Frames(from_client=True), Stream(magic=True)
    assert cut(stream.receive(frames.receive(wire))) == sent


def test_equal_datagrams_come_as_one_run() -> None:
    datagrams, _ = train(44, 1452, 100)
    frames, stream = Frames(from_client=False), Stream(magic=False)
    assert stream.receive(frames.receive(Framer().train(datagrams))) == [(datagrams.octets, 1452)]


def test_a_message_is_one_datagram_in_a_text_frame() -> None:
    assert Framer().train(Datagrams(b"\xff\xfe", 2, NOWHERE)) == b"\x81\x06\0\0\0\2\xff\xfe"
    assert Framer().keepalive() == b"\x81\x04\0\0\0\0"
    assert client().magic() == b"\x81\x84" + KEY + masked(bytes.fromhex("2faced77"), KEY)


@pytest.mark.parametrize("length", [DATAGRAM_LIMIT + 1, 2**32 - 1])
def test_a_length_that_no_datagram_has_ends_it_before_anything_is_kept(length: int) -> None:
    stream = Stream(magic=False)
    with pytest.raises(TooLong, match=str(length)):
        stream.receive(struct.pack("!I", length))


def test_the_longest_datagram_is_taken() -> None:
    octets = bytes(DATAGRAM_LIMIT)
    frames, stream = Frames(from_client=True), Stream(magic=False)
    wire = client().train(Datagrams(octets, len(octets), NOWHERE))
    assert cut(stream.receive(frames.receive(wire))) == [octets]


def test_keepalives_are_no_datagrams() -> None:
    assert Stream(magic=False).receive(bytes(4000)) == []


def test_a_stream_without_the_magic_is_refused() -> None:
    with pytest.raises(Malformed, match="wgtcpd"):
        Stream(magic=True).receive(b"GET ")


@pytest.mark.parametrize(
    ("wire", "why"),
    [
        (b"\x81\x01a", "not masked"),
        (b"\xc1\x80" + KEY, "reserved"),
        (b"\x83\x80" + KEY, "opcode 3"),
        (b"\x8b\x80" + KEY, "opcode 11"),
        (b"\x80\x80" + KEY, "out of order"),
        (b"\x01\x80" + KEY + b"\x81\x80" + KEY, "out of order"),
        (b"\x09\x80" + KEY, "fragments"),
        (b"\x89\xfe\x00\x80" + KEY, "control frame is short"),
        (b"\x81\xff" + struct.pack("!Q", FRAME_LIMIT + 1), "a frame of"),
        (b"\x81\xff" + b"\xff" * 8, "a frame of"),
    ],
)
def test_frames_against_the_rules_end_the_connection(wire: bytes, why: str) -> None:
    with pytest.raises(Malformed, match=why):
        Frames(from_client=True).receive(wire)


def test_a_server_must_not_mask() -> None:
    with pytest.raises(Malformed, match="masked"):
        Frames(from_client=False).receive(client().keepalive())


def test_nothing_is_read_after_a_close() -> None:
    frames = Frames(from_client=False)
    wire = Framer().message(CLOSE, b"\x03\xe8") + Framer().keepalive()
    assert frames.receive(wire) == b""
    assert frames.closed


@given(st.lists(st.binary(max_size=200), max_size=10), st.booleans())
def test_garbage_is_malformed_or_waited_for(pieces: list[bytes], from_client: bool) -> None:
    frames, stream = Frames(from_client=from_client), Stream(magic=from_client)
    try:
        for piece in pieces:
            stream.receive(frames.receive(piece))
    except Malformed:
        return
