"""A dockerd of our own beside any other engine, and nothing of it left when it ends.

It lives in a network namespace, a mount namespace and a process namespace of its own: its bridge,
its firewall rules and the sockets of its containerd cannot meet those of another engine, and when
its first process dies the kernel ends everything that it started.
"""

import ipaddress
import json
import os
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from ipaddress import IPv4Network
from pathlib import Path
from typing import Final, Self

from builder_orch.selfhost.netns import Namespace
from builder_orch.selfhost.process import (
    CommandFailed,
    Program,
    Report,
    State,
    dying_with_us,
    find_program,
    identity,
    private_directory,
    remove_if_empty,
    run,
    run_directory,
)

PROGRAMS: Final = {
    "dockerd": "docker.io",
    "containerd": "docker.io",
    "runc": "docker.io",
    "iptables": "iptables",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "setpriv": "util-linux",
    "mount": "mount",
}
"""What it needs, and the Debian package that has it."""
STOP_LIMIT_S: Final = 20.0
"""The engine gives its containers 10 s; it gets twice that."""
RUNTIME: Final = "/run/docker"
RUN: Final = Path("/run")
BRIDGE_FILTER: Final = Path("/proc/sys/net/bridge")
CGROUPS: Final = Path("/sys/fs/cgroup")
PUBLIC_RESOLVERS: Final = ("1.1.1.1", "8.8.8.8")
ENTER: Final = """
trap 'exit 143' TERM
mount -t tmpfs -o mode=0755 fly-build /run || exit
mkdir -p /run/lock /run/etc/upper /run/etc/work
cp -L /etc/hosts /run/etc/upper/hosts
cp "$1" /run/etc/upper/resolv.conf
mount -t overlay -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work fly-build /etc \\
    || mount --bind "$1" /etc/resolv.conf
shift
"$@" &
engine=$!
trap 'kill -TERM "$engine"' TERM
while kill -0 "$engine" 2>/dev/null; do
    wait "$engine"
    ended=$?
done
exit "$ended"
"""
"""What happens in the new mount namespace around dockerd.

dockerd, containerd and runc use fixed paths below /run, where another engine's would be, and
dockerd leaves a key in /etc/docker: it gets an empty /run in memory, and an /etc whose changes are
there too. It is not the first process of its namespace: that one inherits what starts a container
and ends, which dockerd would never wait for.
"""


def lacking(state: Path) -> str:
    """Say why this machine cannot run an engine of ours; empty if nothing speaks against it."""
    packages = sorted({package for name, package in PROGRAMS.items() if not find_program(name)})
    reasons = ["one of our own needs root"] if os.geteuid() != 0 else []
    if state.resolve().is_relative_to(RUN):
        reasons.append(f"one of our own cannot live below {RUN}")
    reasons += [f"not installed: {', '.join(packages)}"] if packages else []
    return "; ".join(reasons)


def reachable_resolvers(texts: Sequence[str]) -> list[str]:
    """Return the name servers of the first resolv.conf that has any besides loopback ones."""
    for text in texts:
        found = []
        for line in text.splitlines():
            words = line.split()
            if len(words) > 1 and words[0] == "nameserver":
                with suppress(ValueError):
                    if not ipaddress.ip_address(words[1].partition("%")[0]).is_loopback:
                        found.append(words[1])
        if found:
            return found
    return []


def configuration(
    *,
    data: Path,
    socket: Path,
    bridge: IPv4Network,
    mtu: int,
    driver: str,
    group: str,
    isolated: bool,
) -> dict[str, object]:
    """Return the daemon.json of an engine of ours.

    `isolated` containers cannot talk to each other (`icc`): those of two apps share one bridge, and
    dockerd does not start if it is asked for this and the kernel cannot. Control groups
    are made directly, because systemd would look for our processes in its own process namespace.
    What must not outlive a crash (a small pid in a pid file, dead mounts) is in a folder of memory.
    """
    return {
        "data-root": str(data),
        "exec-root": RUNTIME,
        "pidfile": f"{RUNTIME}/dockerd.pid",
        "hosts": [f"unix://{socket}"],
        "group": "root",
        "bip": f"{next(bridge.hosts())}/{bridge.prefixlen}",
        "mtu": mtu,
        "icc": not isolated,
        "storage-driver": driver,
        "exec-opts": ["native.cgroupdriver=cgroupfs"],
        "cgroup-parent": f"/{group}",
        "features": {"buildkit": True},
        "shutdown-timeout": 10,
        "log-driver": "json-file",
        "log-opts": {"max-size": "10m", "max-file": "2"},
    }


class OwnEngine:
    """Our dockerd and its namespaces; an async context manager.

    `answers(socket)` tells whether the engine is ready. Raises `CommandFailed` where namespaces
    are not to be had and `ProgramFailed` when dockerd does not come up; nothing is left then.
    """

    def __init__(
        self,
        state: Path,
        *,
        report: Report,
        answers: Callable[[Path], Awaitable[bool]],
        environment: Mapping[str, str],
    ) -> None:
        self.namespace = Namespace(identity(state), state, report)
        self.socket = Path()
        self._state = state
        self._report = report
        self._answers = answers
        self._environment = environment
        self._group = f"fly-build-{identity(state)}"
        self._program: Program | None = None
        self._stack = AsyncExitStack()

    @property
    def state(self) -> State:
        """What dockerd is doing."""
        return self._program.state if self._program else State.CREATED

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            # Registered first, for what a namespace's end leaves: the last to be undone.
            stack.callback(self._remove_groups)
            await stack.enter_async_context(self.namespace)
            self.socket = run_directory(self._state) / "docker.sock"
            stack.callback(remove_if_empty, self.socket.parent)
            stack.callback(self.socket.unlink, missing_ok=True)
            self._program = Program(
                "dockerd",
                await self._arguments(),
                log=self._state / "dockerd.log",
                ready=lambda: self._answers(self.socket),
                report=self._report,
                environment={"HOME": str(self._state / "engine"), **self._environment},
                stop_limit_s=STOP_LIMIT_S,
            )
            stack.push_async_callback(self._program.stop)
            await self._program.start()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def ensure(self) -> None:
        """Start dockerd again if it was given up; `ProgramFailed` if it does not come up."""
        assert self._program is not None, "used outside its context"
        await self._program.ensure()

    async def _arguments(self) -> list[str]:
        engine = private_directory(self._state / "engine")
        data = private_directory(engine / "docker")
        settings = configuration(
            data=data,
            socket=self.socket,
            bridge=self.namespace.bridge,
            mtu=self.namespace.mtu,
            driver=await self._storage_driver(data),
            group=self._group,
            isolated=await self._bridge_filters(),
        )
        config = engine / "daemon.json"
        config.write_text(json.dumps(settings, indent=2))
        # A mount namespace hides the mounts of images; the process namespace ends with its first
        # process, the shell, which ends with dockerd. `unshare` itself is deaf to SIGTERM, so that
        # the kernel has to kill it when we are gone; the shell then gets a SIGTERM, passes it on,
        # and dockerd stops its containers in order.
        return [
            *dying_with_us("KILL"),
            *(_program("nsenter"), f"--net={self.namespace.path}", "--"),
            *(_program("unshare"), "--mount", "--propagation", "slave"),
            *("--pid", "--fork", "--kill-child=SIGTERM", "--mount-proc", "--"),
            *("/bin/sh", "-c", ENTER, "enter", str(self._resolvers(engine))),
            *(_program("dockerd"), "--config-file", str(config)),
        ]

    def _resolvers(self, engine: Path) -> Path:
        """Write a resolv.conf for inside: the host's, unless its resolver is out of reach there.

        That is so for one on the host's loopback, as systemd and others run it.
        """
        paths = (Path("/etc/resolv.conf"), RUN / "systemd/resolve/resolv.conf")
        texts = [path.read_text() if path.exists() else "" for path in paths]
        servers = reachable_resolvers(texts)
        if not servers:
            servers = list(PUBLIC_RESOLVERS)
            self._report(f"the engine asks the name servers {', '.join(servers)}")
        lines = [f"nameserver {server}" for server in servers]
        lines += [line for line in texts[0].splitlines() if line.startswith("search ")][:1]
        file = engine / "resolv.conf"
        file.write_text("\n".join(lines) + "\n")
        return file

    async def _bridge_filters(self) -> bool:
        """Tell whether this kernel can filter what passes over a bridge."""
        with suppress(CommandFailed):
            await run("modprobe", "-q", "br_netfilter")
        if BRIDGE_FILTER.exists():
            return True
        self._report("this kernel has no br_netfilter: containers of two apps can reach each other")
        return False

    async def _storage_driver(self, data: Path) -> str:
        """Return overlay2, or vfs where the file system below cannot carry an overlay."""
        with tempfile.TemporaryDirectory(dir=data, prefix="probe-") as probe:
            for name in ("lower", "upper", "work", "merged"):
                (Path(probe) / name).mkdir()
            options = f"lowerdir={probe}/lower,upperdir={probe}/upper,workdir={probe}/work"
            try:
                await run(
                    *("unshare", "--mount", "--", _program("mount"), "-t", "overlay", "overlay"),
                    *("-o", options, f"{probe}/merged"),
                )
            except CommandFailed as error:
                self._report(f"images take more room, stored without overlays: {error}")
                return "vfs"
        return "overlay2"

    def _remove_groups(self) -> None:
        """Remove the control groups of containers that were killed; empty ones go by rmdir."""
        for top in (CGROUPS / self._group, *CGROUPS.glob(f"*/{self._group}")):
            for folder, _, _ in os.walk(top, topdown=False):
                with suppress(OSError):
                    Path(folder).rmdir()


def _program(name: str) -> str:
    return find_program(name) or name
