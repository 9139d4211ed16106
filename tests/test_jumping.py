"""The clock that jumps does so when nothing is left to do, and not before."""

import asyncio
import time

from tests import jumping


def test_hours_pass_in_a_moment() -> None:
    async def story() -> float:
        began = jumping.now()
        await asyncio.sleep(7200)
        return jumping.now() - began

    assert jumping.run(story()) >= 7200


def test_what_a_thread_does_is_waited_for() -> None:
    """However slow the machine is: a limit of the story must not pass meanwhile."""

    def slow() -> int:
        number, until = 0, time.perf_counter() + 20 * jumping.GRACE_S
        while time.perf_counter() < until:
            number += 1
        return number

    async def story() -> int:
        async with asyncio.timeout(120):
            return await asyncio.to_thread(slow)

    assert jumping.run(story())
