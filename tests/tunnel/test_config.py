"""wg-quick text in and out."""

from ipaddress import IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.tunnel.config import (
    Door,
    PeerConfig,
    PrivateKey,
    PublicKey,
    TunnelConfig,
    decode_key,
    encode_key,
)

KEY = bytes(range(32))
TEXT = f"""
# made by hand
[Interface]
PrivateKey = {encode_key(KEY)}
Address = 10.0.0.2/32, fdaa:0:1::2/120
DNS = 9.9.9.9, fdaa:0:1::3
PostUp = true

[Peer]
PublicKey = {encode_key(KEY[::-1])}
AllowedIPs = 0.0.0.0/0, fdaa:0:1::/48
Endpoint = [2001:db8::1]:51820
PersistentKeepalive = 25
"""


def test_the_ipv6_part_of_a_wg_quick_file_is_taken() -> None:
    config = TunnelConfig.parse(TEXT)
    assert config.address == IPv6Address("fdaa:0:1::2")
    assert config.dns == IPv6Address("fdaa:0:1::3")
    assert config.mtu == 1420
    (peer,) = config.peers
    assert peer.public_key == KEY[::-1]
    assert peer.allowed == (IPv6Network("fdaa:0:1::/48"),)
    assert peer.endpoint == ("2001:db8::1", 51820)
    assert peer.keepalive_s == 25


def test_repeated_lines_add_up() -> None:
    text = TEXT.replace("AllowedIPs = 0.0.0.0/0,", "AllowedIPs = fdaa:9::/48\nAllowedIPs =")
    assert [str(net) for net in TunnelConfig.parse(text).peers[0].allowed] == [
        "fdaa:9::/48",
        "fdaa:0:1::/48",
    ]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("PrivateKey = ", "PrivateKey = x", "line 4"),
        ("51820", "99999", "line 12"),
        ("[Peer]", "[Pear]", "unknown section"),
        ("Address = 10.0.0.2/32, fdaa:0:1::2/120", "Address = 10.0.0.2/32", "IPv6 Address"),
        ("Address = 10.0.0.2/32, fdaa:0:1::2/120", "", "needs PrivateKey and Address"),
        ("PublicKey", "Publickey2", "needs PublicKey"),
        ("PostUp = true", "MTU = 500", "1280"),
        ("PostUp = true", "nonsense", "Name = value"),
        ("PersistentKeepalive = 25", "WebSocket = 443", "line 13"),
        ("PersistentKeepalive = 25", f"WebSocket = 0 {'ab' * 32}", "line 13"),
        ("PersistentKeepalive = 25", f"WebSocket = 443 {'ab' * 31}", "line 13: a WebSocket"),
    ],
)
def test_a_wrong_line_is_named(old: str, new: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TunnelConfig.parse(TEXT.replace(old, new))


networks = st.builds(
    lambda address, length: IPv6Network((address, length), strict=False),
    st.integers(0, 2**128 - 1),
    st.integers(0, 128),
)
keys = st.binary(min_size=32, max_size=32)
peers = st.builds(
    PeerConfig,
    public_key=keys.map(PublicKey),
    allowed=st.lists(networks, max_size=3).map(tuple),
    endpoint=st.none()
    | st.tuples(st.sampled_from(["::1", "192.0.2.1", "gw.example"]), st.integers(0, 65535)),
    keepalive_s=st.none() | st.integers(1, 65535).map(float),
    preshared_key=keys,
    door=st.none() | st.builds(Door, st.integers(1, 65535), keys),
)
configs = st.builds(
    TunnelConfig,
    private_key=keys.map(PrivateKey),
    address=st.integers(0, 2**128 - 1).map(IPv6Address),
    peers=st.lists(peers, max_size=3).map(tuple),
    dns=st.none() | st.integers(0, 2**128 - 1).map(IPv6Address),
    listen_port=st.integers(0, 65535),
    mtu=st.integers(1280, 65535),
)


@given(configs)
def test_what_is_dumped_is_read_back(config: TunnelConfig) -> None:
    assert TunnelConfig.parse(config.dump()) == config


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        TunnelConfig.parse(text)
    except ValueError:
        return


def test_no_key_is_ever_shown() -> None:
    shown = repr(TunnelConfig.parse(TEXT.replace("PostUp = true", "")))
    assert encode_key(KEY) not in shown
    assert repr(KEY) not in shown


def test_keys_have_32_octets() -> None:
    with pytest.raises(ValueError, match="has 31"):
        decode_key(encode_key(KEY[:31]))
