"""What is written comes out as packets, whatever the chunks were."""

from hypothesis import given
from hypothesis import strategies as st

from builder_orch.tunnel.ipv6 import segment
from builder_orch.tunnel.ipv6.outbox import Outbox
from builder_orch.tunnel.ipv6.segment import FIN, PSH, Template
from builder_orch.tunnel.machine import Train

TEMPLATE = Template((bytes(15) + b"\x01", 1), (bytes(15) + b"\x02", 2))
START = 5000


@given(
    st.lists(st.integers(1, 9000), min_size=1, max_size=12),
    st.integers(1, 1400),
    st.booleans(),
    st.data(),
)
def test_any_stretch_of_it_can_be_sent(
    writes: list[int], size: int, fin: bool, data: st.DataObject
) -> None:
    outbox, text, text_len = Outbox(START, TEMPLATE), b"", sum(writes)
    for number, length in enumerate(writes):
        chunk = bytes((number * 31 + i * 7) % 256 for i in range(length))
        outbox.put(chunk)
        text += chunk
    outbox.fin = fin
    assert outbox.last == START + text_len + fin
    freed = data.draw(st.integers(0, text_len - 1))
    outbox.free(START + freed)
    start = data.draw(st.integers(freed, text_len - 1 + fin))
    stop = data.draw(st.integers(start + 1, text_len + fin))
    trains: list[Train] = []
    outbox.emit(trains, START + start, START + stop, size, 1, 1)
    segments = [segment.parse(packet) for train in trains for packet in train]
    assert b"".join(one.payload for one in segments) == text[start:stop]
    at = START + start
    for one in segments:
        assert one.seq == at
        assert len(one.payload) <= size
        at += one.length
    assert at == START + stop
    assert [bool(one.flags & FIN) for one in segments].count(True) == (stop > text_len)
    assert all(len(one.payload) == size for one in segments[: -1 - (stop > text_len)])


def test_small_writes_are_gathered_and_the_last_packet_pushes() -> None:
    outbox = Outbox(START, TEMPLATE)
    for _ in range(100):
        outbox.put(b"0123456789")
    trains: list[Train] = []
    outbox.emit(trains, START, START + 1000, 600, 1, 1)
    segments = [segment.parse(packet) for train in trains for packet in train]
    assert [len(one.payload) for one in segments] == [600, 400]
    assert [bool(one.flags & PSH) for one in segments] == [False, True]


@given(st.lists(st.integers(4097, 30_000), min_size=1, max_size=5), st.data())
def test_whole_trains_end_where_a_chunk_or_a_train_of_it_does(
    writes: list[int], data: st.DataObject
) -> None:
    train = 4000
    outbox = Outbox(START, TEMPLATE)
    ends: set[int] = set()
    for length in writes:
        ends |= set(range(outbox.end, outbox.end + length, train))
        outbox.put(bytes(length))
    start = data.draw(st.integers(START, outbox.end - 1))
    octets = data.draw(st.integers(0, outbox.end - start))
    if octets > train:
        whole = outbox.whole(start, octets, train)
        assert octets - train < whole <= octets
        assert start + whole in ends
