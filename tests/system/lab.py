"""A laboratory of two network namespaces joined by a cable, and wireguard-go in one of them."""

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from pathlib import Path
from typing import IO

import pytest

from builder_orch.tunnel.carrier.upgrade import authority

ROOT = Path(__file__).parents[2]
CLONE_NEWNET = 0x40000000
LISTENING = "00010000"
"""__SO_ACCEPTCON, as /proc/net/unix has it."""
OUR_HOST, THEIR_HOST = "192.0.2.1", "192.0.2.2"
OUR_HOST6, THEIR_HOST6 = "2001:db8::1", "2001:db8::2"
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

    def socket(
        self, family: socket.AddressFamily = socket.AF_INET, *, far: bool = False
    ) -> socket.socket:
        """A UDP socket of the left namespace, or of the right one if `far`."""
        return _inside(self.right if far else self.left, family)

    def nft(self, namespace: str, rules: str) -> None:
        """Put these rules in the place of all others in a namespace."""
        inside = ("ip", "netns", "exec", namespace)
        run(*inside, "nft", "-f", "-", stdin=f"flush ruleset\n{rules}\n")

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
        with tempfile.TemporaryFile() as said:
            child = subprocess.Popen(words, env=quiet, stdout=said, stderr=said)
            self.children.append(child)
            # Before it listens, `wg` would take its socket for a dead one and remove it.
            _await(lambda: _listens(child.pid, self._control), child, said)
            _await(lambda: self._in_right("wg", "show", self.interface), child, said)
        lines = ["[Interface]", f"PrivateKey = {_text(private_key)}", "[Peer]"]
        lines += [f"PublicKey = {_text(our_public_key)}", f"AllowedIPs = {OURS}/128"]
        if preshared_key is not None:
            lines.append(f"PresharedKey = {_text(preshared_key)}")
        if endpoint is not None:
            lines.append(f"Endpoint = {authority(*endpoint)}")
        inside = ("ip", "netns", "exec", self.right)
        run(*inside, "wg", "setconf", self.interface, "/dev/stdin", stdin="\n".join(lines) + "\n")
        run(*inside, "ip", "address", "add", f"{THEIRS}/64", "dev", self.interface, "nodad")
        run(*inside, "ip", "link", "set", self.interface, "mtu", str(mtu), "up")
        return int(run(*inside, "wg", "show", self.interface, "listen-port"))

    @property
    def _control(self) -> Path:
        return Path(f"/var/run/wireguard/{self.interface}.sock")

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
        ends = ((self.left, OUR_HOST, OUR_HOST6), (self.right, THEIR_HOST, THEIR_HOST6))
        for name, host, host6 in ends:
            run("ip", "-n", name, "address", "add", f"{host}/24", "dev", "v0")
            run("ip", "-n", name, "address", "add", f"{host6}/64", "dev", "v0", "nodad")
            run("ip", "-n", name, "link", "set", "v0", "up")

    def dismiss(self) -> None:
        """End our children; the cable stays."""
        for child in self.children:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
        self.children.clear()
        # Who is killed leaves it behind.
        self._control.unlink(missing_ok=True)

    def demolish(self) -> None:
        """End our children and remove the namespaces, also half-made ones."""
        self.dismiss()
        for name in (self.left, self.right):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _text(key: bytes) -> str:
    return b64encode(key).decode()


def _await(
    condition: Callable[[], bool], child: "subprocess.Popen[bytes]", said: IO[bytes]
) -> None:
    """Poll a program that we started until it is up; bounded by its own tenth of a second steps."""
    pause = threading.Event()
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline or child.poll() is not None:
            said.seek(0)
            pytest.fail(f"{child.args!r} is not up: status {child.poll()}, {said.read()!r}")
        pause.wait(0.02)


def _listens(pid: int, path: Path) -> bool:
    """Whether a process, or one beside it in its namespace, listens at this unix socket."""
    try:
        table = Path(f"/proc/{pid}/net/unix").read_text()
    except OSError:
        return False
    rows = [line.split() for line in table.splitlines()]
    return any(row[3] == LISTENING and row[-1] == str(path) for row in rows)


def _inside(namespace: str, family: socket.AddressFamily) -> socket.socket:
    """A socket belongs to the namespace of the thread that made it."""
    made: list[socket.socket] = []

    def make() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with Path(f"/var/run/netns/{namespace}").open() as handle:
            if libc.setns(handle.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        made.append(socket.socket(family, socket.SOCK_DGRAM))

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
