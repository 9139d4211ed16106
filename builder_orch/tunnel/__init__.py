"""User-mode WireGuard with a TCP/IPv6 stack of its own, usable alone: no interface, no root."""

from builder_orch.tunnel.config import PeerConfig, TunnelConfig
from builder_orch.tunnel.driver import Dial, DialBlocking, Tunnel, open_tunnel

__all__ = ["Dial", "DialBlocking", "PeerConfig", "Tunnel", "TunnelConfig", "open_tunnel"]
