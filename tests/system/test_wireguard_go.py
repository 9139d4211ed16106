"""The WireGuard core against wireguard-go: both roles, preshared keys, cookies under load."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv6Network

import pytest

from builder_orch.tunnel.config import NO_PRESHARED_KEY, PeerConfig, PrivateKey, PublicKey
from builder_orch.tunnel.wireguard import noise
from builder_orch.tunnel.wireguard.handshake import Handshake
from builder_orch.tunnel.wireguard.interface import Interface, SessionStarted
from builder_orch.tunnel.wireguard.message import (
    COOKIE_REPLY,
    RESPONSE,
    CookieReply,
    Response,
    kind_of,
)
from tests.system.lab import OURS, THEIR_HOST, THEIRS, Lab, laboratory

pytestmark = pytest.mark.system

# Sends one datagram to us, which makes the kernel and wireguard-go call.
CALLER = """
import socket, sys
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp:
    udp.sendto(b"hello from behind", (sys.argv[1], 4242))
"""
ECHO_REQUEST, ECHO_REPLY = 128, 129
PATIENCE_S = 20.0


@pytest.fixture
def lab() -> Iterator[Lab]:
    with laboratory() as built:
        yield built


def checksum(octets: bytes) -> int:
    """The Internet checksum, slowly."""
    total = sum(
        int.from_bytes(octets[at : at + 2].ljust(2, b"\0")) for at in range(0, len(octets), 2)
    )
    return 65535 - total % 65535


def echo_request(payload: bytes) -> bytes:
    """An ICMPv6 echo request from us to the kernel behind wireguard-go."""
    message = bytes([ECHO_REQUEST, 0, 0, 0, 0, 7, 0, 1]) + payload
    addresses = OURS.packed + THEIRS.packed
    pseudo = addresses + len(message).to_bytes(4) + bytes([0, 0, 0, 58])
    message = message[:2] + checksum(pseudo + message).to_bytes(2) + message[4:]
    return bytes([0x60, 0, 0, 0]) + len(message).to_bytes(2) + bytes([58, 64]) + addresses + message


class Host:
    """An interface over a plain UDP socket, turned by hand."""

    def __init__(self, udp: socket.socket, interface: Interface) -> None:
        self._udp = udp
        self.interface = interface
        self.packets: list[bytes] = []

    def turn_until(self, done: Callable[[], bool]) -> None:
        """Send, receive and let time pass until `done`, or fail."""
        limit = time.monotonic() + PATIENCE_S
        while not done():
            now = time.monotonic()
            assert now < limit, f"nothing after {PATIENCE_S} s: {self.interface.drops}"
            for octets, segment, endpoint in self.interface.transmit(now):
                for at in range(0, len(octets), segment):
                    self._udp.sendto(octets[at : at + segment], endpoint)
            due = self.interface.deadline()
            self._udp.settimeout(max(0.001, min(0.5, limit - now if due is None else due - now)))
            try:
                octets, source = self._udp.recvfrom(65536)
            except TimeoutError:
                continue
            now = time.monotonic()
            self.packets += self.interface.receive(octets, len(octets), source, now)


def keys() -> tuple[PrivateKey, PrivateKey]:
    return PrivateKey(os.urandom(32)), PrivateKey(os.urandom(32))


def public(key: PrivateKey) -> PublicKey:
    return PublicKey(noise.Key(key).public)


def host(udp: socket.socket, ours: PrivateKey, peer: PeerConfig) -> Host:
    epoch = time.time() - time.monotonic()
    return Host(udp, Interface(ours, mtu=1420, entropy=os.urandom, epoch=epoch, peers=[peer]))


def expect_echo(our: Host, payload: bytes) -> None:
    """One echo there and back."""
    our.packets.clear()
    our.interface.send([echo_request(payload)], time.monotonic())
    our.turn_until(lambda: any(one[6] == 58 and one[40] == ECHO_REPLY for one in our.packets))
    (answer,) = (one for one in our.packets if one[6] == 58 and one[40] == ECHO_REPLY)
    assert answer[8:40] == THEIRS.packed + OURS.packed
    assert answer[48:] == payload


@pytest.mark.parametrize("psk", [None, os.urandom(32)], ids=["no psk", "psk"])
def test_we_call_wireguard_go(lab: Lab, psk: bytes | None) -> None:
    ours, theirs = keys()
    port = lab.wireguard_go(private_key=theirs, our_public_key=public(ours), preshared_key=psk)
    peer = PeerConfig(
        public(theirs),
        (IPv6Network((THEIRS, 128)),),
        (THEIR_HOST, port),
        preshared_key=psk or NO_PRESHARED_KEY,
    )
    with lab.socket() as udp:
        our = host(udp, ours, peer)
        expect_echo(our, b"to be carried by the first handshake")
        expect_echo(our, bytes(1420 - 48))
        started = [event for event in our.interface.events() if isinstance(event, SessionStarted)]
        assert [event.attempt for event in started] == [1]
        assert not our.interface.drops


@pytest.mark.parametrize("psk", [None, os.urandom(32)], ids=["no psk", "psk"])
def test_wireguard_go_calls_us(lab: Lab, psk: bytes | None) -> None:
    ours, theirs = keys()
    with lab.socket() as udp:
        udp.bind(("192.0.2.1", 0))
        lab.wireguard_go(
            private_key=theirs,
            our_public_key=public(ours),
            endpoint=udp.getsockname(),
            preshared_key=psk,
        )
        peer = PeerConfig(
            public(theirs),
            (IPv6Network((THEIRS, 128)), IPv6Network("fe80::/10")),
            preshared_key=psk or NO_PRESHARED_KEY,
        )
        our = host(udp, ours, peer)
        lab.spawn(CALLER, str(OURS))
        our.turn_until(lambda: any(b"hello from behind" in one for one in our.packets))
        started = [event for event in our.interface.events() if isinstance(event, SessionStarted)]
        assert [event.attempt for event in started] == [0]
        expect_echo(our, b"answered on their session")


def flooded(
    program: "subprocess.Popen[bytes]", udp: socket.socket, calls: list[bytes]
) -> CookieReply | None:
    """Let calls pile up while the program is stopped; the first cookie that comes of it, if any.

    Whether it counts itself busy depends on how its threads happen to run.
    """
    program.send_signal(signal.SIGSTOP)
    for call in calls:
        udp.send(call)
    program.send_signal(signal.SIGCONT)
    udp.settimeout(0.3)
    while True:
        try:
            answer = udp.recv(2048)
        except TimeoutError:
            return None
        if kind_of(answer) == COOKIE_REPLY:
            return CookieReply.parse(answer)


def response_to(udp: socket.socket, index: int) -> Response | None:
    """Wait a moment for the response to one call; being asked for a cookie again is a failure."""
    while True:
        try:
            answer = udp.recv(2048)
        except TimeoutError:
            return None
        if kind_of(answer) == COOKIE_REPLY:
            assert CookieReply.parse(answer).receiver < 1000, "the cookie was not accepted"
        elif Response.parse(answer).receiver == index:
            return Response.parse(answer)


def test_wireguard_go_under_load_sends_cookies_that_we_can_use(lab: Lab) -> None:
    """While it is stopped, more calls pile up than it likes; then it wants to see our address."""
    ours, theirs = keys()
    port = lab.wireguard_go(private_key=theirs, our_public_key=public(ours))
    wall = time.time()

    def calling() -> Handshake:
        own = noise.Key(ours)
        return Handshake(own, public(theirs), NO_PRESHARED_KEY, os.urandom, wall)

    with lab.socket() as udp:
        udp.settimeout(2.0)
        udp.connect((THEIR_HOST, port))
        udp.send(calling().initiate(1, 0.0))
        assert kind_of(udp.recv(2048)) == RESPONSE
        callers: dict[int, Handshake] = {}
        cookie: CookieReply | None = None
        for flood in range(10):
            callers = {index: calling() for index in range(300)}
            start = 100.0 * (flood + 1)
            calls = [
                caller.initiate(index, start + index / 20) for index, caller in callers.items()
            ]
            cookie = flooded(lab.children[0], udp, calls)
            if cookie is not None:
                break
        assert cookie is not None
        proven = callers[cookie.receiver]
        proven.keep_cookie(cookie, 2000.0)
        # It takes one call in 20 ms and drops what its queues cannot hold, so repeat.
        udp.settimeout(0.1)
        response: Response | None = None
        for attempt in range(30):
            call = proven.initiate(1000 + attempt, 2000.0 + attempt / 20)
            assert call[-16:] != bytes(16)
            udp.send(call)
            response = response_to(udp, 1000 + attempt)
            if response is not None:
                break
        assert response is not None
        proven.finish(response)
