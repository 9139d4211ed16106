"""What SYNs agree on, and options that nobody agreed on (RFC 9293 §3.2, §3.7.1, RFC 7323)."""

import pytest

from tests.tunnel.ipv6.scripted.trace import Wanted, play

# -- MSS


@pytest.mark.parametrize(
    ("said", "size"),
    [
        ("nomss", 1220),
        ("mss 0", 1220),
        ("mss 536", 536),
        ("mss 1000", 1000),
        ("mss 1360", 1360),
        ("mss 1361", 1360),
        ("mss 9000", 1360),
        ("mss 65535", 1360),
    ],
)
@pytest.mark.parametrize("way", ["open", "accept"])
def test_segments_are_as_large_as_both_take(way: str, said: str, size: int) -> None:
    """RFC 9293 §3.7.1: 1220 for a peer that says nothing, never more than our own MTU less 60."""
    play(f"""
        {way} {said}
        write 3000
        > A 1:{1 + size} ack 1
        > A {1 + size}:{1 + 2 * size} ack 1
        drain
    """)


@pytest.mark.parametrize("mss", [1, 20, 63])
def test_a_tiny_segment_size_does_not_stop_data(mss: int) -> None:
    play(f"""
        open mss {mss}
        write 300
        >> A 1:301 ack 1
        +0.02 < A 1 ack 301
        silence
    """)


def test_a_segment_size_is_told_in_a_syn_only() -> None:
    play("""
        open
        < A 1:2 ack 1 mss 100
        write 1360
        > A 1:1361 ack 2
    """)


# -- window scale (RFC 7323 §2)


@pytest.mark.parametrize("scale", [0, 7, 14, 15, 255])
def test_a_scale_above_14_counts_as_14(scale: int) -> None:
    """§2.3. Of a window of 16384 octets all is used and no more."""
    trace = play(f"""
        open scale {scale} win 10000
        < A 1 ack 1 win {1 << 14}
        write 250000
        take 250001 win {1 << 14}
    """)
    most = max(sent.ahead for sent in trace.sent)
    assert (1 << 14) - 1360 < most <= 1 << 14


def test_the_window_of_a_syn_is_never_scaled() -> None:
    play("""
        open win 2720 scale 7
        write 10000
        >> A 1:2721 ack 1
        +0.01 silence
    """)


@pytest.mark.parametrize("way", ["open", "accept"])
def test_without_their_scale_ours_is_not_used_either(way: str) -> None:
    """Both must offer it; what we then offer is at most 65535 octets."""
    trace = play(f"""
        {way} noscale
        < A 1:1361 ack 1
        +0.6 drain
    """)
    assert trace.sent[-1].window == 65_535
    if way == "accept":
        assert 3 not in trace.sent[0].options


def test_an_answer_offers_only_what_was_asked_for() -> None:
    """RFC 2018 §2, RFC 7323 §2.2."""
    trace = play("""
        listen
        < S 0 mss 1360
        > SA 0 ack 1 mss 1360
    """)
    assert set(trace.sent[0].options) == {2}


# -- options

ODD = {
    "unknown": "fe04abcd",
    "unknown and empty": "fd02",
    "experiment": "fd08f98900000000",
    "fast open asks for a cookie": "2202",
    "multipath": "1e0c0081000000000000000a",
    "MD5": "1312" + 16 * "00",
    "user timeout": "1c04003c",
    "length zero": "fe00",
    "length one": "fe01",
    "runs over the end": "fe28",
    "cut after its kind": "010101fe",
    "end and then garbage": "00fe00ff",
    "nothing but padding": 8 * "01",
    "MSS of a wrong length": "020305b4",
    "scale of a wrong length": "0302",
    "SACK in a SYN": "050a0000000100000002",
    "SACK of a wrong length": "050700000001ff",
}


@pytest.mark.parametrize("raw", ODD.values(), ids=ODD)
def test_an_option_we_do_not_know_does_no_harm(raw: str) -> None:
    """RFC 9293 §3.1 (MUST-6, MUST-7): in a SYN and later, and what precedes it counts."""
    play(f"""
        listen
        < S 0 mss 500 raw {raw}
        > SA 0 ack 1
        < A 1:101 ack 1 raw {raw}
        read 100
        ..0.5 > A 1 ack 101
        write 600
        > A 1:501 ack 101
        > A 501:601 ack 101
    """)


def test_reserved_bits_and_ecn_flags_are_passed_over() -> None:
    play("""
        open
        < AEW 1:101 ack 1 reserved 14
        ..0.5 > A 1 ack 101
        read 100
    """)


@pytest.mark.parametrize("offset", [0, 4, 15])
def test_a_data_offset_that_does_not_fit_is_dropped_and_counted(offset: int) -> None:
    trace = play("open")
    packet = bytearray(trace.packet(Wanted.parse(["A", "1", "ack", "1"])))
    packet[52] = offset << 4
    trace.stack.receive([bytes(packet)], trace.now)
    trace.play("""
        silence
        state ESTABLISHED
    """)
    assert sum(trace.stack.drops.values()) == 1
