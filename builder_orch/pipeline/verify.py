"""Ask the release over HTTP, through the tunnel."""

import asyncio
import http.client
import socket
import time
from dataclasses import dataclass
from typing import ClassVar

from builder_orch.errors import ReleaseFailed
from builder_orch.events import Emit, Retry
from builder_orch.pipeline.engine import Dial, Pause
from builder_orch.pipeline.line import Line
from builder_orch.pipeline.thread import in_thread

TRIES = 6
FIRST_WAIT_S = 0.5
BODY_LIMIT = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Address:
    """Where a release is to answer."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """As a user would type it inside the network."""
        return f"http://{self.host}:{self.port}/"


@dataclass(frozen=True, slots=True)
class Answered:
    """What came back. `elapsed_s` is from dialling to the last octet."""

    url: str
    status: int
    octets: int
    elapsed_s: float

    def __str__(self) -> str:
        return (
            f"answered {self.status} in {max(1, round(self.elapsed_s * 1000))} ms"
            f" at {self.url} through the tunnel"
        )


@dataclass(frozen=True, slots=True)
class Verify:
    """Success is an answer; a server error or silence, some times in a row, is a failed release."""

    dial: Dial
    limit_s: float
    pause: Pause
    name: ClassVar[str] = "verify"

    async def run(self, given: Address, emit: Emit) -> Answered:
        wait_s = FIRST_WAIT_S
        why = ""
        for attempt in range(1, TRIES + 1):
            try:
                async with asyncio.timeout(self.limit_s):
                    answered = await self._get(given)
                if answered.status < 500:
                    return answered
                why = f"it answered {answered.status}"
            except (OSError, http.client.HTTPException) as error:
                why = str(error) or "no answer in time"
            if attempt < TRIES:
                emit(Retry(self.name, attempt, why, wait_s))
                await self.pause(wait_s)
                wait_s *= 2
        raise ReleaseFailed(
            f"the release does not answer at {given.url}: {why}",
            hint=f"Check that the app listens on [::]:{given.port} or 0.0.0.0:{given.port}, or set "
            "[http_service] internal_port in fly.toml to its port.",
        )

    async def _get(self, given: Address) -> Answered:
        began = time.monotonic()
        line = Line(await self.dial(given.host, given.port))

        def ask() -> tuple[int, int]:
            try:
                return _get_over(line, given)
            finally:
                line.end()

        status, octets = await in_thread(ask, give_up=line.give_up)
        return Answered(given.url, status, octets, time.monotonic() - began)


def _get_over(line: socket.socket, given: Address) -> tuple[int, int]:
    connection = http.client.HTTPConnection(given.host, given.port)
    connection.sock = line
    headers = {"User-Agent": "fly-build", "Accept": "*/*", "Connection": "close"}
    connection.request("GET", "/", headers=headers)
    with connection.getresponse() as response:
        return response.status, len(response.read(BODY_LIMIT))
