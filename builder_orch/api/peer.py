"""Our end of a tunnel: a key pair made here, and what the platform granted for it."""

from ipaddress import IPv6Address, IPv6Network
from typing import Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from builder_orch.api.models import Peer, split_endpoint
from builder_orch.tunnel.config import PeerConfig, PrivateKey, PublicKey, TunnelConfig

ORGANIZATION_PREFIX: Final = 48
"""Bits of a peer's address that are its organization's network."""
DNS_HOST: Final = 3
"""The resolver's last octet in that network."""


def new_key() -> PrivateKey:
    """A private key that leaves this process only into a file of our own."""
    return PrivateKey(X25519PrivateKey.generate().private_bytes_raw())


def public_key(private_key: PrivateKey) -> PublicKey:
    """The half that the platform is given."""
    own = X25519PrivateKey.from_private_bytes(private_key)
    return PublicKey(own.public_key().public_bytes_raw())


def organization_network(address: IPv6Address) -> IPv6Network:
    """The /48 around an address inside."""
    return IPv6Network((address, ORGANIZATION_PREFIX), strict=False)


def tunnel_config(private_key: PrivateKey, peer: Peer) -> TunnelConfig:
    """Our address, the gateway as the only peer, the organization's /48 behind it and its resolver.

    Nothing the platform answers can widen the routes: they follow from the address alone.
    """
    network = organization_network(peer.address)
    # `local` because the platform's address was judged when its answer was parsed
    endpoint = split_endpoint(peer.endpoint, local=True)
    gateway = PeerConfig(peer.gateway_key, (network,), endpoint, door=peer.door)
    return TunnelConfig(
        private_key=private_key,
        address=peer.address,
        peers=(gateway,),
        dns=network[DNS_HOST],
    )
