"""Blocking work that is given up comes back at once, and its far end sees a reset."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from builder_orch.events import Event, Log
from builder_orch.pipeline.line import Line
from builder_orch.pipeline.thread import PENDING, Relay, in_thread

Pair = tuple[Line, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    line = Line(near)
    with far:
        yield line, far
    line.end()


def read(line: Line) -> None:
    line.recv_into(bytearray(1))


def write(line: Line) -> None:
    line.sendall(bytes(64 << 20))


@pytest.mark.parametrize("work", [read, write])
async def test_whatever_waits_in_a_line_comes_back_when_it_is_given_up(
    pair: Pair, work: Callable[[Line], None]
) -> None:
    line, far = pair
    begun = threading.Event()

    def run() -> None:
        begun.set()
        work(line)

    task = asyncio.create_task(in_thread(run, give_up=line.give_up))
    await asyncio.to_thread(begun.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    line.end()

    def drain() -> None:
        while far.recv(1 << 20):
            pass

    with pytest.raises(ConnectionResetError):
        drain()


def test_a_fragile_line_ends_in_a_reset_and_a_whole_one_does_not(pair: Pair) -> None:
    line, far = pair
    line.fragile(True)
    line.sendall(b"x")
    line.fragile(False)
    line.end()
    assert (far.recv(1), far.recv(1)) == (b"x", b"")


def test_an_end_of_the_process_is_the_same_as_an_end_of_a_fragile_line(pair: Pair) -> None:
    line, far = pair
    line.fragile(True)
    line.close()
    with pytest.raises(ConnectionResetError):
        far.recv(1)


def test_a_line_keeps_its_time_limit_and_counts_what_moves(pair: Pair) -> None:
    line, far = pair
    far.sendall(b"abc")
    buffer = bytearray(8)
    assert line.recv_into(buffer) == 3
    line.sendall(b"de")
    assert line.moved == 5
    line.settimeout(0.01)
    with pytest.raises(TimeoutError):
        line.recv_into(buffer)


def test_giving_up_and_ending_may_come_in_any_order_and_often(pair: Pair) -> None:
    line, _ = pair
    for step in (line.give_up, line.give_up, line.end, line.give_up, line.end):
        step()
    assert line.fileno() == -1


async def test_what_a_thread_returns_or_raises_arrives() -> None:
    assert await in_thread(lambda: 7, give_up=lambda: None) == 7
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 // 0, give_up=lambda: None)


async def test_events_of_a_thread_arrive_in_order_and_hold_it_back() -> None:
    told: list[Event] = []
    relay = Relay(told.append)
    sent = threading.Event()

    def work() -> None:
        for number in range(3 * PENDING):
            relay(Log(str(number)))
            if number == PENDING:
                # It can only get here when the event loop has taken some.
                assert told
        sent.set()

    await in_thread(work, give_up=lambda: None)
    await asyncio.to_thread(sent.wait)
    await asyncio.sleep(0)
    assert [event.text for event in told if isinstance(event, Log)] == [
        str(number) for number in range(3 * PENDING)
    ]


async def test_a_relay_that_is_closed_drops_events_and_lets_the_thread_go() -> None:
    told: list[Event] = []
    relay = Relay(told.append)
    relay.close()

    def work() -> None:
        for _ in range(2 * PENDING):
            relay(Log("x"))

    await in_thread(work, give_up=lambda: None)
    assert told == []
