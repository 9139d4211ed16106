"""Two network namespaces joined by a cable; the far one has a wireguard-go and the server."""

import os
import pathlib
import shutil
import subprocess
import sys
import time
from base64 import b64encode
from contextlib import suppress
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from bench.subject import WEBSOCKET_PORT

ROOT = pathlib.Path(__file__).parent.parent
NEAR_HOST, FAR_HOST = "198.18.0.1", "198.18.0.2"
NEAR, FAR, OTHER = "fdaa:0:b::2", "fdaa:0:b::3", "fdaa:0:b::4"
"""`OTHER` is a second process at the near end: a key belongs to one process."""
PLAIN_NEAR, PLAIN_FAR = "fdaa:0:c::2", "fdaa:0:c::3"
UDP_PORT = 51820
RELAY_PORT = 51821
KERNEL_CONTROLS = ("cubic", "reno")
"""What the kernels' TCP is set to, the first that a namespace may have: CUBIC is what nearly all
come with. With BBR below, WebSockets are a third as fast: of two models of one path, ours above and
its below, each takes the other's restraint for the path's limit."""
GATEWAY_PORT = 51822


@dataclass(frozen=True)
class Path:
    """A way between the namespaces: delay there and back, shares of datagrams each way."""

    rtt_ms: float
    loss: float = 0.0
    reorder: float = 0.0
    jitter_ms: float = 3.0


def public(private: bytes) -> bytes:
    """The public half of an X25519 key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def missing() -> str | None:
    """Why nothing can be measured here, if so."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    return None if shutil.which("ip") else "needs iproute2"


def build_peers(out: pathlib.Path) -> pathlib.Path | None:
    """The Go peers, built; None (and a line) where there is no Go toolchain."""
    go = shutil.which("go")
    if go is None:
        return None
    program = out / "peers"
    done = subprocess.run(
        [go, "build", "-o", str(program), "."], cwd=ROOT / "bench/peers", check=False
    )
    return program if done.returncode == 0 else None


@dataclass
class Lab:
    """The namespaces and what runs in them; `close` ends all of it."""

    peers: pathlib.Path
    out: pathlib.Path
    near: str = field(default_factory=lambda: f"fbbench-{os.getpid()}-near")
    far: str = field(default_factory=lambda: f"fbbench-{os.getpid()}-far")
    children: list["subprocess.Popen[str]"] = field(default_factory=list)
    ports: dict[str, int] = field(default_factory=dict)

    def open(self) -> None:
        """Make everything."""
        self.keys = {side: os.urandom(32) for side in ("near", "far", "gateway", "other")}
        for name in (self.near, self.far):
            self.ip("netns", "add", name)
            self.ip("-n", name, "link", "set", "lo", "up")
            self.control(name)
        self.ip("-n", self.near, *f"link add v0 type veth peer v0 netns {self.far}".split())
        for name, host, plain in (
            (self.near, NEAR_HOST, PLAIN_NEAR),
            (self.far, FAR_HOST, PLAIN_FAR),
        ):
            self.ip("-n", name, "address", "add", f"{host}/30", "dev", "v0")
            self.ip("-n", name, "address", "add", f"{plain}/64", "dev", "v0", "nodad")
            self.ip("-n", name, "link", "set", "v0", "up")
        self.tun(self.far, FAR, self.uapi("far", listen=UDP_PORT))
        for address in (FAR, PLAIN_FAR, "::1"):
            server = self.python(self.far, "server", address)
            assert server.stdout is not None
            self.ports[address] = int(server.stdout.readline())
        self.config = self.out / "ours.conf"
        self.gateway_config = self.out / "gateway.conf"
        self.port = UDP_PORT
        self.clear()

    def control(self, name: str) -> None:
        """Set the congestion control of a namespace's kernel."""
        for kind in KERNEL_CONTROLS:
            words = ["sh", "-c", f"echo {kind} >/proc/sys/net/ipv4/tcp_congestion_control"]
            inside = ["ip", "netns", "exec", name, *words]
            if not subprocess.run(inside, check=False, capture_output=True).returncode:
                return
        raise SystemExit(f"bench: none of {', '.join(KERNEL_CONTROLS)} can be had")

    def gateway(self, *, backend: str = "") -> None:
        """A gateway of ours at the far end, and the configuration that leads to it.

        `backend` is a Unix socket to lead streams to; the server of the other subjects otherwise.
        """
        self.gateway_config.write_text(
            f"[Interface]\nPrivateKey = {_text(self.keys['gateway'])}\nAddress = {FAR}/128\n"
            f"ListenPort = {GATEWAY_PORT}\n"
            f"[Peer]\nPublicKey = {_text(public(self.keys['near']))}\nAllowedIPs = {NEAR}/128\n"
            f"[Peer]\nPublicKey = {_text(public(self.keys['other']))}\nAllowedIPs = {OTHER}/128\n"
        )
        child = self.python(
            self.far,
            "gateway",
            str(self.gateway_config),
            str(self.out / "gateway.pem"),
            FAR_HOST,
            str(GATEWAY_PORT),
            str(WEBSOCKET_PORT),
            backend or str(self.ports["::1"]),
        )
        assert child.stdout is not None
        child.stdout.readline()
        self.to_gateway = self.out / "to-gateway.conf"
        self.lead(self.to_gateway, "gateway", GATEWAY_PORT)

    def clear(self) -> None:
        """The way is the cable itself again."""
        if self.port == RELAY_PORT:
            self.end(self.children[-1])
        self.reach(UDP_PORT)

    def impair(self, path: Path) -> None:
        """Lead the way through a relay, until `clear`."""
        words = [f"{path.rtt_ms / 2}ms", path.loss, path.reorder, f"{path.jitter_ms}ms", 1]
        relay = self.start(
            self.far,
            str(self.peers),
            "relay",
            f"{FAR_HOST}:{RELAY_PORT}",
            f"127.0.0.1:{UDP_PORT}",
            *map(str, words),
        )
        assert relay.stdout is not None
        relay.stdout.readline()
        self.reach(RELAY_PORT)

    def reach(self, port: int) -> None:
        """Have every subject call the far end at this UDP port."""
        self.port = port
        self.lead(self.config, "far", port)

    def lead(self, path: pathlib.Path, side: str, port: int, *, other: bool = False) -> None:
        """Write the near end's configuration for a peer at the far host."""
        key, address = ("other", OTHER) if other else ("near", NEAR)
        path.write_text(
            f"[Interface]\nPrivateKey = {_text(self.keys[key])}\nAddress = {address}/128\n"
            f"[Peer]\nPublicKey = {_text(public(self.keys[side]))}\n"
            f"AllowedIPs = {FAR}/128\nEndpoint = {FAR_HOST}:{port}\n"
        )

    def uapi(self, side: str, *, listen: int | None = None) -> str:
        """The configuration of a Go peer, as its control protocol wants it."""
        other, allowed = ("near", NEAR) if side == "far" else ("far", FAR)
        lines = [f"private_key={self.keys[side].hex()}"]
        if listen is not None:
            lines.append(f"listen_port={listen}")
        lines.append(f"public_key={public(self.keys[other]).hex()}")
        if side == "near":
            lines.append(f"endpoint={FAR_HOST}:{self.port}")
        return "\n".join([*lines, f"allowed_ip={allowed}/128"]) + "\n"

    def tun(self, name: str, address: str, uapi: str) -> "subprocess.Popen[str]":
        """wireguard-go behind a TUN device of a namespace."""
        child = self.start(name, str(self.peers), "tun", "wg0")
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(uapi)
        child.stdin.close()
        child.stdout.readline()
        self.ip("-n", name, "address", "add", f"{address}/64", "dev", "wg0", "nodad")
        self.ip("-n", name, "link", "set", "wg0", "up", "mtu", "1420")
        return child

    def python(self, name: str, *words: str) -> "subprocess.Popen[str]":
        """A subject of ours in a namespace."""
        return self.start(name, sys.executable, "-m", "bench.subject", *words)

    def start(self, name: str, *words: str) -> "subprocess.Popen[str]":
        """Any program in a namespace; ended by `close`."""
        child = subprocess.Popen(
            ["ip", "netns", "exec", name, *words],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.children.append(child)
        return child

    def end(self, child: "subprocess.Popen[str]") -> None:
        """End one program."""
        child.terminate()
        child.wait(10)
        self.children.remove(child)
        time.sleep(0.2)

    def ip(self, *words: str) -> None:
        """Run ip(8)."""
        subprocess.run(["ip", *words], check=True)

    def close(self) -> None:
        """End every program and remove the namespaces."""
        for child in self.children:
            child.kill()
            child.wait()
        for name in (self.near, self.far):
            with suppress(OSError):
                subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _text(key: bytes) -> str:
    return b64encode(key).decode()
