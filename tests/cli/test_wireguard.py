"""`fly-build wireguard` against a platform whose gateway and API are real."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from builder_orch.api.keyring import Keyring, Purpose, load
from builder_orch.cli.main import fly_build
from builder_orch.errors import Exit
from builder_orch.tunnel.config import TunnelConfig, encode_key
from tests.cli.platform_here import Here, platform_here


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    with platform_here(tmp_path) as made:
        yield made


@pytest.fixture
def ring(home: Path) -> Keyring:
    return Keyring(home / "peers")


def command(here: Here, *words: str, **more: str) -> Result:
    result = CliRunner().invoke(fly_build, ["wireguard", *words], env={**here.environment, **more})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def told(here: Here, *words: str, **more: str) -> dict[str, Any]:
    """The result of a command that has to succeed."""
    result = command(here, *words, "--json", **more)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def failed(result: Result, kind: str, code: Exit) -> str:
    """The card of a failure."""
    assert result.exit_code == code, result.output
    assert f"id:    {kind}, exit code {int(code)}" in result.stderr
    return result.stderr


# --- peers and files


def test_a_peer_is_made_listed_and_removed_everywhere(here: Here, ring: Keyring) -> None:
    made = told(here, "create", "laptop")
    path = Path(made["file"])
    assert path == ring.path("laptop")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    record = load(path)
    assert record.purpose is Purpose.KEPT
    assert record.config is not None
    assert str(record.config.address) == made["address"]
    (shown,) = told(here, "list")["peers"]
    assert (shown["name"], shown["kind"], shown["known_to_platform"]) == ("laptop", "kept", True)
    assert shown["public_key"] == encode_key(record.public_key)
    told(here, "remove", "laptop")
    assert here.names() == set()
    assert not path.exists()
    assert command(here, "list").stdout == "there are no peers\n"


def test_no_private_key_is_printed(here: Here, ring: Keyring) -> None:
    said = command(here, "create", "one").output
    said += command(here, "status", "one", "--output", "ndjson").output
    said += command(here, "list", "--json").output
    said += command(here, "reset", "one").output
    said += repr(ring.find("one-r2"))
    config = ring.find("one-r2").config
    assert config is not None
    assert encode_key(config.private_key) not in said


def test_a_file_for_another_program_is_what_the_standard_tools_take(
    here: Here, ring: Keyring, tmp_path: Path
) -> None:
    path = tmp_path / "wg0.conf"
    told(here, "create", "router", "--file", str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    config = TunnelConfig.parse(path.read_text())
    assert config.peers[0].endpoint == here.front.endpoint
    assert config.peers[0].keepalive_s == 15
    assert "WebSocket" not in path.read_text()
    record = ring.find("router")
    assert (record.purpose, record.config) == (Purpose.EXPORTED, None)
    assert encode_key(config.private_key) not in ring.path("router").read_text()
    # Its key is nowhere else, so it can neither be used nor replaced here.
    failed(command(here, "status", "router"), "RB-USAGE", Exit.USAGE)
    failed(command(here, "reset", "router"), "RB-USAGE", Exit.USAGE)


def test_wg_quick_strips_what_we_write(here: Here, tmp_path: Path) -> None:
    if shutil.which("wg-quick") is None:
        pytest.skip("needs wg-quick of wireguard-tools")
    if os.geteuid() != 0:
        pytest.skip("wg-quick does not even read a file without root")
    path = tmp_path / "wg0.conf"
    told(here, "create", "router", "--file", str(path))
    words = ["wg-quick", "strip", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # What is left is what `wg setconf` takes: no addresses, no DNS, no MTU.
    kept = [line.partition(" = ")[0] for line in done.stdout.splitlines() if " = " in line]
    assert kept == ["PrivateKey", "PublicKey", "AllowedIPs", "Endpoint", "PersistentKeepalive"]


def test_stdout_gets_the_file_alone(here: Here) -> None:
    result = command(here, "create", "router", "--file", "-")
    assert result.exit_code == 0
    config = TunnelConfig.parse(result.stdout)
    assert str(config.address) in {str(peer.address) for peer in here.store.peers()}


def test_nothing_is_written_over_without_force(here: Here, tmp_path: Path) -> None:
    path = tmp_path / "wg0.conf"
    path.write_text("mine")
    failed(command(here, "create", "a", "--file", str(path)), "RB-USAGE", Exit.USAGE)
    assert path.read_text() == "mine"
    assert here.names() == set()
    told(here, "create", "a", "--file", str(path), "--force")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    TunnelConfig.parse(path.read_text())
    failed(command(here, "create", "a"), "RB-USAGE", Exit.USAGE)


def test_a_file_that_cannot_be_written_leaves_no_peer(here: Here, ring: Keyring) -> None:
    failed(command(here, "create", "a", "--file", "/proc/wg0.conf"), "RB-USAGE", Exit.USAGE)
    assert here.names() == set()
    assert ring.entries() == []


def test_reset_takes_a_new_key_and_removes_the_old_peer(here: Here, ring: Keyring) -> None:
    told(here, "create", "laptop")
    old = ring.find("laptop")
    assert told(here, "reset")["name"] == "laptop-r2"
    assert told(here, "reset", "laptop-r2")["name"] == "laptop-r3"
    assert here.names() == {"laptop-r3"}
    assert [entry.path.name for entry in ring.entries()] == ["laptop-r3.peer"]
    assert ring.find("laptop-r3").public_key != old.public_key


def test_a_peer_that_the_platform_forgot_is_told_and_pruned(here: Here, ring: Keyring) -> None:
    told(here, "create", "gone")
    (peer,) = here.store.peers()
    here.store.remove_peer(peer.id)
    (shown,) = told(here, "list")["peers"]
    assert shown["known_to_platform"] is False
    assert "fly-build wireguard reset" in shown["remarks"][0]
    result = command(here, "create", "next")
    assert "no longer knows the peer gone" in result.stderr
    assert {entry.path.stem for entry in ring.entries()} == {"next"}


def test_a_token_of_another_organization_prunes_nothing(here: Here, ring: Keyring) -> None:
    told(here, "create", "mine")
    other = here.store.ensure_organization("other")
    narrow = here.store.issue_token("narrow", lifetime_s=60, organization=other)
    told(here, "create", "theirs", FLY_BUILD_TOKEN=narrow)
    assert {entry.path.stem for entry in ring.entries()} == {"mine", "theirs"}


def test_peers_of_another_platform_are_left_alone(here: Here, ring: Keyring) -> None:
    told(here, "create", "mine")
    ring.write(replace(ring.find("mine"), platform="https://elsewhere.example/graphql"))
    assert command(here, "list", "--json").exit_code == 0
    failed(command(here, "reset", "mine"), "RB-USAGE", Exit.USAGE)
    failed(command(here, "remove", "mine"), "RB-USAGE", Exit.USAGE)
    assert here.names() == {"mine"}


def test_without_a_platform_the_next_step_is_said() -> None:
    result = CliRunner().invoke(fly_build, ["wireguard", "list"])
    assert "fly-build selfhost start" in failed(result, "RB-USAGE", Exit.USAGE)


def test_an_unreadable_file_is_shown_and_can_be_removed(here: Here, ring: Keyring) -> None:
    told(here, "create", "odd")
    ring.path("odd").write_text("{")
    (shown,) = told(here, "list")["peers"]
    assert "not what this version of fly-build writes" in shown["remarks"][0]
    told(here, "remove", "odd")
    assert here.names() == set()
    assert ring.entries() == []


def test_a_name_that_is_nowhere(here: Here) -> None:
    for verb in ("remove", "reset", "status"):
        said = failed(command(here, verb, "nobody"), "RB-USAGE", Exit.USAGE)
        assert "fly-build wireguard list" in said
    assert "letters, digits" in failed(command(here, "create", "a b"), "RB-USAGE", Exit.USAGE)


# --- status: what carries, and why nothing does


def test_status_tells_the_carrier_and_why_and_leaves_nothing(here: Here, ring: Keyring) -> None:
    result = command(here, "status")
    assert result.exit_code == 0, result.output
    host, port = here.front.endpoint
    assert f"carrier: udp {host}:{port} (it answered first)" in result.stdout
    assert "ping" in result.stdout
    # Said only when an answer is overdue, which on this machine it is not.
    assert "unanswered" not in result.output
    assert here.names() == set()
    assert ring.entries() == []


def test_status_of_a_kept_peer_uses_that_peer(here: Here) -> None:
    told(here, "create", "laptop")
    for _ in range(2):
        found = told(here, "status", "laptop")
        assert found["peer"]["known_to_platform"] is True
        assert found["test"]["carrier"] == "udp"
        assert found["twin"] is False
    assert here.names() == {"laptop"}


def test_a_platform_that_is_known_by_its_url_alone_says_where_its_door_is(
    here: Here, home: Path
) -> None:
    door = f"wss://127.0.0.1:{here.websocket_port}"
    told(here, "create", "laptop")
    for name in ((), ("laptop",)):
        found = told(here, "status", *name, "--carrier", "websocket")["test"]
        assert (found["carrier"], found["endpoint"]) == ("websocket", door)
    with silent_port() as sock:
        here.front.elsewhere = sock.getsockname()
        found = told(here, "status")["test"]
    assert (found["endpoint"], found["why"]) == (door, "UDP did not answer")
    # Somebody else answers there by now: who was told the key notices.
    path = home / "peers" / "laptop.peer"
    key = here.front.gateway.websocket
    assert key is not None
    path.write_text(path.read_text().replace(key.pin.hex(), "ab" * 32))
    result = command(here, "status", "laptop", "--carrier", "websocket", "--tunnel-timeout", "1s")
    assert result.exit_code == Exit.TUNNEL_NOT_UP
    assert "another key than expected" in result.output


def silent_port() -> socket.socket:
    """A UDP port that swallows everything, as a firewall does."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    return sock


def closed_port() -> tuple[str, int]:
    with silent_port() as sock:
        return "127.0.0.1", sock.getsockname()[1]


def test_a_gateway_that_is_down_is_said_to_be(here: Here) -> None:
    here.front.elsewhere = closed_port()
    result = command(here, "status", "--carrier", "udp", "--tunnel-timeout", "1.2s")
    said = failed(result, "RB-GATEWAY-DOWN", Exit.TUNNEL_NOT_UP)
    assert "the gateway does not run there" in said
    assert here.names() == set()


def test_udp_that_is_swallowed_is_told_from_a_gateway_that_is_down(here: Here) -> None:
    with silent_port() as sock:
        here.front.elsewhere = sock.getsockname()
        result = command(here, "status", "--carrier", "udp", "--tunnel-timeout", "1.2s")
    said = failed(result, "RB-UDP-BLOCKED", Exit.TUNNEL_NOT_UP)
    assert "does not answer; the platform knows the peer, so does its gateway" in said
    assert "--carrier auto" in said
    assert here.names() == set()


def door(here: Here, home: Path, port: int) -> None:
    """Say, as a platform of this machine does, where WebSockets are taken."""
    folder = home / "selfhost"
    folder.mkdir()
    record = {"version": 1, "api_url": here.url, "token": here.token, "pid": os.getpid()}
    more = {"registry": "r", "organization": "personal", "websocket_port": port}
    (folder / "platform.json").write_text(json.dumps({**record, **more, "websocket_pin": ""}))


def test_a_peer_that_is_not_installed_is_told_by_the_way_that_is_open(
    here: Here, home: Path
) -> None:
    here.front.deaf = True
    door(here, home, here.websocket_port)
    result = command(here, "status", "--tunnel-timeout", "1.8s")
    said = failed(result, "RB-PEER-NOT-INSTALLED", Exit.TUNNEL_NOT_UP)
    assert "the platform knows the peer" in said
    assert "--tunnel-timeout" in said


def test_a_network_that_lets_neither_way_out_is_blamed(here: Here, home: Path) -> None:
    door(here, home, closed_port()[1])
    with silent_port() as sock:
        here.front.elsewhere = sock.getsockname()
        result = command(here, "status", "--tunnel-timeout", "1.5s")
    said = failed(result, "RB-UDP-BLOCKED", Exit.TUNNEL_NOT_UP)
    assert "neither way to the gateway leads there" in said
    assert "cause: the network between here and the gateway" in said


def test_a_peer_that_is_not_installed_is_told_by_the_platform_where_there_is_udp_alone(
    here: Here,
) -> None:
    here.front.deaf = True
    result = command(here, "status", "--carrier", "udp", "--tunnel-timeout", "1.2s")
    said = failed(result, "RB-PEER-NOT-INSTALLED", Exit.TUNNEL_NOT_UP)
    assert "its gateway was not told of it yet" in said


@pytest.mark.long
def test_a_resolver_that_is_dead_inside_is_told_from_a_gateway_that_is(tmp_path: Path) -> None:
    with platform_here(tmp_path, resolver=False) as here:
        result = command(here, "status")
    said = failed(result, "RB-TUNNEL-DNS", Exit.TUNNEL_NOT_UP)
    assert "it does answer a ping" in said


def test_a_peer_that_the_platform_forgot_is_told(here: Here) -> None:
    told(here, "create", "gone")
    (peer,) = here.store.peers()
    here.store.remove_peer(peer.id)
    with silent_port() as sock:
        # The file has the endpoint, so the gateway itself has to forget the key.
        here.front.elsewhere = sock.getsockname()
        told(here, "create", "other")
    result = command(here, "status", "other", "--carrier", "udp", "--tunnel-timeout", "1s")
    failed(result, "RB-GATEWAY-DOWN", Exit.TUNNEL_NOT_UP)
    here.store.remove_peer(here.store.peers()[0].id)
    result = command(here, "status", "other", "--carrier", "udp", "--tunnel-timeout", "1s")
    assert "reset other" in failed(result, "RB-PEER-UNKNOWN", Exit.TUNNEL_NOT_UP)


@pytest.mark.parametrize(
    "delay_s", [0.5, *(pytest.param(late, marks=pytest.mark.long) for late in (5.0, 45.0, 95.0))]
)
def test_a_peer_that_is_installed_late_is_waited_for(tmp_path: Path, delay_s: float) -> None:
    with platform_here(tmp_path, install_delay_s=delay_s) as here:
        found = told(here, "status")
    assert 1000 * delay_s <= found["test"]["handshake_ms"] <= 1000 * delay_s + 5400


# --- one key, one process


def begin(here: Here, *words: str, **more: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, **here.environment, **more}
    words = ("wireguard", *words, "--output", "ndjson")
    return subprocess.Popen(
        [sys.executable, "-m", "builder_orch", *words],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def until(process: "subprocess.Popen[str]", kind: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["t"] == kind:
            return
    raise AssertionError(f"it ended without a {kind}")


def end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    assert process.stdout is not None
    process.stdout.close()
    process.wait()


def test_a_second_process_with_the_same_key_is_refused_also_from_a_copy(
    here: Here, ring: Keyring, tmp_path: Path
) -> None:
    told(here, "create", "laptop")
    shutil.copytree(ring.folder, tmp_path / "copy" / "peers")
    first = begin(here, "status", "laptop", "--watch", "60s")
    try:
        until(first, "transport")
        copied = {"FLY_BUILD_HOME": str(tmp_path / "copy")}
        for result in (
            command(here, "status", "laptop"),
            command(here, "status", "laptop", **copied),
        ):
            said = failed(result, "RB-LOCKED", Exit.LOCKED)
            assert f"in use by pid {first.pid}" in said
        for verb in ("reset", "remove"):
            failed(command(here, verb, "laptop"), "RB-LOCKED", Exit.LOCKED)
        (shown,) = told(here, "list")["peers"]
        assert shown["used_by_pid"] == first.pid
    finally:
        end(first)
    # Killed, not closed: its lock went with it.
    assert told(here, "status", "laptop")["test"]["carrier"] == "udp"


def test_the_peer_of_a_killed_command_is_removed_by_the_next(here: Here, ring: Keyring) -> None:
    first = begin(here, "status", "--watch", "60s")
    try:
        until(first, "transport")
        (left,) = here.names()
        # It lives, so it is nobody's business.
        told(here, "create", "mine")
        assert here.names() == {left, "mine"}
    finally:
        end(first)
    assert here.names() == {left, "mine"}
    result = command(here, "status")
    assert "removed 1 peers of runs that were killed" in result.stderr
    assert here.names() == {"mine"}
    assert [entry.path.stem for entry in ring.entries()] == ["mine"]


def test_a_command_that_is_interrupted_removes_its_peer(here: Here, ring: Keyring) -> None:
    first = begin(here, "status", "--watch", "60s")
    try:
        until(first, "transport")
        assert len(here.names()) == 1
        first.send_signal(signal.SIGINT)
        assert first.stdout is not None
        result = json.loads(list(first.stdout)[-1])
        assert first.wait(30) == Exit.INTERRUPTED
    finally:
        end(first)
    assert "cached" not in result["error"]["hint"]
    assert here.names() == set()
    assert ring.entries() == []


def test_ephemeral_peers_are_collected_when_idle_and_not_while_they_talk(here: Here) -> None:
    for name in ("idle", "busy"):
        told(here, "create", name, "--ephemeral")
    told(here, "create", "stays")
    talking = begin(here, "status", "busy", "--watch", "60s")
    try:
        until(talking, "transport")
        assert here.sweep(1000.0) == ["idle"]
    finally:
        end(talking)
    assert here.names() == {"busy", "stays"}
    said = failed(command(here, "status", "idle"), "RB-PEER-UNKNOWN", Exit.TUNNEL_NOT_UP)
    assert "fly-build wireguard reset" in said


def test_a_command_that_cannot_write_its_peer_down_works_without(here: Here, home: Path) -> None:
    (home / "peers").write_text("in the way")
    result = command(here, "status")
    assert result.exit_code == 0, result.output
    assert "is not written down" in result.stderr
    assert here.names() == set()
    failed(command(here, "create", "kept"), "RB-USAGE", Exit.USAGE)
    assert here.names() == set()


TWIN = """
import asyncio, sys
from ipaddress import IPv6Address
from builder_orch.tunnel import TunnelConfig, open_tunnel
async def main():
    config = TunnelConfig.parse(sys.stdin.read())
    async with open_tunnel(config) as tunnel:
        while True:
            try:
                await tunnel.ping(config.dns, timeout_s=1.0)
            except TimeoutError:
                continue
            await asyncio.sleep(1.0)
asyncio.run(main())
"""


@pytest.mark.long
def test_a_key_that_is_used_on_another_machine_is_replaced(here: Here, ring: Keyring) -> None:
    told(here, "create", "laptop")
    config = ring.find("laptop").config
    assert config is not None
    # As if on another machine: it does not look at our locks.
    words = [sys.executable, "-c", TWIN]
    with subprocess.Popen(words, stdin=subprocess.PIPE, text=True) as twin:
        assert twin.stdin is not None
        twin.stdin.write(config.dump())
        twin.stdin.close()
        found = told(here, "status", "laptop", "--watch", "150s")
        twin.kill()
    assert found["twin"] is True
    assert found["new_peer"]["name"] == "laptop-r2"
    assert here.names() == {"laptop-r2"}
    assert [entry.path.stem for entry in ring.entries()] == ["laptop-r2"]
