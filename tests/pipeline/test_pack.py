"""From a directory to an archive: what is in it, in which order, and what is refused."""

import io
import os
import socket
import stat
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder_orch.errors import (
    BuilderOrchError,
    BuildFailed,
    ContextRefused,
    DockerfileInvalid,
    UsageFailure,
)
from builder_orch.events import Event, PhaseFinished, Warned
from builder_orch.pipeline.context import OUTSIDE_NAME, Context, Directory, scan
from builder_orch.pipeline.ignore import Ignore
from builder_orch.pipeline.pack import CHUNK, Pack, archive, archive_size
from builder_orch.pipeline.stage import perform


def write(root: Path, name: str, content: bytes | str = b"") -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "ctx", "Dockerfile", "FROM scratch\nCOPY . /\n")
    return tmp_path / "ctx"


def scanned(
    root: Path, *, dockerfile: Path | None = None, ignorefile: Path | None = None
) -> Context:
    return scan(Directory(root, dockerfile, ignorefile), lambda _: None)


def members(context: Context) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(b"".join(archive(context)))) as tar:
        return {member.name: member for member in tar}


def contents(context: Context) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(b"".join(archive(context)))) as tar:
        return {
            member.name: file.read()
            for member in tar
            if member.isfile() and (file := tar.extractfile(member))
        }


def warnings(root: Path) -> dict[str, str]:
    events: list[Event] = []
    scan(Directory(root), events.append)
    return {event.id: event.message for event in events if isinstance(event, Warned)}


def test_the_dockerfile_is_last_and_the_ignore_file_before_it(root: Path) -> None:
    write(root, ".dockerignore", "*.log\nDockerfile\n.dockerignore\n")
    for name in ("zz", "a/b/c", "a/x.txt", "x.log"):
        write(root, name, name)
    assert list(members(scanned(root))) == [
        "a", "a/b", "a/b/c", "a/x.txt", "zz", ".dockerignore", "Dockerfile"
    ]  # fmt: skip


def test_the_same_directory_gives_the_same_octets(root: Path) -> None:
    for name in ("b", "a", "c/d", "é"):
        write(root, name, name)
    assert b"".join(archive(scanned(root))) == b"".join(archive(scanned(root)))


def test_mode_time_and_content_are_kept_but_not_the_owner(root: Path) -> None:
    path = write(root, "script", b"\x00\xff" * 300)
    path.chmod(0o4751)
    os.utime(path, (0, 1234567890))
    member = members(scanned(root))["script"]
    assert (member.mode, member.mtime, member.uid, member.gid) == (0o4751, 1234567890, 0, 0)
    assert (member.uname, member.gname) == ("", "")
    assert contents(scanned(root))["script"] == b"\x00\xff" * 300


def test_links_are_stored_as_links_and_those_that_lead_out_are_warned_of(root: Path) -> None:
    write(root.parent, "outside", "secret of the neighbour")
    (root / "good").symlink_to("Dockerfile")
    (root / "out").symlink_to("../outside")
    (root / "absolute").symlink_to("/etc/./passwd")
    (root / "loop").symlink_to("loop")
    found = members(scanned(root))
    assert {name: found[name].linkname for name in ("good", "out", "absolute", "loop")} == {
        "good": "Dockerfile", "out": "../outside", "absolute": "/etc/./passwd", "loop": "loop"
    }  # fmt: skip
    assert all(found[name].issym() for name in ("good", "out", "absolute", "loop"))
    said = warnings(root)["link-leaves-context"]
    assert "out" in said
    assert "absolute" in said
    assert "good" not in said
    assert b"neighbour" not in b"".join(archive(scanned(root)))


@pytest.mark.parametrize(
    "name", [".env", "a/.env.production", "id_rsa", "server.pem", "tls.KEY", ".npmrc", ".netrc"]
)
def test_what_looks_like_a_secret_is_warned_of_unless_it_is_ignored(root: Path, name: str) -> None:
    write(root, name, "s3cret")
    write(root, ".env.example")
    assert name in warnings(root)["secret-in-context"]
    assert "example" not in warnings(root)["secret-in-context"]
    write(root, ".dockerignore", f"**/{Path(name).name}")
    assert warnings(root) == {}
    assert b"s3cret" not in b"".join(archive(scanned(root)))


def test_a_warning_counts_what_it_does_not_name(root: Path) -> None:
    for number in range(9):
        write(root, f"{number}.pem")
    assert "and 4 more" in warnings(root)["secret-in-context"]


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_every_size_is_padded_to_blocks(root: Path, size: int) -> None:
    write(root, "file", os.urandom(size))
    octets = b"".join(archive(scanned(root)))
    assert contents(scanned(root))["file"] == (root / "file").read_bytes()
    assert len(octets) == archive_size(scanned(root))
    assert len(octets) % 512 == 0


def test_a_file_over_8_gib_has_a_header_that_says_so(root: Path) -> None:
    size = (8 << 30) + 5
    with write(root, "huge").open("r+b") as file:
        file.truncate(size)
    octets = archive(scanned(root))
    head = next(octets)
    with tarfile.open(fileobj=io.BytesIO(head), mode="r:") as tar:
        member = tar.next()
        assert member is not None
        assert (member.name, member.size) == ("huge", size)


def test_strange_names_survive(root: Path) -> None:
    names = ["ünï/" + "x" * 200, "a b\n\t'\"", "y" * 250, os.fsdecode(b"\xff\xfe")]
    for name in names:
        write(root, name, "here")
    with tarfile.open(
        fileobj=io.BytesIO(b"".join(archive(scanned(root)))), errors="surrogateescape"
    ) as tar:
        assert set(names) <= set(tar.getnames())


# --- which Dockerfile, which rules


def test_a_dockerfile_of_its_own_brings_its_own_ignore_file(root: Path) -> None:
    path = write(root, "build/Web.dockerfile", "FROM scratch\n")
    write(root, ".dockerignore", "b")
    write(root, "build/Web.dockerfile.dockerignore", "a")
    write(root, "a")
    write(root, "b")
    context = scanned(root, dockerfile=path)
    assert context.dockerfile_name == "build/Web.dockerfile"
    assert list(members(context))[-1] == "build/Web.dockerfile"
    assert "b" in members(context)
    assert "a" not in members(context)


def test_an_ignore_file_that_was_asked_for_beats_all_others(root: Path) -> None:
    write(root, ".dockerignore", "b")
    write(root, "Dockerfile.dockerignore", "c")
    other = write(root.parent, "mine", "a\n.dockerignore\n")
    for name in "abc":
        write(root, name)
    found = members(scanned(root, ignorefile=other))
    assert {"b", "c"} <= found.keys()
    assert {"a", ".dockerignore"}.isdisjoint(found)


def test_a_dockerfile_from_elsewhere_travels_under_a_name_of_its_own(root: Path) -> None:
    path = write(root.parent, "elsewhere", "FROM scratch\n# other\n")
    context = scanned(root, dockerfile=path)
    assert context.dockerfile_name == OUTSIDE_NAME
    assert list(members(context))[-1] == OUTSIDE_NAME
    assert contents(context)[OUTSIDE_NAME] == b"FROM scratch\n# other\n"
    assert "Dockerfile" in members(context)


def test_a_dockerfile_that_is_a_link_is_read_where_it_leads(root: Path) -> None:
    write(root.parent, "real", "FROM scratch\n# real\n")
    (root / "Dockerfile").unlink()
    (root / "Dockerfile").symlink_to("../real")
    context = scanned(root)
    assert contents(context)[context.dockerfile_name] == b"FROM scratch\n# real\n"
    assert members(context)["Dockerfile"].issym()


# --- what is refused


@contextmanager
def nobody() -> Iterator[None]:
    """As a user who is not root: root may read everything."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def open_up(path: Path) -> None:
    """Let anybody come as far as this directory."""
    for folder in (path, *path.parents[:-1]):
        if folder.owner() in {"root", path.owner()} and len(folder.parts) > 2:
            folder.chmod(folder.stat().st_mode | 0o755)


def make_socket(root: Path) -> str:
    folder = os.open(root, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(f"/proc/self/fd/{folder}/it")
    finally:
        os.close(folder)
    return "a socket"


def make_pipe(root: Path) -> str:
    os.mkfifo(root / "it")
    return "a pipe"


def make_unreadable(root: Path) -> str:
    write(root, "it", "x").chmod(0)
    return "cannot be read: permission denied"


def make_closed_directory(root: Path) -> str:
    write(root, "it/x").parent.chmod(0)
    return "cannot be read: Permission denied"


@pytest.mark.parametrize("make", [make_socket, make_pipe, make_unreadable, make_closed_directory])
def test_what_cannot_be_sent_is_refused_by_name_unless_it_is_ignored(
    root: Path, make: Callable[[Path], str]
) -> None:
    said = make(root)
    open_up(root)
    with nobody():
        with pytest.raises(ContextRefused) as caught:
            scanned(root)
        assert said in str(caught.value)
        assert "it" in str(caught.value)
    write(root, ".dockerignore", "it")
    with nobody():
        assert "it" not in members(scanned(root))
    (root / "it").chmod(0o700)


@pytest.mark.parametrize(
    ("dockerfile", "kind", "said"),
    [
        (None, DockerfileInvalid, "there is no Dockerfile in"),
        ("FROM scratch\nOOPS\n", DockerfileInvalid, "Dockerfile:2"),
        ("FROM scratch\nCOPY gone /\n", BuildFailed, "Dockerfile:2: COPY gone: there is no gone"),
        ("FROM scratch\nCOPY ../up /\n", BuildFailed, "../up"),
        ("FROM scratch\nADD a/left /\n", BuildFailed, "ignored by .dockerignore:1 (a/*)"),
        ("FROM scratch\nCOPY out /\n", BuildFailed, "link to what is not in the build context"),
        ("FROM scratch\nCOPY circle/x /\n", BuildFailed, "Dockerfile:2: COPY circle/x: "),
    ],
)
def test_a_build_that_must_fail_fails_before_anything_is_sent(
    root: Path, dockerfile: str | None, kind: type[BuilderOrchError], said: str
) -> None:
    write(root, "a/left")
    write(root, ".dockerignore", "a/*")
    (root / "out").symlink_to("/proc/version")
    (root / "circle").symlink_to("../../circle")
    if dockerfile is None:
        (root / "Dockerfile").unlink()
    else:
        write(root, "Dockerfile", dockerfile)
    with pytest.raises(kind) as caught:
        scanned(root)
    assert said in str(caught.value)
    assert caught.value.code == 20
    assert caught.value.hint


def test_sources_that_are_there_pass(root: Path) -> None:
    write(root, "a/kept")
    write(root, "Dockerfile", "FROM scratch\nCOPY . a ./a/kept /a ../a linked/kept rooted /\n")
    write(root, ".dockerignore", "a/*\n!a/kept\n")
    (root / "linked").symlink_to("../../a")
    (root / "rooted").symlink_to("/linked/../linked/kept")
    assert "a/kept" in members(scanned(root))


def test_a_dockerfile_of_the_context_is_called_as_it_is_called_there(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write(root, "sub/Dockerfile", "FROM scratch\n")
    outside = tmp_path / "Dockerfile"
    outside.write_text("FROM scratch\n")
    monkeypatch.chdir(root)
    for top in (root, Path(), Path("sub/..")):
        assert scanned(top, dockerfile=other).dockerfile.path == "sub/Dockerfile"
        assert scanned(top, dockerfile=outside).dockerfile.path == str(outside)


def test_paths_that_are_none_are_usage_errors(root: Path) -> None:
    with pytest.raises(UsageFailure, match="is not a directory"):
        scanned(root / "gone")
    with pytest.raises(UsageFailure, match="ignore file"):
        scanned(root, ignorefile=root / "gone")
    with pytest.raises(DockerfileInvalid, match="gone"):
        scanned(root, dockerfile=root / "gone")
    write(root, ".dockerignore", "a\n[")
    with pytest.raises(ContextRefused, match=r"\.dockerignore:2"):
        scanned(root)


@pytest.mark.parametrize("made", ["a directory", "a pipe", "a link to nowhere"])
def test_what_only_has_the_dockerfiles_name_is_named(root: Path, made: str) -> None:
    path = root / "Dockerfile"
    path.unlink()
    if made == "a directory":
        path.mkdir()
    elif made == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("nowhere")
    for dockerfile in (None, path):
        with pytest.raises(DockerfileInvalid, match=f"Dockerfile is {made}"):
            scanned(root, dockerfile=dockerfile)


def test_a_target_that_is_none_is_refused(root: Path) -> None:
    with pytest.raises(DockerfileInvalid, match="no stage 'x'"):
        scan(Directory(root, target="x"), lambda _: None)


# --- what changes while it is sent


def shrink(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(2 * CHUNK)


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other")
    os.utime(path, (0, 0))


@pytest.mark.parametrize(
    ("change", "said"), [(shrink, "shrank"), (grow, "grew"), (rewrite, "changed")]
)
def test_a_file_that_changes_while_it_is_sent_is_refused_by_name(
    root: Path, change: Callable[[Path], None], said: str
) -> None:
    path = write(root, "big", bytes(4 * CHUNK))
    octets = archive(scanned(root))
    next(octets)
    change(path)
    with pytest.raises(ContextRefused, match=f"big {said} while"):
        list(octets)


def becomes_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def becomes_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def becomes_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (Path.unlink, "vanished"),
        (becomes_link, "became a link"),
        (becomes_pipe, "became something special"),
        (becomes_directory, "became a directory"),
    ],
)
def test_a_file_that_is_another_thing_by_now_is_refused_by_name(
    root: Path, change: Callable[[Path], None], said: str
) -> None:
    path = write(root, "it", "x")
    context = scanned(root)
    change(path)
    with pytest.raises(ContextRefused, match=f"it {said}"):
        list(archive(context))


def test_a_link_or_directory_that_is_gone_is_refused(root: Path) -> None:
    (root / "link").symlink_to("x")
    (root / "folder").mkdir()
    context = scanned(root)
    (root / "folder").rmdir()
    with pytest.raises(ContextRefused, match="folder vanished"):
        list(archive(context))


# --- properties

NAME = st.text("abé .!*[]#\\-", min_size=1, max_size=5).filter(
    lambda name: name.strip() not in {"", ".", ".."}
)
TREE = st.dictionaries(
    st.lists(NAME, min_size=1, max_size=3).map(tuple), st.binary(max_size=700), max_size=8
)
PATTERN = st.lists(st.sampled_from(["a", "b", "*", "**", "?", "[ab]", "é"]), max_size=3)
PATTERNS = st.lists(st.tuples(st.booleans(), PATTERN.map("/".join)), max_size=4)


@settings(deadline=None, max_examples=60)
@given(TREE, PATTERNS)
def test_the_members_are_the_files_that_no_rule_ignores(
    tmp_path_factory: pytest.TempPathFactory,
    tree: dict[tuple[str, ...], bytes],
    patterns: list[tuple[bool, str]],
) -> None:
    root = tmp_path_factory.mktemp("tree")
    write(root, "Dockerfile", "FROM scratch\n")
    for parts, content in tree.items():
        if all(not (root / Path(*parts[:depth])).is_file() for depth in range(1, len(parts))):
            path = root / Path(*parts)
            if not path.is_dir():
                write(root, path.relative_to(root).as_posix(), b"planted" + content)
    rules = "\n".join(("!" if keep else "") + text for keep, text in patterns if text)
    write(root, ".dockerignore", rules)
    ignore = Ignore.parse(rules)
    expected = {
        name: path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
        and (
            (name := path.relative_to(root).as_posix()) in {"Dockerfile", ".dockerignore"}
            or not ignore.ignores(name)
        )
    }
    context = scanned(root)
    assert contents(context) == expected
    assert list(members(context))[-2:] == [".dockerignore", "Dockerfile"]
    assert all(stat.S_IMODE(member.mode) == member.mode for member in members(context).values())


async def test_the_stage_says_what_it_found(root: Path) -> None:
    events: list[Event] = []
    write(root, ".env")
    context = await perform(Pack(), Directory(root), events.append)
    assert context.dockerfile_name == "Dockerfile"
    assert any(isinstance(event, Warned) for event in events)
    (finished,) = [event for event in events if isinstance(event, PhaseFinished)]
    assert (finished.phase, finished.outcome) == ("preflight", "2 files, 22 bytes")
