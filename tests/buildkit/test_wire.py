"""Octets and back, and that octets which are no message never do more than raise Malformed."""

import stat
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.buildkit.grpc import LONGEST, Messages, frame
from builder_orch.buildkit.messages import (
    Packet,
    PacketKind,
    Stat,
    StatusResponse,
    Vertex,
    VertexWarning,
    go_mode,
    single,
    solve_response,
    worker_labels,
)
from builder_orch.buildkit.progress import Watching
from builder_orch.buildkit.wire import (
    bytes_field,
    fields,
    map_field,
    message_field,
    number_field,
    signed,
    text_field,
    varint,
)
from builder_orch.tunnel.machine import Malformed

NUMBERS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("number", "octets"),
    [(0, "00"), (1, "01"), (127, "7f"), (150, "9601"), (-1, "ffffffffffffffffff01")],
)
def test_numbers_are_in_base_128(number: int, octets: str) -> None:
    assert varint(number) == bytes.fromhex(octets)


@given(st.integers(-(2**63), 2**63 - 1))
def test_a_number_comes_back(number: int) -> None:
    found = dict(fields(number_field(3, number)))
    assert signed(found.get(3)) == number


@given(st.lists(st.tuples(st.integers(1, 2**29 - 1), NUMBERS | st.binary())))
def test_fields_come_back_in_their_order(given: list[tuple[int, int | bytes]]) -> None:
    made = b""
    for number, value in given:
        if isinstance(value, bytes):
            made += message_field(number, value)
        else:
            made += varint(number << 3) + varint(value)
    assert list(fields(made)) == given


PARSERS: list[Callable[[bytes], object]] = [
    lambda octets: list(fields(octets)),
    Packet.decode,
    StatusResponse.decode,
    solve_response,
    worker_labels,
    lambda octets: single(1, octets),
    lambda octets: list(Messages().feed(octets)),
]


@pytest.mark.parametrize("parse", PARSERS)
@given(
    st.binary(max_size=200)
    | st.lists(st.tuples(st.integers(1, 14), NUMBERS | st.binary(max_size=30))).map(
        lambda given: b"".join(
            message_field(n, v) if isinstance(v, bytes) else varint(n << 3) + varint(v)
            for n, v in given
        )
    )
)
def test_garbage_is_malformed_and_no_worse(parse: Callable[[bytes], object], octets: bytes) -> None:
    with suppress(Malformed):
        parse(octets)


@given(st.lists(st.binary(max_size=60)))
def test_any_status_that_can_be_read_can_be_told(parts: list[bytes]) -> None:
    watching = Watching()
    for part in parts:
        for number in (1, 2, 3, 4):
            with suppress(Malformed):
                list(watching.take(StatusResponse.decode(message_field(number, part))))
    list(watching.finish())


@given(st.lists(st.binary(max_size=50)), st.lists(st.integers(1, 9)))
def test_messages_are_put_together_however_they_were_cut(
    messages: list[bytes], cuts: list[int]
) -> None:
    whole = b"".join(map(frame, messages))
    cutter = Messages()
    found: list[bytes] = []
    for size in cuts:
        found += cutter.feed(whole[:size])
        whole = whole[size:]
    found += cutter.feed(whole)
    assert found == messages
    assert cutter.complete


@pytest.mark.parametrize("octets", [b"\1\0\0\0\0", b"\0" + (LONGEST + 1).to_bytes(4, "big")])
def test_what_was_not_agreed_upon_is_no_message(octets: bytes) -> None:
    with pytest.raises(Malformed):
        list(Messages().feed(octets))


def test_a_packet_is_as_the_engine_reads_it() -> None:
    """By the .proto files: type 1, stat 2, ID 3, data 4; path 1, mode 2, size 5, modTime 6."""
    told = Stat("a", 0o644, 5, 7, xattrs={"user.x": b"y"})
    xattr = "520b0a06757365722e78120179"
    expected = bytes.fromhex("12170a016110a40328053007" + xattr)
    assert Packet(PacketKind.STAT, stat=told).encode() == expected
    assert Packet(PacketKind.DATA, 300, b"hi").encode() == bytes.fromhex("080218ac0222026869")
    assert Packet(PacketKind.STAT).encode() == b""
    assert Packet.decode(bytes.fromhex("080118ac02")) == Packet(PacketKind.REQ, 300)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (stat.S_IFREG | 0o4755, 1 << 23 | 0o755),
        (stat.S_IFDIR | 0o1777, 1 << 31 | 1 << 20 | 0o777),
        (stat.S_IFLNK | 0o777, 1 << 27 | 0o777),
        (stat.S_IFREG | 0o2711, 1 << 22 | 0o711),
        (stat.S_IFCHR | 0o600, 1 << 26 | 1 << 21 | 0o600),
    ],
)
def test_modes_are_those_of_go(mode: int, expected: int) -> None:
    assert go_mode(mode) == expected


def test_a_status_is_read() -> None:
    vertex = text_field(1, "sha256:1") + text_field(3, "[1/2] RUN x") + number_field(4, 1)
    warning = bytes_field(3, b"careful") + message_field(7, message_field(1, number_field(1, 9)))
    found = StatusResponse.decode(message_field(1, vertex) + message_field(4, warning))
    assert found.vertices == (Vertex("sha256:1", "[1/2] RUN x", cached=True),)
    assert found.warnings == (VertexWarning("careful", "", 9),)
    assert solve_response(map_field(1, {"a": "b"})) == {"a": "b"}
