"""From what a platform granted to what a tunnel is opened with."""

from ipaddress import IPv6Address, IPv6Network

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from builder_orch.api.models import Peer
from builder_orch.api.peer import new_key, public_key, tunnel_config
from builder_orch.tunnel.config import PublicKey, TunnelConfig

GATEWAY = PublicKey(bytes(range(32)))
ADDRESS = IPv6Address("fdaa:0:18:a7b:7d:0:a:102")


def test_routes_and_resolver_follow_from_the_address_alone() -> None:
    config = tunnel_config(new_key(), Peer(ADDRESS, "8.8.8.8", GATEWAY))
    assert config.address == ADDRESS
    assert config.dns == IPv6Address("fdaa:0:18::3")
    (gateway,) = config.peers
    assert gateway.allowed == (IPv6Network("fdaa:0:18::/48"),)
    assert gateway.public_key == GATEWAY


@pytest.mark.parametrize(
    ("endpoint", "expected"),
    [
        ("8.8.8.8", ("8.8.8.8", 51820)),
        ("127.0.0.1:40000", ("127.0.0.1", 40000)),
        ("[::1]:40000", ("::1", 40000)),
        ("gateway.example", ("gateway.example", 51820)),
    ],
)
def test_the_port_is_the_usual_one_unless_the_platform_says_another(
    endpoint: str, expected: tuple[str, int]
) -> None:
    config = tunnel_config(new_key(), Peer(ADDRESS, endpoint, GATEWAY))
    assert config.peers[0].endpoint == expected


def test_the_text_form_of_a_tunnel_is_read_back_the_same() -> None:
    config = tunnel_config(new_key(), Peer(ADDRESS, "[::1]:40000", GATEWAY))
    assert TunnelConfig.parse(config.dump()) == config


def test_keys_are_new_each_time_and_never_shown() -> None:
    one, other = new_key(), new_key()
    assert one != other
    config = tunnel_config(one, Peer(ADDRESS, "8.8.8.8", GATEWAY))
    assert repr(one) not in repr(config)


def test_two_ends_agree_on_what_the_keys_make() -> None:
    ours, theirs = new_key(), X25519PrivateKey.generate()
    by_us = X25519PrivateKey.from_private_bytes(ours).exchange(theirs.public_key())
    by_them = theirs.exchange(X25519PublicKey.from_public_bytes(public_key(ours)))
    assert by_us == by_them
