"""From a choice to a carrier that is bound or connected."""

import asyncio
import socket
from dataclasses import replace

from builder_orch.errors import TunnelNotUp
from builder_orch.tunnel.carrier import Carrier
from builder_orch.tunnel.carrier.choice import UDP, WEBSOCKET, Choice
from builder_orch.tunnel.carrier.families import UdpFamilies
from builder_orch.tunnel.carrier.memory import Memory
from builder_orch.tunnel.carrier.proxy import Outside, ProxyRefused
from builder_orch.tunnel.carrier.race import RaceCarrier
from builder_orch.tunnel.carrier.udp import UdpCarrier
from builder_orch.tunnel.carrier.upgrade import authority
from builder_orch.tunnel.carrier.websocket import Gate, WebSocketCarrier
from builder_orch.tunnel.config import Door, TunnelConfig
from builder_orch.tunnel.machine import Endpoint

WEBSOCKET_PORT = 443


def gate_of(choice: Choice, host: str, told: Door | None) -> Gate:
    """Where to call at a gateway's host, of which `told` is what its configuration says."""
    if choice.port or told is None:
        return Gate(host, choice.port or WEBSOCKET_PORT, choice.pin)
    return Gate(host, told.port, choice.pin or told.pin)


async def open_carrier(config: TunnelConfig, choice: Choice) -> tuple[TunnelConfig, Carrier]:
    """The carrier, and the configuration with the gateways' names looked up.

    TunnelNotUp when there is no way out at all; what only time can tell is not waited for.
    """
    named = [peer.endpoint for peer in config.peers if peer.endpoint is not None]
    if len(config.peers) != 1 or not named or config.listen_port:
        config = _with([(await _numeric(endpoint))[0] for endpoint in named], config)
        return config, _bound(config)
    if choice.kind == UDP:
        udp = _connected(await _numeric(named[0]))
        return _at(udp, config), udp
    host, _ = named[0]
    gate = gate_of(choice, host, config.peers[0].door)
    if choice.kind == WEBSOCKET:
        return config, WebSocketCarrier(gate, choice.outside, why="asked for")
    try:
        udp = _connected(await _numeric(named[0]))
    except TunnelNotUp as failure:
        if not _has_proxy(gate, choice.outside):
            raise
        # Where everything goes through a proxy, often not even names are known on this side of it.
        return config, WebSocketCarrier(gate, choice.outside, why=f"no UDP: {failure}")
    config = _at(udp, config)
    network = f"{authority(*udp.far)} from {udp.endpoint[0]}" if udp.far else ""
    websocket = WebSocketCarrier(gate, choice.outside)
    memory = Memory(choice.memory)
    return config, RaceCarrier(udp, websocket, memory=memory, network=network)


def _has_proxy(gate: Gate, outside: Outside) -> bool:
    try:
        return outside.proxy_for(gate.host, gate.port) is not None
    except ProxyRefused:
        return False


def _at(udp: UdpCarrier | UdpFamilies, config: TunnelConfig) -> TunnelConfig:
    return _with([udp.far] if udp.far else [], config)


def _with(endpoints: list[Endpoint], config: TunnelConfig) -> TunnelConfig:
    left = iter(endpoints)
    peers = [
        replace(peer, endpoint=next(left)) if peer.endpoint is not None else peer
        for peer in config.peers
    ]
    return replace(config, peers=tuple(peers))


async def _numeric(endpoint: Endpoint) -> list[Endpoint]:
    """The endpoint with its host looked up by the system's resolver: one of each family at most, in
    the resolver's order, the family that this machine should prefer first (RFC 6724).
    """
    host, port = endpoint
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except socket.gaierror as error:
        raise TunnelNotUp(
            f"the gateway's name {host} cannot be resolved: {error.strerror}",
            hint="Check this machine's DNS and network connection.",
        ) from None
    ways: dict[socket.AddressFamily, Endpoint] = {}
    for family, _, _, _, address in found:
        ways.setdefault(family, (str(address[0]), int(address[1])))
    return list(ways.values())


def _connected(ways: list[Endpoint]) -> UdpCarrier | UdpFamilies:
    """Sockets for the families that this machine has a route for."""
    carriers: list[UdpCarrier] = []
    failure = OSError("no address")
    for endpoint in ways:
        try:
            carriers.append(UdpCarrier.connect(endpoint))
        except OSError as error:
            failure = error
    if not carriers:
        raise _no_socket(failure)
    return carriers[0] if len(carriers) == 1 else UdpFamilies(tuple(carriers))


def _bound(config: TunnelConfig) -> UdpCarrier:
    hosts = [peer.endpoint[0] for peer in config.peers if peer.endpoint is not None]
    any_host = "::" if any(":" in host for host in hosts) else "0.0.0.0"  # noqa: S104
    try:
        return UdpCarrier.bind(any_host, config.listen_port)
    except OSError as error:
        raise _no_socket(error) from None


def _no_socket(error: OSError) -> TunnelNotUp:
    return TunnelNotUp(
        f"no UDP socket towards the gateway: {error.strerror}",
        hint="Check this machine's routes; an IPv6 gateway needs IPv6 on this side.",
    )
