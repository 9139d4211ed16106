"""The real client against the real API; and requests that no client of ours would send."""

import asyncio
import json
import os
import sqlite3
import subprocess
from collections.abc import AsyncIterator
from ipaddress import IPv6Address
from pathlib import Path
from shutil import which
from typing import NoReturn

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHCertificate,
    load_ssh_public_identity,
)
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from builder_orch.api.client import IDEMPOTENT_SELFHOST, Platform
from builder_orch.api.models import Secret
from builder_orch.api.peer import new_key, public_key, tunnel_config
from builder_orch.errors import (
    AppUnknown,
    NotAllowed,
    NotLoggedIn,
    PlatformRefused,
    PlatformUnavailable,
)
from builder_orch.selfhost.names import Plan
from builder_orch.selfhost.resolvers_ssh import authority, authority_line
from builder_orch.selfhost.rows import TokenRow
from builder_orch.tunnel.config import Door, PublicKey, TunnelConfig, encode_key
from tests.api.rig import GATEWAY_KEY, Selfhost, Waits, codes, post, selfhost

IMAGE = "127.0.0.1:5000/hello@sha256:" + "a" * 64


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Selfhost]:
    async with selfhost(tmp_path) as running:
        yield running


# --- the story of a deploy


async def test_a_disk_without_room_is_told_to_whoever_asked(
    host: Selfhost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        cause = sqlite3.OperationalError("database or disk is full")
        raise OperationalError("INSERT", {}, cause)

    async with host.platform() as platform:
        organization = await platform.organization(None)
        monkeypatch.setattr(host.store, "create_app", full)
        with pytest.raises(PlatformUnavailable, match="no room on the disk of the platform"):
            await platform.create_app(organization, "hello")


async def test_a_deploy_from_the_first_question_to_the_last(host: Selfhost) -> None:
    async with host.platform() as platform:
        organization = await platform.organization(None)
        assert (organization.slug, organization.personal) == ("personal", True)
        app = await platform.create_app(organization, "hello")
        assert (await platform.app("hello")) == app
        assert (await platform.nearest_region()).code == "local"

        private = new_key()
        peer = await platform.add_peer(
            organization, "laptop", encode_key(public_key(private)), region=None, ephemeral=True
        )
        assert host.gateway.peers == {public_key(private): peer.address}
        config = tunnel_config(private, peer)
        assert config.peers[0].endpoint == host.gateway.endpoint
        assert config.peers[0].public_key == GATEWAY_KEY
        assert config.dns == Plan(1).gateway

        builder = await platform.ensure_builder(app, None)
        assert builder.address == Plan(1).builder(1)
        assert builder.address in config.peers[0].allowed[0]
        assert host.builder.asked == [builder.app_name]

        build = await platform.create_build(
            app, machine_id=builder.machine_id, strategies=["Dockerfile"]
        )
        image = ("sha256:" + "b" * 64, "hello:v1", 12345678901)
        done = await platform.finish_build(
            app, build, status="completed", image=image, logs="", timings_ms={"build": 1.6, "x": 1}
        )
        assert done.status == "completed"

        release = await platform.create_release(
            app, image=IMAGE, build=build, strategy="rolling", definition={"app": "hello"}
        )
        assert (release.version, release.in_progress) == (1, True)
        assert release.hostname == "hello.internal"
        assert host.runner.begun == [("hello", 1)]

        machine_id, address = host.store.allot("hello")
        host.store.machine_started("hello", machine_id, address, "container", IMAGE)
        host.store.release_status("hello", 1, "complete", None)
        seen = await platform.release(app, 1)
        assert (seen.status, seen.in_progress, seen.addresses) == ("complete", False, (address,))
        assert seen.image == IMAGE
        assert (await platform.app("hello")).status == "deployed"

        await platform.update_release(release, status="complete", metadata={"ok": True})
        await platform.remove_peer(organization, "laptop")
        await platform.remove_peer(organization, "laptop")
        assert host.gateway.peers == {}
        assert await platform.validate_peers([peer.address]) == [peer.address]


async def test_what_a_build_leaves_behind(host: Selfhost) -> None:
    async with host.platform() as platform:
        app = await platform.create_app(await platform.organization(None), "hello")
        build = await platform.create_build(app, machine_id="m", strategies=["a", "b"])
        await platform.finish_build(
            app, build, status="failed", image=None, logs="é" * 9000, timings_ms={"push": 2.4}
        )
        with pytest.raises(PlatformRefused, match="already failed"):
            await platform.finish_build(
                app, build, status="completed", image=None, logs="", timings_ms={}
            )
    kept = host.store.build(host.store.app("hello"), build.id)
    assert kept.logs == "é" * 2048
    assert kept.timings == {"pushMs": 2}
    assert (kept.machine_id, kept.strategies) == ("m", ["a", "b"])


# --- peers


ADD_PEER = """mutation Add($input: AddWireGuardPeerInput!) {
  addWireGuardPeer(input: $input) { endpointip }
}"""


async def test_where_websockets_are_taken_is_said_beside_the_answer(host: Selfhost) -> None:
    given = {"organizationId": host.organization.id, "name": "a", "pubkey": encode_key(GATEWAY_KEY)}
    question = {"query": ADD_PEER, "variables": {"input": given}}
    assert set((await post(host, question))[1]) == {"data"}
    host.gateway.websocket = Door(4433, bytes(range(32)))
    _, said = await post(host, question)
    assert said["data"] == {"addWireGuardPeer": {"endpointip": "127.0.0.1:40000"}}
    assert said["extensions"] == {"wgtcpd": {"port": 4433, "spkiSha256": bytes(range(32)).hex()}}
    # Neither who may not have a peer is told, nor who asks for something else.
    stranger = {**given, "organizationId": "other"}
    for other in (
        {**question, "variables": {"input": stranger}},
        {"query": "{ organizations { nodes { id } } }"},
    ):
        assert "extensions" not in (await post(host, other))[1]


async def test_a_client_calls_where_it_is_told(host: Selfhost) -> None:
    host.gateway.websocket = Door(4433, bytes(range(32)))
    private = new_key()
    async with host.platform() as platform:
        organization = await platform.organization(None)
        peer = await platform.add_peer(
            organization, "laptop", encode_key(public_key(private)), region=None, ephemeral=True
        )
    config = tunnel_config(private, peer)
    assert config.peers[0].door == host.gateway.websocket
    assert TunnelConfig.parse(config.dump()) == config


async def test_no_answer_before_the_gateway_has_the_peer(host: Selfhost) -> None:
    host.gateway.broken = True
    async with host.platform() as platform:
        organization = await platform.organization(None)
        key = encode_key(public_key(new_key()))
        with capture_logs() as logs, pytest.raises(PlatformUnavailable) as caught:
            await platform.add_peer(organization, "p", key, region=None, ephemeral=False)
        assert "secret reason" not in str(caught.value)
        assert any("secret reason" in str(entry.get("failure")) for entry in logs)
        assert host.store.peers() == []
        host.gateway.broken = False
        await platform.add_peer(organization, "p", key, region=None, ephemeral=False)
    assert len(host.store.peers()) == 1


async def test_a_peer_that_was_in_stays_in_when_it_cannot_be_installed_again(
    host: Selfhost,
) -> None:
    async with host.platform() as platform:
        organization = await platform.organization(None)
        key = encode_key(public_key(new_key()))
        first = await platform.add_peer(organization, "p", key, region=None, ephemeral=False)
        host.gateway.broken = True
        with pytest.raises(PlatformUnavailable):
            await platform.add_peer(organization, "p", key, region=None, ephemeral=False)
    assert [peer.address for peer in host.store.peers()] == [first.address]


async def test_many_requests_for_one_peer_make_one(host: Selfhost) -> None:
    async with host.platform() as platform:
        organization = await platform.organization(None)
        key = encode_key(public_key(new_key()))
        made = await asyncio.gather(
            *[
                platform.add_peer(organization, "p", key, region=None, ephemeral=False)
                for _ in range(10)
            ]
        )
    assert len(set(made)) == 1
    assert len(host.store.peers()) == 1


async def test_a_repetition_waits_for_what_becomes_of_the_first(
    host: Selfhost, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, failing, asked = asyncio.Event(), asyncio.Event(), asyncio.Semaphore(0)
    good_install, authenticate = host.gateway.install, host.store.authenticate

    async def install(key: PublicKey, address: IPv6Address) -> None:
        if entered.is_set():
            return await good_install(key, address)
        entered.set()
        await failing.wait()
        raise OSError("not now")

    def count(token: str) -> TokenRow:
        asked.release()
        return authenticate(token)

    monkeypatch.setattr(host.gateway, "install", install)
    monkeypatch.setattr(host.store, "authenticate", count)
    given = {
        "organizationId": host.organization.id,
        "name": "p",
        "pubkey": encode_key(public_key(new_key())),
    }
    query = "mutation($i:AddWireGuardPeerInput!){addWireGuardPeer(input:$i){peerip}}"
    body = {"query": query, "variables": {"i": given}}
    first = asyncio.create_task(post(host, body))
    await entered.wait()
    second = asyncio.create_task(post(host, body))
    await asked.acquire()
    await asked.acquire()
    for _ in range(100):  # as far as the second can come while the first is not done
        await asyncio.sleep(0)
    failing.set()
    assert codes((await first)[1]) == ["SERVER_ERROR"]
    assert "errors" not in (await second)[1]
    assert len(host.store.peers()) == len(host.gateway.peers) == 1


async def test_a_peer_of_somebody_else(host: Selfhost) -> None:
    key = encode_key(public_key(new_key()))
    stranger = host.store.issue_token("stranger", lifetime_s=60)
    async with host.platform() as mine, host.platform(stranger) as theirs:
        organization = await mine.organization(None)
        await mine.add_peer(organization, "p", key, region=None, ephemeral=False)
        with pytest.raises(PlatformRefused, match="another peer"):
            await theirs.add_peer(organization, "q", key, region=None, ephemeral=False)


async def test_which_peers_are_valid(host: Selfhost) -> None:
    async with host.platform() as platform:
        organization = await platform.organization(None)
        key = encode_key(public_key(new_key()))
        peer = await platform.add_peer(organization, "p", key, region=None, ephemeral=False)
        gone = IPv6Address("fdaa:0:1:1::f02")
        assert await platform.validate_peers([peer.address, gone]) == [gone]


async def test_which_peers_the_gateway_was_told_of(host: Selfhost) -> None:
    async with host.platform() as platform:
        organization = await platform.organization(None)
        key = encode_key(public_key(new_key()))
        peer = await platform.add_peer(organization, "p", key, region=None, ephemeral=False)
        assert await platform.is_installed(peer.address) is True
        host.gateway.peers.clear()
        assert await platform.is_installed(peer.address) is False


# --- a reply that is lost after the work was done


class Cut:
    """A proxy that carries the first request of each kind out and then drops the answer."""

    def __init__(self, host: Selfhost) -> None:
        self._host = host
        self._seen: set[object] = set()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:-2])
        body = await reader.readexactly(int(fields["Content-Length"]))
        _, answer = await post(self._host, body, headers={"Authorization": fields["Authorization"]})
        operation = json.loads(body)["operationName"]
        if operation in self._seen:
            octets = json.dumps(answer).encode()
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
                + f"Content-Length: {len(octets)}\r\n\r\n".encode()
                + octets
            )
        self._seen.add(operation)
        writer.close()


async def test_lost_answers_leave_one_of_each(host: Selfhost) -> None:
    server = await asyncio.start_server(Cut(host), "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/graphql"
    waits = Waits()
    async with Platform(
        url, Secret(host.token), idempotent=IDEMPOTENT_SELFHOST, sleep=waits
    ) as platform:
        organization = await platform.organization("personal")
        host.store.create_app(host.organization, "hello")
        app = await platform.app("hello")
        key = encode_key(public_key(new_key()))
        await platform.add_peer(organization, "p", key, region=None, ephemeral=False)
        builder = await platform.ensure_builder(app, None)
        build = await platform.create_build(app, machine_id=builder.machine_id, strategies=[])
        await platform.finish_build(
            app, build, status="completed", image=None, logs="", timings_ms={}
        )
        release = await platform.create_release(
            app, image=IMAGE, build=build, strategy="rolling", definition={}
        )
        await platform.update_release(release, status="running", metadata={})
        await platform.remove_peer(organization, "p")
        with pytest.raises(PlatformUnavailable, match="not known"):
            await platform.create_app(organization, "second")
    server.close()
    await server.wait_closed()
    assert len(waits.seconds) == 9
    row = host.store.app("hello")
    assert [one.version for one in host.store.releases(row)] == [1]
    assert host.runner.begun == [("hello", 1)]
    assert host.store.peers() == []
    assert host.store.app("second").name == "second"


# --- releases


@pytest.mark.parametrize("image", ["hello:latest", "hello@sha256:00"])
async def test_a_release_is_pinned(host: Selfhost, image: str) -> None:
    async with host.platform() as platform:
        app = await platform.create_app(await platform.organization(None), "hello")
        build = await platform.create_build(app, machine_id="", strategies=[])
        with pytest.raises(PlatformRefused, match="digest"):
            await platform.create_release(
                app, image=image, build=build, strategy="rolling", definition={}
            )
    assert host.runner.begun == []


async def test_a_release_that_is_not_taken_up_has_failed(host: Selfhost) -> None:
    host.runner.broken = True
    async with host.platform() as platform:
        app = await platform.create_app(await platform.organization(None), "hello")
        build = await platform.create_build(app, machine_id="", strategies=[])
        # the first try ends in an error; its repetition finds the release, and begins none again
        release = await platform.create_release(
            app, image=IMAGE, build=build, strategy="rolling", definition={}
        )
    assert (release.status, release.in_progress) == ("failed", False)
    assert release.reason == "it was not taken up"
    assert len(host.store.releases(host.store.app("hello"))) == 1


async def test_a_version_that_there_is_not(host: Selfhost) -> None:
    async with host.platform() as platform:
        app = await platform.create_app(await platform.organization(None), "hello")
        with pytest.raises(PlatformRefused, match="version 7"):
            await platform.release(app, 7)


# --- who may


async def test_wrong_and_expired_tokens(host: Selfhost) -> None:
    async with host.platform("fbt_wrong") as platform:
        with pytest.raises(NotLoggedIn, match="not accept"):
            await platform.nearest_region()
    host.clock.now += 3600
    async with host.platform() as platform:
        with pytest.raises(NotLoggedIn, match="expired"):
            await platform.nearest_region()


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Basic eDp5", "Bearer x,y,z", "FlyV1 fm2_" + "x" * 4000]
)
async def test_headers_without_a_good_token(host: Selfhost, value: str) -> None:
    status, answer = await post(
        host, {"query": "{nearestRegion{code}}"}, headers={"Authorization": value}
    )
    assert (status, codes(answer)) == (200, ["UNAUTHORIZED"])
    assert answer["data"] is None


@pytest.mark.parametrize("form", ["Bearer {}", "FlyV1 {}", "bearer {}", "FlyV1 fm2_abc,{}"])
async def test_both_schemes_and_lists(host: Selfhost, form: str) -> None:
    headers = {"Authorization": form.format(host.token)}
    _, answer = await post(host, {"query": "{nearestRegion{code}}"}, headers=headers)
    assert answer == {"data": {"nearestRegion": {"code": "local"}}}


async def test_a_token_reaches_as_far_as_its_scopes(host: Selfhost) -> None:
    token = host.store.issue_token("ci", lifetime_s=60, scopes=["build"])
    async with host.platform(token) as platform:
        with pytest.raises(NotAllowed, match="app"):
            await platform.create_app(await platform.organization(None), "hello")
    assert [row.outcome for row in host.store.audited()] == [
        "refused: The token's scopes do not hold 'app'."
    ]


async def test_another_organization_is_not_there(host: Selfhost) -> None:
    other = host.store.ensure_organization("other")
    host.store.create_app(host.organization, "hello")
    token = host.store.issue_token("x", lifetime_s=60, organization=other)
    async with host.platform() as mine, host.platform(token) as platform:
        app = await mine.app("hello")
        build = await mine.create_build(app, machine_id="", strategies=[])
        release = await mine.create_release(
            app, image=IMAGE, build=build, strategy="rolling", definition={}
        )
        assert (await platform.organization(None)).slug == "other"
        with pytest.raises(AppUnknown):
            await platform.app("hello")
        with pytest.raises(AppUnknown):
            await platform.ensure_builder(app, None)
        with pytest.raises(AppUnknown):
            await platform.update_release(release, status="failed", metadata={})
        with pytest.raises(AppUnknown):
            await platform.create_app(app.organization, "mine")


async def test_every_mutation_is_written_down(host: Selfhost) -> None:
    async with host.platform() as platform:
        organization = await platform.organization(None)
        await platform.create_app(organization, "hello")
        with pytest.raises(PlatformRefused):
            await platform.create_app(organization, "hello")
        with pytest.raises(PlatformRefused):
            await platform.create_app(organization, "BAD")
        host.gateway.broken = True
        with pytest.raises(PlatformUnavailable):
            await platform.add_peer(
                organization, "p", encode_key(GATEWAY_KEY), region=None, ephemeral=False
            )
    rows = host.store.audited()
    seen = [(row.mutation, row.subject, row.outcome.partition(":")[0]) for row in rows]
    assert seen[:3] == [
        ("createApp", "hello", "done"),
        ("createApp", "hello", "refused"),
        ("createApp", "BAD", "refused"),
    ]
    assert set(seen[3:]) == {("addWireGuardPeer", "p", "failed")}
    assert all(row.request_id and row.client_mutation_id and row.token_id for row in rows)


# --- certificates


def ssh_key() -> str:
    public = Ed25519PrivateKey.generate().public_key()
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


async def test_a_certificate_is_signed_for_names_and_hours(host: Selfhost) -> None:
    key = ssh_key()
    host.store.create_app(host.organization, "hello")
    async with host.platform() as platform:
        line = await platform.issue_certificate(
            await platform.organization(None),
            public_key=key,
            principals=["root", "fly"],
            apps=["hello"],
            valid_hours=2,
        )
    certificate = load_ssh_public_identity(line.encode())
    assert isinstance(certificate, SSHCertificate)
    certificate.verify_cert_signature()
    assert certificate.valid_principals == [b"root", b"fly"]
    assert certificate.valid_before == host.clock.now + 2 * 3600
    assert certificate.valid_after < host.clock.now
    signed_by = certificate.signature_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    assert signed_by.decode() == authority_line(host.store)
    assert authority(host.store).public_key() == certificate.signature_key()


@pytest.mark.skipif(which("ssh-keygen") is None, reason="ssh-keygen is not installed")
async def test_openssh_reads_the_certificate(host: Selfhost, tmp_path: Path) -> None:
    async with host.platform() as platform:
        line = await platform.issue_certificate(
            await platform.organization(None), public_key=ssh_key(), principals=["root"]
        )
    path = tmp_path / "id-cert.pub"
    path.write_text(line)
    program = which("ssh-keygen")
    assert program is not None
    read = await asyncio.to_thread(
        subprocess.run,
        [program, "-L", "-f", str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert "user certificate" in read.stdout
    assert "permit-pty" in read.stdout
    assert "root" in read.stdout


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"valid_hours": 0}, "validHours"),
        ({"valid_hours": 73}, "validHours"),
        ({"principals": []}, "principals"),
        ({"principals": ["a,b"]}, "principal"),
        ({"principals": ["a\nb"]}, "principal"),
        ({"public_key": "ssh-ed25519 AAAA"}, "publicKey"),
        ({"public_key": ""}, "publicKey"),
        ({"apps": ["nothing"]}, "Could not find App"),
    ],
)
async def test_a_certificate_that_is_not_issued(
    host: Selfhost, changed: dict[str, object], words: str
) -> None:
    given = {"public_key": ssh_key(), "principals": ["root"], "apps": [], "valid_hours": 1}
    async with host.platform() as platform:
        organization = await platform.organization(None)
        with pytest.raises((PlatformRefused, AppUnknown), match=words):
            await platform.issue_certificate(organization, **{**given, **changed})  # type: ignore[arg-type]
