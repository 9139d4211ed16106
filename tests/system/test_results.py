"""What leaves a real engine: files, archives, images; and what it refuses, and why."""

import hashlib
import io
import json
import os
import random
import shutil
import socket
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from ipaddress import IPv6Address
from pathlib import Path

import docker
import pytest

from builder_orch.buildkit.messages import Cache
from builder_orch.buildkit.sshagent import KeyAgent
from builder_orch.errors import BuildFailed, LocalDiskFull, UsageFailure
from builder_orch.events import Event, Log
from builder_orch.pipeline.build import Build, Built, Send, building
from builder_orch.pipeline.context import Directory, scan
from builder_orch.pipeline.engine import BUILDKIT, Engine, Recipe, wait_for_engine
from builder_orch.pipeline.load import Load, engine_here
from builder_orch.pipeline.output import Exported, Form, Output
from builder_orch.pipeline.stage import perform

pytestmark = pytest.mark.system

BUSYBOX = shutil.which("busybox", path="/bin:/usr/bin")
RECIPE = Recipe("Dockerfile", builder=BUILDKIT, node="tests")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    if BUSYBOX is None:
        pytest.skip("there is no busybox on this machine to build an image from")
    folder = tmp_path / "context"
    folder.mkdir()
    shutil.copy(os.path.realpath(BUSYBOX), folder / "busybox")
    (folder / "id").write_text(os.urandom(16).hex())
    return folder


def dockerfile(root: Path, *lines: str, busybox: bool = False) -> None:
    head = ["FROM scratch", "COPY id busybox /bin/", 'SHELL ["/bin/busybox", "sh", "-c"]']
    text = "\n".join([*(head if busybox else ["FROM scratch"]), *lines])
    (root / "Dockerfile").write_text(text + "\n")


async def connect(path: Path) -> Engine:
    async def dial(host: str, port: int) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(path))
        return sock

    return await wait_for_engine(Engine(IPv6Address("fdaa::2"), dial), print, limit_s=30)


async def build(
    engine: Engine, root: Path, recipe: Recipe = RECIPE, events: list[Event] | None = None
) -> Built | Exported:
    emit = (events if events is not None else []).append
    context = scan(Directory(root), emit)
    async with building(engine, context, recipe, emit) as under_way:
        await perform(Send(), under_way, emit)
        return await perform(Build(), under_way, emit)


@pytest.fixture
def raw(engine_socket: Path) -> Iterator[docker.APIClient]:
    client = docker.APIClient(base_url=f"unix://{engine_socket}", version="auto")
    with closing(client):
        yield client


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def ran(*words: str, stdin: bytes = b"") -> None:
    subprocess.run(words, input=stdin, check=True, capture_output=True)


def awkward(root: Path) -> Path:
    tree = root / "tree"
    (tree / "deep" / "er").mkdir(parents=True)
    for name in ("a", "deep/f", "deep/er/g", "ü", "new\nline", "empty"):
        (tree / name).write_text(name * (name != "empty"))
    (tree / "big").write_bytes(os.urandom(3_000_000))
    (tree / "link").symlink_to("../../outside")
    os.link(tree / "a", tree / "hard")
    (tree / "a").chmod(0o4711)
    for marked in ("a", "deep"):
        os.setxattr(tree / marked, "user.mark", marked.encode())
    (tree / "deep").chmod(0o555)
    return tree


def hashes(folder: Path) -> dict[str, str]:
    """By path: what it is and, of a file, its content."""
    found = {}
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            what = f"-> {path.readlink()}"
        elif stat.S_ISDIR(mode):
            what = f"{mode:o}"
        else:
            what = f"{mode & ~0o6000:o} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        for name in os.listxattr(path, follow_symlinks=False):
            what += f" {name}={os.getxattr(path, name, follow_symlinks=False)!r}"
        found[path.relative_to(folder).as_posix()] = what
    return found


async def test_a_directory_of_the_result_is_the_directory_that_went_in(
    engine_socket: Path, root: Path, tmp_path: Path
) -> None:
    tree = awkward(root)
    dockerfile(root, "COPY tree /")
    out = tmp_path / "out"
    recipe = replace(RECIPE, output=Output(Form.LOCAL, out))
    engine = await connect(engine_socket)
    made = await build(engine, root, recipe)
    assert isinstance(made, Exported)
    assert hashes(out) == hashes(tree)
    (out / "mine").write_text("mine")
    (tree / "a").write_text("changed")
    await build(engine, root, recipe)
    assert (out / "mine").read_text() == "mine"
    assert (out / "a").read_text() == "changed"
    assert names(tmp_path) == ["context", "out"]


async def test_a_tar_of_the_result_holds_what_went_in(
    engine_socket: Path, root: Path, tmp_path: Path
) -> None:
    tree = awkward(root)
    dockerfile(root, "COPY tree /")
    place = tmp_path / "new" / "out.tar"
    await build(await connect(engine_socket), root, replace(RECIPE, output=Output(Form.TAR, place)))
    with tarfile.open(place) as tar:
        found = {member.name.rstrip("/") for member in tar}
        big = tar.extractfile("big")
        assert big is not None
        assert big.read() == (tree / "big").read_bytes()
    assert found == set(hashes(tree))


async def test_a_build_that_fails_leaves_what_was_there(
    engine_socket: Path, root: Path, tmp_path: Path
) -> None:
    dockerfile(root, "RUN exit 3", busybox=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    engine = await connect(engine_socket)
    for output in (Output(Form.LOCAL, tmp_path / "out"), Output(Form.TAR, tmp_path / "out.tar")):
        with pytest.raises(BuildFailed, match="exit code 3"):
            await build(engine, root, replace(RECIPE, output=output))
    assert names(tmp_path) == ["context", "out"]
    assert hashes(tmp_path / "out").keys() == {"mine"}


async def test_a_result_that_cannot_be_written_says_so(
    engine_socket: Path, root: Path, tmp_path: Path
) -> None:
    dockerfile(root, "COPY id /id/x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "id").touch()
    (tmp_path / "file").touch()
    engine = await connect(engine_socket)
    for output in (
        Output(Form.LOCAL, tmp_path / "out"),
        Output(Form.LOCAL, tmp_path / "file" / "out"),
        Output(Form.TAR, tmp_path / "file" / "out.tar"),
    ):
        with pytest.raises(UsageFailure, match="cannot be written"):
            await build(engine, root, replace(RECIPE, output=output))
    assert (tmp_path / "out" / "id").is_file()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    place = tmp_path / "small"
    place.mkdir()
    ran("mount", "-t", "tmpfs", "-o", "size=2m", "fly-build", str(place))
    yield place
    ran("umount", str(place))


@pytest.mark.parametrize("form", [Form.LOCAL, Form.TAR])
async def test_a_result_that_finds_no_room_here_is_told_apart_and_leaves_nothing(
    engine_socket: Path, root: Path, small: Path, form: Form
) -> None:
    (root / "large").write_bytes(os.urandom(3_000_000))
    dockerfile(root, "COPY large id /")
    engine = await connect(engine_socket)
    recipe = replace(RECIPE, output=Output(form, small / "out"))
    with pytest.raises(LocalDiskFull, match="no room for the result"):
        await build(engine, root, recipe)
    assert names(small) == []
    (root / "large").write_bytes(b"not so large")
    await build(engine, root, recipe)
    assert names(small) == ["out"]


async def test_an_image_comes_as_an_archive_and_into_an_engine_here(
    engine_socket: Path, root: Path, raw: docker.APIClient, tmp_path: Path
) -> None:
    dockerfile(root, "COPY id /id")
    engine = await connect(engine_socket)
    built = await build(engine, root)
    assert isinstance(built, Built)
    name = f"registry.test/loaded-{os.urandom(4).hex()}"
    place = tmp_path / "image.tar"
    await perform(Load(engine, name, "1", place, None), built, print)
    with tarfile.open(place) as tar:
        listed = tar.extractfile("manifest.json")
        assert listed is not None
        assert json.loads(listed.read())[0]["RepoTags"] == [f"{name}:1"]
    raw.remove_image(f"{name}:1", force=True)
    # The image itself may still have other names here, so another engine's place is taken by one
    # that has forgotten this name.
    raw.load_image(place.read_bytes())
    raw.tag(f"{name}:1", name, "2")
    here = await engine_here(f"unix://{engine_socket}")
    loaded = await perform(Load(engine, name, "3", None, here), built, print)
    assert loaded.name == f"{name}:3"
    assert raw.inspect_image(f"{name}:3")["Id"] == built.image_id


async def test_an_engine_that_is_not_here_is_missed_before_the_build(tmp_path: Path) -> None:
    for host in (f"unix://{tmp_path}/none", "tcp://127.0.0.1:1", "ssh://somewhere", "nonsense"):
        with pytest.raises(UsageFailure, match="no Docker engine on this machine") as caught:
            await engine_here(host)
        assert "lost" not in str(caught.value)
        assert "[::1]" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"platforms": ("linux/amd64", "linux/arm64")}, "containerd's image store"),
        (
            {"cache_to": (Cache("registry", {"ref": "r.test/a:b"}),)},
            "type=registry needs an engine",
        ),
        ({"ulimits": {"nofile": "1:1"}}, r"Docker 23\.0 or later"),
        ({"output": Output(Form.OCI, Path("/nonexistent"))}, "--dest type=oci needs"),
        ({"contexts": {"other": Path("/")}}, r"Docker 23\.0 or later"),
    ],
)
async def test_what_this_engine_would_not_do_is_refused_with_the_reason(
    engine_socket: Path, root: Path, more: dict[str, object], said: str
) -> None:
    engine = await connect(engine_socket)
    if engine.version != "1.41":
        pytest.skip(f"the engine here (API {engine.version}) may be able to do more")
    dockerfile(root, "COPY id /id")
    if "contexts" in more:
        more = {"contexts": {"other": root}}
    with pytest.raises(UsageFailure, match=said) as caught:
        await build(engine, root, replace(RECIPE, **more))  # type: ignore[arg-type]
    assert caught.value.hint


async def test_files_for_several_platforms_lie_side_by_side(
    engine_socket: Path, root: Path, tmp_path: Path
) -> None:
    dockerfile(root, "COPY id /id")
    platforms = ("linux/amd64", "linux/arm64")
    output = Output(Form.LOCAL, tmp_path / "out")
    await build(
        await connect(engine_socket), root, replace(RECIPE, platforms=platforms, output=output)
    )
    assert {path for path in hashes(tmp_path / "out") if "/" in path} == {
        "linux_amd64/id",
        "linux_arm64/id",
    }


def program(root: Path, name: str) -> list[str]:
    """COPY lines for a program of this machine and the libraries that it needs."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    said = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    needed = {word for line in said.splitlines() for word in line.split() if word[:1] == "/"}
    for file in (path, *needed):
        to = root / "program" / file.lstrip("/")
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(os.path.realpath(file), to)
    return ["COPY program /"]


async def test_a_step_signs_with_a_key_from_a_file_that_it_never_sees(
    engine_socket: Path, root: Path, raw: docker.APIClient, tmp_path: Path
) -> None:
    lines = program(root, "ssh-keygen")
    key = tmp_path / "key"
    ran("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "me", "-f", str(key))
    shutil.copy(f"{key}.pub", root / "key.pub")
    (root / "passwd").write_text("root:x:0:0::/:/bin/sh\n")
    dockerfile(
        root,
        *lines,
        "COPY key.pub id /",
        "COPY passwd /etc/passwd",
        "RUN --mount=type=ssh,id=k /usr/bin/ssh-keygen -Y sign -n test -f /key.pub < /id",
        busybox=True,
    )
    events: list[Event] = []
    recipe = replace(RECIPE, agents={"k": KeyAgent.of([key])})
    built = await build(await connect(engine_socket), root, recipe, events)
    said = [one.text for one in events if isinstance(one, Log) and one.stream == "stdout"]
    signature = tmp_path / "signature"
    signature.write_text("\n".join([*said, ""]))
    (tmp_path / "allowed").write_text(f"me {(root / 'key.pub').read_text()}")
    judge = ["ssh-keygen", "-Y", "verify", "-n", "test", "-I", "me"]
    judge += ["-f", str(tmp_path / "allowed"), "-s", str(signature)]
    ran(*judge, stdin=(root / "id").read_bytes())
    assert isinstance(built, Built)
    saved = b"".join(raw.get_image(built.image_id))
    assert key.read_bytes().splitlines()[2] not in saved


def flourishing(tree: Path, files: int) -> None:
    """Names in many letters, holes, links, nothing at all, and all the rest."""
    chance = random.Random(files)
    letters = "aä🐳.-_ +~'\"$&\\é漢"
    for number in range(files):
        folder = tree / f"d{number % 23}" / f"{letters[number % len(letters)]}{number % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{''.join(chance.choices(letters, k=number % 9))}{number}"
        match number % 10:
            case 0:
                path.touch()
            case 1:
                path.symlink_to(chance.choice(["../x", "/etc/hosts", path.name]))
            case 2:
                with path.open("wb") as file:
                    file.truncate(chance.randrange(1 << 18))
            case 3:
                os.link(tree / "first", path)
            case _:
                path.write_bytes(chance.randbytes(chance.randrange(6000)))
        if not path.is_symlink():
            path.chmod(chance.choice([0o644, 0o600, 0o755]))


def in_image(archive: bytes) -> dict[str, str]:
    """What an image with one layer holds, as `hashes` has it."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as image:
        layer = image.extractfile(next(one for one in image if one.name.endswith("/layer.tar")))
        assert layer is not None
        found: dict[str, str] = {}
        with tarfile.open(fileobj=layer) as tar:
            for one in tar:
                name = one.name.rstrip("/")
                if one.issym():
                    found[name] = f"-> {one.linkname}"
                elif one.isdir():
                    found[name] = f"{stat.S_IFDIR | one.mode:o}"
                else:
                    content = tar.extractfile(one)
                    assert content is not None
                    digest = hashlib.sha256(content.read()).hexdigest()
                    found[name] = f"{stat.S_IFREG | one.mode:o} {digest}"
    return found


@pytest.mark.parametrize("files", [200, pytest.param(5000, marks=pytest.mark.long)])
async def test_every_file_is_in_the_image_as_it_was(
    engine_socket: Path, root: Path, raw: docker.APIClient, files: int
) -> None:
    tree = root / "tree"
    tree.mkdir()
    (tree / "first").write_bytes(b"first")
    flourishing(tree, files)
    dockerfile(root, "COPY tree /")
    events: list[Event] = []
    built = await build(await connect(engine_socket), root, events=events)
    assert isinstance(built, Built)
    expected = hashes(tree)
    assert len(expected) > files
    assert in_image(b"".join(raw.get_image(built.image_id))) == expected
