"""What a capture holds is what another program reads."""

import stat
from pathlib import Path

import pytest

from builder_orch.tunnel.capture import capturing
from builder_orch.tunnel.driver import open_tunnel
from tests.tunnel.joined import CLIENT, GATEWAY, pair


async def test_every_inner_packet_is_in_the_file_and_scapy_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "inner.pcap"
    with capturing(path) as capture:
        async with pair() as ends, open_tunnel(ends.config, capture=capture) as watched:
            await watched.ping(GATEWAY)
    from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, IPv6
    from scapy.utils import RawPcapReader

    with RawPcapReader(str(path)) as reader:
        assert reader.linktype == 101
        request, reply = [IPv6(octets) for octets, _ in reader]
    assert request.src == str(CLIENT)
    assert ICMPv6EchoRequest in request
    assert ICMPv6EchoReply in reply
    assert request[ICMPv6EchoRequest].data == reply[ICMPv6EchoReply].data
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), capturing(tmp_path / "no" / "inner.pcap"):
        raise AssertionError("not reached")
