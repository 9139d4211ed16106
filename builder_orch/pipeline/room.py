"""Room on a builder whose disk is full: what builds have cached goes, once, and the run goes on."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from builder_orch.errors import BuilderFull, BuilderOrchError
from builder_orch.events import Emit, Retry, Warned
from builder_orch.pipeline.amount import readable
from builder_orch.pipeline.engine import Engine, Refused

Made = TypeVar("Made")


@dataclass(slots=True)
class Room:
    """For one run: it takes caches away at most once, however often its work is begun again."""

    emit: Emit
    freed: int | None = None
    """Octets that it gave back; None before it was needed."""

    async def within(self, engine: Engine, work: Callable[[Engine], Awaitable[Made]]) -> Made:
        """Do work that may be repeated as a whole; BuilderFull when there is no room to be had."""
        try:
            return await work(engine)
        except BuilderFull as error:
            if self.freed is not None or not await self._make(engine, error):
                raise self._told(error) from None
        try:
            return await work(engine)
        except BuilderFull as error:
            raise self._told(error) from None

    async def _make(self, engine: Engine, why: BuilderFull) -> bool:
        """Throw away what `fly-build builder prune` would; did that give anything back?"""
        try:
            self.freed = await engine.prune(images=False)
        except (BuilderOrchError, Refused) as error:
            self.emit(Warned("builder-prune", f"the builder's caches stay: {error}"))
            return False
        if self.freed:
            cause = f"{str(why).splitlines()[0]}; {readable(self.freed)} of caches thrown away"
            self.emit(Retry("build", 1, cause, 0.0))
        return bool(self.freed)

    def _told(self, error: BuilderFull) -> BuilderFull:
        """The same, with what has been tried already."""
        if self.freed is None:
            return error
        return BuilderFull(
            f"{error}\nits caches were thrown away before ({readable(self.freed)})",
            hint="fly-build builder prune --all throws away images that nobody uses as well. "
            "If that is not enough, the builder needs a larger disk.",
        )
