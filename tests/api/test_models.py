"""Answers of platforms that lie, and of those that do not."""

import copy
import pickle
from ipaddress import IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.api.models import (
    NODE_LIMIT,
    Answer,
    App,
    Builder,
    Organization,
    Peer,
    Release,
    Secret,
    is_printable,
    printable,
    split_endpoint,
    told_door,
)
from builder_orch.errors import PlatformRefused
from builder_orch.tunnel.config import Door, encode_key

KEY = bytes(range(32))
PEER: dict[str, object] = {
    "peerip": "fdaa:0:18:a7b:7d:0:a:102",
    "endpointip": "203.0.113.7",
    "pubkey": encode_key(KEY),
}


def peer(**changed: object) -> Peer:
    # documentation addresses are not global; 8.8.8.8 stands for somebody's gateway
    fields = {**PEER, "endpointip": "8.8.8.8", **changed}
    return Peer.parse(Answer(fields, "AddWireGuardPeer.addWireGuardPeer"))


def test_a_good_peer_is_taken_as_it_is() -> None:
    good = peer()
    assert good.address == IPv6Address("fdaa:0:18:a7b:7d:0:a:102")
    assert good.endpoint == "8.8.8.8"
    assert good.gateway_key == KEY


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("endpointip", "127.0.0.1"),
        ("endpointip", "localhost"),
        ("endpointip", "169.254.169.254"),
        ("endpointip", "10.0.0.1:51820"),
        ("endpointip", "[::1]:51820"),
        ("endpointip", "::ffff:127.0.0.1"),
        ("endpointip", "fe80::1%eth0"),
        ("endpointip", "ff02::1"),
        ("endpointip", "0.0.0.0"),
        ("endpointip", "/etc/passwd"),
        ("endpointip", "../../run/docker.sock"),
        ("endpointip", "http://gw.example/"),
        ("endpointip", "gw.example:0"),
        ("endpointip", "gw.example:70000"),
        ("endpointip", "gw.example:٣"),
        ("endpointip", "0177.1"),
        ("endpointip", ""),
        ("endpointip", None),
        ("endpointip", "gw.example\x1b[2J"),
        ("endpointip", 7),
        ("peerip", "2001:db8::1"),
        ("peerip", "fdab::1"),
        ("peerip", "10.0.0.1"),
        ("peerip", "fdaa::1%lo"),
        ("peerip", "fdaa::/16"),
        ("peerip", "::/0"),
        ("pubkey", encode_key(bytes(32))),
        ("pubkey", encode_key(KEY)[:-4]),
        ("pubkey", "é" * 44),
        ("pubkey", "-" * 44),
    ],
)
def test_a_hostile_peer_is_refused_by_the_field(field: str, value: object) -> None:
    with pytest.raises(PlatformRefused, match=rf"addWireGuardPeer\.{field} ") as caught:
        peer(**{field: value})
    assert is_printable(str(caught.value))


PIN = "ab" * 32
SAID = {"wgtcpd": {"port": 4433, "spkiSha256": PIN}}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def test_a_door_is_what_the_extensions_say() -> None:
    answer = Answer({"peer": {**PEER, "endpointip": "8.8.8.8"}}, "answer", {**SAID, "cost": 3})
    assert Peer.parse(answer.at("peer")).door == Door(4433, bytes.fromhex(PIN))
    assert peer().door is None


@pytest.mark.parametrize(
    "said",
    [
        {"port": 0},
        {"port": 65536},
        {"port": -1},
        {"port": True},
        {"port": "4433"},
        {"port": 4433.0},
        {"port": None},
        {"port": 10**6000},
        {"spkiSha256": ""},
        {"spkiSha256": PIN[2:]},
        {"spkiSha256": PIN + "ab"},
        {"spkiSha256": "x" * 64},
        {"spkiSha256": None},
        {"spkiSha256": [PIN]},
    ],
)
def test_half_a_door_is_none(said: dict[str, object]) -> None:
    assert told_door({"wgtcpd": {"port": 4433, "spkiSha256": PIN, **said}}) is None


@given(
    JSON
    | st.fixed_dictionaries({"wgtcpd": JSON})
    | st.fixed_dictionaries(
        {"wgtcpd": st.fixed_dictionaries({"port": JSON, "spkiSha256": JSON | st.just(PIN)})}
    )
)
def test_whatever_the_extensions_are_the_peer_is_taken(said: object) -> None:
    found = Peer.parse(Answer({**PEER, "endpointip": "8.8.8.8"}, "answer", said))
    assert found.address == IPv6Address("fdaa:0:18:a7b:7d:0:a:102")
    assert found.door is None or (0 < found.door.port < 65536 and len(found.door.pin) == 32)


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("8.8.8.8", ("8.8.8.8", 51820)),
        ("8.8.8.8:443", ("8.8.8.8", 443)),
        ("2606:4700::1", ("2606:4700::1", 51820)),
        ("[2606:4700::1]", ("2606:4700::1", 51820)),
        ("[2606:4700::1]:443", ("2606:4700::1", 443)),
        ("ams1.gateway.example", ("ams1.gateway.example", 51820)),
        ("ams1.gateway.example:1", ("ams1.gateway.example", 1)),
    ],
)
def test_endpoints_with_and_without_a_port(text: str, endpoint: tuple[str, int]) -> None:
    assert split_endpoint(text) == endpoint


def test_only_a_platform_on_this_machine_may_point_to_it() -> None:
    assert split_endpoint("127.0.0.1:40000", local=True) == ("127.0.0.1", 40000)
    assert split_endpoint("[::1]:40000", local=True) == ("::1", 40000)
    assert split_endpoint("localhost:40000", local=True) == ("localhost", 40000)
    for text in ("127.0.0.1:40000", "[::1]:40000", "localhost:40000"):
        with pytest.raises(ValueError, match=r"is not|names"):
            split_endpoint(text)
    for text in ("169.254.169.254", "[::ffff:169.254.169.254]:1", "fe80::1", "ff02::1", "::"):
        with pytest.raises(ValueError, match="gateway"):
            split_endpoint(text, local=True)


@pytest.mark.parametrize("slug", ["a\x1b[2J", "a\n", "a\x00", "a\u202eb", "a\u2028b", "\ud800"])
def test_names_that_would_steer_a_terminal_are_refused(slug: str) -> None:
    answer = Answer({"id": "1", "slug": slug, "name": "n"}, "organization")
    with pytest.raises(PlatformRefused, match=r"organization\.slug holds control") as caught:
        Organization.parse(answer)
    assert slug not in str(caught.value)


def machine(*ips: dict[str, str], state: str = "started") -> dict[str, object]:
    return {"id": "m1", "state": state, "ips": {"nodes": list(ips)}}


def test_a_builder_is_known_by_its_private_address() -> None:
    ips = [
        {"kind": "public", "ip": "2606:4700::1"},
        {"kind": "privatenet", "ip": "fdaa:0:18:1::2"},
    ]
    found = Builder.parse(Answer({"app": {"name": "b"}, "machine": machine(*ips)}, "e"))
    assert found == Builder("b", "m1", "started", IPv6Address("fdaa:0:18:1::2"))


def test_a_builder_without_or_with_a_wrong_address_is_refused() -> None:
    for ips in ([], [{"kind": "public", "ip": "fdaa::2"}], [{"kind": "privatenet", "ip": "::1"}]):
        answer = Answer({"app": {"name": "b"}, "machine": machine(*ips)}, "ensure")
        with pytest.raises(PlatformRefused, match=r"ensure\.machine\.ips"):
            Builder.parse(answer)


def test_a_release_shows_machines_that_run_and_words_without_escapes() -> None:
    release = {
        "id": "r",
        "version": 3,
        "status": "failed",
        "inProgress": False,
        "reason": "it said:\n\x1b[31mno\x1b[0m",
        "imageRef": None,
    }
    one, other = {"kind": "privatenet", "ip": "fdaa::a"}, {"kind": "privatenet", "ip": "fdaa::b"}
    app = {"hostname": None, "machines": {"nodes": [machine(one), machine(other, state="stopped")]}}
    parsed = Release.parse(Answer(release, "r"), Answer(app, "a"))
    assert parsed.addresses == (IPv6Address("fdaa::a"),)
    assert parsed.reason == "it said: [31mno [0m"


def test_a_million_nodes_are_refused_before_they_are_looked_at() -> None:
    nodes = [None] * (NODE_LIMIT + 1)
    with pytest.raises(PlatformRefused, match="more than 1000 items"):
        Answer({"organizations": {"nodes": nodes}}, "Organizations").nodes("organizations")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        [
            "id", "slug", "name", "rawSlug", "type", "organization", "peerip", "endpointip",
            "pubkey", "machine", "app", "ips", "version", "status", "inProgress", "machines",
        ],
        JSON,
    ),
)  # fmt: skip


@given(FIELDS | JSON)
def test_whatever_a_platform_says_only_a_refusal_comes_out(value: object) -> None:
    for parse in (Organization.parse, App.parse, Peer.parse, Builder.parse, Release.parse):
        try:
            parse(Answer(value, "x"))
        except PlatformRefused as refused:
            assert is_printable(str(refused))  # noqa: PT017 (also a parse that succeeds is right)


@given(st.text())
def test_an_endpoint_is_read_or_refused(text: str) -> None:
    try:
        host, port = split_endpoint(text)
    except ValueError:
        return
    assert "/" not in host
    assert 1 <= port <= 65535


@given(st.text(), st.integers(1, 60))
def test_what_is_made_printable_is_printable_and_short(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert is_printable(shown)
    assert len(shown) <= limit


def test_a_secret_is_shown_by_reveal_alone() -> None:
    secret = Secret("canary")
    for shown in (repr(secret), str(secret), f"{secret}", f"{secret:>20}", "%s" % secret):  # noqa: UP031
        assert "canary" not in shown
    assert "canary" not in repr({"token": secret, "in": [secret]})
    assert secret.reveal() == "canary"
    assert secret == Secret("canary")
    assert secret != Secret("other")
    assert not Secret("")
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        copy.copy(secret)
