"""The API through proxies: what they hear, what they may refuse, and who is reached without one."""

from pathlib import Path

import pytest
from aiohttp import ClientConnectorError, ClientSession, ClientTimeout
from yarl import URL

from builder_orch.api.client import TRIES, Platform
from builder_orch.api.dialer import connector
from builder_orch.api.failures import unconnected
from builder_orch.api.models import Secret
from builder_orch.errors import Exit, PlatformUnavailable, UsageFailure
from builder_orch.tunnel.carrier.proxy import Outside
from tests.api.rig import CANARY, Waits, answer, bound, certificate_for, scripted
from tests.tunnel.carrier.gate import Proxy, Socks

REGION = answer({"nearestRegion": {"code": "ams", "name": "Amsterdam"}})
FAR = "api.test"
"""A name that nobody but a proxy of ours knows."""


def client(url: str, outside: Outside, waits: Waits | None = None) -> Platform:
    return Platform(url, Secret(CANARY), outside=outside, sleep=waits or Waits())


@pytest.mark.parametrize("login", ["", "user:p%40ss@"])
async def test_an_http_proxy_connects_and_hears_no_more_than_a_name(
    tmp_path: Path, login: str
) -> None:
    path = certificate_for(tmp_path, FAR)
    proxy = Proxy(credentials="user:p@ss" if login else "")
    async with (
        scripted(REGION, certificate=path, host=FAR) as script,
        proxy.running() as address,
        client(script.url, Outside(f"http://{login}{address}", "", (str(path),))) as platform,
    ):
        assert (await platform.nearest_region()).code == "ams"
    assert script.requests[0].headers["authorization"] == f"Bearer {CANARY}"
    assert "proxy-authorization" not in script.requests[0].headers
    assert proxy.asked[0].startswith(f"CONNECT {URL(script.url).authority} HTTP/1.1\r\n")
    assert proxy.passed
    assert CANARY.encode() not in proxy.passed
    assert not any(CANARY in head for head in proxy.asked)


async def test_a_socks_proxy_connects_too(tmp_path: Path) -> None:
    path, proxy = certificate_for(tmp_path, FAR), Socks(credentials="user:p@ss")
    async with (
        scripted(REGION, certificate=path, host=FAR) as script,
        proxy.running() as address,
        client(script.url, Outside(f"socks5h://user:p%40ss@{address}", "", (str(path),))) as found,
    ):
        assert (await found.nearest_region()).code == "ams"
    assert proxy.asked == [f"{FAR} {URL(script.url).port}"]


async def test_a_proxy_that_answers_in_the_platforms_place_is_not_believed(tmp_path: Path) -> None:
    path = certificate_for(tmp_path, "another.test")
    proxy = Proxy()
    async with (
        scripted(certificate=path, host=FAR) as script,
        proxy.running() as address,
        client(script.url, Outside(f"http://{address}", "", (str(path),))) as platform,
    ):
        with pytest.raises(PlatformUnavailable, match="certificate"):
            await platform.nearest_region()
    assert script.requests == []


@pytest.mark.parametrize(
    ("proxy", "why", "asked"),
    [
        (Proxy(credentials="user:other"), "wants a name and password, or others (407 Proxy", 1),
        (Proxy(answer=b"HTTP/1.1 403 Forbidden\r\n\r\n"), "refused (403 Forbidden)", 1),
        (Proxy(answer=b"HTTP/1.1 502 Bad\x1b[2J Gateway\r\n\r\n"), "refused (502 Bad", TRIES),
        (Proxy(answer=None), "closed the connection", TRIES),
        (Proxy(answer=b"what?\r\n\r\n"), "no HTTP answer", TRIES),
    ],
)
async def test_a_proxy_that_does_not_is_named_in_one_line(
    proxy: Proxy, why: str, asked: int
) -> None:
    waits = Waits()
    async with (
        proxy.running() as address,
        client(f"https://{FAR}/graphql", Outside(f"http://user:planted@{address}"), waits) as found,
    ):
        with pytest.raises(PlatformUnavailable) as caught:
            await found.nearest_region()
    said = str(caught.value)
    assert f"failed: the proxy {address} {why}" in said
    assert said.isprintable()
    assert "planted" not in said + caught.value.hint
    assert "HTTPS_PROXY" in caught.value.hint
    assert caught.value.code is Exit.BUILDER_NOT_PROVISIONED
    # A login that is wrong is not tried until somebody's account is closed.
    assert len(proxy.asked) == asked == len(waits.seconds) + 1


async def test_a_proxy_that_is_not_there_is_named_in_one_line() -> None:
    with bound() as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        async with client(f"https://{FAR}/graphql", Outside(address)) as platform:
            with pytest.raises(PlatformUnavailable) as caught:
                await platform.nearest_region()
    assert str(caught.value).endswith(f"the proxy {address} cannot be reached: Connection refused")


async def test_a_proxy_that_does_not_come_to_a_point_is_given_up() -> None:
    with bound() as silent:
        silent.listen()
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        url = URL(f"https://{FAR}/")
        async with ClientSession(
            connector=connector(url, Outside(address)), timeout=ClientTimeout(sock_connect=0.01)
        ) as session:
            with pytest.raises(ClientConnectorError) as caught:
                await session.get(url)
    assert unconnected(caught.value) == f"the proxy {address} did not connect us in 0.01 s"


async def test_a_token_goes_to_no_proxy_in_clear() -> None:
    proxy = Proxy()
    async with proxy.running() as address:
        outside = Outside(f"http://{address}")
        with pytest.raises(UsageFailure, match="in clear"):
            client(f"http://{FAR}/graphql", outside)
        # Plain http is for this machine, and that is reached without.
        async with scripted(REGION) as script, client(script.url, outside) as platform:
            assert (await platform.nearest_region()).code == "ams"
    assert proxy.asked == []


async def test_whom_no_proxy_is_for_is_reached_without(tmp_path: Path) -> None:
    path, proxy = certificate_for(tmp_path), Proxy()
    async with (
        scripted(REGION, certificate=path, host="localhost") as script,
        proxy.running() as address,
        client(script.url, Outside(f"http://{address}", "", (str(path),))) as platform,
    ):
        assert (await platform.nearest_region()).code == "ams"
    assert proxy.asked == []


@pytest.mark.parametrize(
    ("outside", "why"),
    [
        (Outside("socks4://user:planted@p:1"), f"{FAR} is .* by a proxy: a socks4 proxy is not"),
        (Outside("http://p:none"), "a port that is none"),
        (Outside("", "", ("/dev/null/ca",)), "no certificates .* from /dev/null/ca: Not a direc"),
        (Outside("http://p:1", "", ("/dev/null",)), "no certificates .* from /dev/null: it holds"),
    ],
)
async def test_variables_that_cannot_be_used_are_wrong_usage(outside: Outside, why: str) -> None:
    with pytest.raises(UsageFailure, match=why) as caught:
        await client(f"https://{FAR}/graphql", outside).__aenter__()
    assert "planted" not in str(caught.value)
