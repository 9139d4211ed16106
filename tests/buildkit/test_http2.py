"""Two ends over a pipe of small pieces: windows, short answers beside bulk, every kind of end."""

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import PingReceived, RequestReceived
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.buildkit.grpc import Call, Channel, Code, Failed, Service, frame, serving
from builder_orch.buildkit.http2 import Connection, Lost, Reset, Vigilance
from tests import jumping

Handler = Callable[[Call], Awaitable[None]]


class Half:
    """One end of a pair of pipes; hands octets on in pieces of a seeded size."""

    def __init__(self, seed: int) -> None:
        self.queue: asyncio.Queue[bytes] = asyncio.Queue()
        self.other: Half | None = None
        self._random = random.Random(seed)
        self._rest = b""

    async def read(self) -> bytes:
        if not self._rest:
            self._rest = await self.queue.get()
        size = self._random.choice([1, 9, 1000, 100_000])
        octets, self._rest = self._rest[:size], self._rest[size:]
        return octets

    async def write(self, octets: bytes) -> None:
        assert self.other is not None
        self.other.queue.put_nowait(octets)
        await asyncio.sleep(0)

    def close(self) -> None:
        assert self.other is not None
        self.other.queue.put_nowait(b"")


def pair(seed: int = 1) -> tuple[Half, Half]:
    one, two = Half(seed), Half(seed + 1)
    one.other, two.other = two, one
    return one, two


@asynccontextmanager
async def talking(seed: int = 1, **handlers: Handler) -> AsyncGenerator[Channel]:
    near, far = pair(seed)
    defects: list[Exception] = []
    service = Service({f"/{name}": handler for name, handler in handlers.items()}, defects.append)
    async with (
        serving(service),
        Connection(far, client=False, accept=service.accept),
        Connection(near, client=True) as connection,
    ):
        yield Channel(connection)


async def echo(call: Call) -> None:
    while (message := await call.receive()) is not None:
        await call.send(message)


@pytest.mark.parametrize("seed", range(4))
async def test_much_goes_both_ways_beside_short_answers(seed: int) -> None:
    async with talking(seed, echo=echo) as channel:
        call = channel.call("/echo")
        call.bulk()
        sent = [bytes([number]) * (number * 40_000) for number in range(12)]

        async def send() -> None:
            for message in sent:
                await call.send(message)
            await call.send(end=True)

        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            short = group.create_task(channel.ask("/echo", b"ping"))
            got = [await call.receive() for _ in sent]
            assert await call.receive() is None
        assert got == sent
        assert short.result() == b"ping"


async def test_messages_of_one_call_do_not_interleave() -> None:
    async with talking(echo=echo) as channel:
        call = channel.call("/echo")
        sent = {bytes([number]) * 200_000 for number in range(6)}
        async with asyncio.TaskGroup() as group:
            for message in sent:
                group.create_task(call.send(message))
            got = {await call.receive() for _ in sent}
        assert got == sent


async def refuse(call: Call) -> None:
    await call.receive()
    raise Failed(Code.NOT_FOUND, "no such thing: 100 % \u00e4")


async def break_down(call: Call) -> None:
    raise RuntimeError("a defect")


async def test_a_call_ends_as_its_handler_says() -> None:
    async with talking(refuse=refuse, defect=break_down) as channel:
        for method, code, said in (
            ("/refuse", Code.NOT_FOUND, "no such thing: 100 % \u00e4"),
            ("/defect", Code.UNKNOWN, "a defect"),
            ("/other", Code.UNIMPLEMENTED, "not served here"),
        ):
            with pytest.raises(Failed) as caught:
                await channel.ask(method, b"")
            assert (caught.value.code, str(caught.value)) == (code, said)


async def test_a_call_that_is_given_up_is_given_up_at_the_other_end() -> None:
    ended: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    async def wait(call: Call) -> None:
        try:
            await call.receive()
            await call.receive()
        except Failed as error:
            ended.set_result(error)

    async with talking(wait=wait) as channel:
        call = channel.call("/wait")
        await call.send(b"x")
        call.cancel()
        error = await ended
        assert isinstance(error, Failed)
        assert error.code == Code.CANCELLED
        with pytest.raises((Failed, Reset)):
            await call.send(b"y")


async def hang(call: Call) -> None:
    await asyncio.Event().wait()


async def test_the_end_of_the_connection_ends_every_wait() -> None:
    near, far = pair()
    async with Connection(near, client=True) as connection:
        channel = Channel(connection)
        reading = asyncio.create_task(channel.call("/x").receive())
        writing = asyncio.create_task(channel.call("/x").send(bytes(1_000_000)))
        await asyncio.sleep(0)
        far.close()
        for task in (reading, writing):
            with pytest.raises(Lost, match="closed the connection"):
                await task
        with pytest.raises(Lost):
            channel.call("/x")


async def ends(pipe: Half, octets: bytes, *, client: bool) -> Lost | None:
    """What a connection says after these octets and the end."""
    pipe.queue.put_nowait(octets)
    pipe.queue.put_nowait(b"")
    async with Connection(pipe, client=client) as connection:
        for _ in range(1000):
            await asyncio.sleep(0)
        return connection.lost


@given(st.binary(min_size=1, max_size=300), st.booleans(), st.booleans())
def test_garbage_ends_the_connection_and_nothing_else(
    octets: bytes, client: bool, preface: bool
) -> None:
    if preface:
        settings = b"\0\0\0\4\0\0\0\0\0"
        octets = (b"" if client else b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n") + settings + octets

    async def run() -> Lost | None:
        near, _ = pair()
        return await ends(near, octets, client=client)

    assert isinstance(asyncio.run(run()), Lost)


# --- a far end that is gone, or only quiet


async def answering(pipe: Half, pings: list[float], between: float | None) -> None:
    """A server that answers pings, and says something of its own every so often, if at all."""
    state = H2Connection(H2Configuration(client_side=False))
    state.initiate_connection()
    await pipe.write(state.data_to_send())
    numbers: list[int] = []

    async def write() -> None:
        # To write nothing would be the end.
        if octets := state.data_to_send():
            await pipe.write(octets)

    async def speak() -> None:
        while between is not None:
            await asyncio.sleep(between)
            for number in numbers:
                state.send_data(number, frame(b"well"))
            await write()

    speaking = asyncio.create_task(speak())
    try:
        while octets := await pipe.read():
            for event in state.receive_data(octets):
                if isinstance(event, PingReceived):
                    pings.append(jumping.now())
                if isinstance(event, RequestReceived):
                    numbers.append(event.stream_id or 0)
                    state.send_headers(numbers[-1], [(":status", "200")])
            await write()
    finally:
        speaking.cancel()


def quiet(between: float | None, for_s: float) -> tuple[Lost | None, list[float]]:
    """What a watchful client makes of such a server; when it asked for a sign of life."""

    async def tell() -> tuple[Lost | None, list[float]]:
        near, far = pair()
        pings: list[float] = []
        server = asyncio.create_task(answering(far, pings, between))
        vigilance = Vigilance()
        began = jumping.now()
        async with Connection(near, client=True, vigilance=vigilance) as connection:
            call = Channel(connection).call("/x")
            reading = asyncio.create_task(_read_all(call))
            await asyncio.sleep(for_s)
            lost = connection.lost
            reading.cancel()
        server.cancel()
        return lost, [at - began for at in pings]

    return jumping.run(tell())


async def _read_all(call: Call) -> None:
    while await call.receive() is not None:
        continue


def test_a_far_end_that_answers_is_waited_for_and_not_asked_more_often_than_it_likes() -> None:
    lost, pings = quiet(None, 7200)
    assert lost is None
    # Servers of gRPC's library take the third one in five minutes for an attack.
    assert 20 < len(pings) < 30
    assert all(after - before > 300 for before, after in pairwise(pings[1:]))


def test_who_speaks_by_himself_is_not_asked() -> None:
    assert quiet(5.0, 600) == (None, [])


def test_who_speaks_now_and_then_is_asked_in_between() -> None:
    lost, pings = quiet(60.0, 600)
    assert lost is None
    assert len(pings) >= 10


def test_a_far_end_that_is_gone_is_noticed_within_half_a_minute() -> None:
    async def tell() -> tuple[float, Lost]:
        near, _ = pair()
        async with Connection(near, client=True, vigilance=Vigilance()) as connection:
            began = jumping.now()
            with pytest.raises(Lost, match="though a ping was sent") as caught:
                await Channel(connection).call("/x").receive()
            return jumping.now() - began, caught.value

    took_s, _ = jumping.run(tell())
    assert 20 < took_s <= 30
