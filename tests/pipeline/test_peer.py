"""Peers that are made, written down and removed, also where a command ends in the middle."""

import os
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from builder_orch.api.keyring import ROTATE_AFTER_S, Entry, Keyring, Purpose
from builder_orch.api.models import Granted, Organization
from builder_orch.errors import NotAllowed, PlatformUnavailable
from builder_orch.events import Event, PhaseReason, Warned
from builder_orch.pipeline.kept import Kept, next_name
from builder_orch.pipeline.peer import AddPeer, tidy
from builder_orch.pipeline.roster import Line, remarks, survey
from builder_orch.tunnel.config import PublicKey, decode_key
from tests.pipeline.fake_world import ORGANIZATION, FakePlatform

IDENTITY = "https://api.example/graphql"
DOWN = PlatformUnavailable("the API is down", hint="Wait.")


class Crash(BaseException):
    """The process ends here."""


@dataclass
class Peers(FakePlatform):
    """A platform that also lists its peers; `crash_after` ends us when that call is done."""

    crash_after: str = ""

    async def _called(self, name: str) -> None:
        await super()._called(name)
        if name == self.crash_after:
            self.crash_after = ""
            raise Crash

    async def remove_peer(self, organization: Organization, name: str) -> None:
        await self._called("remove_peer")
        self.peers.pop(name, None)

    async def organizations(self) -> list[Organization]:
        return [ORGANIZATION]

    async def peers_of(self, organization: Organization) -> list[Granted]:
        address = IPv6Address("fdaa:0:1:a::9")
        return [
            Granted(name, address, PublicKey(decode_key(key)), "")
            for name, key in self.peers.items()
        ]


@dataclass
class Scene:
    """A user with a keyring."""

    platform: Peers
    ring: Keyring
    events: list[Event]

    @property
    def kept(self) -> Kept:
        return Kept(self.platform, self.ring, IDENTITY, self.events.append)  # type: ignore[arg-type]

    async def tidy(self) -> None:
        await tidy(self.platform, self.ring, IDENTITY, self.events.append)

    def files(self) -> dict[str, Purpose | None]:
        """By name, what each is for."""
        return {
            entry.path.stem: entry.record.purpose if entry.record else None
            for entry in self.ring.entries()
        }

    def is_empty(self) -> bool:
        """Is there nothing, neither here nor there?"""
        return not self.platform.peers and not self.files()

    def is_consistent(self) -> bool:
        """Does a file know each peer of the platform?"""
        return set(self.platform.peers) <= set(self.files())


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    (tmp_path / "locks").mkdir(mode=0o700)
    ring = Keyring(tmp_path / "peers", locks=tmp_path / "locks", machine="here")
    return Scene(Peers(), ring, [])


async def test_a_run_writes_its_peer_down_without_its_key_and_strikes_it_out(scene: Scene) -> None:
    async with AsyncExitStack() as closing:
        add = AddPeer(scene.platform, closing, "host", scene.ring, IDENTITY)
        await add.run(ORGANIZATION, scene.events.append)
        ((name, purpose),) = scene.files().items()
        assert purpose is Purpose.RUN
        assert scene.ring.find(name).config is None
        (entry,) = scene.ring.entries()
        assert entry.user is not None
        assert entry.user.pid == os.getpid()
        # It lives, so nobody removes it.
        await scene.tidy()
        assert set(scene.platform.peers) == {name}
    assert scene.is_empty()


async def test_a_peer_that_is_refused_leaves_no_file(scene: Scene) -> None:
    scene.platform.failures["add_peer"] = NotAllowed("no", hint="Ask.")
    async with AsyncExitStack() as closing:
        add = AddPeer(scene.platform, closing, "host", scene.ring, IDENTITY)
        with pytest.raises(NotAllowed):
            await add.run(ORGANIZATION, scene.events.append)
    assert scene.files() == {}


async def test_what_cannot_be_removed_now_is_removed_by_the_next_run(scene: Scene) -> None:
    async with AsyncExitStack() as closing:
        add = AddPeer(scene.platform, closing, "host", scene.ring, IDENTITY)
        await add.run(ORGANIZATION, scene.events.append)
        scene.platform.failures["remove_peer"] = DOWN
    assert len(scene.files()) == len(scene.platform.peers) == 1
    await scene.tidy()
    assert any("the API is down" in e.message for e in scene.events if isinstance(e, Warned))
    assert len(scene.files()) == 1
    del scene.platform.failures["remove_peer"]
    await scene.tidy()
    assert scene.is_empty()
    told = [event.reason for event in scene.events if isinstance(event, PhaseReason)]
    assert "removed 1 peers of runs that were killed" in told


async def test_peers_of_other_platforms_and_kept_ones_are_not_tidied(scene: Scene) -> None:
    record, _ = await scene.kept.create(ORGANIZATION, "laptop")
    other = replace(record, name="other", platform="elsewhere", purpose=Purpose.RUN, config=None)
    scene.ring.write(other)
    await scene.tidy()
    assert set(scene.files()) == {"laptop", "other"}


async def test_a_create_that_ends_in_the_middle_is_undone_by_the_next_command(
    scene: Scene,
) -> None:
    scene.platform.crash_after = "add_peer"
    with pytest.raises(Crash):
        await scene.kept.create(ORGANIZATION, "laptop")
    assert scene.is_consistent()
    await scene.kept.tidy()
    assert scene.is_empty()
    await scene.kept.create(ORGANIZATION, "laptop")
    assert set(scene.platform.peers) == {"laptop"}


@pytest.mark.parametrize("write", [1, 2, 3])
@pytest.mark.parametrize("step", ["write", "forget"])
async def test_a_reset_that_ends_in_the_middle_loses_no_peer_and_leaves_none(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, step: str, write: int
) -> None:
    await scene.kept.create(ORGANIZATION, "laptop")
    real, calls = getattr(Keyring, step), []

    def dying(ring: Keyring, *given: object) -> object:
        calls.append(given)
        if len(calls) == write:
            raise Crash
        return real(ring, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Keyring, step, dying)
        try:
            await scene.kept.reset("laptop")
        except Crash:
            assert scene.is_consistent()
    await scene.kept.tidy()
    kept = {name for name, purpose in scene.files().items() if purpose is Purpose.KEPT}
    assert kept
    assert set(scene.platform.peers) == kept == set(scene.files())


async def test_a_reset_whose_last_step_fails_has_succeeded(scene: Scene) -> None:
    await scene.kept.create(ORGANIZATION, "laptop")
    scene.platform.failures["remove_peer"] = DOWN
    record, config = await scene.kept.reset("laptop")
    assert record.name == "laptop-r2"
    assert scene.ring.find("laptop-r2").config == config
    assert scene.files() == {"laptop": Purpose.RUN, "laptop-r2": Purpose.KEPT}


def test_names_of_generations() -> None:
    assert next_name("laptop") == "laptop-r2"
    assert next_name("laptop-r2") == "laptop-r3"
    assert next_name("a-r9") == "a-r10"
    assert len(next_name("x" * 200)) <= 200


async def test_the_list_is_of_both_and_says_what_to_do(scene: Scene) -> None:
    record, _ = await scene.kept.create(ORGANIZATION, "mine")
    old = replace(record, name="old", made_at=record.made_at - ROTATE_AFTER_S - 86400)
    scene.ring.write(old)
    scene.ring.write(replace(record, name="far", machine="elsewhere"))
    scene.platform.peers["theirs"] = scene.platform.peers["mine"]
    granted = await scene.platform.peers_of(ORGANIZATION)
    lines = {line.name: line for line in survey(granted, scene.ring.entries())}
    assert list(lines) == ["far", "mine", "old", "theirs"]
    assert lines["theirs"].entry is None
    said = {name: remarks(line, scene.ring, record.made_at) for name, line in lines.items()}
    assert said["mine"] == said["theirs"] == []
    assert "31 days old" in said["old"][1]
    assert "made on another machine" in said["far"][1]
    assert all("does not know it" in said[name][0] for name in ("old", "far"))
    run = Entry(Path("r"), replace(record, purpose=Purpose.RUN))
    assert (
        "the next command removes it" in remarks(Line("r", None, "", None, run), scene.ring, 0)[0]
    )


async def test_without_an_answer_of_the_platform_nothing_is_called_unknown(scene: Scene) -> None:
    await scene.kept.create(ORGANIZATION, "mine")
    (line,) = survey(None, scene.ring.entries())
    assert line.known is None
    assert remarks(line, scene.ring, 0.0) == []


async def test_what_is_invalid_is_asked_only_of_reachable_organizations(scene: Scene) -> None:
    record, _ = await scene.kept.create(ORGANIZATION, "mine")
    scene.platform.knows_peers = False
    foreign = replace(record, organization=Organization("o2", "other", "Other"))
    assert await scene.kept.invalid([foreign]) == []
    assert await scene.kept.invalid([record]) == [record]
    assert await scene.kept.invalid([]) == []
