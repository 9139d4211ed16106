"""From `--carrier`, the environment and the platform's file to the choice of a carrier."""

import asyncio
import json
import os
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from builder_orch.cli import deploy as command
from builder_orch.cli import shared
from builder_orch.cli.main import fly_build
from builder_orch.cli.options import CARRIERS, Flags
from builder_orch.settings import Environment, PlatformSettings
from builder_orch.tunnel.carrier.choice import KINDS, Choice
from tests.api.rig import bound
from tests.cli.platform_here import platform_here
from tests.tunnel.carrier.gate import Socks

SETTINGS = PlatformSettings("http://127.0.0.1:1/graphql", "token", "127.0.0.1:2", "a test")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """The choices that the tunnel's process was started with."""
    choices: list[Choice] = []

    @asynccontextmanager
    async def hosting(*, choice: Choice, capture: Path | None) -> AsyncGenerator[None]:
        choices.append(choice)
        yield

    monkeypatch.setattr(shared, "hosting", hosting)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    return choices


async def choice(settings: PlatformSettings, flags: Flags, chosen: list[Choice]) -> Choice:
    async with command.open_world(settings, lambda _: None, flags):
        return chosen[-1]


def test_the_flag_knows_every_kind_there_is() -> None:
    assert CARRIERS == KINDS


async def test_where_nothing_is_known_better_it_is_left_to_the_peer(chosen: list[Choice]) -> None:
    made = await choice(SETTINGS, Flags(Path()), chosen)
    assert (made.kind, made.port, made.pin) == ("auto", 0, None)
    assert made.memory == Path(os.environ["FLY_BUILD_HOME"]) / "carriers.json"


async def test_the_environment_names_the_proxy(
    chosen: list[Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "example.org")
    made = await choice(SETTINGS, Flags(Path(), carrier="websocket"), chosen)
    assert made.kind == "websocket"
    assert made.outside.proxy == "http://proxy.example:3128"
    assert made.outside.no_proxy == "example.org"


async def test_a_selfhost_platform_says_where_its_door_is(chosen: list[Choice]) -> None:
    folder = Path(os.environ["FLY_BUILD_HOME"]) / "selfhost"
    folder.mkdir(parents=True)
    record: dict[str, object] = {
        "version": 1,
        "api_url": "http://127.0.0.1:1/graphql",
        "token": "token",
        "registry": "127.0.0.1:2",
        "pid": os.getpid(),
        "organization": "personal",
    }
    for door, expected in (
        ({}, (0, None)),
        ({"websocket_port": 4433, "websocket_pin": "ab" * 32}, (4433, b"\xab" * 32)),
    ):
        (folder / "platform.json").write_text(json.dumps({**record, **door}))
        settings = Environment.current().platform()
        assert settings is not None
        made = await choice(settings, Flags(Path()), chosen)
        assert (made.port, made.pin) == expected


@pytest.mark.parametrize(
    ("words", "environment"),
    [(["--carrier", "pigeon"], {}), ([], {"FLY_BUILD_CARRIER": "pigeon"})],
)
def test_another_kind_is_wrong_usage(words: list[str], environment: dict[str, str]) -> None:
    result = CliRunner().invoke(command.deploy, words, env=environment)
    assert result.exit_code == 2
    assert "pigeon" in result.output


def test_a_proxy_that_does_not_lead_to_the_platform_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    with bound() as closed:
        proxy = f"127.0.0.1:{closed.getsockname()[1]}"
        environment = {
            "FLY_BUILD_API_URL": "https://api.test/graphql",
            "FLY_BUILD_TOKEN": "planted",
            "FLY_BUILD_REGISTRY": "registry.test",
            "HTTPS_PROXY": f"http://user:grown@{proxy}",
        }
        words = ["build", str(tmp_path), "--app", "shop", "--progress", "none"]
        result = CliRunner().invoke(fly_build, words, env=environment)
    assert result.exit_code == 10, result.output
    assert f"failed: the proxy {proxy} cannot be reached: Connection refused" in result.output
    assert "planted" not in result.output
    assert "grown" not in result.output


def test_a_socks_proxy_leads_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Loopback is never reached through a proxy; here it is far away.
    monkeypatch.setattr("builder_orch.tunnel.carrier.proxy._is_local", lambda _: False)
    proxy, stack = Socks(credentials="user:planted"), AsyncExitStack()
    with platform_here(tmp_path) as here:
        opening = stack.enter_async_context(proxy.running())
        address = asyncio.run_coroutine_threadsafe(opening, here.loop).result(10)
        words = ["wireguard", "status", "--carrier", "websocket", "--tunnel-timeout"]
        try:
            good, bad = (
                CliRunner().invoke(
                    fly_build,
                    [*words, limit],
                    env={**here.environment, "ALL_PROXY": f"socks5h://user:{password}@{address}"},
                )
                for password, limit in (("planted", "60s"), ("grown", "1.5s"))
            )
        finally:
            asyncio.run_coroutine_threadsafe(stack.aclose(), here.loop).result(10)
        assert good.exit_code == 0, good.output
        assert f"carrier: websocket wss://127.0.0.1:{here.websocket_port}" in good.stdout
        assert set(proxy.asked) == {f"127.0.0.1 {here.websocket_port}"}
    assert bad.exit_code == 11, bad.output
    assert f"the proxy {address} refused (Username and password authentication" in bad.output
    assert "planted" not in good.output + bad.output
    assert "grown" not in bad.output
