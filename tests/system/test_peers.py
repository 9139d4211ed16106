"""Peers beside each other, and what others make of ours: four processes, wg(8) and wireguard-go."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv6Network
from pathlib import Path
from typing import Any

import pytest

from builder_orch.pipeline.kept import exported
from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.config import PeerConfig, PrivateKey, TunnelConfig, decode_key, encode_key
from builder_orch.tunnel.driver import open_tunnel
from builder_orch.tunnel.stamps import Stamps
from tests.system.embedded import LIMIT_S, Embedded, app
from tests.system.lab import OUR_HOST, OURS, THEIR_HOST, THEIRS, Lab, laboratory, run
from tests.tunnel.joined import public

pytestmark = pytest.mark.system

SERVE = 'CMD ["/bin/busybox", "httpd", "-f", "-p", "8080"]'
NETWORK = IPv6Network("fdaa:0:9::/48")


@pytest.fixture
def lab() -> Iterator[Lab]:
    with laboratory() as built:
        yield built


def config(port: int, ours: bytes, theirs: bytes) -> TunnelConfig:
    peer = PeerConfig(public(theirs), (NETWORK,), (THEIR_HOST, port))
    return TunnelConfig(PrivateKey(ours), OURS, (peer,), dns=THEIRS)


# --- outside judges


def test_the_standard_tools_take_an_exported_file_as_it_is(lab: Lab, tmp_path: Path) -> None:
    if shutil.which("wg-quick") is None:
        pytest.skip("needs wg-quick of wireguard-tools")
    ours, theirs = os.urandom(32), os.urandom(32)
    lab.wireguard_go(private_key=theirs, our_public_key=public(ours))
    path = tmp_path / "wg0.conf"
    path.write_text(exported(config(51820, ours, theirs)))
    path.chmod(0o600)
    stripped = run("wg-quick", "strip", str(path))
    inside = ("ip", "netns", "exec", lab.right)
    run(*inside, "wg", "setconf", lab.interface, "/dev/stdin", stdin=stripped)
    shown = run(*inside, "wg", "showconf", lab.interface)
    facts = dict(re.findall(r"^(\w+) = (.*)$", shown, re.MULTILINE))
    # wg(8) shows the key as it is used, with some bits set and cleared.
    assert public(decode_key(facts["PrivateKey"])) == public(ours)
    assert facts["PublicKey"] == encode_key(public(theirs))
    assert facts["AllowedIPs"] == str(NETWORK)
    assert facts["Endpoint"] == f"{THEIR_HOST}:51820"
    assert facts["PersistentKeepalive"] == "15"


async def test_wireguard_go_answers_a_key_whose_clock_was_set_back(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = os.urandom(32), os.urandom(32)
    port = lab.wireguard_go(private_key=theirs, our_public_key=public(ours))
    stamps = Stamps(tmp_path / "laptop.stamp")
    wall = 1_800_000_000.0
    for jump in (0.0, 3600.0, -3600.0, -10 * 31_557_600.0):
        wall += jump
        monkeypatch.setattr("builder_orch.tunnel.driver.time.time", lambda now=wall: now)
        sock = lab.socket()
        sock.bind((OUR_HOST, 0))
        settings = config(port, ours, theirs)
        async with open_tunnel(settings, carrier=UdpCarrier(sock), stamps=stamps) as tunnel:
            assert await tunnel.ready(timeout_s=20) <= 6.0
            # wireguard-go takes one initiation of a peer in 20 ms: let them pass.
            for _ in range(50):
                await tunnel.ping(THEIRS)


# --- four processes, each with a peer of its own


@dataclass
class Talker:
    """A process that talks through a tunnel."""

    process: "subprocess.Popen[str]"

    def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        said: dict[str, Any] = json.loads(self.process.stdout.readline())
        return said

    def end(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.line()


@contextmanager
def talking(embedded: Embedded, kind: str) -> Iterator[Talker]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.system.peer_streams", kind],
        env=embedded.environment(PYTHONPATH=str(Path(__file__).parents[2])),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    patience = threading.Timer(LIMIT_S, process.kill)
    patience.start()
    try:
        talker = Talker(process)
        assert talker.line()["event"] == "talking"
        yield talker
        assert process.wait(30) == 0
    finally:
        patience.cancel()
        process.kill()
        process.wait()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()


def test_two_streams_a_proxy_and_a_deploy_do_not_disturb_each_other(
    embedded: Embedded, tmp_path: Path
) -> None:
    folder = app(tmp_path / "app", SERVE)
    first = embedded.run("deploy", folder, "--create-app")
    assert first.code == 0, first.said
    before = {name for (name,) in embedded.rows("select name from peers")}
    files = kept(embedded)
    with (
        talking(embedded, "stream") as one,
        talking(embedded, "stream") as two,
        talking(embedded, "proxy") as proxy,
    ):
        during = {name for (name,) in embedded.rows("select name from peers")}
        assert len(during - before) == 3
        deployed = embedded.run("deploy", folder, "--no-cache")
        assert deployed.code == 0, deployed.said
        found = [talker.end() for talker in (one, two, proxy)]
    for talk in found:
        assert talk["event"] == "done"
        assert talk["rounds"] > 5
        # A session that is knocked off is silent for 15 s, and then for 15 s again.
        assert talk["worst_s"] < 10
        assert talk["routes"] == 1
    after = {name for (name,) in embedded.rows("select name from peers")}
    assert after == before
    assert kept(embedded) == files


def kept(platform: Embedded) -> set[str]:
    """The files of peers in this home; an agent may have left one that it shares."""
    peers = platform.home / "peers"
    return {path.name for path in peers.iterdir() if path.suffix == ".peer"}


def test_the_carrier_is_shown_by_status(embedded: Embedded) -> None:
    ended = embedded.run("wireguard", "status")
    assert ended.code == 0, ended.said
    assert re.search(r"^carrier: udp 127\.0\.0\.1:\d+ \(it answered", ended.out, re.MULTILINE)
    forced = embedded.run("wireguard", "status", "--carrier", "websocket", "--json")
    test = json.loads(forced.out)["test"]
    assert (test["carrier"], test["why"]) == ("websocket", "asked for")
