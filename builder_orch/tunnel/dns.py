"""DNS questions for inside names: messages only, the driver carries them (RFC 1035, RFC 3596)."""

from ipaddress import IPv6Address

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from builder_orch.tunnel.failures import NameUnknown, ServerFailed
from builder_orch.tunnel.machine import Entropy, Malformed

PORT = 53
UDP_PAYLOAD = 1232
CNAME_LIMIT = 8


class Question:
    """One question and the judgement of its answers; a fresh random id each."""

    def __init__(self, name: str, entropy: Entropy, *, kind: str = "AAAA") -> None:
        try:
            self._name = dns.name.from_text(name)
        except dns.exception.DNSException as error:
            raise NameUnknown(f"{name!r} is not a host name: {error}") from None
        self._kind = dns.rdatatype.from_text(kind)
        message = dns.message.make_query(self._name, self._kind, payload=UDP_PAYLOAD)
        message.id = int.from_bytes(entropy(2), "big")
        self._message = message
        self.octets = message.to_wire()

    def judge(self, octets: bytes) -> dns.message.Message:
        """The answer, if it is one to this question; Malformed for anything else."""
        try:
            answer = dns.message.from_wire(octets, ignore_trailing=True)
        except (dns.exception.DNSException, ValueError) as error:
            raise Malformed(f"no DNS message: {error}") from None
        if not self._message.is_response(answer):
            raise Malformed("an answer to another question")
        return answer

    def addresses(self, answer: dns.message.Message) -> list[IPv6Address]:
        """AAAA addresses of an answer that was judged good, over CNAMEs if need be.

        NameUnknown where there are none, ServerFailed for SERVFAIL and the like.
        """
        code = answer.rcode()
        if code == dns.rcode.NXDOMAIN:
            raise NameUnknown(f"no such name inside: {self._name}")
        if code != dns.rcode.NOERROR:
            raise ServerFailed(f"inside DNS answered {dns.rcode.to_text(code)} for {self._name}")
        name = self._name
        for _ in range(CNAME_LIMIT):
            found = _rrset(answer, name, dns.rdatatype.AAAA)
            if found is not None:
                return [IPv6Address(record.address) for record in found]
            alias = _rrset(answer, name, dns.rdatatype.CNAME)
            if alias is None:
                break
            name = alias[0].target
        raise NameUnknown(f"no IPv6 address inside for {self._name}")


def is_truncated(answer: dns.message.Message) -> bool:
    """Whether the answer did not fit a datagram and must be asked for over TCP."""
    return bool(answer.flags & dns.flags.TC)


def _rrset(
    answer: dns.message.Message, name: dns.name.Name, kind: dns.rdatatype.RdataType
) -> dns.rrset.RRset | None:
    for rrset in answer.answer:
        if rrset.name == name and rrset.rdtype == kind and rrset.rdclass == dns.rdataclass.IN:
            return rrset
    return None
