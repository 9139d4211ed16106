"""The engine's own BuildKit as judge: what it caches, what it is sent, what it never sees."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, suppress
from ipaddress import IPv6Address
from pathlib import Path

import docker
import pytest

from builder_orch.errors import BuildFailed
from builder_orch.events import Event, Log, PhaseFinished, Step
from builder_orch.pipeline.build import Build, Built, Send, building
from builder_orch.pipeline.context import Directory, scan
from builder_orch.pipeline.engine import BUILDKIT, Engine, Recipe, wait_for_engine
from builder_orch.pipeline.stage import perform

pytestmark = pytest.mark.system

BUSYBOX = shutil.which("busybox", path="/bin:/usr/bin")
DOCKER = next((path for path in ("/usr/bin/docker",) if Path(path).is_file()), None)
CANARY = "planted-" + os.urandom(8).hex()
MEGABYTE = 1 << 20

Dialled = Callable[[], "Counted"]


class Counted:
    """Dials the engine and counts what is written to it, on the socket itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sent: list[int] = []
        self._pairs: set[asyncio.Task[None]] = set()

    async def dial(self, host: str, port: int) -> socket.socket:
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=theirs)
        far_reader, far_writer = await asyncio.open_unix_connection(self.path)
        for source, sink, counted in (
            (reader, far_writer, True),
            (far_reader, writer, False),
        ):
            task = asyncio.create_task(self._pump(source, sink, counted))
            self._pairs.add(task)
            task.add_done_callback(self._pairs.discard)
        return ours

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, counted: bool
    ) -> None:
        total = 0
        try:
            with suppress(ConnectionError):
                while octets := await source.read(65536):
                    total += len(octets)
                    sink.write(octets)
                    await sink.drain()
        finally:
            sink.close()
            with suppress(ConnectionError):
                await sink.wait_closed()
        if counted:
            self.sent.append(total)

    async def over(self) -> int:
        """The octets of the connection that sent most, when all have ended."""
        await asyncio.gather(*self._pairs)
        return max(self.sent)


@pytest.fixture
async def dialled(engine_socket: Path) -> AsyncIterator[Dialled]:
    """Makes them; at the end every connection has to have been closed by who dialled it."""
    made: list[Counted] = []

    def another() -> Counted:
        made.append(Counted(engine_socket))
        return made[-1]

    yield another
    async with asyncio.timeout(20):
        for counted in made:
            await counted.over()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    if BUSYBOX is None:
        pytest.skip("there is no busybox on this machine to build an image from")
    folder = tmp_path / "context"
    folder.mkdir()
    shutil.copy(os.path.realpath(BUSYBOX), folder / "busybox")
    (folder / "id").write_text(os.urandom(16).hex())
    (folder / "Dockerfile").write_text("FROM scratch AS first\nCOPY id busybox /bin/\n")
    with (folder / "Dockerfile").open("a") as file:
        file.write('SHELL ["/bin/busybox", "sh", "-c"]\n')
    return folder


def steps(root: Path, *lines: str) -> None:
    with (root / "Dockerfile").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


async def build(
    counted: Counted, root: Path, events: list[Event], recipe: Recipe | None = None
) -> Built:
    engine = await wait_for_engine(Engine(IPv6Address("fdaa::2"), counted.dial), print, limit_s=30)
    context = scan(Directory(root), events.append)
    recipe = recipe or Recipe(context.dockerfile_name, builder=BUILDKIT, node="tests")
    async with building(engine, context, recipe, events.append) as under_way:
        await perform(Send(), under_way, events.append)
        built = await perform(Build(), under_way, events.append)
        assert isinstance(built, Built)
        return built


@pytest.fixture
def raw(engine_socket: Path) -> Iterator[docker.APIClient]:
    client = docker.APIClient(base_url=f"unix://{engine_socket}", version="auto")
    with closing(client):
        yield client


def output(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Log) and event.stream != "engine"]


async def test_a_cache_mount_is_kept_between_builds(dialled: Dialled, root: Path) -> None:
    name = os.urandom(8).hex()
    line = f"RUN --mount=type=cache,id={name},target=/c echo $N >> /c/f; /bin/busybox wc -l < /c/f"
    steps(root, "ARG N", line)
    for expected in ("1", "2"):
        recipe = Recipe("Dockerfile", {"N": expected}, builder=BUILDKIT, node="tests")
        events: list[Event] = []
        await build(dialled(), root, events, recipe)
        assert output(events) == [expected]


async def test_a_secret_is_used_and_left_nowhere(
    dialled: Dialled, root: Path, raw: docker.APIClient, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text(CANARY)
    file = tmp_path / "secret"
    steps(
        root,
        "RUN --mount=type=secret,id=s,required /bin/busybox sha256sum < /run/secrets/s > /sum",
    )
    recipe = Recipe("Dockerfile", secrets={"s": file.read_bytes}, builder=BUILDKIT)
    events: list[Event] = []
    made = await build(dialled(), root, events, recipe)
    assert CANARY not in repr((events, made, recipe))
    assert CANARY not in json.dumps([raw.history(made.image_id), raw.inspect_image(made.image_id)])
    saved = b"".join(raw.get_image(made.image_id))
    assert b"sum" in saved
    assert CANARY.encode() not in saved


async def test_only_the_target_and_what_it_needs_is_built(dialled: Dialled, root: Path) -> None:
    steps(root, "FROM first AS wanted", "RUN echo wanted", "FROM first AS other", "RUN exit 9")
    recipe = Recipe("Dockerfile", target="wanted", builder=BUILDKIT)
    events: list[Event] = []
    await build(dialled(), root, events, recipe)
    assert output(events) == ["wanted"]
    assert Step(1, 1, "RUN echo wanted (wanted)") in events


async def test_a_failing_step_ends_the_build_with_its_last_lines(
    dialled: Dialled, root: Path
) -> None:
    steps(root, "RUN echo one; echo two >&2; exit 7")
    with pytest.raises(BuildFailed) as caught:
        await build(dialled(), root, [])
    said = str(caught.value)
    assert "failed with exit code 7" in said
    assert {"  | one", "  | two"} <= set(said.splitlines())


async def test_a_second_build_sends_less_than_a_hundredth(dialled: Dialled, root: Path) -> None:
    steps(root, "COPY data /data", "RUN /bin/busybox sha256sum /data/* | /bin/busybox wc -l")
    (root / "data").mkdir()
    for number in range(300):
        (root / "data" / str(number)).write_bytes(os.urandom(MEGABYTE // 10))
    first, second = dialled(), dialled()
    await build(first, root, [])
    assert await first.over() > 30 * 1_000_000
    (root / "data" / "7").write_text("changed")
    events: list[Event] = []
    await build(second, root, events)
    assert output(events) == ["300"]
    assert await second.over() < await first.over() / 100
    phases = [event for event in events if isinstance(event, PhaseFinished)]
    assert " sent for a context of 3" in phases[0].outcome


AWKWARD = """\
RUN touch /made
COPY tree /tree
COPY tree/li* tree/link/f /some/
"""


@pytest.mark.skipif(DOCKER is None, reason="there is no docker command line to compare with")
async def test_the_docker_command_finds_every_step_cached(
    engine_socket: Path, dialled: Dialled, root: Path, raw: docker.APIClient
) -> None:
    tree = root / "tree"
    (tree / "deep" / "er").mkdir(parents=True)
    for name in ("a", "a-b", "deep/f", "deep/er/g", "ü", "new\nline", "dropped.log", "kept.log"):
        (tree / name).write_text(name)
    (tree / "link").symlink_to("deep")
    (tree / "loop").symlink_to("loop")
    os.link(tree / "a", tree / "hard")
    os.setxattr(tree / "a-b", "user.mark", b"x")
    (tree / "a").chmod(0o4711)
    (tree / "deep").chmod(0o1777)
    (root / ".dockerignore").write_text("**/*.log\n!tree/kept.log\n.dockerignore\nDockerfile\n")
    steps(root, AWKWARD)
    await build(dialled(), root, [])
    assert DOCKER is not None
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(root.parent),
        "DOCKER_BUILDKIT": "1",
        "DOCKER_HOST": f"unix://{engine_socket}",
    }
    process = await asyncio.create_subprocess_exec(
        DOCKER, "build", "--progress", "plain", str(root),
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    lines = said.decode().splitlines()
    assert process.returncode == 0, lines
    numbers = {line.split()[0] for line in lines if "/4] " in line}
    assert len(numbers) == 4
    assert numbers == {line.split()[0] for line in lines if line.endswith(" CACHED")}


async def test_a_build_that_is_given_up_stops_on_the_engine(
    dialled: Dialled, root: Path, raw: docker.APIClient
) -> None:
    marker = str(600 + int.from_bytes(os.urandom(4), "big"))
    steps(root, f"RUN echo running; /bin/busybox sleep {marker}")
    runs = asyncio.Event()

    class Events(list[Event]):
        def append(self, event: Event) -> None:
            if isinstance(event, Log) and event.text == "running":
                runs.set()

    task = asyncio.create_task(build(dialled(), root, Events()))
    async with asyncio.timeout(60):
        await runs.wait()
    await until(lambda: sleeping(marker))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not sleeping(marker))


async def until(reached: Callable[[], bool]) -> None:
    """What the engine has to bring about within the time that a user is promised."""
    async with asyncio.timeout(5):
        while not reached():  # noqa: ASYNC110 (it happens in other processes)
            await asyncio.sleep(0.05)


def sleeping(marker: str) -> bool:
    """Does the step still sleep, for this many seconds?"""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if path.read_bytes().split(b"\0")[-3:-1] == [b"sleep", marker.encode()]:
                return True
    return False
