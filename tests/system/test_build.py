"""The real classic builder as judge: what arrives, arrives whole; what is cut makes no image."""

import asyncio
import contextlib
import hashlib
import io
import os
import random
import select
import shutil
import socket
import tarfile
from base64 import b64decode
from collections.abc import Iterator
from ipaddress import IPv6Address
from pathlib import Path

import docker
import docker.errors
import pytest

from builder_orch.errors import BuilderLost, BuilderOrchError, BuildFailed, DockerfileInvalid
from builder_orch.events import Event, Log, Step
from builder_orch.pipeline.build import Build, Built, Send, building
from builder_orch.pipeline.context import Directory, scan
from builder_orch.pipeline.engine import CLASSIC, Engine, Recipe, wait_for_engine
from builder_orch.pipeline.pack import archive
from builder_orch.pipeline.stage import perform

pytestmark = pytest.mark.system

BUSYBOX = shutil.which("busybox")
GIVE_UP_S = 120.0
"""No answer here is meant to take so long, whatever else this machine does."""


async def engine_at(path: Path) -> Engine:
    async def dial(host: str, port: int) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(path))
        return sock

    return await wait_for_engine(Engine(IPv6Address("fdaa::2"), dial), print, limit_s=30)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    if BUSYBOX is None:
        pytest.skip("there is no busybox on this machine to build an image from")
    shutil.copy(BUSYBOX, tmp_path / "busybox")
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY busybox /bin/sh\n")
    return tmp_path


def steps(root: Path, *lines: str) -> None:
    with (root / "Dockerfile").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


async def build(engine: Engine, root: Path, events: list[Event]) -> Built:
    context = scan(Directory(root), events.append)
    recipe = Recipe(context.dockerfile_name, no_cache=True, builder=CLASSIC)
    async with building(engine, context, recipe, events.append) as under_way:
        await perform(Send(), under_way, events.append)
        built = await perform(Build(), under_way, events.append)
        assert isinstance(built, Built)
        return built


async def test_every_file_arrives_as_it_was(engine_socket: Path, root: Path) -> None:
    tree = root / "tree"
    for number in range(300):
        path = tree / f"d{number % 7}" / ("ü" * (number % 90) + str(number))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(number * 7))
    (tree / "link").symlink_to("d0/0")
    steps(root, "COPY busybox /bin/busybox", "COPY tree /tree")
    steps(root, "RUN cd /tree && find . -type f -exec /bin/busybox sha256sum {} + | base64")
    steps(root, "RUN test -L /tree/link && stat -c %u:%g /tree/d0/0 | grep -q '^0:0$'")
    events: list[Event] = []
    await build(await engine_at(engine_socket), root, events)
    # In base64, because the engine spoils letters that its own buffers cut in two.
    coded = [one.text for one in events if isinstance(one, Log) and one.stream == "stdout"]
    lines = b64decode("".join(coded)).decode().splitlines()
    seen = {tuple(line.split("  ")) for line in lines}
    expected = {
        (hashlib.sha256(path.read_bytes()).hexdigest(), f"./{path.relative_to(tree).as_posix()}")
        for path in tree.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
    assert seen == expected


@pytest.mark.parametrize(
    ("lines", "kind", "said"),
    [
        (["RUN echo last words >&2; exit 7"], BuildFailed, "exit code 7\n  | last words"),
        (["COPY gone* /"], BuildFailed, "no source files"),
        (["RUN --mount=type=cache,target=/x true"], DockerfileInvalid, "BuildKit"),
        (["ENV"], DockerfileInvalid, "ENV"),
    ],
)
async def test_a_failing_build_is_told_in_its_own_words(
    engine_socket: Path, root: Path, lines: list[str], kind: type[BuilderOrchError], said: str
) -> None:
    steps(root, *lines)
    with pytest.raises(kind) as caught:
        await build(await engine_at(engine_socket), root, [])
    assert said in str(caught.value)


@pytest.fixture
def raw(engine_socket: Path) -> Iterator[docker.APIClient]:
    client = docker.APIClient(base_url=f"unix://{engine_socket}", version="auto")
    with client:
        yield client


async def test_a_run_that_is_given_up_leaves_no_container(
    engine_socket: Path, root: Path, raw: docker.APIClient
) -> None:
    steps(root, "RUN sleep 600")
    engine = await engine_at(engine_socket)
    context = scan(Directory(root), lambda _: None)
    runs = asyncio.Event()

    def emit(event: Event) -> None:
        if isinstance(event, Step) and event.number == 3:
            runs.set()

    before = {one["Id"] for one in raw.containers(all=True)}
    async with building(engine, context, Recipe("Dockerfile", builder=CLASSIC), emit):
        await runs.wait()
    left = {one["Id"] for one in raw.containers(all=True)} - before
    for container in left:
        with contextlib.suppress(docker.errors.NotFound):
            raw.wait(container, timeout=30, condition="removed")


@pytest.mark.parametrize("ending", ["clean", "short"])
async def test_a_context_cut_at_any_member_makes_no_image(
    engine_socket: Path, root: Path, raw: docker.APIClient, ending: str
) -> None:
    """The order of the members alone prevents it: here a cut upload ends as if it were whole."""
    for name in ("a", "b"):
        (root / name).write_text(name)
    steps(root, "COPY . /all")
    whole = b"".join(archive(scan(Directory(root), lambda _: None)))
    start = whole.rindex(b"Dockerfile\0")
    cuts = [at for at in range(0, start + 512, 512) if not at or whole[at : at + 1] in b"abD"]
    assert len(cuts) >= 3
    before = {one["Id"] for one in raw.images(all=True)}
    for cut in cuts:
        body = whole[: cut - (ending == "short")]
        answer = raw.post(
            raw._url("/build"),  # noqa: SLF001 - the judge's own way to its API
            data=iter([body]),
            headers={"Content-Type": "application/tar"},
        )
        assert answer.status_code >= 400
    made = {one["Id"] for one in raw.images(all=True)} - before
    assert made == set()


@pytest.mark.parametrize("every", [65536, pytest.param(4096, marks=pytest.mark.long)])
async def test_a_context_cut_anywhere_makes_no_image(
    engine_socket: Path, root: Path, raw: docker.APIClient, every: int
) -> None:
    """Also in the middle of a file, and up to the last octet of the Dockerfile."""
    (root / "data").write_bytes(os.urandom(200_000))
    (root / "busybox").write_bytes(os.urandom(100_000))
    steps(root, "COPY . /all")
    whole = b"".join(archive(scan(Directory(root), lambda _: None)))
    end = whole.rindex(b"Dockerfile\0") + 512 + (root / "Dockerfile").stat().st_size
    cuts = [*range(0, end, every), end - 1]
    before = {one["Id"] for one in raw.images(all=True)}
    for cut in cuts:
        answer = raw.post(
            raw._url("/build"),  # noqa: SLF001 - the judge's own way to its API
            data=iter([whole[:cut]]),
            headers={"Content-Type": "application/tar"},
        )
        assert answer.status_code >= 400 or "errorDetail" in answer.text, cut
    made = {one["Id"] for one in raw.images(all=True)} - before
    assert made == set()
    answer = raw.post(raw._url("/build"), data=iter([whole]))  # noqa: SLF001
    assert "Successfully built" in answer.text


class Cutter:
    """Sends a part of a context to an engine's socket and then leaves it in some way."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: list[socket.socket] = []

    def cut(self, octets: bytes, how: str) -> bytes:
        """What the engine said to that; nothing where nobody stayed to hear it."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(GIVE_UP_S)
        sock.connect(str(self._path))
        expecting = "Expect: 100-continue\r\n" if how == "rst" else ""
        sock.sendall(
            b"POST /build HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n"
            b"Content-Type: application/tar\r\nTransfer-Encoding: chunked\r\n"
            + expecting.encode()
            + b"\r\n"
        )
        if how == "rst":
            # With its answer unread, the end of a local socket is a reset at the other one.
            select.select([sock], [], [], GIVE_UP_S)
        with contextlib.suppress(OSError):
            # It may have heard enough and left.
            sock.sendall(b"%x\r\n%b\r\n" % (len(octets), octets) if octets else b"")
            if how == "chunk-end":
                sock.sendall(b"0\r\n\r\n")
        if how == "stall":
            self._held.append(sock)
            return b""
        if how == "fin":
            sock.shutdown(socket.SHUT_WR)
        if how == "rst":
            sock.close()
            return b""
        with sock:
            return b"".join(iter(lambda: sock.recv(65536), b""))

    def let_go(self) -> None:
        """The end of those that stalled."""
        for sock in self._held:
            sock.close()


@pytest.mark.long
@pytest.mark.parametrize("how", ["fin", "rst", "stall", "chunk-end"])
async def test_a_context_that_breaks_off_makes_no_image(
    engine_socket: Path, root: Path, raw: docker.APIClient, how: str
) -> None:
    """At every boundary of the archive, one octet before and after, and anywhere else."""
    chance = random.Random(how)
    for number in range(6):
        (root / f"f{number}").write_bytes(chance.randbytes(chance.randrange(3000)))
    (root / "busybox").write_bytes(chance.randbytes(5000))
    steps(root, "COPY . /all")
    whole = b"".join(archive(scan(Directory(root), lambda _: None)))
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        ends = [(one.offset, one.offset_data, one.offset_data + one.size) for one in tar]
    # The last octet that counts is that of the Dockerfile; behind it there is only padding.
    last = ends[-1][2]
    marks = {at + step for member in ends for at in member for step in (-1, 0, 1)}
    cuts = sorted({at for at in marks if 0 <= at < last})
    cuts += [chance.randrange(last) for _ in range(200)]
    before = {one["Id"] for one in raw.images(all=True)}
    cutter = Cutter(engine_socket)
    try:
        for cut in cuts:
            answer = await asyncio.to_thread(cutter.cut, whole[:cut], how)
            assert b"Successfully built" not in answer, cut
            assert not answer or b" 500 " in answer or b"errorDetail" in answer, (cut, answer)
        # The engine is done with those that left when it has done another one.
        answer = await asyncio.to_thread(cutter.cut, whole, "chunk-end")
        assert b"Successfully built" in answer
        made = {one["Id"] for one in raw.images(all=True)} - before
    finally:
        cutter.let_go()
    (image,) = [raw.history(one) for one in made if raw.inspect_image(one)["Parent"]]
    assert {one["Id"] for one in image if one["Id"] != "<missing>"} == made


async def test_an_engine_that_was_never_there_is_lost(tmp_path: Path) -> None:
    async def dial(host: str, port: int) -> socket.socket:
        raise ConnectionRefusedError

    with pytest.raises(BuilderLost, match="connection refused"):
        await Engine(IPv6Address("fdaa::2"), dial).ping()
