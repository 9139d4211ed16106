"""What clients get from the agent, and that it never gives what it should keep."""

import asyncio
import os
import socket
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import replace
from ipaddress import IPv6Network
from pathlib import Path

import pytest

from builder_orch.agent.client import AgentTunnel, KeyBusy, Leaving
from builder_orch.agent.place import Place
from builder_orch.agent.server import Terms
from builder_orch.api.keylock import hold_key
from builder_orch.api.keyring import Keyring, Purpose, Record
from builder_orch.api.models import Organization
from builder_orch.errors import AlreadyRunning, TunnelNotUp, UsageFailure
from builder_orch.tunnel.carrier.choice import Choice
from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.config import PeerConfig, PrivateKey, TunnelConfig, encode_key
from builder_orch.tunnel.control import DESCRIPTOR
from builder_orch.tunnel.driver import open_tunnel
from tests.agent.rig import QUICK, UDP, Served, keep, serving
from tests.tunnel.joined import CLIENT, GATEWAY, NETWORK, Pair, pair, public

HOST = str(GATEWAY)
LASTING = replace(QUICK, tunnel_idle_s=60.0)


@pytest.fixture
def place(home: Path) -> Place:
    return Place(home / "agent")


@pytest.fixture
async def ends() -> AsyncGenerator[Pair]:
    """A gateway with an echo at port 7; the client of the pair rests, the agent has its key."""
    async with pair() as both:
        await both.serve(7, echo)
        yield both


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """All of the question is awaited before the first octet of the answer."""
    writer.write(await reader.read())
    writer.close()


async def converse(tunnel: AgentTunnel, octets: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(sock=await tunnel.dial(HOST, 7))
    writer.write(octets)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


async def test_clients_share_one_session_and_lose_no_half_closed_answer(
    place: Place, ends: Pair, home: Path
) -> None:
    path = keep(ends.config, home / "peer.conf")
    async with serving(place) as served, AsyncExitStack() as stack:
        tunnels = [await stack.enter_async_context(served.tunnel(path)) for _ in range(4)]
        assert await tunnels[0].ready(timeout_s=20) > 0
        # The others find the session that the first one made.
        assert await tunnels[1].ready(timeout_s=20) < 1e-2
        texts = [os.urandom(200_000) for _ in range(25)]
        for text in texts:
            assert await asyncio.gather(*(converse(one, text) for one in tunnels)) == [text] * 4
        assert await tunnels[2].ping(GATEWAY) > 0
        (held,) = await served_tunnels(served)
        assert held["clients"] == 4
        assert held["handshake_age_s"] is not None
        with pytest.raises(ConnectionRefusedError):
            await tunnels[3].dial(HOST, 9)
        assert await tunnels[3].drops() == {}


async def test_the_far_end_may_close_its_half_first(place: Place, ends: Pair, home: Path) -> None:
    path = keep(ends.config, home / "peer.conf")
    heard: asyncio.Queue[bytes] = asyncio.Queue()

    async def speak_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"that is all")
        writer.write_eof()
        await heard.put(await reader.read())
        writer.close()

    await ends.serve(8, speak_first)
    async with serving(place) as served, served.tunnel(path) as tunnel:
        for _ in range(100):
            octets = os.urandom(20_000)
            reader, writer = await asyncio.open_connection(sock=await tunnel.dial(HOST, 8))
            assert await reader.read() == b"that is all"
            writer.write(octets)
            writer.close()
            assert await heard.get() == octets


async def served_tunnels(served: Served) -> list[dict[str, object]]:
    found = served.agent.status()["tunnels"]
    assert isinstance(found, list)
    return found


async def test_what_was_dialled_outlives_the_client_that_asked(
    place: Place, ends: Pair, home: Path
) -> None:
    path = keep(ends.config, home / "peer.conf")
    async with serving(place) as served:
        async with served.tunnel(path) as tunnel:
            sock = await tunnel.dial(HOST, 7)
        await served.until(clients=0, connections=1)
        reader, writer = await asyncio.open_connection(sock=sock)
        writer.write(b"still here")
        writer.write_eof()
        assert await reader.read() == b"still here"
        writer.close()
        # Then nobody needs the tunnel any more, and its key is free again.
        await served.until(tunnels=[])
        with hold_key(public(ends.config.private_key), "it"):
            pass


async def test_no_private_key_crosses_the_socket(
    place: Place, ends: Pair, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = keep(ends.config, home / "peer.conf")
    crossed = bytearray()
    send = socket.send_fds

    def listening(sock: socket.socket, buffers: list[bytes], fds: list[int]) -> int:
        crossed.extend(b"".join(buffers))
        return send(sock, buffers, fds)

    monkeypatch.setattr(socket, "send_fds", listening)
    async with serving(place) as served, served.tunnel(path) as tunnel:
        assert await converse(tunnel, b"x") == b"x"
        call = await served.call()
        await asyncio.to_thread(call.ask, {"do": "status"})
        call.close()
    text = crossed.decode(errors="replace")
    assert str(path) in text
    assert DESCRIPTOR in text
    secret = encode_key(ends.config.private_key)
    assert secret not in text
    assert ends.config.private_key.hex() not in text


# Configuration


async def test_a_changed_file_is_another_tunnel_and_what_is_open_goes_on(
    place: Place, ends: Pair, home: Path
) -> None:
    path = keep(ends.config, home / "peer.conf")
    async with pair() as later, serving(place, LASTING) as served:
        await later.serve(7, echo)
        async with served.tunnel(path) as before:
            reader, writer = await asyncio.open_connection(sock=await before.dial(HOST, 7))
            half = home / "half"
            half.touch(mode=0o600)
            half.write_text(later.config.dump())
            half.replace(path)
            async with served.tunnel(path) as after:
                assert await converse(after, b"new") == b"new"
                assert len(await served_tunnels(served)) == 2
                writer.write(b"old")
                writer.write_eof()
                assert await reader.read() == b"old"
                writer.close()
        # The old one is gone at once, the new one waits for who comes next.
        await served.until(clients=0, connections=0)
        while len(found := await served_tunnels(served)) > 1:
            await asyncio.to_thread(path.exists)
        assert found[0]["file"] == str(path)


async def test_a_key_in_use_is_not_used_in_another_way(
    place: Place, ends: Pair, home: Path
) -> None:
    path = keep(ends.config, home / "peer.conf")
    changed = keep(replace(ends.config, mtu=1300), home / "changed.conf")
    async with serving(place, LASTING) as served:
        async with served.tunnel(path) as tunnel, served.client() as other:
            with pytest.raises(KeyBusy, match="another configuration"):
                await other.open_file(changed, UDP)
            with pytest.raises(KeyBusy, match="another configuration"):
                await other.open_file(path, replace(UDP, kind="auto"))
            assert await converse(tunnel, b"undisturbed") == b"undisturbed"
        await served.until(clients=0, connections=0)
        async with served.tunnel(changed) as tunnel:
            assert await converse(tunnel, b"now it may") == b"now it may"


async def test_a_session_that_the_gateway_forgot_while_nobody_used_it_is_made_anew(
    place: Place, home: Path
) -> None:
    ours, theirs = PrivateKey(os.urandom(32)), PrivateKey(os.urandom(32))
    carrier = UdpCarrier.bind("127.0.0.1", 0)
    port = carrier.endpoint[1]
    known = PeerConfig(public(ours), (IPv6Network(f"{CLIENT}/128"),))
    gateway = PeerConfig(public(theirs), (NETWORK,), carrier.endpoint)
    there = TunnelConfig(theirs, GATEWAY, (known,))
    path = keep(TunnelConfig(ours, CLIENT, (gateway,), dns=GATEWAY), home / "peer.conf")
    async with serving(place, LASTING) as served:
        async with open_tunnel(there, carrier=carrier), served.tunnel(path) as tunnel:
            assert await tunnel.ping(GATEWAY) > 0
        # The same gateway, at the same place, with all it knew but the sessions.
        carrier = UdpCarrier.bind("127.0.0.1", port)
        async with open_tunnel(there, carrier=carrier), served.tunnel(path) as tunnel:
            assert await tunnel.ping(GATEWAY, timeout_s=2.0) > 0


async def test_a_key_that_another_process_has_is_left_to_it(
    place: Place, ends: Pair, home: Path
) -> None:
    path = keep(ends.config, home / "peer.conf")
    async with serving(place) as served, served.client() as tunnel:
        with (
            hold_key(public(ends.config.private_key), "the other's"),
            pytest.raises(KeyBusy, match=f"pid {os.getpid()}"),
        ):
            await tunnel.open_file(path, UDP)
        await tunnel.open_file(path, UDP)
        with (
            pytest.raises(AlreadyRunning),
            hold_key(public(ends.config.private_key), "the agent's"),
        ):
            raise AssertionError("not reached")


@pytest.mark.parametrize("what", ["open", "missing", "link", "fifo", "garbage", "half", "nobody"])
async def test_a_file_that_is_not_good_is_refused_with_its_reason(
    place: Place, ends: Pair, home: Path, what: str
) -> None:
    path = home / "peer.conf"
    text = ends.config.dump()
    match what:
        case "open":
            keep(ends.config, path).chmod(0o640)
        case "link":
            path.symlink_to(keep(ends.config, home / "real.conf"))
        case "fifo":
            os.mkfifo(path, 0o600)
        case "garbage":
            keep(ends.config, path).write_bytes(b"{\xff")
        case "half":
            keep(ends.config, path).write_text(text[: text.index("PublicKey")])
        case "nobody":
            keep(replace(ends.config, peers=()), path)
        case _:
            pass
    async with serving(place) as served, served.client() as tunnel:
        with pytest.raises(UsageFailure, match=r"peer\.conf") as caught:
            await tunnel.open_file(path, UDP)
        assert encode_key(ends.config.private_key) not in str(caught.value)
        # The client may correct it and ask again.
        path.unlink(missing_ok=True)
        await tunnel.open_file(keep(ends.config, path), UDP)


async def test_a_tunnel_that_cannot_be_opened_says_why(
    place: Place, ends: Pair, home: Path
) -> None:
    (peer,) = ends.config.peers
    nowhere = replace(ends.config, peers=(replace(peer, endpoint=("gateway.invalid", 51820)),))
    path = keep(nowhere, home / "peer.conf")
    async with serving(place) as served, served.client() as tunnel:
        with pytest.raises(TunnelNotUp, match=r"gateway\.invalid"):
            await tunnel.open_file(path, Choice("udp"))
        keep(ends.config, path)
        await tunnel.open_file(path, UDP)
        assert await converse(tunnel, b"mended") == b"mended"


async def test_a_clock_that_was_set_back_does_not_lock_a_peer_out(
    place: Place, ends: Pair, home: Path
) -> None:
    own = public(ends.config.private_key)
    ring = Keyring(home / "peers")
    record = Record(
        "laptop", "here", Organization("1", "us", "us"), own, Purpose.KEPT, 0.0, config=ends.config
    )
    path = ring.write(record)
    ahead = time.time() + 3600
    path.with_suffix(".stamp").write_text(f"{ahead}\n")
    async with serving(place) as served, served.tunnel(path) as tunnel:
        assert await tunnel.ready(timeout_s=20) >= 0
        assert float(path.with_suffix(".stamp").read_text()) > ahead
        # Without the private key in its file, a peer is for others.
        ring.mark_for_removal(record)
        async with served.client() as other:
            with pytest.raises(UsageFailure, match="not kept"):
                await other.open_file(path, UDP)


# Its end


async def test_it_ends_when_it_was_idle_and_not_before(
    place: Place, ends: Pair, home: Path
) -> None:
    path = keep(ends.config, home / "peer.conf")
    terms = replace(QUICK, idle_s=0.1)
    async with serving(place, terms) as served:
        async with served.tunnel(path) as tunnel:
            sock = await tunnel.dial(HOST, 7)
            await asyncio.wait({served.task}, timeout=0.3)
            assert not served.task.done()
        await asyncio.wait({served.task}, timeout=0.3)
        assert not served.task.done()
        sock.close()
        await served.task
    assert not place.socket.exists()


async def test_an_agent_that_leaves_lets_the_next_one_come_and_serves_what_it_has(
    place: Place, ends: Pair, home: Path
) -> None:
    path = keep(ends.config, home / "peer.conf")
    async with pair() as other, serving(place) as served, served.client() as late:
        await other.serve(7, echo)
        async with served.tunnel(path) as tunnel:
            reader, writer = await asyncio.open_connection(sock=await tunnel.dial(HOST, 7))
            call = await served.call()
            answer = await asyncio.to_thread(call.ask, {"do": "retire", "now": False})
            call.close()
            assert answer == {"pid": os.getpid(), "connections": 1}
            async with serving(place) as successor, successor.client() as second:
                with pytest.raises(Leaving):
                    await late.open_file(path, UDP)
                with pytest.raises(KeyBusy):
                    await second.open_file(path, UDP)
                await second.open_file(keep(other.config, home / "other.conf"), UDP)
                assert await converse(second, b"next") == b"next"
                writer.write(b"last")
                writer.write_eof()
                assert await reader.read() == b"last"
                # Its clients may go on to dial, too: they are in the middle of something.
                assert await converse(tunnel, b"more") == b"more"
                writer.close()
        await served.task


async def test_an_agent_that_is_to_end_now_resets_what_is_open(
    place: Place, ends: Pair, home: Path
) -> None:
    path = keep(ends.config, home / "peer.conf")
    async with serving(place, Terms()) as served, served.tunnel(path) as tunnel:
        with await tunnel.dial(HOST, 7) as sock:
            call = await served.call()
            answer = await asyncio.to_thread(call.ask, {"do": "retire", "now": True})
            call.close()
            assert answer == {"pid": os.getpid(), "connections": 0}
            await served.task
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        with pytest.raises(ConnectionResetError):
            await tunnel.dial(HOST, 7)
