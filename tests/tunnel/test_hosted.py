"""A tunnel in another process behaves as one in this."""

import asyncio
import os
import signal
import socket
import stat
import sys
from dataclasses import replace
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from builder_orch.errors import TunnelNotUp
from builder_orch.tunnel.carrier import REFUSED
from builder_orch.tunnel.hosted import hosting, open_hosted_tunnel
from tests.tunnel.joined import GATEWAY, pair


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while octets := await reader.read(65536):
        writer.write(octets)
        await writer.drain()
    writer.close()


async def test_streams_pings_and_failures_come_through() -> None:
    async with pair() as ends, open_hosted_tunnel(ends.config) as tunnel:
        await ends.serve(7, echo)
        reasons: list[str] = []
        assert await tunnel.ready(timeout_s=20, report=reasons.append) > 0
        assert reasons == []
        assert await tunnel.ping(GATEWAY) > 0
        octets = os.urandom(3 << 20)
        reader, writer = await asyncio.open_connection(sock=await tunnel.dial(str(GATEWAY), 7))
        writer.write(octets)
        writer.write_eof()
        assert await reader.read() == octets
        writer.close()
        with pytest.raises(ConnectionRefusedError, match=r"\]:9 refused"):
            await tunnel.dial(str(GATEWAY), 9)
        with pytest.raises(TimeoutError):
            await tunnel.ping(IPv6Address("fdaa:0:7::99"), timeout_s=0.05)
        assert await tunnel.drops() == {}


async def test_what_is_waited_for_comes_through() -> None:
    async with pair() as ends:
        config = ends.config
    async with open_hosted_tunnel(config) as tunnel:
        reasons: list[str] = []
        with pytest.raises(TunnelNotUp, match="refuses datagrams"):
            await tunnel.ready(timeout_s=0.6, report=reasons.append)
        assert "refuses datagrams" in reasons[0]
        (sign,) = await tunnel.signs()
        assert (sign.kind, sign.state) == ("udp", REFUSED)
        twin = asyncio.ensure_future(tunnel.twin())
        await tunnel.signs()
        assert not twin.done()
        twin.cancel()


async def test_a_thread_dials_through_the_other_process() -> None:
    async with pair() as ends, open_hosted_tunnel(ends.config) as tunnel:
        await ends.serve(7, echo)

        def converse() -> bytes:
            with tunnel.dial_blocking(str(GATEWAY), 7) as sock:
                assert sock.gettimeout() is None
                sock.sendall(b"hello")
                sock.shutdown(socket.SHUT_WR)
                return b"".join(iter(lambda: sock.recv(100), b""))

        assert await asyncio.to_thread(converse) == b"hello"


async def test_a_tunnel_that_cannot_be_opened_says_why() -> None:
    async with pair() as ends:
        (peer,) = ends.config.peers
        nowhere = replace(peer, endpoint=("gateway.invalid", 51820))
        config = replace(ends.config, peers=(nowhere,))
    with pytest.raises(TunnelNotUp, match=r"gateway\.invalid") as caught:
        async with open_hosted_tunnel(config):
            raise AssertionError("not reached")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        ("/nowhere/python", "/nowhere/python: No such file or directory"),
        ("/etc/passwd", "/etc/passwd: Permission denied"),
        ("/bin/false", "exit code 1"),
    ],
)
async def test_a_process_that_does_not_start_is_a_failure_with_its_reason(
    python: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair() as ends:
        config = ends.config
    monkeypatch.setattr(sys, "executable", python)
    with pytest.raises(TunnelNotUp, match=reason) as caught:
        async with open_hosted_tunnel(config):
            raise AssertionError("not reached")
    assert caught.value.hint


async def test_the_end_of_the_other_process_is_a_failure_and_a_reset() -> None:
    async with pair() as ends:
        await ends.serve(7, echo)
        async with hosting() as opener, opener(ends.config) as tunnel:
            sock = await tunnel.dial(str(GATEWAY), 7)
            waiting = asyncio.ensure_future(tunnel.ping(IPv6Address("fdaa:0:7::99")))
            await tunnel.drops()
            os.kill(tunnel.pid, signal.SIGKILL)
            with pytest.raises(ConnectionResetError, match="process has ended"):
                await waiting
            with pytest.raises(ConnectionResetError, match="process has ended"):
                await tunnel.dial(str(GATEWAY), 7)
            with sock:
                sock.settimeout(10)
                with pytest.raises(ConnectionResetError):
                    sock.recv(1)


async def test_what_ends_all_processes_of_a_job_leaves_the_tunnel_to_its_user() -> None:
    async with pair() as ends:
        await ends.serve(7, echo)
        async with open_hosted_tunnel(ends.config) as tunnel:
            assert os.getpgid(tunnel.pid) != os.getpgid(0)
            await tunnel.drops()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(tunnel.pid, number)
            with await tunnel.dial(str(GATEWAY), 7) as sock:
                sock.setblocking(False)
                await asyncio.get_running_loop().sock_sendall(sock, b"still")
                assert await asyncio.get_running_loop().sock_recv(sock, 5) == b"still"


async def test_leaving_the_block_resets_what_is_open() -> None:
    async with pair() as ends:
        await ends.serve(7, echo)
        async with open_hosted_tunnel(ends.config) as tunnel:
            sock = await tunnel.dial(str(GATEWAY), 7)
        with sock, pytest.raises(ConnectionResetError):
            sock.recv(1)


async def test_a_capture_is_written_by_the_other_process(tmp_path: Path) -> None:
    path = tmp_path / "inner.pcap"
    async with pair() as ends, open_hosted_tunnel(ends.config, capture=path) as tunnel:
        await tunnel.ping(GATEWAY)
    assert path.stat().st_size > 24 + 2 * 16
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
