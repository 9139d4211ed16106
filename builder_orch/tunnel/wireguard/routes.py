"""Crypto-routing: which peer an inside address belongs to (WireGuard paper, section 2)."""

from collections.abc import Iterable
from ipaddress import IPv6Network
from typing import Generic, TypeVar

Owner = TypeVar("Owner")

CACHED = 4096
"""Addresses remembered; a peer may use any number out of its networks."""


class Routes(Generic[Owner]):
    """Longest prefix first: one dictionary for each prefix length in use, and a cache before them.

    Networks come in very few lengths, so this is as quick as a trie and has nothing to balance.
    """

    def __init__(self) -> None:
        self._tables: dict[int, dict[int, Owner]] = {}
        self._cache: dict[bytes, Owner] = {}

    def add(self, networks: Iterable[IPv6Network], owner: Owner) -> None:
        """Route `networks` to `owner`; a network that was another's moves."""
        for network in networks:
            shift = 128 - network.prefixlen
            if shift not in self._tables:
                self._tables = dict(sorted({**self._tables, shift: {}}.items()))
            self._tables[shift][int(network.network_address) >> shift] = owner
        self._cache.clear()

    def remove(self, networks: Iterable[IPv6Network], owner: Owner) -> None:
        """Take back those of `networks` that still are `owner`'s."""
        for network in networks:
            shift = 128 - network.prefixlen
            table = self._tables.get(shift, {})
            prefix = int(network.network_address) >> shift
            if table.get(prefix) is owner:
                del table[prefix]
                if not table:
                    del self._tables[shift]
        self._cache.clear()

    def find(self, address: bytes) -> Owner | None:
        """Who owns the 16 octets `address`, if anybody does."""
        owner = self._cache.get(address)
        if owner is None:
            owner = self._search(int.from_bytes(address))
            if owner is not None:
                if len(self._cache) >= CACHED:
                    self._cache.clear()
                self._cache[address] = owner
        return owner

    def _search(self, address: int) -> Owner | None:
        for shift, table in self._tables.items():
            owner = table.get(address >> shift)
            if owner is not None:
                return owner
        return None
