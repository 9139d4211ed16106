"""An event loop on which hours pass in a moment: whenever nothing is left to do, time jumps.

Only for what goes on inside this process; somebody else's work takes its time, and would seem not
to be done in hours. What the loop's own threads do is waited for.
"""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple, Unpack

Made = TypeVar("Made")
Words = TypeVarTuple("Words")

GRACE_S = 0.002
"""What an octet may need from one end of a loopback connection to the other."""


class _Selector(selectors.DefaultSelector):
    ahead = 0.0
    in_threads = 0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        ready = super().select(min(timeout, GRACE_S))
        if not ready and not self.in_threads:
            self.ahead += timeout
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Selector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return super().time() + self._jumping.ahead

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Words]], Made], *args: *Words
    ) -> asyncio.Future[Made]:
        future = super().run_in_executor(executor, func, *args)
        self._jumping.in_threads += 1
        future.add_done_callback(self._left_thread)
        return future

    def _left_thread(self, _: object) -> None:
        self._jumping.in_threads -= 1


def run(work: Coroutine[Any, Any, Made]) -> Made:
    """Do it on a loop of that kind."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(work)


def now() -> float:
    """The time of the loop that runs."""
    return asyncio.get_running_loop().time()
