"""TCP octets, one segment or a train at a time."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.tunnel.ipv6 import header, segment
from builder_orch.tunnel.ipv6.segment import (
    ACK,
    FIN,
    PSH,
    SYN,
    Answers,
    Blocks,
    Run,
    Segment,
    Template,
    read_answers,
    read_run,
    sack_option,
)
from builder_orch.tunnel.ipv6.seq import MASK
from builder_orch.tunnel.machine import Laid, Malformed

LOCAL, REMOTE = (bytes(15) + b"\x01", 50_000), (bytes(15) + b"\x02", 443)
TEMPLATE = Template(LOCAL, REMOTE)
NUMBER = st.integers(0, MASK)


def intact(packet: bytes) -> bool:
    ip = header.parse(packet)
    return header.is_intact(ip.source, ip.destination, ip.next_header, packet[ip.offset :])


@given(NUMBER, NUMBER, st.integers(0, 63), st.integers(0, 0xFFFF), st.binary(max_size=1500))
def test_a_segment_comes_back_as_it_was(
    seq: int, ack: int, flags: int, window: int, payload: bytes
) -> None:
    packet = TEMPLATE.segment(seq, ack, flags, window, payload)
    assert intact(packet)
    assert segment.parse(packet) == Segment(50_000, 443, seq, ack, flags, window, payload)


@given(st.integers(0, 0xFFFF), st.none() | st.integers(0, 14), st.booleans())
def test_syn_options_come_back(mss: int, scale: int | None, sack: bool) -> None:
    packet = TEMPLATE.segment(1, 0, SYN, 5, b"", segment.syn_options(mss, scale, sack))
    assert intact(packet)
    got = segment.parse(packet)
    assert (got.mss, got.scale, got.sack_permitted) == (mss, scale, sack)
    assert got.length == 1


@given(st.lists(st.tuples(NUMBER, NUMBER), max_size=4).map(tuple))
def test_blocks_come_back(blocks: tuple[tuple[int, int], ...]) -> None:
    packet = TEMPLATE.segment(1, 0, ACK, 5, b"data", segment.sack_option(blocks))
    assert intact(packet)
    got = segment.parse(packet)
    assert (got.blocks, got.payload) == (blocks, b"data")


def test_a_scale_above_14_is_taken_as_14() -> None:
    packet = TEMPLATE.segment(1, 0, SYN, 5, b"", b"\x03\x03\xff\x00")
    assert segment.parse(packet).scale == 14


@pytest.mark.parametrize(
    "options", [b"\x02\x08\x05", b"\x02\x00\x00\x00", b"\x05\x0a\x00\x00", b"\xfd\x01\x02\x03"]
)
def test_options_that_make_no_sense_are_passed_over(options: bytes) -> None:
    options += b"\0" * (-len(options) % 4)
    got = segment.parse(TEMPLATE.segment(9, 8, ACK, 7, b"data", options))
    assert got == Segment(50_000, 443, 9, 8, ACK, 7, b"data")


def test_a_header_that_does_not_fit_is_malformed() -> None:
    packet = TEMPLATE.segment(1, 2, ACK, 3)
    with pytest.raises(Malformed):
        segment.parse(packet[:-1])
    for offset in (0, 4, 6, 15):
        changed = packet[:52] + bytes((offset << 4,)) + packet[53:]
        with pytest.raises(Malformed):
            segment.parse(changed)


@given(
    st.integers(1, 1400),
    st.integers(1, 20),
    st.integers(0, 50),
    NUMBER | st.integers(MASK - 3000, MASK),
    NUMBER,
    st.integers(0, 0xFFFF),
    st.randoms(use_true_random=False),
)
def test_a_train_is_what_single_segments_would_be(
    size: int, count: int, at: int, seq: int, ack: int, window: int, random: object
) -> None:
    chunk = random.randbytes(at + size * count + 7)  # type: ignore[attr-defined]
    train = TEMPLATE.train(chunk, at, size, count, seq, ack, window)
    assert train == [
        TEMPLATE.segment(
            seq + i * size, ack, ACK, window, chunk[at + i * size : at + (i + 1) * size]
        )
        for i in range(count)
    ]


def data(seq: int, payload: bytes, *, ack: int = 500, flags: int = ACK, window: int = 9) -> bytes:
    return TEMPLATE.segment(seq, ack, flags, window, payload)


def read(packets: Sequence[bytes], *, outstanding: int = 100, room: int = 1000) -> Run | None:
    return read_run(packets, 0, len(packets), 100, 500, outstanding, room)


def test_a_run_ends_where_something_new_begins() -> None:
    run = [data(100, b"aaaa"), data(104, b"bbbb", ack=510, flags=ACK | PSH, window=8)]
    plain = Run(2, [b"aaaa", b"bbbb"], 8, 10, 8)
    others = [
        data(109, b"cccc", ack=510),
        data(108, b"ccccc", ack=510),
        data(108, b"cccc", ack=509),
        data(108, b"cccc", ack=601),
        data(108, b"cccc", ack=510, flags=ACK | FIN),
        Template(LOCAL, (REMOTE[0], 80)).segment(108, 510, ACK, 9, b"cccc"),
        TEMPLATE.segment(108, 510, ACK, 9, b"", b"\x01\x01\x01\x01"),
    ]
    assert read(run) == plain
    for other in others:
        assert read([*run, other]) == plain


def test_a_run_stays_inside_the_window() -> None:
    run = [data(100, b"aaaa"), data(104, b"bbbb")]
    assert read(run, room=7) == Run(1, [b"aaaa"], 4, 0, 9)
    assert read(run, room=3) is None


def test_pure_acknowledgements_run_together_while_they_grow() -> None:
    acks = [data(100, b"", ack=n) for n in (501, 520, 520)]
    assert read(acks) == Run(2, [], 0, 20, 9)
    assert read([data(100, b"")]) is None


def test_a_run_goes_over_the_border_of_the_circle() -> None:
    packets = [data(MASK - 1, b"aaaa", ack=1), data(2, b"bbbb", ack=3)]
    run = read_run(packets, 0, 2, MASK - 1, MASK, 100, 1000)
    assert run == Run(2, [b"aaaa", b"bbbb"], 8, 4, 9)


@given(st.lists(st.integers(0, 40), max_size=3), st.integers(4, 59), st.integers(0, 255))
def test_many_packets_at_once_are_read_as_they_are_one_by_one(
    which: list[int], at: int, octet: int
) -> None:
    """Whatever octets of its headers are others; the first four are not for TCP to look at."""
    packets = TEMPLATE.train(bytes(range(250)) * 4, 0, 20, 40, 100, 510, 9)
    packets.append(data(900, b"the end", ack=510, flags=ACK | PSH))
    for index in which:
        packets[index] = packets[index][:at] + bytes([octet]) + packets[index][at + 1 :]
    expected = Run(0, [], 0, 0, 0)
    for packet in packets:
        run = read_run([packet], 0, 1, 100 + expected.octets, 500, 100, 1000 - expected.octets)
        goes_on = run is not None and packet[4:44] == packets[0][4:44]
        if run is None or not goes_on or run.acked < expected.acked:
            break
        octets = expected.octets + run.octets
        payloads = expected.payloads + run.payloads
        expected = Run(expected.after + 1, payloads, octets, run.acked, run.window)
    assert read(packets) == (expected if expected.after else None)
    full = packets[:40]
    assert read(Laid(b"".join(full), len(full[0]))) == read(full)


def answer(ack: int, *blocks: tuple[int, int], seq: int = 100, flags: int = ACK) -> bytes:
    return TEMPLATE.segment(seq, ack, flags, 9, b"", sack_option(blocks))


def answers(packets: list[bytes]) -> Answers | None:
    return read_answers(packets, 0, len(packets), 100, 500, 100, segment.PACKET_OVERHEAD)


def test_answers_that_were_there_at_once_are_read_as_one() -> None:
    first = [answer(500, (510, 520)), answer(500, (510, 530)), answer(505, (540, 550), (510, 530))]
    assert answers(first) == Answers(3, 5, 9, ((10, 30), (40, 50)))
    # What was selected first and then acknowledged for good is not selected any more.
    assert answers([*first, answer(520, (545, 560))]) == Answers(4, 20, 9, ((20, 30), (40, 60)))
    assert answers([*first, answer(550, (560, 570))]) == Answers(4, 50, 9, ((60, 70),))


def test_answers_end_where_something_new_begins() -> None:
    first, plain = answer(505, (510, 520)), Answers(1, 5, 9, ((10, 20),))
    whole = answer(505, (540, 550), (510, 520))
    assert answers([first, answer(504, (510, 530))]) == plain
    elsewhere = Template(LOCAL, (REMOTE[0], 80))
    assert answers([first, elsewhere.segment(100, 505, ACK, 9, b"", first[60:])]) == plain
    others = [
        answer(505),
        answer(505, (500, 504), (510, 520)),
        answer(505, (512, 515), (510, 520)),
        answer(505, (505, 520)),
        answer(505, (520, 520)),
        answer(505, (590, 601)),
        answer(601, (610, 620)),
        answer(505, (510, 530), seq=99),
        answer(505, (510, 530), flags=ACK | PSH),
        answer(505, (510, 530), flags=ACK | FIN),
        TEMPLATE.segment(100, 505, ACK, 9, b"data", sack_option(((510, 530),))),
        TEMPLATE.segment(100, 505, ACK, 9, b"", b"\1\1\1\1" + sack_option(((510, 530),))),
        whole[:-8],
        whole[:-1],
        whole[:4] + b"\0\x20" + whole[6:],
    ]
    for other in others:
        assert answers([first, other]) == plain
        assert answers([other]) is None


def test_answers_go_over_the_border_of_the_circle() -> None:
    packets = [answer(MASK, (3, 9)), answer(1, (3, 12))]
    assert read_answers(packets, 0, 2, 100, MASK - 1, 50, 60) == Answers(2, 3, 9, ((5, 14),))


BLOCKS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=4)


@given(st.lists(st.tuples(st.integers(0, 60), BLOCKS), min_size=1, max_size=6))
def test_answers_select_what_each_of_them_selects(said: list[tuple[int, Blocks]]) -> None:
    packets = [
        answer(500 + ack, *((500 + left, 500 + right) for left, right in blocks))
        for ack, blocks in said
    ]
    taken, acked, selected = 0, 0, set[int]()
    for packet, (ack, blocks) in zip(packets, said, strict=True):
        one = answers([packet])
        if one is None or ack < acked:
            break
        assert {o for left, right in one.blocks for o in range(left, right)} == {
            o for left, right in blocks for o in range(left, right)
        }
        taken, acked = taken + 1, ack
        selected |= {o for left, right in blocks for o in range(left, right)}
    all_of_them = answers(packets)
    if all_of_them is None:
        assert not taken
        return
    assert (all_of_them.after, all_of_them.acked) == (taken, acked)
    octets = [o for left, right in all_of_them.blocks for o in range(left, right)]
    assert octets == sorted(o for o in selected if o >= acked)
