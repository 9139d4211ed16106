"""Answers are judged before they are believed."""

from ipaddress import IPv6Address

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.tunnel.dns import Question, is_truncated
from builder_orch.tunnel.failures import NameUnknown, ServerFailed
from builder_orch.tunnel.machine import Malformed


def ask(name: str = "hello.internal") -> Question:
    return Question(name, lambda count: bytes(range(7, 7 + count)))


def answer(question: Question, *records: tuple[str, str, str]) -> dns.message.Message:
    reply = dns.message.make_response(dns.message.from_wire(question.octets))
    for name, kind, value in records:
        reply.answer.append(dns.rrset.from_text(name, 5, "IN", kind, value))
    return reply


def test_addresses_are_read_over_aliases() -> None:
    question = ask()
    reply = answer(
        question,
        ("hello.internal.", "CNAME", "other.internal."),
        ("other.internal.", "AAAA", "fdaa::7"),
    )
    assert question.addresses(question.judge(reply.to_wire())) == [IPv6Address("fdaa::7")]


def test_an_alias_loop_ends() -> None:
    question = ask()
    reply = answer(
        question,
        ("hello.internal.", "CNAME", "b.internal."),
        ("b.internal.", "CNAME", "hello.internal."),
    )
    with pytest.raises(NameUnknown):
        question.addresses(question.judge(reply.to_wire()))


def test_no_such_name_and_no_service_differ() -> None:
    question = ask()
    reply = answer(question)
    reply.set_rcode(dns.rcode.NXDOMAIN)
    with pytest.raises(NameUnknown, match="no such name"):
        question.addresses(question.judge(reply.to_wire()))
    reply.set_rcode(dns.rcode.SERVFAIL)
    with pytest.raises(ServerFailed, match="SERVFAIL"):
        question.addresses(question.judge(reply.to_wire()))


def test_an_answer_to_another_question_is_refused() -> None:
    other = ask("evil.internal")
    with pytest.raises(Malformed):
        ask().judge(answer(other, ("evil.internal.", "AAAA", "fdaa::6")).to_wire())
    with pytest.raises(Malformed):
        ask().judge(ask().octets)


def test_truncation_is_seen() -> None:
    question = ask()
    reply = answer(question)
    reply.flags |= dns.flags.TC
    assert is_truncated(question.judge(reply.to_wire()))


@given(st.binary(max_size=600))
def test_garbage_is_malformed(octets: bytes) -> None:
    with pytest.raises(Malformed):
        ask().judge(octets)


@given(st.integers(0), st.integers(0, 255))
def test_a_flipped_octet_never_escapes(at: int, value: int) -> None:
    question = ask()
    octets = bytearray(answer(question, ("hello.internal.", "AAAA", "fdaa::7")).to_wire())
    octets[at % len(octets)] = value
    try:
        question.addresses(question.judge(bytes(octets)))
    except (Malformed, NameUnknown, ServerFailed):
        return


@pytest.mark.parametrize("name", ["a..b", "x" * 64, ""])
def test_what_cannot_be_a_name_is_unknown(name: str) -> None:
    if name:
        with pytest.raises(NameUnknown):
            ask(name)
