"""Blocking work beside the event loop, which can be given up."""

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from builder_orch.events import Emit, Event

Made = TypeVar("Made")

GRACE_S = 2.0
"""How long work that was given up may take to come back before nobody waits for it any more."""
PENDING = 256
"""Events that a thread may be ahead of the event loop."""


async def in_thread(work: Callable[[], Made], *, give_up: Callable[[], None]) -> Made:
    """Run `work` in a thread of its own; cancellation calls `give_up`, then waits for its end.

    The thread is a daemon, unlike an executor's: work that will not come back must not keep the
    process from ending.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[Made] = loop.create_future()

    def settle(made: Made | None, error: BaseException | None) -> None:
        if outcome.done():
            return
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(made)  # type: ignore[arg-type]

    def run() -> None:
        made: Made | None = None
        failed: BaseException | None = None
        try:
            made = work()
        except BaseException as error:
            failed = error
        try:
            loop.call_soon_threadsafe(settle, made, failed)
        except RuntimeError:
            # The loop ended; the one who waited gave up long ago.
            return

    threading.Thread(target=run, name="fly-build-work", daemon=True).start()
    try:
        return await asyncio.shield(outcome)
    except asyncio.CancelledError:
        give_up()
        await asyncio.wait({outcome}, timeout=GRACE_S)
        if outcome.done() and not outcome.cancelled():
            # Taken, so that nobody complains of an exception that was never looked at.
            outcome.exception()
        raise


class Relay:
    """Brings events from a thread to the event loop in their order, and slows the thread down."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._loop = asyncio.get_running_loop()
        self._room = threading.BoundedSemaphore(PENDING)
        self._closed = False

    def __call__(self, event: Event) -> None:
        """Hand over one event from the thread; waits while too many are on their way."""
        while not self._room.acquire(timeout=1.0):
            if self._closed:
                return
        try:
            self._loop.call_soon_threadsafe(self._deliver, event)
        except RuntimeError:
            # The loop ended: nobody is left to tell.
            self._closed = True

    def close(self) -> None:
        """From now on events are dropped; the thread never waits again."""
        self._closed = True

    def _deliver(self, event: Event) -> None:
        self._room.release()
        if not self._closed:
            self._emit(event)
