"""A network namespace of our own: a wire to the host, the way out, and sockets inside it.

Everything in it carries the identity of the state directory in its name, so that what a killed run
left behind is found and removed by the next. Nothing that belongs to others is changed, except that
forwarding of IPv4 is turned on where it is off; that is reported and undone.
"""

import asyncio
import ctypes
import json
import os
import signal
import socket
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from ipaddress import IPv4Network
from pathlib import Path
from typing import Final, Self

from builder_orch.selfhost.process import POLL_S, CommandFailed, Report, run

CLONE_NEWNET: Final = 0x40000000
"""The kind of namespace that setns(2) is told to expect."""
FOLDER: Final = Path("/run/netns")
"""Where `ip netns` keeps the names."""
FORWARDING: Final = Path("/proc/sys/net/ipv4/ip_forward")
PRIVATE: Final = tuple(
    IPv4Network(text)
    for text in ("10.213.0.0/16", "10.97.0.0/16", "172.29.0.0/16", "192.168.213.0/24")
)
"""Parts of the private ranges (RFC 1918) that few networks use, in the order we try them."""
CONNECT_LIMIT_S: Final = 10.0


def first_free(taken: Iterable[IPv4Network], length: int) -> IPv4Network:
    """Return the first private network of this prefix length that overlaps none of the taken.

    Raises `CommandFailed` when there is none.
    """
    occupied = list(taken)
    for whole in PRIVATE:
        for candidate in whole.subnets(new_prefix=length):
            if not any(candidate.overlaps(network) for network in occupied):
                return candidate
    raise CommandFailed(f"no private /{length} network is free on this machine")


def networks_in(routes: str, addresses: str) -> Iterator[IPv4Network]:
    """Read the networks out of `ip -j route` and `ip -j addr`; the default route is not one."""
    for route in json.loads(routes or "[]"):
        destination = str(route.get("dst", "default"))
        if destination != "default":
            yield IPv4Network(destination, strict=False)
    for link in json.loads(addresses or "[]"):
        for address in link.get("addr_info", []):
            if address.get("family") == "inet":
                yield IPv4Network(f"{address['local']}/{address['prefixlen']}", strict=False)


def foreign_drops(ruleset: str, own: str) -> list[str]:
    """Name the tables of others whose chain drops forwarded IPv4 packets by default."""
    listed = [entry["chain"] for entry in json.loads(ruleset)["nftables"] if "chain" in entry]
    return sorted(
        {
            str(found["table"])
            for found in listed
            if found.get("hook") == "forward"
            and found.get("policy") == "drop"
            and found.get("family") in {"ip", "inet"}
            and found.get("table") != own
        }
    )


class Namespace:
    """One network namespace; an async context manager that makes and removes it.

    `network` is the /30 of the wire (host first), `bridge` a /24 that nobody uses, free for a
    bridge inside. Sockets of `connect` and `listen` are non-blocking and live in the namespace,
    whatever thread uses them later. Raises `CommandFailed` where namespaces are not to be had.
    """

    def __init__(self, identity: str, state: Path, report: Report) -> None:
        self.name = f"fly-build-{identity}"
        self.host_link = f"fb{identity}h"
        self.inner_link = f"fb{identity}n"
        self.table = f"fly_build_{identity}"
        self.network = IPv4Network("0.0.0.0/30")
        self.bridge = IPv4Network("0.0.0.0/24")
        self.mtu = 1500
        self._memory = state / "forwarding.json"
        self._report = report
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self._libc = ctypes.CDLL(None, use_errno=True)

    @property
    def path(self) -> Path:
        """The file that stands for the namespace."""
        return FOLDER / self.name

    async def __aenter__(self) -> Self:
        await self.remove()
        try:
            await self._make()
        except BaseException:
            await self.remove()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.remove()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def remove(self) -> None:
        """Remove everything that carries our name; processes still inside are ended first."""
        if self.path.exists():
            await self._end_inside()
        await self._remove_part("ip", "link", "del", self.host_link)
        await self._remove_part("ip", "netns", "del", self.name)
        await self._remove_part("nft", "delete", "table", "ip", self.table)
        self._restore_forwarding()

    async def connect(
        self, address: str, port: int, *, limit_s: float = CONNECT_LIMIT_S
    ) -> socket.socket:
        """Return a stream connected to an address inside; raises as `connect` does."""
        stream = await self._socket()
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.get_running_loop().sock_connect(stream, (address, port))
        except BaseException:
            stream.close()
            raise
        return stream

    async def listen(self, port: int, address: str = "127.0.0.1") -> socket.socket:
        """Return a socket that listens inside; port 0 lets the system choose."""
        stream = await self._socket()
        try:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            stream.bind((address, port))
            stream.listen(128)
        except BaseException:
            stream.close()
            raise
        return stream

    async def _make(self) -> None:
        await run("ip", "netns", "add", self.name)
        await run("ip", "-n", self.name, "link", "set", "lo", "up")
        taken = list(
            networks_in(
                await run("ip", "-j", "-4", "route", "show", "table", "all"),
                await run("ip", "-j", "-4", "addr"),
            )
        )
        self.network = first_free(taken, 30)
        self.bridge = first_free([*taken, self.network], 24)
        self.mtu = await self._way_out_mtu()
        host, inner = (str(address) for address in self.network.hosts())
        # One command: a wire whose inner end never shows up on the host.
        await run(
            *("ip", "link", "add", self.host_link, "mtu", str(self.mtu), "type", "veth"),
            *("peer", "name", self.inner_link, "mtu", str(self.mtu), "netns", self.name),
        )
        await run("ip", "addr", "add", f"{host}/30", "dev", self.host_link)
        await run("ip", "link", "set", self.host_link, "up")
        within = ("ip", "-n", self.name)
        await run(*within, "addr", "add", f"{inner}/30", "dev", self.inner_link)
        await run(*within, "link", "set", self.inner_link, "up")
        await run(*within, "route", "add", "default", "via", host)
        try:
            await self._open_way_out()
        except OSError as error:
            self._report(f"build steps cannot reach the Internet: {error}")

    async def _open_way_out(self) -> None:
        # Link-local 169.254/16 is where clouds serve a machine's own credentials.
        rules = f"""
            table ip {self.table} {{
                chain postrouting {{
                    type nat hook postrouting priority srcnat;
                    ip saddr {self.network} oifname != "{self.host_link}" masquerade
                }}
                chain forward {{
                    type filter hook forward priority filter;
                    iifname "{self.host_link}" ip daddr 169.254.0.0/16 drop
                }}
            }}
        """
        await run("nft", "-f", "-", octets=rules.encode())
        self._turn_forwarding_on()
        drops = foreign_drops(await run("nft", "-j", "list", "ruleset"), self.table)
        if drops:
            self._report(
                f"the firewall of this machine (table {', '.join(drops)}) drops forwarded packets; "
                f"build steps may not reach the Internet until it lets {self.host_link} through"
            )

    async def _way_out_mtu(self) -> int:
        for route in json.loads(await run("ip", "-j", "-4", "route", "show", "default") or "[]"):
            link = json.loads(await run("ip", "-j", "link", "show", route["dev"]))
            return min(1500, int(link[0]["mtu"]))
        return 1500

    def _turn_forwarding_on(self) -> None:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        if FORWARDING.read_text().strip() != "0":
            return
        links = sorted(name for _, name in socket.if_nameindex())
        self._memory.write_text(json.dumps({"boot": boot, "links": links}))
        FORWARDING.write_text("1\n")
        self._report("turned on IPv4 forwarding, for build steps to reach the Internet")

    def _restore_forwarding(self) -> None:
        """Turn forwarding off if it was us who turned it on and nothing newer may rely on it."""
        try:
            memory = json.loads(self._memory.read_text())
        except FileNotFoundError:
            return
        except ValueError:
            memory = {"boot": "", "links": []}
        self._memory.unlink()
        if memory["boot"] != Path("/proc/sys/kernel/random/boot_id").read_text().strip():
            return
        own = {self.host_link, self.inner_link}
        newer = {name for _, name in socket.if_nameindex()} - set(memory["links"]) - own
        if newer:
            names = ", ".join(sorted(newer))
            self._report(f"IPv4 forwarding stays on: {names} came since we turned it on")
            return
        with suppress(OSError):
            FORWARDING.write_text("0\n")
            self._report("turned IPv4 forwarding off again")

    async def _remove_part(self, *command: str) -> None:
        # These fail when there is nothing to remove, which is the usual case at a start.
        with suppress(CommandFailed):
            await run(*command)

    async def _end_inside(self) -> None:
        """End the processes of a run that was killed: an engine needs a while to stop in order."""
        for number, limit_s in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
            until = asyncio.get_running_loop().time() + limit_s
            pids = await self._pids()
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            while pids and asyncio.get_running_loop().time() < until:
                await asyncio.sleep(POLL_S)
                pids = await self._pids()
            if not pids:
                return

    async def _pids(self) -> list[int]:
        try:
            return [int(pid) for pid in (await run("ip", "netns", "pids", self.name)).split()]
        except CommandFailed:
            return []

    async def _socket(self) -> socket.socket:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._make_socket)

    def _make_socket(self) -> socket.socket:
        """Make a socket inside; runs on the thread that does nothing else."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._enter(there)
            finally:
                os.close(there)
            try:
                stream = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            finally:
                self._go_home(home)
        finally:
            os.close(home)
        stream.setblocking(False)
        return stream

    def _enter(self, namespace: int) -> None:
        if self._libc.setns(namespace, CLONE_NEWNET):
            code = ctypes.get_errno()
            raise OSError(code, f"setns: {os.strerror(code)}")

    def _go_home(self, home: int) -> None:
        try:
            self._enter(home)
        except OSError:
            # This thread stays in the namespace; it must never make another socket.
            stranded, self._thread = (
                self._thread,
                ThreadPoolExecutor(1, thread_name_prefix=self.name),
            )
            stranded.shutdown(wait=False)
            raise
