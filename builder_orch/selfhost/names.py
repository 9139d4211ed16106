"""Who has which address inside an organization's network, and the DNS that says so.

An organization with the number n owns fdaa:n/48 (n fills the second and third group). Within it
::3 is the gateway itself, which resolves; peers, builders and machines each have a /64, and each of
them a /120 there, so that one may hold further addresses of its own.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv6Address, IPv6Network
from types import MappingProxyType
from typing import Final

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.rrset
from dns.rdtypes.ANY.TXT import TXT

TTL_S: Final = 5
"""Machines come and go with every release."""
UDP_LIMIT: Final = 1232
"""Octets of an answer over UDP: what fits the smallest IPv6 packet (DNS flag day 2020)."""
PLAIN_UDP_LIMIT: Final = 512
"""The same for a query without EDNS (RFC 1035 section 4.2.1)."""
STREAM_LIMIT: Final = 65535
HEADER_LEN: Final = 12
TXT_PART: Final = 255

_PRIVATE: Final = int(IPv6Address("fdaa::"))
_GATEWAY: Final = 3
_PEERS, _BUILDERS, _MACHINES = 1, 2, 3
_FIRST_IN_120: Final = 2
_ROOT: Final = dns.name.from_text("internal.")
_API: Final = dns.name.from_text("_api.internal.")
_APPS: Final = dns.name.from_text("_apps.internal.")

Records = dict[dns.rdatatype.RdataType, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Plan:
    """The addresses of the organization with this number (1 to 2**32 - 1)."""

    number: int

    def __post_init__(self) -> None:
        if not 1 <= self.number < 1 << 32:
            raise ValueError(f"{self.number} is not an organization's number")

    @property
    def network(self) -> IPv6Network:
        """The /48 that is routed into the organization's tunnels."""
        return IPv6Network((_PRIVATE | self.number << 80, 48))

    @property
    def gateway(self) -> IPv6Address:
        """The gateway's own address; it resolves names, and answers as `_api.internal`."""
        return self.network[_GATEWAY]

    dns = gateway

    def peer(self, index: int) -> IPv6Address:
        """The address of the peer with this index (1 to 2**32 - 1)."""
        return self._host(_PEERS, index)

    def builder(self, index: int) -> IPv6Address:
        """The address of a builder machine."""
        return self._host(_BUILDERS, index)

    def machine(self, index: int) -> IPv6Address:
        """The address of a machine that runs a release."""
        return self._host(_MACHINES, index)

    def _host(self, kind: int, index: int) -> IPv6Address:
        if not 1 <= index < 1 << 32:
            raise ValueError(f"{index} is not the index of an address")
        return self.network[kind << 64 | index << 8 | _FIRST_IN_120]


def own_network(address: IPv6Address) -> IPv6Network:
    """The /120 of a peer, builder or machine: all that it may send from."""
    return IPv6Network((address, 120), strict=False)


@dataclass(frozen=True, slots=True)
class Host:
    """A machine that answers under its app's names."""

    machine_id: str
    region: str
    address: IPv6Address


@dataclass(frozen=True, slots=True)
class Zone:
    """What one organization's resolver knows."""

    gateway: IPv6Address
    apps: Mapping[str, tuple[Host, ...]] = field(default_factory=lambda: MappingProxyType({}))


def answer(query: bytes, zone: Zone, *, stream: bool = False) -> bytes:
    """The answer to one DNS message; b"" where none may be sent (RFC 1035 section 4.1).

    Over UDP it is truncated at the smaller of 1232 octets and what the query says it takes;
    `stream` is for TCP, without the length in front.
    """
    if len(query) < HEADER_LEN or query[2] & 0x80:
        # too short to have an id, or itself an answer: replying could go on for ever
        return b""
    try:
        message = dns.message.from_wire(query)
    except (dns.exception.DNSException, ValueError):
        return _bare(query, dns.rcode.FORMERR)
    if message.opcode() != dns.opcode.QUERY:
        return _bare(query, dns.rcode.NOTIMP)
    if len(message.question) != 1 or message.had_tsig:
        return _bare(query, dns.rcode.FORMERR)
    reply = dns.message.make_response(message, our_payload=UDP_LIMIT, pad=0)
    if message.edns > 0:
        reply.set_rcode(dns.rcode.BADVERS)
    else:
        _fill(reply, message.question[0], zone)
    limit = STREAM_LIMIT
    if not stream:
        asked = message.payload if message.edns >= 0 else PLAIN_UDP_LIMIT
        limit = min(UDP_LIMIT, max(PLAIN_UDP_LIMIT, asked))
    return reply.to_wire(max_size=limit, prefer_truncation=True)


def _bare(query: bytes, rcode: dns.rcode.Rcode) -> bytes:
    """A header alone: for what could not be understood, nothing of it is sent back."""
    flags = (query[2] & 0x79) | 0x80  # QR, and the query's opcode and RD
    return query[:2] + bytes((flags, rcode)) + bytes(8)


def _fill(reply: dns.message.Message, question: dns.rrset.RRset, zone: Zone) -> None:
    name, kind = question.name, question.rdtype
    if question.rdclass != dns.rdataclass.IN or not name.is_subdomain(_ROOT):
        reply.set_rcode(dns.rcode.REFUSED)
        return
    reply.flags |= dns.flags.AA
    records = _records(name, zone)
    if records is None:
        reply.set_rcode(dns.rcode.NXDOMAIN)
        return
    for rdtype, texts in records.items():
        if texts and kind in {rdtype, dns.rdatatype.ANY}:
            reply.answer.append(_rrset(name, rdtype, texts))


def _rrset(
    name: dns.name.Name, rdtype: dns.rdatatype.RdataType, texts: tuple[str, ...]
) -> dns.rrset.RRset:
    rrset = dns.rrset.RRset(name, dns.rdataclass.IN, rdtype)
    for text in texts:
        if rdtype == dns.rdatatype.AAAA:
            rrset.add(dns.rdata.from_text(dns.rdataclass.IN, rdtype, text), TTL_S)
        else:
            octets = text.encode()
            parts = [octets[i : i + TXT_PART] for i in range(0, len(octets), TXT_PART)]
            rrset.add(TXT(dns.rdataclass.IN, rdtype, parts or [b""]), TTL_S)
    return rrset


def _records(name: dns.name.Name, zone: Zone) -> Records | None:
    """What there is under a name; None when there is no such name."""
    if name == _API:
        return _aaaa([zone.gateway])
    if name == _APPS:
        return {dns.rdatatype.TXT: (",".join(sorted(zone.apps)),)}
    if name == _ROOT:
        return {}
    labels = [label.decode("latin-1").lower() for label in name.relativize(_ROOT).labels]
    hosts = zone.apps.get(labels[-1])
    if hosts is None:
        return None
    match labels:
        case [_]:
            return _aaaa([host.address for host in hosts])
        case ["regions", _]:
            return {dns.rdatatype.TXT: (",".join(sorted({host.region for host in hosts})),)}
        case ["vm", _]:
            return {}
        case [machine, "vm", _]:
            return _some(host.address for host in hosts if host.machine_id.lower() == machine)
        case [region, _]:
            return _some(host.address for host in hosts if host.region.lower() == region)
        case _:
            return None


def _some(addresses: Iterator[IPv6Address]) -> Records | None:
    found = list(addresses)
    return _aaaa(found) if found else None


def _aaaa(addresses: list[IPv6Address]) -> Records:
    return {dns.rdatatype.AAAA: tuple(str(address) for address in addresses)}
