"""A laboratory of two network namespaces joined by a cable, and wireguard-go in one of them."""

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLONE_NEWNET = 0x40000000
OUR_HOST, THEIR_HOST = "192.0.2.1", "192.0.2.2"
OURS, THEIRS = IPv6Address("fdaa:0:9::2"), IPv6Address("fdaa:0:9::3")


def missing() -> str | None:
    """Why the laboratory cannot be built on this machine, if it cannot."""
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    absent = [name for name in ("ip", "wg", "wireguard-go") if shutil.which(name) is None]
    if absent:
        return f"needs {', '.join(absent)}"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    probe = subprocess.run(["ip", "netns", "add", _name("probe")], capture_output=True, check=False)
    if probe.returncode:
        return "network namespaces are not allowed here"
    subprocess.run(["ip", "netns", "del", _name("probe")], check=True)
    return None


def _name(side: str) -> str:
    return f"fbtest-{os.getpid()}-{side}"


def run(*words: str, stdin: str | None = None) -> str:
    """Run a command, show what it said if it failed."""
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(words)}: {done.stderr}")
    return done.stdout


@dataclass
class Lab:
    """`left` is where we open sockets, `right` where wireguard-go and the kernel's TCP live."""

    left: str = field(default_factory=lambda: _name("left"))
    right: str = field(default_factory=lambda: _name("right"))
    children: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    interface: str = f"wg{os.getpid()}"
    """wireguard-go keeps its control sockets in one folder for all namespaces, by this name."""

    def socket(self, kind: socket.SocketKind = socket.SOCK_DGRAM) -> socket.socket:
        """An IPv4 socket of the left namespace."""
        return _inside(self.left, kind)

    def spawn(self, program: str, *arguments: str) -> "subprocess.Popen[bytes]":
        """Run a Python program in the right namespace; it is ended with the laboratory."""
        words = ["ip", "netns", "exec", self.right, sys.executable, "-c", program, *arguments]
        child = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.children.append(child)
        return child

    def module(self, name: str, *arguments: str) -> "subprocess.Popen[bytes]":
        """Run a module of the tests in the right namespace, likewise."""
        words = ["ip", "netns", "exec", self.right, sys.executable, "-m", name, *arguments]
        child = subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.children.append(child)
        return child

    def wireguard_go(
        self,
        *,
        private_key: bytes,
        our_public_key: bytes,
        endpoint: tuple[str, int] | None = None,
        preshared_key: bytes | None = None,
        mtu: int = 1420,
    ) -> int:
        """Start wireguard-go with us as its peer; the UDP port it listens at."""
        words = ["ip", "netns", "exec", self.right, "wireguard-go", "-f", self.interface]
        quiet = {**os.environ, "WG_PROCESS_FOREGROUND": "1", "LOG_LEVEL": "error"}
        child = subprocess.Popen(
            words, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.children.append(child)
        _await(lambda: self._in_right("wg", "show", self.interface))
        lines = ["[Interface]", f"PrivateKey = {_text(private_key)}", "[Peer]"]
        lines += [f"PublicKey = {_text(our_public_key)}", f"AllowedIPs = {OURS}/128"]
        if preshared_key is not None:
            lines.append(f"PresharedKey = {_text(preshared_key)}")
        if endpoint is not None:
            lines.append(f"Endpoint = {endpoint[0]}:{endpoint[1]}")
        inside = ("ip", "netns", "exec", self.right)
        run(*inside, "wg", "setconf", self.interface, "/dev/stdin", stdin="\n".join(lines) + "\n")
        run(*inside, "ip", "address", "add", f"{THEIRS}/64", "dev", self.interface, "nodad")
        run(*inside, "ip", "link", "set", self.interface, "mtu", str(mtu), "up")
        return int(run(*inside, "wg", "show", self.interface, "listen-port"))

    def _in_right(self, *words: str) -> bool:
        command = ["ip", "netns", "exec", self.right, *words]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def build(self) -> None:
        """Make the namespaces and the cable."""
        for name in (self.left, self.right):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        cable = f"link add v0 type veth peer v0 netns {self.right}"
        run("ip", "-n", self.left, *cable.split())
        for name, host in ((self.left, OUR_HOST), (self.right, THEIR_HOST)):
            run("ip", "-n", name, "address", "add", f"{host}/30", "dev", "v0")
            run("ip", "-n", name, "link", "set", "v0", "up")

    def demolish(self) -> None:
        """End our children and remove the namespaces, also half-made ones."""
        for child in self.children:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
        for name in (self.left, self.right):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _text(key: bytes) -> str:
    return b64encode(key).decode()


def _await(condition: "object") -> None:
    """Poll a program that we started until it is up; bounded by its own tenth of a second steps."""
    assert callable(condition)
    pause = threading.Event()
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("a program of the laboratory did not come up within 10 s")
        pause.wait(0.05)


def _inside(namespace: str, kind: socket.SocketKind) -> socket.socket:
    """A socket belongs to the namespace of the thread that made it."""
    made: list[socket.socket] = []

    def make() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with Path(f"/var/run/netns/{namespace}").open() as handle:
            if libc.setns(handle.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        made.append(socket.socket(socket.AF_INET, kind))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


@contextlib.contextmanager
def laboratory() -> Iterator[Lab]:
    """A built laboratory that is gone afterwards; skips with the reason where it cannot be."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    lab = Lab()
    try:
        lab.build()
        yield lab
    finally:
        lab.demolish()
