"""Longest prefix against a slow model."""

from ipaddress import IPv6Address, IPv6Network
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from builder_orch.tunnel.wireguard.routes import CACHED, Routes

# Few distinct bits, so that prefixes nest and collide.
ADDRESSES = st.integers(0, 255).map(
    lambda bits: IPv6Address(sum(1 << (16 * place) for place in range(8) if bits >> place & 1))
)
NETWORKS = st.builds(
    lambda address, length: IPv6Network((address, length), strict=False),
    ADDRESSES,
    st.sampled_from([0, 1, 16, 32, 48, 63, 64, 65, 112, 120, 127, 128]),
)
STEPS = st.lists(st.tuples(st.booleans(), NETWORKS, st.sampled_from("abcd")), max_size=30)


@settings(max_examples=300, deadline=None)
@given(STEPS, st.lists(ADDRESSES, min_size=1, max_size=10))
def test_the_longest_prefix_wins(
    steps: list[tuple[bool, IPv6Network, str]], addresses: list[IPv6Address]
) -> None:
    routes: Routes[str] = Routes()
    model: dict[IPv6Network, str] = {}
    for adding, network, owner in steps:
        if adding:
            routes.add([network], owner)
            model[network] = owner
        else:
            routes.remove([network], owner)
            if model.get(network) == owner:
                del model[network]
        for address in addresses:
            holding = [known for known in model if address in known]
            best = max(holding, key=lambda known: known.prefixlen, default=None)
            assert routes.find(address.packed) == (None if best is None else model[best])


def test_a_network_moves_to_who_took_it_last() -> None:
    routes: Routes[str] = Routes()
    network = IPv6Network("fd00::/8")
    routes.add([network], "a")
    routes.add([network], "b")
    routes.remove([network], "a")
    assert routes.find(IPv6Address("fd00::1").packed) == "b"


def test_more_addresses_than_are_cached_still_find_their_owner() -> None:
    routes: Routes[str] = Routes()
    routes.add([IPv6Network("fd00::/64")], "a")
    first = int(IPv6Address("fd00::"))
    assert all(routes.find((first + step).to_bytes(16)) == "a" for step in range(2 * CACHED + 10))


def networks(dice: Random) -> IPv6Network:
    """Any network; short prefixes hold many of the others."""
    length = dice.choice([0, 8, 16, 32, 47, 48, 64, 96, 127, 128, dice.randrange(129)])
    return IPv6Network((address(dice), length), strict=False)


def address(dice: Random) -> int:
    """Half of them differ in a few bits only."""
    few = sum(1 << place for place in dice.sample(range(128), 3))
    return 0xFD << 120 ^ (few if dice.random() < 0.5 else dice.getrandbits(128))


def test_a_hundred_thousand_addresses_find_what_a_slow_search_finds() -> None:
    dice = Random(12)
    routes: Routes[str] = Routes()
    model: dict[IPv6Network, str] = {}
    for _ in range(500):
        for _ in range(3):
            network, owner = networks(dice), dice.choice("abcd")
            routes.add([network], owner)
            model[network] = owner
        while len(model) > 60:
            network = dice.choice(list(model))
            routes.remove([network], model.pop(network))
        prefixes = sorted(
            ((net.prefixlen, int(net.network_address) >> 128 - net.prefixlen) for net in model),
            reverse=True,
        )
        for _ in range(200):
            sought = address(dice)
            best = next(
                (
                    IPv6Network((prefix << 128 - length, length))
                    for length, prefix in prefixes
                    if sought >> 128 - length == prefix
                ),
                None,
            )
            assert routes.find(sought.to_bytes(16)) == (None if best is None else model[best])
