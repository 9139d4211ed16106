"""Messages between the processes, whole or in pieces, with and without descriptors."""

import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.tunnel import control
from builder_orch.tunnel.control import Inbox
from builder_orch.tunnel.machine import Malformed

texts = st.text(max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=10,
)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    near, far = socket.socketpair()
    far.setblocking(False)
    with near, far:
        yield near, far


@given(
    st.lists(st.dictionaries(texts, values, max_size=5), min_size=1, max_size=5), st.integers(1, 7)
)
def test_messages_arrive_as_they_were_however_they_are_cut(
    sent: list[dict[str, object]], size: int
) -> None:
    near, far = socket.socketpair()
    with near, far:
        for message in sent:
            control.send(near, message)
        octets = far.recv(1 << 20)
    into, out = socket.socketpair()
    inbox, heard = Inbox(), []
    with into, out:
        for at in range(0, len(octets), size):
            into.sendall(octets[at : at + size])
            assert inbox.receive(out)
            heard += list(inbox.messages())
    assert heard == sent


def test_a_descriptor_comes_with_its_message(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    reading, writing = os.pipe()
    control.send(near, {"result": control.DESCRIPTOR}, writing)
    os.close(writing)
    inbox = Inbox()
    assert inbox.receive(far)
    assert list(inbox.messages()) == [{"result": control.DESCRIPTOR}]
    passed = inbox.descriptor()
    os.write(passed, b"through")
    os.close(passed)
    assert os.read(reading, 100) == b"through"
    os.close(reading)
    with pytest.raises(Malformed, match="without its descriptor"):
        inbox.descriptor()


def test_descriptors_that_nobody_takes_are_closed(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    near, far = ends
    reading, writing = os.pipe()
    control.send(near, {}, writing)
    os.close(writing)
    inbox = Inbox()
    inbox.receive(far)
    inbox.close()
    assert os.read(reading, 1) == b"", "the last writer is gone"
    os.close(reading)


@given(st.binary(min_size=1, max_size=200))
def test_garbage_is_malformed_or_incomplete(octets: bytes) -> None:
    near, far = socket.socketpair()
    with near, far:
        near.sendall(octets)
        inbox = Inbox()
        inbox.receive(far)
        try:
            list(inbox.messages())
        except Malformed:
            return
