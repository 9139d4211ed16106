"""What goes wrong on the way to a platform, told in words for people."""

import asyncio
import socket
import struct
from ssl import SSLError

import pytest
from aiohttp import ClientConnectorDNSError, ClientConnectorError
from aiohttp.client_reqrep import ConnectionKey

from builder_orch.api.client import ASKED, Platform, operations
from builder_orch.api.failures import unconnected
from builder_orch.api.models import Secret
from builder_orch.errors import PlatformUnavailable
from tests.api.rig import CANARY, Waits

PLACE = ConnectionKey("::1", 9, False, True, None, None, None)


def test_every_operation_has_words_for_people() -> None:
    assert ASKED.keys() == operations().keys()
    assert not any(name in words for name in ASKED for words in ASKED.values())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(111, "Connect call failed ('::1', 9)"), "Connection refused"),
        (
            OSError("Multiple exceptions: [Errno 111] Connect call, [Errno 101] Connect call"),
            "Connection refused; Network is unreachable",
        ),
        (SSLError(1, "[SSL: WRONG_VERSION_NUMBER] (_ssl.c:1006)"), "no TLS with what answers"),
        (OSError("\x1b[2Jno errno"), "[2Jno errno"),
    ],
)
def test_a_connection_that_fails_is_told_in_the_words_of_the_system(
    error: OSError, said: str
) -> None:
    told = unconnected(ClientConnectorError(PLACE, error))
    assert told.startswith(f"no connection to [::1]:9: {said}")
    assert "Connect call" not in told


def test_a_name_without_an_address_is_told_as_such() -> None:
    error = ClientConnectorDNSError(PLACE, OSError(-2, "Name or service not known"))
    assert unconnected(error) == "no address for ::1"


async def test_a_connection_that_breaks_is_told_in_words() -> None:
    async def rude(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async with await asyncio.start_server(rude, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/graphql"
        async with Platform(url, Secret(CANARY), sleep=Waits()) as platform:
            with pytest.raises(PlatformUnavailable, match="the connection broke") as caught:
                await platform.nearest_region()
    assert "Errno" not in str(caught.value)


async def test_what_speaks_no_tls_is_told_as_such() -> None:
    async def plainly(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.0 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(plainly, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        url = f"https://127.0.0.1:{port}/graphql"
        async with Platform(url, Secret(CANARY), sleep=Waits()) as platform:
            with pytest.raises(PlatformUnavailable, match="no TLS with what answers there"):
                await platform.nearest_region()
