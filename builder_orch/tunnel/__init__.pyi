from builder_orch.tunnel.config import PeerConfig, TunnelConfig
from builder_orch.tunnel.driver import Dial, DialBlocking, Tunnel, open_tunnel
from builder_orch.tunnel.hosted import open_hosted_tunnel
from builder_orch.tunnel.transport import open_connection

__all__ = [
    "Dial",
    "DialBlocking",
    "PeerConfig",
    "Tunnel",
    "TunnelConfig",
    "open_connection",
    "open_hosted_tunnel",
    "open_tunnel",
]
