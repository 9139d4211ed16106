"""Addresses that never meet, and a resolver that garbage cannot upset."""

from ipaddress import IPv6Address, IPv6Network

import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdatatype
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dns import DNS

from builder_orch.selfhost.names import (
    PLAIN_UDP_LIMIT,
    TTL_S,
    UDP_LIMIT,
    Host,
    Plan,
    Zone,
    answer,
    own_network,
)

PLAN = Plan(0x18)
HELLO = (
    Host("m1", "local", PLAN.machine(1)),
    Host("m2", "ams", PLAN.machine(2)),
)
ZONE = Zone(PLAN.gateway, {"hello": HELLO, "empty": (), "fly-builder-24": ()})
CROWD = tuple(Host(f"m{i}", "local", PLAN.machine(i)) for i in range(1, 101))


def ask(
    name: str,
    kind: str = "AAAA",
    *,
    zone: Zone = ZONE,
    payload: int | None = UDP_LIMIT,
    stream: bool = False,
    rdclass: str = "IN",
) -> dns.message.Message:
    query = dns.message.make_query(name, kind, rdclass)
    if payload is not None:
        query.use_edns(0, 0, payload)
    octets = answer(query.to_wire(), zone, stream=stream)
    reply = dns.message.from_wire(octets)
    assert query.is_response(reply)
    return reply


def texts(reply: dns.message.Message) -> list[str]:
    return [str(record) for rrset in reply.answer for record in rrset]


# --- the plan


def test_the_plan_of_one_organization() -> None:
    assert PLAN.network == IPv6Network("fdaa:0:18::/48")
    assert PLAN.gateway == PLAN.dns == IPv6Address("fdaa:0:18::3")
    assert PLAN.peer(1) == IPv6Address("fdaa:0:18:1::102")
    assert PLAN.builder(1) == IPv6Address("fdaa:0:18:2::102")
    assert PLAN.machine(1) == IPv6Address("fdaa:0:18:3::102")
    assert Plan(0x12345).network == IPv6Network("fdaa:1:2345::/48")


NUMBERS = st.integers(1, 2**32 - 1)
KINDS = st.sampled_from(["peer", "builder", "machine"])


@given(NUMBERS, KINDS, NUMBERS, NUMBERS, KINDS, NUMBERS)
def test_no_two_share_a_network(
    number: int, kind: str, index: int, number2: int, kind2: str, index2: int
) -> None:
    one: IPv6Address = getattr(Plan(number), kind)(index)
    other: IPv6Address = getattr(Plan(number2), kind2)(index2)
    same = (number, kind, index) == (number2, kind2, index2)
    assert (own_network(one) == own_network(other)) == same
    assert one in Plan(number).network
    assert (other in Plan(number).network) == (number == number2)
    assert Plan(number).gateway not in own_network(one)


@pytest.mark.parametrize("number", [0, -1, 2**32])
def test_numbers_that_no_address_has(number: int) -> None:
    with pytest.raises(ValueError, match="number"):
        Plan(number)
    with pytest.raises(ValueError, match="index"):
        PLAN.peer(number)


# --- names


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("_api.internal", "AAAA", [str(PLAN.gateway)]),
        ("hello.internal", "AAAA", [str(host.address) for host in HELLO]),
        ("HeLLo.InterNal", "AAAA", [str(host.address) for host in HELLO]),
        ("m2.vm.hello.internal", "AAAA", [str(HELLO[1].address)]),
        ("ams.hello.internal", "AAAA", [str(HELLO[1].address)]),
        ("regions.hello.internal", "TXT", ['"ams,local"']),
        ("_apps.internal", "TXT", ['"empty,fly-builder-24,hello"']),
        ("_apps.internal", "ANY", ['"empty,fly-builder-24,hello"']),
        ("m1.vm.hello.internal", "ANY", [str(HELLO[0].address)]),
        ("empty.internal", "AAAA", []),
        ("hello.internal", "A", []),
        ("hello.internal", "TXT", []),
        ("vm.hello.internal", "AAAA", []),
        ("internal", "ANY", []),
    ],
)
def test_a_name_that_there_is(name: str, kind: str, expected: list[str]) -> None:
    reply = ask(name, kind)
    assert reply.rcode() == dns.rcode.NOERROR
    assert reply.flags & dns.flags.AA
    assert sorted(texts(reply)) == sorted(expected)
    assert all(rrset.ttl == TTL_S for rrset in reply.answer)


@pytest.mark.parametrize(
    "name",
    [
        "nothing.internal",
        "m9.vm.hello.internal",
        "m1.vm.empty.internal",
        "fra.hello.internal",
        "a.b.c.hello.internal",
        "hello.vm.internal",
        "_peer.internal",
    ],
)
def test_a_name_that_there_is_not(name: str) -> None:
    reply = ask(name, "ANY")
    assert reply.rcode() == dns.rcode.NXDOMAIN
    assert not reply.answer


@pytest.mark.parametrize("name", ["example.com", ".", "internal.example", "notinternal"])
def test_other_peoples_names_are_refused(name: str) -> None:
    assert ask(name).rcode() == dns.rcode.REFUSED


def test_other_classes_are_refused() -> None:
    assert ask("hello.internal", "TXT", rdclass="CH").rcode() == dns.rcode.REFUSED


def test_long_lists_of_apps_are_cut_into_strings_that_join() -> None:
    zone = Zone(PLAN.gateway, {f"app-with-a-long-name-{i:03}": () for i in range(30)})
    (rrset,) = ask("_apps.internal", "TXT", zone=zone).answer
    joined = b"".join(rrset[0].strings).decode()
    assert joined.split(",") == sorted(zone.apps)


# --- sizes


@pytest.mark.parametrize(
    ("payload", "limit"),
    [(None, PLAIN_UDP_LIMIT), (100, PLAIN_UDP_LIMIT), (600, 600), (65535, UDP_LIMIT)],
)
def test_what_does_not_fit_a_datagram_is_truncated(payload: int | None, limit: int) -> None:
    query = dns.message.make_query("crowd.internal", "AAAA")
    if payload is not None:
        query.use_edns(0, 0, payload)
    zone = Zone(PLAN.gateway, {"crowd": CROWD})
    octets = answer(query.to_wire(), zone)
    assert len(octets) <= limit
    assert dns.message.from_wire(octets).flags & dns.flags.TC


def test_a_stream_carries_it_all() -> None:
    reply = ask("crowd.internal", zone=Zone(PLAN.gateway, {"crowd": CROWD}), stream=True)
    assert not reply.flags & dns.flags.TC
    assert len(texts(reply)) == len(CROWD)


# --- what is no question


def test_an_answer_is_never_answered() -> None:
    query = dns.message.make_query("hello.internal", "AAAA")
    assert answer(answer(query.to_wire(), ZONE), ZONE) == b""
    assert answer(b"\x12\x34\x81", ZONE) == b""


def test_other_operations_are_not_implemented() -> None:
    query = dns.message.make_query("hello.internal", "AAAA")
    query.set_opcode(dns.opcode.STATUS)
    reply = dns.message.from_wire(answer(query.to_wire(), ZONE))
    assert reply.rcode() == dns.rcode.NOTIMP
    assert reply.id == query.id


@pytest.mark.parametrize("count", [0, 2])
def test_one_question_at_a_time(count: int) -> None:
    query = dns.message.make_query("hello.internal", "AAAA")
    query.question *= count
    if count == 2:
        query.find_rrset(
            query.question,
            dns.name.from_text("empty.internal"),
            query.question[0].rdclass,
            dns.rdatatype.AAAA,
            create=True,
            force_unique=True,
        )
    assert dns.message.from_wire(answer(query.to_wire(), ZONE)).rcode() == dns.rcode.FORMERR


def test_a_later_edns_is_answered_with_the_version_we_have() -> None:
    query = dns.message.make_query("hello.internal", "AAAA")
    query.use_edns(1)
    reply = dns.message.from_wire(answer(query.to_wire(), ZONE))
    assert reply.rcode() == dns.rcode.BADVERS
    assert reply.edns == 0
    assert not reply.answer


def test_garbage_after_the_header_is_a_format_error_under_its_id() -> None:
    octets = answer(b"\xab\xcd\x01\x00\x00\x01" + b"\xff" * 20, ZONE)
    reply = dns.message.from_wire(octets)
    assert reply.id == 0xABCD
    assert reply.rcode() == dns.rcode.FORMERR


GOOD = dns.message.make_query("m1.vm.hello.internal", "AAAA", use_edns=True).to_wire()


@given(
    st.binary(max_size=600)
    | st.binary(max_size=80).map(lambda tail: GOOD[:4] + tail)
    | st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)).map(
        lambda change: GOOD[: change[0]] + bytes([change[1]]) + GOOD[change[0] + 1 :]
    )
)
def test_garbage_gets_an_answer_or_none(octets: bytes) -> None:
    for stream in (False, True):
        reply = answer(octets, ZONE, stream=stream)
        if reply:
            assert reply[:2] == octets[:2]
            assert reply[2] & 0x80
            assert stream or len(reply) <= UDP_LIMIT
            dns.message.from_wire(reply)


def test_scapy_reads_the_same_answer() -> None:
    query = dns.message.make_query("hello.internal", "AAAA")
    judged = DNS(answer(query.to_wire(), ZONE))
    assert judged.qr == judged.aa == 1
    # any order is right: dnspython deals an RRset out shuffled
    assert {record.rdata for record in judged.an} == {str(host.address) for host in HELLO}
