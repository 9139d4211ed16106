"""User-mode WireGuard with a TCP/IPv6 stack of its own, usable alone: no interface, no root.

The names below are imported when they are first used, so that a process that only hands a
configuration to another does not load the tunnel; `__init__.pyi` has their types.
"""

from importlib import import_module

_HOMES = {
    "Dial": "driver",
    "DialBlocking": "driver",
    "PeerConfig": "config",
    "Tunnel": "driver",
    "TunnelConfig": "config",
    "open_connection": "transport",
    "open_hosted_tunnel": "hosted",
    "open_tunnel": "driver",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)
