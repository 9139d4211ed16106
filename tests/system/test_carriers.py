"""Carriers under a firewall that changes its mind: two namespaces, nftables, both ends ours."""

import json
import os
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.system.conftest import SERVE
from tests.system.embedded import Embedded, app
from tests.system.lab import Lab, laboratory, run

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
DROP_UDP = "meta l4proto udp drop"
REJECT_UDP = "meta l4proto udp reject"
DROP_TCP = "meta l4proto tcp drop"


@dataclass
class Ends:
    """The gateway at the right, and clients at the left of a firewall."""

    lab: Lab
    told: str = ""
    started: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def start(self, namespace: str, *words: str) -> "subprocess.Popen[bytes]":
        command = ["ip", "netns", "exec", namespace, sys.executable, "-m"]
        process = subprocess.Popen(
            [*command, "tests.system.carrier_ends", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.lab.children.append(process)
        return process

    def client(self, kind: str = "auto", *haste: str) -> "Client":
        process = self.start(self.lab.left, "client", kind, *haste)
        assert process.stdin is not None
        process.stdin.write(self.told.encode())
        process.stdin.flush()
        return Client(process)

    def firewall(self, *rules: str) -> None:
        """These rules for what comes to the gateway and leaves it, and no others."""
        lines = ["flush ruleset", "table inet t {"]
        for hook in ("input", "output"):
            lines += [f"chain {hook} {{", f"type filter hook {hook} priority 0; policy accept;"]
            # What the gateway refuses is said by an ICMP error, which has to get out.
            lines += rules if hook == "input" or "reject" not in rules[0] else []
            lines.append("}")
        lines.append("}")
        inside = ("ip", "netns", "exec", self.lab.right)
        run(*inside, "nft", "-f", "-", stdin="\n".join(lines) + "\n")

    def wait_for_a_hit(self) -> None:
        """Until a rule that counts has counted something."""
        inside = ("ip", "netns", "exec", self.lab.right)
        pause, until = threading.Event(), time.monotonic() + 20
        while not re.search(r"packets [1-9]", run(*inside, "nft", "list", "ruleset")):
            assert time.monotonic() < until, "nothing came"
            pause.wait(0.02)

    def open_firewall(self) -> None:
        run("ip", "netns", "exec", self.lab.right, "nft", "flush", "ruleset")


@dataclass
class Client:
    """A client, and what it says."""

    process: "subprocess.Popen[bytes]"
    heard: list[dict[str, object]] = field(default_factory=list)
    rest: bytes = b""

    def line(self, within_s: float) -> str:
        assert self.process.stdout is not None
        until = time.monotonic() + within_s
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self.rest:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, until - time.monotonic()))
            octets = os.read(descriptor, 65536) if ready else b""
            if not octets:
                pytest.fail(f"nothing more was said within {within_s} s after {self.heard}")
            self.rest += octets
        first, _, self.rest = self.rest.partition(b"\n")
        return first.decode()

    def wait_for(
        self, event: str, kind: str | None = None, *, within_s: float
    ) -> dict[str, object]:
        until = time.monotonic() + within_s
        while True:
            said: dict[str, object] = json.loads(self.line(until - time.monotonic()))
            self.heard.append(said)
            if said["event"] == event and kind in {None, said.get("kind")}:
                return said

    def stop(self) -> dict[str, object]:
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.wait_for("done", within_s=60)


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    if shutil.which("nft") is None:
        pytest.skip("needs nft")
    with laboratory() as lab:
        both = Ends(lab)
        gateway = both.start(lab.right, "gateway", str(tmp_path))
        both.told = Client(gateway).line(20) + "\n"
        yield both


def test_udp_dropped_from_the_start_is_three_seconds_at_most(ends: Ends) -> None:
    ends.firewall(DROP_UDP)
    client = ends.client()
    ready = client.wait_for("ready", within_s=30)
    assert ready["kind"] == "websocket"
    assert ready["why"] == "UDP did not answer"
    assert float(str(ready["took_s"])) < 3.0
    assert client.stop()["exact"]


def test_udp_rejected_is_a_second_at_most(ends: Ends) -> None:
    ends.firewall(REJECT_UDP)
    client = ends.client()
    ready = client.wait_for("ready", within_s=30)
    assert ready["kind"] == "websocket"
    assert ready["why"] == "UDP was refused"
    assert float(str(ready["took_s"])) < 1.0
    assert client.stop()["exact"]


def test_a_blocked_websocket_costs_nothing_where_udp_is_fine(ends: Ends) -> None:
    ends.firewall(DROP_TCP)
    client = ends.client()
    ready = client.wait_for("ready", within_s=30)
    assert ready["kind"] == "udp"
    # Less than the head start: WebSocket was not even waited for.
    assert float(str(ready["took_s"])) < 1.0
    assert client.stop()["exact"]


@pytest.mark.parametrize(
    ("haste", "stall_s"),
    [(["hurried"], 5.0), pytest.param([], 16.0, marks=pytest.mark.long)],
    ids=["hurried", "in real time"],
)
def test_an_upload_outlives_udp_and_returns_to_it(
    ends: Ends, haste: list[str], stall_s: float
) -> None:
    client = ends.client("auto", *haste)
    assert client.wait_for("ready", within_s=30)["kind"] == "udp"
    client.wait_for("route", "udp", within_s=30)
    ends.firewall(DROP_UDP)
    moved = client.wait_for("route", "websocket", within_s=60)
    assert moved["why"] == "UDP went silent"
    assert float(str(moved["stall_s"])) < stall_s
    ends.open_firewall()
    back = client.wait_for("route", "udp", within_s=90)
    assert back["why"] == "UDP answers again (3 probes)"
    done = client.stop()
    assert done["exact"]
    assert int(str(done["blocks"])) >= int(str(back["blocks"])) > int(str(moved["blocks"]))
    assert float(str(done["stall_s"])) < stall_s


def test_an_upload_outlives_a_gateway_connection_that_is_cut(ends: Ends) -> None:
    client = ends.client("websocket")
    assert client.wait_for("ready", within_s=30)["why"] == "asked for"
    client.wait_for("route", "websocket", within_s=30)
    ends.firewall("meta l4proto tcp counter reject with tcp reset")
    ends.wait_for_a_hit()
    ends.open_firewall()
    assert client.stop()["exact"]


def test_a_deploy_by_url_alone_finds_the_door(embedded: Embedded, tmp_path: Path) -> None:
    folder = app(tmp_path / "app", "STOPSIGNAL SIGKILL", SERVE, name="by-url")
    token = embedded.run("selfhost", "token", "--expires", "10m").out.strip()
    there = {**embedded.elsewhere(token), "FLY_BUILD_CARRIER": "websocket"}
    door = f"wss://127.0.0.1:{embedded.record['websocket_port']}"
    assert not door.endswith(":443")
    try:
        # By a peer of its own, and by one that the agent holds.
        for words in (["--create-app"], ["--agent", "on"]):
            with embedded.running("deploy", folder, *words, **there) as deploying:
                carrier = deploying.until(lambda event: event["t"] == "transport")
                assert (carrier["kind"], carrier["endpoint"]) == ("websocket", door)
            assert embedded.ended[-1].code == 0, embedded.ended[-1].said
    finally:
        embedded.run("agent", "stop", "--now", **there)
