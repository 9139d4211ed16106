"""WireGuard's own layer over Noise, judged by captures of the Linux kernel."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest

from builder_orch.tunnel.config import PublicKey
from builder_orch.tunnel.machine import Rejected
from builder_orch.tunnel.wireguard import noise, tai64n
from builder_orch.tunnel.wireguard.cookie import Door, Jar
from builder_orch.tunnel.wireguard.handshake import IDENTIFIER, Handshake, read_name
from builder_orch.tunnel.wireguard.message import Initiation, Response, kind_of
from tests.tunnel.wireguard.lab import EPOCH, dice, vectors


@dataclass
class Capture:
    """The keys of a capture and what went over the wire, in order."""

    statics: tuple[noise.Key, noise.Key]
    ephemerals: dict[bytes, noise.Key]
    psks: list[bytes]
    datagrams: list[bytes]

    def of_kind(self, kind: int) -> list[bytes]:
        return [octets for octets in self.datagrams if kind_of(octets) == kind]

    def recreate(self, octets: bytes) -> tuple[noise.Sent, bytes]:
        """Make the initiation again, out of the keys and the timestamp that it carries."""
        one, other = self.statics
        addressed = Door(one.public, dice(0)).is_addressed(octets)
        caller, called = (other, one) if addressed else (one, other)
        initiation = Initiation.parse(octets)
        secret = called.exchange(caller.public)
        received = noise.read_payload(read_name(called, initiation), secret)
        assert received.remote == caller.public
        ephemeral = self.ephemerals[initiation.noise[:32]]
        sent, made = noise.write_initiation(
            caller, called.public, ephemeral, secret, received.payload, IDENTIFIER
        )
        body = Initiation(initiation.sender, made).emit()
        return sent, Jar(called.public).stamp(body, 0.0)


def capture(name: str) -> Capture:
    known: Any = vectors()["kernel_captures"]
    ephemerals = [noise.Key(bytes.fromhex(text)) for text in known["ephemerals"]]
    return Capture(
        (
            noise.Key(bytes.fromhex(known["static_i"])),
            noise.Key(bytes.fromhex(known["static_r"])),
        ),
        {key.public: key for key in ephemerals},
        [bytes.fromhex(text) for text in known["psks"]],
        [bytes.fromhex(datagram["udp_payload"]) for datagram in known[name]],
    )


def finish(sent: noise.Sent, response: Response, psks: list[bytes]) -> noise.Keys:
    """Read a response with whichever preshared key fits; exactly one may."""
    fitting: list[noise.Keys] = []
    for psk in psks:
        try:
            keys, payload = noise.read_response(sent, response.noise, psk)
        except Rejected:
            continue
        assert payload == b""
        fitting.append(keys)
    assert len(fitting) == 1
    return fitting[0]


@pytest.mark.parametrize("name", ["ping_tcp", "psk"])
def test_initiations_of_the_kernel_are_made_again_to_the_octet(name: str) -> None:
    seen = capture(name)
    initiations = seen.of_kind(1)
    assert len(initiations) == 2
    for octets in initiations:
        assert seen.recreate(octets)[1] == octets


@pytest.mark.parametrize("name", ["ping_tcp", "psk"])
def test_responses_of_the_kernel_are_understood(name: str) -> None:
    seen = capture(name)
    calls = {Initiation.parse(octets).sender: octets for octets in seen.of_kind(1)}
    responses = seen.of_kind(2)
    assert len(responses) == 2
    for octets in responses:
        response = Response.parse(octets)
        sent, _ = seen.recreate(calls[response.receiver])
        finish(sent, response, seen.psks)


def handshakes(psk: bytes = bytes(32)) -> tuple[noise.Key, Handshake, noise.Key, Handshake]:
    left, right = noise.Key(bytes([1]) * 32), noise.Key(bytes([2]) * 32)
    ours = Handshake(left, PublicKey(right.public), psk, dice(1), EPOCH)
    theirs = Handshake(right, PublicKey(left.public), psk, dice(2), EPOCH)
    return left, ours, right, theirs


def test_a_handshake_and_its_indices() -> None:
    _, ours, right, theirs = handshakes(bytes([9]) * 32)
    initiation = Initiation.parse(ours.initiate(77, 1.0))
    assert initiation.sender == ours.pending() == 77
    keys, octets = theirs.answer(read_name(right, initiation), initiation.sender, 88, 1.0)
    response = Response.parse(octets)
    assert (response.sender, response.receiver) == (88, 77)
    assert ours.finish(response).digest == keys.digest
    assert ours.pending() is None
    with pytest.raises(Rejected, match="unexpected response"):
        ours.finish(response)


def test_an_initiation_is_answered_once() -> None:
    _, ours, right, theirs = handshakes()
    initiation = Initiation.parse(ours.initiate(77, 1.0))
    theirs.answer(read_name(right, initiation), 77, 88, 1.0)
    with pytest.raises(Rejected, match="replayed"):
        theirs.answer(read_name(right, initiation), 77, 89, 100.0)


def test_older_initiations_are_refused_after_a_newer_one() -> None:
    _, ours, right, theirs = handshakes()
    older = Initiation.parse(ours.initiate(77, 1.0))
    newer = Initiation.parse(ours.initiate(78, 2.0))
    theirs.answer(read_name(right, newer), 78, 88, 3.0)
    with pytest.raises(Rejected, match="replayed"):
        theirs.answer(read_name(right, older), 77, 89, 4.0)


def test_initiations_need_twenty_milliseconds_between_them() -> None:
    _, ours, right, theirs = handshakes()
    first, second, third = (
        Initiation.parse(ours.initiate(index, index / 10)) for index in range(10, 13)
    )
    theirs.answer(read_name(right, first), 1, 88, 5.0)
    with pytest.raises(Rejected, match="too soon"):
        theirs.answer(read_name(right, second), 1, 89, 5.019)
    theirs.answer(read_name(right, third), 1, 90, 5.021)


def test_timestamps_rise_even_when_the_clock_stands() -> None:
    left, ours, right, _ = handshakes()
    stamps = []
    for index in range(100):
        named = read_name(right, Initiation.parse(ours.initiate(index, 1.0)))
        stamps.append(noise.read_payload(named, right.exchange(left.public)).payload)
    assert stamps[0] == tai64n.stamp(EPOCH + 1.0)
    assert all(earlier < later for earlier, later in pairwise(stamps))


def test_only_the_pending_initiation_can_be_answered() -> None:
    _, ours, right, theirs = handshakes()
    first = Initiation.parse(ours.initiate(77, 1.0))
    _, octets = theirs.answer(read_name(right, first), 77, 88, 1.0)
    ours.initiate(78, 7.0)
    with pytest.raises(Rejected, match="unexpected response"):
        ours.finish(Response.parse(octets))
    ours.forget()
    assert ours.pending() is None


def test_a_forged_response_leaves_the_initiation_pending() -> None:
    _, ours, right, theirs = handshakes()
    initiation = Initiation.parse(ours.initiate(77, 1.0))
    _, octets = theirs.answer(read_name(right, initiation), 77, 88, 1.0)
    good = Response.parse(octets)
    with pytest.raises(Rejected, match="forged"):
        ours.finish(good._replace(noise=good.noise[:-1] + bytes([good.noise[-1] ^ 1])))
    ours.finish(good)


def test_a_peer_of_low_order_cannot_be_configured() -> None:
    with pytest.raises(ValueError, match="low order"):
        Handshake(noise.Key(bytes([1]) * 32), PublicKey(bytes(32)), bytes(32), dice(1), EPOCH)
