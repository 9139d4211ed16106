"""Peers and machines as a platform lists them, and to whom."""

import json
from pathlib import Path

import pytest

from builder_orch.api.client import Platform
from builder_orch.api.models import Organization, Secret
from builder_orch.errors import AppUnknown, BuilderOrchError, PlatformRefused
from builder_orch.tunnel.config import Door, PublicKey, encode_key
from tests.api.rig import answer, octets, scripted, selfhost
from tests.api.test_client import PERSONAL

KEY = PublicKey(bytes(range(1, 33)))


async def test_the_peers_of_an_organization_are_listed_to_those_who_reach_it(
    tmp_path: Path,
) -> None:
    async with selfhost(tmp_path) as host, host.platform() as platform:
        mine = await platform.organization(None)
        other = host.store.ensure_organization("other")
        theirs = Organization(other.id, "other", "Other")
        made = await platform.add_peer(
            mine, "laptop", encode_key(KEY), region=None, ephemeral=False
        )
        (peer,) = await platform.peers(mine)
        assert (peer.name, peer.address, peer.key) == ("laptop", made.address, KEY)
        assert await platform.peers(theirs) == []
        narrow = host.store.issue_token("narrow", lifetime_s=60, organization=other)
        async with host.platform(narrow) as stranger:
            assert await stranger.peers(theirs) == []
            with pytest.raises(AppUnknown, match="Could not find Organization"):
                await stranger.peers(mine)


@pytest.mark.parametrize(
    ("said", "door"),
    [
        ({"wgtcpd": {"port": 4433, "spkiSha256": "ab" * 32}, "cost": 1}, Door(4433, b"\xab" * 32)),
        ({"wgtcpd": {"port": "4433", "spkiSha256": "ab" * 32}}, None),
        ({"wgtcpd": [1]}, None),
        (["wgtcpd"], None),
        ("\x1b[2J", None),
        (None, None),
    ],
)
async def test_extensions_that_are_not_understood_are_passed_over(
    said: object, door: Door | None
) -> None:
    peer = {"peerip": "fdaa::1:2", "endpointip": "127.0.0.1:4", "pubkey": encode_key(KEY)}
    body = {"data": {"addWireGuardPeer": peer}, "extensions": said}
    async with (
        scripted(octets(json.dumps(body).encode())) as server,
        Platform(server.url, Secret("t")) as platform,
    ):
        made = await platform.add_peer(PERSONAL, "a", encode_key(KEY), region=None, ephemeral=True)
    assert (made.endpoint, made.door) == ("127.0.0.1:4", door)


async def test_the_state_of_a_machine_is_what_the_platform_says_of_it(tmp_path: Path) -> None:
    async with selfhost(tmp_path) as host, host.platform() as platform:
        app = await platform.create_app(await platform.organization(None), "hello")
        builder = await platform.ensure_builder(app, None)
        assert await platform.machine_state(builder.app_name, builder.machine_id) == "started"
        assert await platform.machine_state(builder.app_name, "another") == ""
        with pytest.raises(BuilderOrchError):
            await platform.machine_state("nothing", "another")


@pytest.mark.parametrize(
    "peer",
    [
        {"id": "p", "name": "a\x1b[2J", "peerip": "fdaa::1", "pubkey": encode_key(KEY)},
        {"id": "p", "name": "a", "peerip": "2001:db8::1", "pubkey": encode_key(KEY)},
        {"id": "p", "name": "a", "peerip": "fdaa::1", "pubkey": "short"},
        {"id": "p", "name": "a", "peerip": "fdaa::1"},
    ],
)
async def test_a_list_that_is_none_is_refused(peer: dict[str, str]) -> None:
    body = {"organization": {"wireGuardPeers": {"nodes": [{**peer, "region": "ams"}]}}}
    async with scripted(answer(body)) as server, Platform(server.url, Secret("t")) as platform:
        with pytest.raises(PlatformRefused, match="wireGuardPeers"):
            await platform.peers(PERSONAL)
