"""What the platform remembers, and what it will not be talked into."""

import sqlite3
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from builder_orch.selfhost.database import Code, Refused
from builder_orch.selfhost.rows import AppRow, OrganizationRow, TokenRow
from builder_orch.selfhost.store import Store
from builder_orch.tunnel.config import PublicKey
from tests.api.rig import Clock

IMAGE = "127.0.0.1:5000/hello@sha256:" + "a" * 64
KEY = PublicKey(b"\x01" * 32)


@dataclass
class Filled:
    """A store with one organization, app and token in it."""

    store: Store
    clock: Clock
    organization: OrganizationRow
    app: AppRow
    token: TokenRow
    path: Path

    def release(self, app: AppRow | None = None) -> int:
        """One more version."""
        row, _ = self.store.create_release(
            app or self.app, image=IMAGE, strategy="ROLLING", definition={}
        )
        return row.version


@pytest.fixture
def filled(tmp_path: Path) -> Iterator[Filled]:
    clock, path = Clock(), tmp_path / "state.db"
    store = Store(f"sqlite:///{path}", clock=clock)
    organization = store.ensure_organization("personal", personal=True)
    token = store.authenticate(store.issue_token("someone", lifetime_s=60))
    app = store.create_app(organization, "hello")
    yield Filled(store, clock, organization, app, token, path)
    store.close()


def code_of(caught: pytest.ExceptionInfo[Refused]) -> Code:
    return caught.value.code


# --- the file


def test_the_file_is_private_and_logs_ahead(filled: Filled) -> None:
    assert stat.S_IMODE(filled.path.stat().st_mode) == 0o600
    for side in filled.path.parent.glob("state.db-*"):
        assert stat.S_IMODE(side.stat().st_mode) == 0o600
    with sqlite3.connect(filled.path) as raw:
        assert raw.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    raw.close()


def test_everything_is_there_after_a_restart(filled: Filled) -> None:
    filled.store.add_peer(filled.token, filled.organization, "laptop", KEY)
    filled.release()
    filled.store.close()
    again = Store(f"sqlite:///{filled.path}", clock=filled.clock)
    assert again.ensure_organization("personal").id == filled.organization.id
    assert [peer.public_key for peer in again.peers()] == [KEY]
    assert [row.version for row in again.releases(again.app("hello"))] == [1]
    assert again.authority("ca", lambda: b"new") == b"new"
    assert again.authority("ca", lambda: b"other") == b"new"
    again.close()


def test_rows_that_hang_together_stay_together(filled: Filled) -> None:
    raw = sqlite3.connect(filled.path)
    raw.execute("PRAGMA foreign_keys=ON")
    with pytest.raises(sqlite3.IntegrityError):
        raw.execute("DELETE FROM organizations")
    raw.close()
    stranger = AppRow(id="app_gone", name="gone")
    with pytest.raises(Exception, match="FOREIGN KEY"):
        filled.release(stranger)


# --- tokens


def test_a_token_is_good_until_it_expires(filled: Filled) -> None:
    token = filled.store.issue_token("someone", lifetime_s=10)
    assert filled.store.authenticate(token).owner == "someone"
    filled.clock.now += 10
    with pytest.raises(Refused, match="expired") as caught:
        filled.store.authenticate(token)
    assert code_of(caught) is Code.UNAUTHORIZED


def test_a_token_can_be_revoked(filled: Filled) -> None:
    token = filled.store.issue_token("someone", lifetime_s=10)
    filled.store.revoke_token(filled.store.authenticate(token).id)
    with pytest.raises(Refused, match="expired"):
        filled.store.authenticate(token)


def test_wrong_tokens_all_get_the_same_answer(filled: Filled) -> None:
    token = filled.store.issue_token("someone", lifetime_s=10)
    changed = token[:-1] + ("A" if token[-1] != "A" else "B")
    other = "fbt_" + "0" * 16 + token[20:]
    answers = set()
    for wrong in ("", "fbt_", token + "x", changed, other, "x" * 10_000, "\x00"):
        with pytest.raises(Refused) as caught:
            filled.store.authenticate(wrong)
        answers.add((caught.value.code, str(caught.value)))
    assert len(answers) == 1


def test_no_file_holds_the_token(filled: Filled) -> None:
    token = filled.store.issue_token("someone", lifetime_s=10)
    secret = token.split("_", 2)[2]
    for path in filled.path.parent.iterdir():
        assert secret.encode() not in path.read_bytes()


def test_scopes_are_known_ones(filled: Filled) -> None:
    with pytest.raises(ValueError, match="root"):
        filled.store.issue_token("someone", lifetime_s=1, scopes=["root"])


def test_a_token_of_one_organization_sees_that_one(filled: Filled) -> None:
    other = filled.store.ensure_organization("other")
    token = filled.store.issue_token("x", lifetime_s=9, organization=other)
    seen = filled.store.organizations(filled.store.authenticate(token))
    assert [row.slug for row in seen] == ["other"]
    assert len(filled.store.organizations(filled.token)) == 2
    assert other.number == filled.organization.number + 1


# --- apps and machines


@pytest.mark.parametrize("name", ["", "A", "-a", "a-", "a.b", "a_b", "é", "a" * 64, "a\n", "_api"])
def test_an_apps_name_is_a_label(filled: Filled, name: str) -> None:
    with pytest.raises(Refused) as caught:
        filled.store.create_app(filled.organization, name)
    assert code_of(caught) is Code.INVALID


def test_names_are_taken_once(filled: Filled) -> None:
    other = filled.store.ensure_organization("other")
    with pytest.raises(Refused, match="already been taken"):
        filled.store.create_app(other, "hello")
    with pytest.raises(Refused, match="platform's"):
        filled.store.create_app(other, "fly-builder-1")


def test_there_is_one_builder_app_for_each_organization(filled: Filled) -> None:
    first = filled.store.ensure_builder_app(filled.organization)
    assert filled.store.ensure_builder_app(filled.organization).id == first.id
    other = filled.store.ensure_builder_app(filled.store.ensure_organization("other"))
    assert other.name != first.name


def test_an_address_is_given_once_and_belongs_to_one_machine(filled: Filled) -> None:
    one_id, one = filled.store.allot("hello")
    _, other = filled.store.allot("hello")
    assert one != other
    filled.store.machine_started("hello", one_id, one, "container", IMAGE)
    filled.store.put_machine(filled.app, "m2", one, state="started")
    assert [row.id for row in filled.store.machines(filled.app)] == ["m2"]


def test_names_lead_to_machines_that_run(filled: Filled) -> None:
    address, stopped = filled.organization.plan.machine(1), filled.organization.plan.machine(2)
    filled.store.put_machine(filled.app, "m1", address, state="started")
    filled.store.put_machine(filled.app, "m2", stopped, state="stopped")
    zone = filled.store.zone(filled.organization)
    assert zone.gateway == filled.organization.plan.gateway
    assert [host.address for host in zone.apps["hello"]] == [address]
    filled.store.machine_retired("hello", "m1")
    assert filled.store.zone(filled.organization).apps["hello"] == ()
    assert filled.store.zone(filled.store.ensure_organization("other")).apps == {}


def test_a_machine_stays_with_its_app(filled: Filled) -> None:
    filled.store.put_machine(filled.app, "m1", filled.organization.plan.machine(1), state="x")
    other = filled.store.create_app(filled.organization, "other")
    with pytest.raises(Refused, match="another app"):
        filled.store.put_machine(other, "m1", filled.organization.plan.machine(2), state="x")
    filled.store.machine_retired("other", "m1")
    assert len(filled.store.machines(filled.app)) == 1


# --- peers


def test_the_same_key_and_name_is_the_same_peer(filled: Filled) -> None:
    first, is_new = filled.store.add_peer(
        filled.token, filled.organization, "laptop", KEY, ephemeral=True
    )
    again, is_new_again = filled.store.add_peer(filled.token, filled.organization, "laptop", KEY)
    assert (is_new, is_new_again) == (True, False)
    assert (again.id, again.address, again.ephemeral) == (first.id, first.address, True)


def test_another_token_of_the_same_owner_has_the_same_peers(filled: Filled) -> None:
    filled.store.add_peer(filled.token, filled.organization, "laptop", KEY)
    token = filled.store.authenticate(filled.store.issue_token("someone", lifetime_s=9))
    assert not filled.store.add_peer(token, filled.organization, "laptop", KEY)[1]


def test_a_key_is_not_taken_over(filled: Filled) -> None:
    filled.store.add_peer(filled.token, filled.organization, "laptop", KEY)
    stranger = filled.store.authenticate(filled.store.issue_token("stranger", lifetime_s=9))
    other = filled.store.ensure_organization("other")
    for token, organization, name in (
        (stranger, filled.organization, "laptop"),
        (stranger, filled.organization, "theirs"),
        (filled.token, filled.organization, "second"),
        (filled.token, other, "laptop"),
    ):
        with pytest.raises(Refused, match="another peer") as caught:
            filled.store.add_peer(token, organization, name, KEY)
        assert code_of(caught) is Code.INVALID


def test_a_peers_name_is_taken_once_in_an_organization(filled: Filled) -> None:
    filled.store.add_peer(filled.token, filled.organization, "laptop", KEY)
    key = PublicKey(b"\x02" * 32)
    with pytest.raises(Refused, match="already been taken"):
        filled.store.add_peer(filled.token, filled.organization, "laptop", key)
    other = filled.store.ensure_organization("other")
    assert filled.store.add_peer(filled.token, other, "laptop", key)[1]


@pytest.mark.parametrize("name", ["", "a b", "a.b", "-a", "a\n", "a\\b", "é", "a" * 201])
def test_a_peers_name_is_plain(filled: Filled, name: str) -> None:
    with pytest.raises(Refused):
        filled.store.add_peer(filled.token, filled.organization, name, KEY)


def test_a_key_of_zeroes_is_no_key(filled: Filled) -> None:
    with pytest.raises(Refused, match="zeroes"):
        filled.store.add_peer(filled.token, filled.organization, "a", PublicKey(bytes(32)))


def test_an_address_is_never_given_twice(filled: Filled) -> None:
    seen: set[IPv6Address] = set()
    for i in range(1, 6):
        key = PublicKey(bytes([i]) * 32)
        peer, _ = filled.store.add_peer(filled.token, filled.organization, f"p{i}", key)
        assert peer.address not in seen
        seen.add(peer.address)
        filled.store.remove_peer(peer.id)
    assert filled.store.peers() == []


def test_which_peers_are_still_there(filled: Filled) -> None:
    peer, _ = filled.store.add_peer(filled.token, filled.organization, "laptop", KEY)
    asked = [peer.address, IPv6Address("fdaa::9")]
    filled.clock.now += 5
    assert filled.store.seen_peers([filled.organization], asked) == {peer.address}
    assert filled.store.seen_peers([], asked) == set()
    assert filled.store.peers()[0].seen_at == filled.clock.now


# --- builds


def finish(filled: Filled, build_id: str, status: str, logs: str = "") -> str:
    return filled.store.finish_build(
        filled.app, build_id, status=status, image={}, timings={}, logs=logs
    ).status


def test_a_build_ends_once(filled: Filled) -> None:
    build = filled.store.create_build(filled.app, builder_type="remote", strategies=["Dockerfile"])
    assert build.status == "running"
    filled.clock.now += 3
    assert finish(filled, build.id, "completed", "the first words") == "completed"
    filled.clock.now += 3
    assert finish(filled, build.id, "completed", "other words") == "completed"
    kept = filled.store.build(filled.app, build.id)
    assert (kept.logs, kept.finished_at) == ("the first words", filled.clock.now - 3)
    with pytest.raises(Refused, match="already completed"):
        finish(filled, build.id, "failed")


def test_builds_that_are_open_can_be_given_up_together(filled: Filled) -> None:
    store, app = filled.store, filled.app
    ended = store.create_build(app, builder_type="remote", strategies=[])
    store.finish_build(app, ended.id, status="completed", image={}, timings={}, logs="")
    lost = store.create_build(app, builder_type="remote", strategies=[])
    assert store.abandon_builds("the platform ended") == 1
    assert store.build(app, ended.id).status == "completed"
    found = store.build(app, lost.id)
    assert (found.status, found.logs) == ("failed", "the platform ended")
    assert found.finished_at is not None
    assert store.abandon_builds("again") == 0


def test_a_build_is_found_by_its_app_alone(filled: Filled) -> None:
    build = filled.store.create_build(filled.app, builder_type="remote", strategies=[])
    other = filled.store.create_app(filled.organization, "other")
    with pytest.raises(Refused) as caught:
        filled.store.build(other, build.id)
    assert code_of(caught) is Code.NOT_FOUND
    with pytest.raises(Refused):
        finish(filled, build.id, "exploded")


def test_a_repeated_creation_is_the_same_build(filled: Filled) -> None:
    made = [
        filled.store.create_build(filled.app, builder_type="r", strategies=[], mutation=mutation).id
        for mutation in ("a", "a", "b", None, None)
    ]
    assert made[0] == made[1]
    assert len(set(made)) == 4


# --- releases


@pytest.mark.parametrize(
    "image",
    [
        "hello",
        "hello:latest",
        "hello@sha256:abc",
        "hello@sha256:" + "A" * 64,
        "@sha256:" + "a" * 64,
        IMAGE + "0",
        IMAGE + "\n",
        "a b@sha256:" + "a" * 64,
    ],
)
def test_only_a_digest_is_released(filled: Filled, image: str) -> None:
    with pytest.raises(Refused, match="digest") as caught:
        filled.store.create_release(filled.app, image=image, strategy="ROLLING", definition={})
    assert code_of(caught) is Code.INVALID


def test_versions_count_for_each_app(filled: Filled) -> None:
    other = filled.store.create_app(filled.organization, "other")
    assert [filled.release(), filled.release(), filled.release(other)] == [1, 2, 1]


def test_versions_only_rise_with_writers_at_once(filled: Filled) -> None:
    second = Store(f"sqlite:///{filled.path}", clock=filled.clock)
    versions: list[int] = []
    start = threading.Barrier(4)

    def write(store: Store) -> None:
        start.wait()
        for _ in range(10):
            row, _ = store.create_release(
                filled.app, image=IMAGE, strategy="ROLLING", definition={}
            )
            versions.append(row.version)

    stores = (filled.store, second, filled.store, second)
    threads = [threading.Thread(target=write, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions) == list(range(1, 41))
    second.close()


def test_a_release_that_ended_keeps_its_end(filled: Filled) -> None:
    filled.release()
    (release,) = filled.store.releases(filled.app)
    assert release.in_progress
    assert filled.store.open_releases()[0].id == release.id
    filled.store.update_release(release.id, status="running")
    filled.store.update_release(release.id, status="failed", reason="no answer")
    again = filled.store.update_release(release.id, status="failed", notes={"by": "hand"})
    assert (again.reason, again.notes, again.in_progress) == ("no answer", {"by": "hand"}, False)
    with pytest.raises(Refused, match="already failed"):
        filled.store.update_release(release.id, status="complete")
    with pytest.raises(Refused, match="not the status"):
        filled.store.update_release(release.id, status="great")
    assert filled.store.open_releases() == []


def test_the_runner_has_the_last_word(filled: Filled) -> None:
    filled.release()
    (release,) = filled.store.releases(filled.app)
    filled.store.update_release(release.id, status="interrupted")
    filled.store.release_status("hello", 1, "complete", None)
    assert filled.store.release(release.id).status == "complete"


def test_a_release_names_a_build_of_its_app(filled: Filled) -> None:
    with pytest.raises(Refused) as caught:
        filled.store.create_release(
            filled.app, image=IMAGE, strategy="ROLLING", definition={}, build_id="build_none"
        )
    assert code_of(caught) is Code.NOT_FOUND
    assert filled.store.releases(filled.app) == []


def test_what_is_not_there(filled: Filled) -> None:
    for find in (filled.store.app, filled.store.organization, filled.store.release):
        with pytest.raises(Refused) as caught:
            find("nothing")
        assert code_of(caught) is Code.NOT_FOUND
    filled.store.remove_peer("nothing")
    filled.store.remove_machine("nothing")
    filled.store.revoke_token("nothing")
