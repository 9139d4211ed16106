from builder_orch.tunnel.config import PeerConfig, TunnelConfig
from builder_orch.tunnel.driver import Dial, DialBlocking, Tunnel, open_tunnel
from builder_orch.tunnel.hosted import open_hosted_tunnel

__all__ = [
    "Dial",
    "DialBlocking",
    "PeerConfig",
    "Tunnel",
    "TunnelConfig",
    "open_hosted_tunnel",
    "open_tunnel",
]
