"""What an engine may write here: what it was asked for, below the place, all of it or nothing."""

import asyncio
import os
import stat
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder_orch.buildkit.control import connected
from builder_orch.buildkit.export import DirectoryTarget, FileTarget, Target, Unsafe
from builder_orch.buildkit.filesync import FileSync
from builder_orch.buildkit.grpc import Call, Failed
from builder_orch.buildkit.messages import Packet, PacketKind, Stat, go_mode, st_mode
from builder_orch.buildkit.progress import Watching
from builder_orch.buildkit.session import Offer
from builder_orch.buildkit.solve import Options, Result, solve
from builder_orch.buildkit.wire import bytes_field
from builder_orch.tunnel.machine import Malformed
from tests.buildkit.fake_daemon import FakeDaemon, Session, running

DIRECTORY, FILE, LINK = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777
METHOD = "/moby.filesync.v1.FileSend/DiffCopy"
MTIME_NS = 1_700_000_000_123_456_789

Sent = list[tuple[Stat, bytes]]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
async def daemon() -> AsyncIterator[FakeDaemon]:
    async with running(FakeDaemon()) as made:
        yield made


def told(path: str, mode: int, content: bytes = b"", link: str = "") -> tuple[Stat, bytes]:
    return Stat(path, go_mode(mode), len(content), MTIME_NS, link), content


TREE: Sent = [
    told("a", DIRECTORY),
    told("a/empty", FILE),
    told("a/f", stat.S_IFREG | 0o4711, b"content" * 100_000),
    told("a/hard", FILE, link="a/f"),
    told("link", LINK, link="../outside"),
    told("\udcff\n", FILE, b"x"),
]


async def copy_to(session: Session, sent: Sent) -> None:
    """As fsutil's sender: the list, then what is asked for, the files piece by piece at a time."""
    call = session.channel.call(METHOD)
    try:
        await send_all(call, sent)
    finally:
        call.cancel()


async def send_all(call: Call, sent: Sent) -> None:
    stats = [Packet(PacketKind.STAT, stat=one).encode() for one, _ in sent]
    await call.send(*stats, Packet(PacketKind.STAT).encode())
    asked: list[int] = []
    expected = sum(stat.S_ISREG(st_mode(one.mode)) and not one.linkname for one, _ in sent)
    while True:
        message = await call.receive()
        if message is None:
            return
        packet = Packet.decode(message)
        if packet.kind is PacketKind.FIN:
            await call.send(packet.encode(), end=True)
            assert await call.receive() is None
            return
        assert packet.kind is PacketKind.REQ
        asked.append(packet.number)
        if len(asked) == expected:
            await contents(call, sent, asked)


async def contents(call: Call, sent: Sent, asked: list[int]) -> None:
    for half in (0, 1):
        for number in asked:
            octets = sent[number][1]
            middle = len(octets) // 2
            piece = octets[middle:] if half else octets[:middle]
            if piece:
                await call.send(Packet(PacketKind.DATA, number, piece).encode())
            if half:
                await call.send(Packet(PacketKind.DATA, number).encode())


async def build(daemon: FakeDaemon, target: Target) -> int:
    """A build whose result goes to a target, which is committed as the pipeline does; its size."""
    offer = Offer(FileSync({}, lambda *_: None, lambda _: None), "key", target=target)
    async with connected(await daemon.dial(), "1.41") as control:
        try:
            await solve(
                control,
                offer,
                Options(),
                lambda _: None,
                result=Result("local"),
                watching=Watching(),
            )
            octets = target.octets
            target.commit()
        finally:
            target.discard()
    return octets


async def test_a_directory_arrives_as_it_was(daemon: FakeDaemon, tmp_path: Path) -> None:
    daemon.script = lambda session, _: copy_to(session, TREE)
    target = DirectoryTarget(tmp_path / "new" / "out")
    octets = await build(daemon, target)
    out = tmp_path / "new" / "out"
    assert names(tmp_path / "new") == ["out"]
    assert (out / "a" / "f").read_bytes() == TREE[2][1]
    assert (out / "a" / "hard").samefile(out / "a" / "f")
    assert (out / "a" / "empty").read_bytes() == b""
    assert str((out / "link").readlink()) == "../outside"
    assert (out / "\udcff\n").read_bytes() == b"x"
    # Whose program it is when it runs is not for a builder to say.
    assert stat.S_IMODE((out / "a" / "f").stat().st_mode) == 0o711
    assert stat.S_IMODE((out / "a").stat().st_mode) == 0o755
    for path in (out / "a", out / "a" / "f", out / "link"):
        assert path.lstat().st_mtime_ns == MTIME_NS
    assert octets == len(TREE[2][1]) + 1


async def test_attributes_that_mean_nothing_to_the_system_are_kept(
    daemon: FakeDaemon, tmp_path: Path
) -> None:
    marks = {
        "user.mark": b"\x00\xff",
        "user.more": b"",
        "security.capability": b"x",
        "user.a\0b": b"x",
    }
    marks |= {"trusted.mark": b"x", "user.far too large": bytes(1 << 20)}
    sent = [
        (replace(one, xattrs=marks), content)
        for one, content in [
            told("a", stat.S_IFDIR | 0o500),
            told("a/f", stat.S_IFREG | 0o400, b"x"),
            told("link", LINK, link="a/f"),
        ]
    ]
    daemon.script = lambda session, _: copy_to(session, sent)
    out = tmp_path / "out"
    await build(daemon, DirectoryTarget(out))
    for path in (out / "a", out / "a" / "f"):
        assert set(os.listxattr(path)) == {"user.mark", "user.more"}
        assert os.getxattr(path, "user.mark") == b"\x00\xff"
        assert path.stat().st_mtime_ns == MTIME_NS
    assert os.listxattr(out / "link", follow_symlinks=False) == []


async def test_what_is_there_already_stays_and_what_has_the_name_is_replaced(
    daemon: FakeDaemon, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    (out / "a" / "mine").write_text("mine")
    (tmp_path / "victim").write_text("victim")
    (out / "a" / "f").symlink_to(tmp_path / "victim")
    daemon.script = lambda session, _: copy_to(session, TREE)
    await build(daemon, DirectoryTarget(out))
    assert (out / "a" / "mine").read_text() == "mine"
    assert (out / "a" / "f").read_bytes() == TREE[2][1]
    assert (tmp_path / "victim").read_text() == "victim"
    assert names(tmp_path) == ["out", "victim"]


async def test_a_link_in_the_place_of_a_directory_is_not_followed(
    daemon: FakeDaemon, tmp_path: Path
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    out.mkdir()
    elsewhere.mkdir()
    (out / "a").symlink_to(elsewhere)
    daemon.script = lambda session, _: copy_to(session, TREE)
    with pytest.raises(FileExistsError, match="is there, and is no directory"):
        await build(daemon, DirectoryTarget(out))
    assert names(elsewhere) == []
    assert names(out) == ["a"]
    assert names(tmp_path) == ["elsewhere", "out"]


async def test_trees_that_come_at_the_same_time_become_one(
    daemon: FakeDaemon, tmp_path: Path
) -> None:
    both = [[told(name, DIRECTORY), told(f"{name}/f", FILE, name.encode())] for name in "xy"]

    async def script(session: Session, daemon: FakeDaemon) -> None:
        await asyncio.gather(*(copy_to(session, sent) for sent in both))

    daemon.script = script
    await build(daemon, DirectoryTarget(tmp_path / "out"))
    assert [(tmp_path / "out" / name / "f").read_text() for name in "xy"] == ["x", "y"]
    assert names(tmp_path) == ["out"]


EVIL: list[Sent] = [
    [told("../x", FILE)],
    [told("/x", FILE)],
    [told("..", DIRECTORY)],
    [told("a/../../x", FILE)],
    [told("a", LINK, link="/tmp"), told("a/x", FILE, b"x")],
    [told("a/x", FILE)],
    [told("a", FILE), told("a", FILE)],
    [told("a", FILE), told("a/x", FILE)],
    [told("x\0y", FILE)],
    [told("", FILE)],
    [told(".", DIRECTORY)],
    [told("x", FILE, link="/etc/passwd")],
    [told("x", LINK, link="/etc/passwd"), told("y", FILE, link="x")],
    [told("x", stat.S_IFBLK | 0o600)],
    [told("x", stat.S_IFSOCK | 0o600)],
    [(Stat("x", go_mode(FILE), 5, MTIME_NS), b"123")],
]


@pytest.mark.parametrize("sent", EVIL, ids=lambda sent: repr([one.path for one, _ in sent]))
async def test_nothing_is_written_outside_and_nothing_half(
    daemon: FakeDaemon, tmp_path: Path, sent: Sent
) -> None:
    daemon.script = lambda session, _: copy_to(session, [told("+first", FILE, b"1"), *sent])
    (tmp_path / "out").mkdir()
    with pytest.raises(Unsafe):
        await build(daemon, DirectoryTarget(tmp_path / "out" / "in"))
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == []


async def test_a_file_is_there_when_the_build_has_succeeded_and_not_before(
    daemon: FakeDaemon, tmp_path: Path
) -> None:
    place = tmp_path / "out.tar"
    place.write_text("before")

    async def script(session: Session, daemon: FakeDaemon) -> None:
        call = session.channel.call(METHOD)
        await call.send(bytes_field(1, b"whole "), bytes_field(1, b"archive"), end=True)
        assert await call.receive() is None
        assert place.read_text() == "before"
        if not daemon.response:
            raise Failed(2, "the end was bad")

    daemon.script = script
    daemon.response = {}
    with pytest.raises(Failed, match="the end was bad"):
        await build(daemon, FileTarget(place))
    assert place.read_text() == "before"
    assert names(tmp_path) == ["out.tar"]
    daemon.response = {"a": "b"}
    await build(daemon, FileTarget(place))
    assert place.read_text() == "whole archive"
    assert names(tmp_path) == ["out.tar"]


async def test_a_place_that_cannot_be_written_is_our_failure(
    daemon: FakeDaemon, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    daemon.script = lambda session, _: copy_to(session, TREE)
    with pytest.raises(OSError, match="file"):
        await build(daemon, DirectoryTarget(tmp_path / "file" / "out"))


async def test_an_engine_that_sends_nothing_leaves_nothing(
    daemon: FakeDaemon, tmp_path: Path
) -> None:
    async def script(session: Session, daemon: FakeDaemon) -> None:
        return

    daemon.script = script
    for target in (DirectoryTarget(tmp_path / "a"), FileTarget(tmp_path / "b")):
        with pytest.raises(FileNotFoundError, match="sent nothing"):
            await build(daemon, target)
    assert names(tmp_path) == []


class Script:
    """A call whose far end says what it was told to, and hears nothing."""

    def __init__(self, messages: list[bytes]) -> None:
        self._messages = messages

    async def receive(self) -> bytes | None:
        return self._messages.pop(0) if self._messages else None

    async def send(self, *messages: bytes, end: bool = False) -> None:
        return


stats = st.builds(
    Stat,
    st.text(alphabet="ab./\0", max_size=6),
    st.sampled_from([go_mode(DIRECTORY), go_mode(FILE), go_mode(LINK), 1 << 26]),
    st.integers(0, 4),
    st.just(0),
    st.sampled_from(["", "a", "../..", "/"]),
)
packets = st.one_of(
    st.builds(lambda one: Packet(PacketKind.STAT, stat=one).encode(), stats),
    st.builds(
        lambda n, octets: Packet(PacketKind.DATA, n, octets).encode(),
        st.integers(0, 3),
        st.binary(max_size=4),
    ),
    st.sampled_from([Packet(PacketKind.STAT).encode(), Packet(PacketKind.FIN).encode()]),
    st.binary(max_size=12),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(packets, max_size=12))
async def test_whatever_is_sent_stays_inside(tmp_path: Path, messages: list[bytes]) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(exist_ok=True)
    target = DirectoryTarget(outside / "in" / "out")
    with suppress(Unsafe, Failed, Malformed, OSError):
        await target.receive(Script(messages))  # type: ignore[arg-type]
        target.commit()
    target.discard()
    assert set(names(outside)) <= {"in"}
    assert not (outside / "in").exists() or set(names(outside / "in")) <= {"out"}


def test_modes_are_the_same_both_ways() -> None:
    for kind in (DIRECTORY, FILE, LINK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
        for bits in (0, 0o755, 0o4711, 0o2770, 0o1777):
            mode = stat.S_IFMT(kind) | bits
            assert st_mode(go_mode(mode)) == mode
    sent = replace(TREE[2][0])
    assert Stat.decode(sent.encode()) == sent
