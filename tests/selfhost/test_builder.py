"""The builder of an organisation: started only on evidence, one port, one connection each."""

from ipaddress import IPv6Address
from pathlib import Path

import pytest
from aiohttp import web

from builder_orch.selfhost.builder import BuilderMachine
from builder_orch.selfhost.engine import Engine
from builder_orch.selfhost.process import State
from tests.selfhost.test_engine import engine_that, pong

ADDRESS = IPv6Address("fdaa:0:1::2")


async def test_the_state_is_what_the_engine_shows_now(home: Path) -> None:
    healthy = [True]

    async def answer(request: web.Request) -> web.StreamResponse:
        if not healthy[0]:
            return web.Response(status=500)
        return web.Response(text="OK") if request.path == "/_ping" else web.json_response({"ID": 1})

    async with (
        engine_that(answer, home) as client,
        Engine(home, report=print, existing=str(client.path), may_own=False) as engine,
    ):
        builder = BuilderMachine(engine, machine_id="b1", address=ADDRESS)
        assert await builder.ensure("web") == ("b1", State.STARTED, ADDRESS)
        assert await builder.ensure("shop") == ("b1", State.STARTED, ADDRESS)
        healthy[0] = False
        assert await builder.ensure("web") == ("b1", State.STOPPED, ADDRESS)


async def test_each_connection_is_a_fresh_one_and_other_ports_are_refused(home: Path) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(text="OK") if request.path == "/_ping" else web.json_response({"ID": 1})

    async with (
        engine_that(answer, home) as client,
        Engine(home, report=print, existing=str(client.path), may_own=False) as engine,
    ):
        builder = BuilderMachine(engine, machine_id="b1", address=ADDRESS)
        one, two = await builder.connect(2375), await builder.connect(2375)
        assert one.fileno() != two.fileno()
        assert not one.getblocking()
        assert [await pong(two), await pong(one)] == [b"OK", b"OK"]
        for port in (0, 22, 2376, 8080):
            with pytest.raises(ConnectionRefusedError, match="2375"):
                await builder.connect(port)
