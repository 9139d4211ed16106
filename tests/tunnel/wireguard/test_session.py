"""Transport data: the two loops, the counters' ends and the slots."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder_orch.tunnel.machine import Rejected, Train
from builder_orch.tunnel.wireguard.message import HEADER_LEN, Initiation, Response
from builder_orch.tunnel.wireguard.noise import Keys
from builder_orch.tunnel.wireguard.session import OVERHEAD, Session, Slate, Slots
from builder_orch.tunnel.wireguard.timers import REJECT_AFTER_MESSAGES, REKEY_AFTER_MESSAGES
from tests.tunnel.wireguard.lab import MTU
from tests.tunnel.wireguard.test_handshake import capture, finish

ONE, OTHER = bytes([1]) * 32, bytes([2]) * 32


def pair() -> tuple[Session, Session]:
    sender = Session(Keys(ONE, OTHER, b""), local=7, remote=8, born=0.0, initiator=True)
    receiver = Session(Keys(OTHER, ONE, b""), local=8, remote=7, born=0.0, initiator=False)
    return sender, receiver


def opened(session: Session, octets: bytes, segment: int) -> tuple[list[bytes], int, Counter[str]]:
    drops: Counter[str] = Counter()
    packets, end = session.open(memoryview(octets), 0, segment, drops)
    return list(packets), end, drops


def test_the_cipher_is_that_of_rfc_8439_section_2_8_2() -> None:
    text = (
        b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the "
        b"future, sunscreen would be it."
    )
    sealed = bytes.fromhex(
        "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d6"
        "3dbea45e8ca9671282fafb69da92728b1a71de0a9e060b2905d6a5b67ecd3b36"
        "92ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc"
        "3ff4def08e4b7a9de576d26586cec64b61161ae10b594f09e26a7e902ecbd0600691"
    )
    cipher = pair()[0].cipher(bytes(range(0x80, 0xA0)))
    nonce, associated = (
        bytes.fromhex("070000004041424344454647"),
        bytes.fromhex("50515253c0c1c2c3c4c5c6c7"),
    )
    assert cipher.encrypt(nonce, text, associated) == sealed
    assert cipher.decrypt(nonce, sealed, associated) == text


def test_transport_messages_of_the_kernel_are_opened_and_made_again() -> None:
    seen = capture("ping_tcp")
    calls = {Initiation.parse(octets).sender: octets for octets in seen.of_kind(1)}
    receivers: dict[int, Session] = {}
    senders: dict[int, Session] = {}
    for octets in seen.of_kind(2):
        response = Response.parse(octets)
        sent, _ = seen.recreate(calls[response.receiver])
        keys = finish(sent, response, seen.psks)
        other = Keys(keys.receive, keys.send, keys.digest)
        ours, theirs = response.receiver, response.sender
        caller = Session(keys, local=ours, remote=theirs, born=0.0, initiator=True)
        called = Session(other, local=theirs, remote=ours, born=0.0, initiator=False)
        receivers |= {ours: caller, theirs: called}
        senders |= {ours: called, theirs: caller}
    sizes: Counter[int] = Counter()
    for octets in seen.of_kind(4):
        index = int.from_bytes(octets[4:8], "little")
        packets, end, drops = opened(receivers[index], octets, len(octets))
        assert (len(packets), end, drops) == (1, len(octets), Counter())
        sizes[len(packets[0])] += 1
        senders[index].sent = int.from_bytes(octets[8:16], "little")
        assert senders[index].seal(packets, MTU) == (octets, len(octets))
    assert sizes == {96: 7, 48: 3, 64: 3, 80: 1, 256: 1, 1420: 1, 0: 2}


SIZES = st.integers(0, MTU)


@settings(deadline=None)
@given(st.integers(1, 64), SIZES, st.none() | SIZES, st.integers(0, 2**32))
def test_a_train_comes_back_padded(count: int, size: int, last: int | None, seed: int) -> None:
    dice = Random(seed)
    train = [dice.randbytes(size) for _ in range(count)]
    if last is not None and last < size:
        train[-1] = train[-1][:last]
    sender, receiver = pair()
    octets, segment = sender.seal(train, MTU)
    assert sender.sent == count
    padded = min(-(-len(train[0]) // 16) * 16, MTU)
    assert segment == padded + OVERHEAD
    packets, end, drops = opened(receiver, octets, segment)
    assert end >= len(octets)
    assert not drops
    assert len(packets) == count
    for packet, original in zip(packets, train, strict=True):
        assert packet[: len(original)] == original
        assert not any(packet[len(original) :])
        assert len(packet) == min(-(-len(original) // 16) * 16, MTU)


def test_a_full_packet_is_not_padded_beyond_the_mtu() -> None:
    sender, _ = pair()
    octets, segment = sender.seal([bytes(1420)], 1420)
    assert len(octets) == segment == 1420 + OVERHEAD
    octets, _ = sender.seal([bytes(1415)], 1420)
    assert len(octets) == 1420 + OVERHEAD


def test_a_train_is_opened_once() -> None:
    sender, receiver = pair()
    octets, segment = sender.seal([bytes(100)] * 5, MTU)
    assert len(opened(receiver, octets, segment)[0]) == 5
    packets, _, drops = opened(receiver, octets, segment)
    assert packets == []
    assert drops == {"replayed": 5}


def test_nothing_made_before_is_changed_by_what_follows() -> None:
    """Both ends of two sessions write on one slate, trains of several sizes in turn."""
    dice, slate = Random(4), Slate()
    ends = [
        (
            Session(
                Keys(key, OTHER, b""), local=7, remote=8, born=0.0, initiator=True, slate=slate
            ),
            Session(
                Keys(OTHER, key, b""), local=8, remote=7, born=0.0, initiator=True, slate=slate
            ),
        )
        for key in (ONE, OTHER)
    ]
    made = []
    for number in range(60):
        sender, receiver = ends[number % 2]
        size, count = dice.choice([16, 64, 1420, 9000]) - dice.randrange(2), dice.randint(1, 70)
        train = [dice.randbytes(size) for _ in range(count)]
        octets, segment = sender.seal(train, 9000)
        drops: Counter[str] = Counter()
        packets, end = receiver.open(memoryview(octets), 0, segment, drops)
        assert (end, drops) == (len(octets), Counter())
        made.append((train, octets, bytes(bytearray(octets)), packets))
    for train, octets, copy, packets in made:
        assert octets == copy
        assert [packet[: len(train[0])] for packet in packets] == train


def test_every_order_of_arrival_gives_each_packet_once() -> None:
    dice = Random(3)
    sender, receiver = pair()
    octets, segment = sender.seal([bytes([number]) * 64 for number in range(60)], MTU)
    datagrams = [octets[at : at + segment] for at in range(0, len(octets), segment)]
    arriving = datagrams + dice.sample(datagrams, 20)
    dice.shuffle(arriving)
    got: list[bytes] = []
    drops: Counter[str] = Counter()
    while arriving:
        count = dice.randint(1, 9)
        buffer, arriving = b"".join(arriving[:count]), arriving[count:]
        packets, _, dropped = opened(receiver, buffer, segment)
        got += packets
        drops += dropped
    assert sorted(got) == [bytes([number]) * 64 for number in range(60)]
    assert drops == {"replayed": 20}


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 8), st.data())
def test_a_flipped_bit_costs_that_packet_alone(count: int, data: st.DataObject) -> None:
    sender, receiver = pair()
    sender.sent = 5
    train = [bytes([number]) * 48 for number in range(count)]
    octets, segment = sender.seal(train, MTU)
    which = data.draw(st.integers(0, count - 1))
    # Not the index, which would make it somebody else's packet.
    place = which * segment + data.draw(st.integers(8, segment - 1))
    broken = bytearray(octets)
    broken[place] ^= 1 << data.draw(st.integers(0, 7))
    packets, _, drops = opened(receiver, bytes(broken), segment)
    assert packets == train[:which] + train[which + 1 :]
    assert drops == {"forged": 1}
    # The window knows nothing of the forged one: the true packet is still welcome.
    packets, _, drops = opened(receiver, octets, segment)
    assert packets == [train[which]]
    assert drops == Counter({"replayed": count - 1} if count > 1 else {})


@given(st.integers(2, 12), st.integers(0, 2**32))
def test_a_batch_is_opened_as_its_datagrams_are_one_by_one(count: int, seed: int) -> None:
    """In any order, with copies, forgeries, gaps and a short last one."""
    dice = Random(seed)
    sender, together = pair()
    alone = pair()[1]
    last = [dice.randbytes(48)] if dice.random() < 0.5 else []
    octets, segment = sender.seal([dice.randbytes(64) for _ in range(count)] + last, MTU)
    datagrams = [octets[at : at + segment] for at in range(0, len(octets), segment)]
    whole, tail = datagrams[:count], datagrams[count:]
    for _ in range(dice.randrange(3)):
        at = dice.randrange(count)
        match dice.randrange(3):
            case 0:
                whole[at] = whole[dice.randrange(count)]
            case 1:
                whole[at] = whole[at][:-1] + bytes([whole[at][-1] ^ 1])
            case _:
                dice.shuffle(whole)
    datagrams = whole + tail
    singly = [opened(alone, datagram, len(datagram)) for datagram in datagrams]
    packets, end, drops = opened(together, b"".join(datagrams), segment)
    assert packets == [packet for got, _, _ in singly for packet in got]
    assert end >= segment * count
    assert drops == sum((lost for _, _, lost in singly), Counter())


def test_a_run_ends_where_another_session_begins() -> None:
    sender, receiver = pair()
    other = Session(Keys(ONE, OTHER, b""), local=7, remote=9, born=0.0, initiator=True)
    first, segment = sender.seal([bytes(64)] * 3, MTU)
    second, _ = other.seal([bytes(64)] * 2, MTU)
    packets, end, _ = opened(receiver, first + second, segment)
    assert len(packets) == 3
    assert end == len(first)


def test_a_tail_too_short_for_a_message_is_left_to_the_caller() -> None:
    sender, receiver = pair()
    octets, segment = sender.seal([bytes(64)] * 2, MTU)
    packets, end, drops = opened(receiver, octets + octets[:31], segment)
    assert len(packets) == 2
    assert end == len(octets)
    assert not drops


def test_counters_end_before_they_wrap() -> None:
    sender, receiver = pair()
    sender.sent = REKEY_AFTER_MESSAGES
    assert not sender.is_stale(0.0)
    sender.seal([b""], MTU)
    assert sender.is_stale(0.0)
    sender.sent = REJECT_AFTER_MESSAGES - 2
    assert not sender.is_usable(0.0, 3)
    with pytest.raises(Rejected, match="exhausted"):
        sender.seal([b""] * 3, MTU)
    assert sender.is_usable(0.0, 2)
    octets, segment = sender.seal([b""] * 2, MTU)
    assert opened(receiver, octets, segment)[0] == [b"", b""]
    assert not sender.is_usable(0.0)
    with pytest.raises(Rejected, match="exhausted"):
        sender.seal([b""], MTU)
    assert sender.sent == REJECT_AFTER_MESSAGES


def test_a_counter_at_the_limit_is_refused_on_receipt() -> None:
    class Reckless(Session):
        """One that does not stop at the limit."""

        def seal(self, train: Train, mtu: int) -> tuple[bytes, int]:
            nonce = bytes(4) + REJECT_AFTER_MESSAGES.to_bytes(8, "little")
            sealed = self.cipher(ONE).encrypt(nonce, train[0], None)
            head = bytes([4, 0, 0, 0]) + (8).to_bytes(4, "little") + nonce[4:]
            return head + sealed, HEADER_LEN + len(sealed)

    sender = Reckless(Keys(ONE, OTHER, b""), local=7, remote=8, born=0.0, initiator=True)
    _, receiver = pair()
    packets, _, drops = opened(receiver, *sender.seal([bytes(16)], MTU))
    assert packets == []
    assert drops == {"replayed": 1}


def test_ages() -> None:
    sender, receiver = pair()
    assert not sender.is_stale(119.9)
    assert sender.is_stale(120.0)
    assert not receiver.is_stale(179.0), "only the initiator asks for a new session by age"
    assert not sender.is_ending(164.9)
    assert sender.is_ending(165.0)
    assert not receiver.is_ending(170.0)
    assert sender.is_usable(179.9)
    assert not sender.is_usable(180.0)


def session(index: int) -> Session:
    return Session(Keys(ONE, OTHER, b""), local=index, remote=0, born=0.0, initiator=True)


def test_slots_of_an_initiator() -> None:
    slots = Slots()
    first, second, third = session(1), session(2), session(3)
    assert slots.initiated(first) == []
    assert slots.initiated(second) == []
    assert (slots.previous, slots.current) == (first, second)
    assert slots.initiated(third) == [first]
    assert slots.find(2) is second
    assert slots.find(1) is None


def test_slots_of_a_responder() -> None:
    slots = Slots()
    first, second, third = session(1), session(2), session(3)
    assert slots.responded(first) == []
    # Not to be used before the initiator has shown the keys.
    assert (slots.current, slots.next) == (None, first)
    assert slots.confirmed() == []
    assert (slots.current, slots.next) == (first, None)
    assert slots.responded(second) == []
    assert slots.responded(third) == [second], "the initiator called again"
    assert slots.confirmed() == []
    assert (slots.previous, slots.current, slots.next) == (first, third, None)
    assert set(slots.clear()) == {first, third}
    assert slots.find(3) is None


def test_slots_when_both_call_at_once() -> None:
    slots = Slots()
    old, answered, begun = session(1), session(2), session(3)
    slots.initiated(old)
    slots.responded(answered)
    assert slots.initiated(begun) == [old]
    assert (slots.previous, slots.current, slots.next) == (answered, begun, None)
