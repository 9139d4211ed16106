"""An engine of our own on this very machine: it builds, it survives, and nothing of it stays."""

import asyncio
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from ipaddress import IPv6Address
from pathlib import Path

import aiohttp
import pytest

from builder_orch.errors import EngineMissing
from builder_orch.selfhost.builder import BuilderMachine
from builder_orch.selfhost.dockerd import lacking
from builder_orch.selfhost.engine import Engine
from builder_orch.selfhost.netns import Namespace
from builder_orch.selfhost.process import CommandFailed, State, identity

BUSYBOX = os.path.realpath(shutil.which("busybox", path="/bin:/usr/bin") or "")
DOCKERFILE = """\
FROM scratch
COPY busybox /bin/busybox
COPY index.html /www/index.html
EXPOSE 8080
"""
QUICK_END = {"Image": "hello:1", "StopSignal": "SIGKILL"}
"""busybox as the first process of a container does not mind a SIGTERM."""
SERVE = 'CMD ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/www"]\n'


def why_no_engine() -> str:
    """Say why no engine of our own can be started here."""
    if reason := lacking(Path.cwd()):
        return reason
    probe = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, check=False
    )
    if probe.returncode:
        return "this machine does not let us make namespaces"
    return "" if Path(BUSYBOX).is_file() else "busybox-static is not installed"


system = [
    pytest.mark.system,
    pytest.mark.skipif(bool(why_no_engine()), reason=f"no engine of our own: {why_no_engine()}"),
]
pytestmark = system


@asynccontextmanager
async def own_engine(state: Path, report: Callable[[str], None] = print) -> AsyncGenerator[Engine]:
    """An engine of ours, not another that happens to be there."""
    async with Engine(state, report=report, existing="/nonexistent") as engine:
        assert engine.own
        yield engine


async def build(engine: Engine, tag: str, dockerfile: str, page: str = "hello") -> str:
    """Build an image from scratch and busybox over the raw API; return what the build said."""
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as tar:
        tar.add(BUSYBOX, "busybox")
        for name, text in (("index.html", page), ("Dockerfile", dockerfile)):
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    context.seek(0)
    return await post(engine, "/build", {"t": tag}, body=context)


async def post(
    engine: Engine,
    path: str,
    query: dict[str, str],
    *,
    body: io.BytesIO | None = None,
    headers: dict[str, str] | None = None,
) -> str:
    connector = aiohttp.UnixConnector(str(engine.docker_host))
    async with (
        aiohttp.ClientSession("http://engine", connector=connector) as session,
        session.post(path, params=query, data=body, headers=headers) as answer,
    ):
        return await answer.text()


def command(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def traces(state: Path) -> list[str]:
    """Whatever on this machine still carries the identity of a state directory."""
    name = identity(state)
    found = [line for line in command("ip", "-o", "link").splitlines() if name in line]
    found += [line for line in command("ip", "netns").splitlines() if name in line]
    found += [
        line
        for line in command("nft", "list", "tables").splitlines()
        if f"fly_build_{name}" in line
    ]
    groups = Path("/sys/fs/cgroup")
    found += [str(path) for depth in ("", "*/") for path in groups.glob(f"{depth}fly-build-{name}")]
    found += [str(path) for path in Path("/tmp").glob(f"*{name}*")]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(state.resolve()) in words and str(os.getpid()) != process.parent.name:
            found.append(words)
    return found


def fixed_places() -> list[str]:
    """What lies where every engine looks for its own."""
    folders = [Path("/run"), Path("/run/docker"), Path("/run/containerd"), Path("/etc/docker")]
    return sorted(str(path) for one in folders if one.is_dir() for path in one.iterdir())


@contextmanager
def host_docker0() -> Iterator[Callable[[], str]]:
    """A docker0 of "another engine" on the host; yields a way to see all of its state."""
    there = subprocess.run(["ip", "link", "show", "docker0"], capture_output=True, check=False)
    made = there.returncode != 0
    if made:
        command("ip", "link", "add", "docker0", "type", "bridge")
        command("ip", "addr", "add", "172.17.0.1/16", "dev", "docker0")
        command("ip", "link", "set", "docker0", "up")

    def look() -> str:
        links = json.loads(command("ip", "-j", "addr", "show", "docker0"))
        return json.dumps(
            [(one["ifindex"], one["flags"], one["address"]) for one in links]
            + [[a["local"] for one in links for a in one["addr_info"] if a["family"] == "inet"]]
        )

    try:
        yield look
    finally:
        if made:
            command("ip", "link", "del", "docker0")


async def test_builds_beside_another_docker0_and_leaves_nothing(home: Path) -> None:
    with host_docker0() as look:
        before = look()
        places = fixed_places()
        async with own_engine(home) as engine:
            assert fixed_places() == places
            said = await build(engine, "hello:1", DOCKERFILE + SERVE)
            assert "Successfully built" in said
            image = await engine.client.image("hello:1")
            assert image.ports == (8080,)
            container = await engine.client.create("hello", QUICK_END)
            await engine.client.start(container)
            found = await engine.client.inspect(container)
            assert found.running
            assert not found.ended
            stream = await engine.connect_container(found.address, 8080)
            reader, writer = await asyncio.open_connection(sock=stream)
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            assert (await reader.read()).endswith(b"hello")
            writer.close()
            # What the host's bridge carries was not touched while ours ran, nor afterwards.
            assert look() == before
        assert look() == before
    assert traces(home) == []


async def test_run_steps_see_name_servers_that_they_can_reach(home: Path) -> None:
    async with own_engine(home) as engine:
        step = 'RUN ["/bin/busybox", "cat", "/etc/resolv.conf"]\n'
        said = await build(engine, "steps:1", DOCKERFILE + step)
        assert "nameserver" in said
        assert "nameserver 127." not in said


async def test_builder_is_started_when_the_engine_answers_and_serves_one_port(home: Path) -> None:
    address = IPv6Address("fdaa:0:1::2")
    async with own_engine(home) as engine:
        builder = BuilderMachine(engine, machine_id="b1", address=address)
        assert await builder.ensure("app") == ("b1", State.STARTED, address)
        reader, writer = await asyncio.open_connection(sock=await builder.connect(2375))
        writer.write(b"GET /_ping HTTP/1.0\r\n\r\n")
        assert (await reader.read()).endswith(b"OK")
        writer.close()
        # Whatever follows a request that was looked at is not heard.
        reader, writer = await asyncio.open_connection(sock=await builder.connect(2375))
        ping = b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: keep-alive\r\n\r\n"
        writer.write(ping * 3)
        assert (await reader.read()).count(b"HTTP/1.1 200 OK") == 1
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            await builder.connect(22)


@pytest.mark.parametrize("reached", ["engine/daemon.json", "dockerd.log", "engine/docker/image"])
async def test_a_start_that_is_broken_off_leaves_nothing(home: Path, reached: str) -> None:
    start = asyncio.create_task(Engine(home, report=print).__aenter__())
    await until((home / reached).exists)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert traces(home) == []


@pytest.fixture
def stacked(home: Path) -> Iterator[Path]:
    """A folder on an overlay, as everything is inside a container, and a long way down."""
    for name in ("lower", "upper", "work", "merged"):
        (home / name).mkdir()
    options = f"lowerdir={home}/lower,upperdir={home}/upper,workdir={home}/work"
    command("mount", "-t", "overlay", "overlay", "-o", options, f"{home}/merged")
    state = home / "merged" / ("d" * 90)
    state.mkdir()
    yield state
    command("umount", "-l", f"{home}/merged")


async def test_images_are_kept_in_some_way_on_any_file_system(stacked: Path) -> None:
    said: list[str] = []
    async with own_engine(stacked, said.append) as engine:
        driver = (await engine.client.info())["Driver"]
        # Kernels differ in whether an overlay may lie on an overlay.
        assert driver == ("vfs" if any("without overlays" in line for line in said) else "overlay2")
        assert engine.docker_host.parent.parent == Path("/tmp")
        assert "Successfully built" in await build(engine, "hello:1", DOCKERFILE + SERVE)
    assert traces(stacked) == []


def dockerd_of(state: Path) -> int:
    """The pid on the host of the dockerd of a state directory."""
    pids = command("ip", "netns", "pids", f"fly-build-{identity(state)}").split()
    names = {int(pid): Path(f"/proc/{pid}/comm").read_text().strip() for pid in pids}
    return next(pid for pid, name in names.items() if name == "dockerd")


def unwaited(state: Path) -> list[str]:
    """What ended in the namespaces of a state directory and still is in the table of processes."""
    found: list[str] = []
    for pid in command("ip", "netns", "pids", f"fly-build-{identity(state)}").split():
        with suppress(OSError):  # It may have ended since it was listed.
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            found += [Path(f"/proc/{child}/stat").read_text() for child in children]
    return [stat for stat in found if stat.rpartition(")")[2].split()[0] == "Z"]


async def until(condition: Callable[[], object]) -> None:
    """Wait until something outside has come about."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 (it happens in other processes)
            await asyncio.sleep(0.05)


async def test_a_crash_is_reported_and_the_containers_come_back(home: Path) -> None:
    said: list[str] = []
    async with own_engine(home, said.append) as engine:
        await build(engine, "hello:1", DOCKERFILE + SERVE)
        body = {
            **QUICK_END,
            "HostConfig": {"RestartPolicy": {"Name": "unless-stopped"}},
        }
        container = await engine.client.create("hello", body)
        await engine.client.start(container)
        os.kill(dockerd_of(home), signal.SIGKILL)
        await until(lambda: any("was started again" in line for line in said))
        assert any("dockerd ended by itself" in line for line in said)
        assert await engine.state() is State.STARTED
        found = await engine.client.inspect(container)
        assert found.running
        # The program that starts a container ends before it, and is nobody's child then.
        await until(lambda: unwaited(home) == [])
        os.kill(dockerd_of(home), signal.SIGKILL)
        await until(lambda: any("a second time" in line for line in said))
        assert await engine.state() is State.FAILED
    assert traces(home) == []


async def test_a_killed_platform_takes_its_engine_along_and_the_next_one_cleans_up(
    home: Path,
) -> None:
    program = (
        "import asyncio, pathlib\n"
        "from builder_orch.selfhost.engine import Engine\n"
        "async def main():\n"
        f"    async with Engine(pathlib.Path({str(home)!r}), report=lambda line: None):\n"
        "        print('up', flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    killed = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert killed.stdout is not None
        assert await killed.stdout.readline() == b"up\n"
        dockerd = dockerd_of(home)
    finally:
        killed.kill()
        await killed.communicate()
    # The kernel told dockerd; nobody else could.
    await until(lambda: not Path(f"/proc/{dockerd}").exists())
    assert any("fly-build" in trace for trace in traces(home))
    async with own_engine(home) as engine:
        assert await engine.state() is State.STARTED
    assert traces(home) == []


async def test_what_sits_in_the_namespace_of_a_killed_run_is_ended(home: Path) -> None:
    name = f"fly-build-{identity(home)}"
    command("ip", "netns", "add", name)
    nsenter = ["nsenter", f"--net=/run/netns/{name}", "sleep", "600"]
    left = await asyncio.create_subprocess_exec(*nsenter)
    try:
        await until(lambda: command("ip", "netns", "pids", name).split())
        async with Namespace(identity(home), home, print):
            assert await left.wait() == -signal.SIGTERM
    finally:
        if left.returncode is None:
            left.kill()
            await left.wait()
    assert traces(home) == []


@pytest.fixture
async def two_namespaces(home: Path) -> AsyncIterator[tuple[Namespace, Namespace]]:
    other = home / "other"
    other.mkdir()
    async with (
        Namespace(identity(home), home, print) as near,
        Namespace(identity(other), other, print) as far,
    ):
        yield near, far
    assert traces(home) == []
    assert traces(other) == []


async def test_what_leaves_the_namespace_wears_the_address_of_the_host(
    two_namespaces: tuple[Namespace, Namespace],
) -> None:
    near, far = two_namespaces
    assert not near.network.overlaps(far.network)
    here, there = far.network.hosts()
    loop = asyncio.get_running_loop()
    with (
        await far.listen(0, str(there)) as listener,
        await near.connect(str(there), listener.getsockname()[1]),
    ):
        accepted, (peer, _) = await loop.sock_accept(listener)
        accepted.close()
    assert peer == str(here)


async def test_the_loopback_inside_is_not_the_loopback_outside(
    two_namespaces: tuple[Namespace, Namespace],
) -> None:
    near, far = two_namespaces
    with await near.listen(0) as listener:
        port = listener.getsockname()[1]
        (await near.connect("127.0.0.1", port)).close()
        with pytest.raises(ConnectionRefusedError):
            await far.connect("127.0.0.1", port)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)


async def test_a_namespace_that_vanished_is_an_error_and_the_thread_is_at_home(home: Path) -> None:
    async with Namespace(identity(home), home, print) as space:
        command("ip", "netns", "del", space.name)
        with pytest.raises(OSError, match="fly-build"):
            await space.connect("127.0.0.1", 9)
    with pytest.raises(CommandFailed):
        await Namespace("no/name", home, print).__aenter__()


async def test_where_no_namespace_can_be_made_the_reason_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builder_orch.selfhost.dockerd.identity", lambda state: "no/name")
    engine = Engine(home, report=print, existing="unix:///nonexistent")
    with pytest.raises(EngineMissing, match="netns add") as caught:
        await engine.__aenter__()
    assert "docker.io" in caught.value.hint
    assert "\n" not in str(caught.value)
