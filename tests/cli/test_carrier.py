"""From `--carrier`, the environment and the platform's file to the choice of a carrier."""

import json
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from builder_orch.cli import deploy as command
from builder_orch.cli.options import CARRIERS, Flags
from builder_orch.settings import Environment, PlatformSettings
from builder_orch.tunnel import hosted
from builder_orch.tunnel.carrier.choice import KINDS, Choice

SETTINGS = PlatformSettings("http://127.0.0.1:1/graphql", "token", "127.0.0.1:2", "a test")


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Choice]:
    """The choices that the tunnel's process was started with."""
    choices: list[Choice] = []

    @asynccontextmanager
    async def hosting(*, choice: Choice, capture: Path | None) -> AsyncGenerator[None]:
        choices.append(choice)
        yield

    monkeypatch.setattr(hosted, "hosting", hosting)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    return choices


async def choice(settings: PlatformSettings, flags: Flags, chosen: list[Choice]) -> Choice:
    async with command.open_world(settings, lambda _: None, flags):
        return chosen[-1]


def test_the_flag_knows_every_kind_there_is() -> None:
    assert CARRIERS == KINDS


async def test_fly_has_its_door_at_443_and_nothing_is_pinned(chosen: list[Choice]) -> None:
    made = await choice(SETTINGS, Flags(Path()), chosen)
    assert (made.kind, made.port, made.pin) == ("auto", 443, None)
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
        ({}, (443, None)),
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
