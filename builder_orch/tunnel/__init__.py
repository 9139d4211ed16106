"""User-mode WireGuard with a TCP/IPv6 stack of its own, usable alone: no interface, no root."""

from importlib import import_module

_PUBLIC = {
    "Dial": "driver",
    "DialBlocking": "driver",
    "PeerConfig": "config",
    "Tunnel": "driver",
    "TunnelConfig": "config",
    "open_tunnel": "driver",
}

__all__ = ["Dial", "DialBlocking", "PeerConfig", "Tunnel", "TunnelConfig", "open_tunnel"]


def __getattr__(name: str) -> object:
    """Import on first use: a command that only writes a configuration needs no event loop."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
