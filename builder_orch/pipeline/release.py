"""From a digest to a version that the platform runs."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from builder_orch.api.models import App, Build, Release
from builder_orch.errors import ReleaseFailed
from builder_orch.events import Emit, PhaseReason
from builder_orch.pipeline.engine import Pause
from builder_orch.pipeline.outside import Platform, settle
from builder_orch.pipeline.push import Pushed

POLL_S = 0.5
FAILED = frozenset({"failed", "interrupted", "cancelled", "dead", "rolled_back"})


@dataclass(frozen=True, slots=True)
class Released:
    """A version that is complete, by the platform's own word."""

    release: Release

    def __str__(self) -> str:
        return f"v{self.release.version} is {self.release.status}"


@dataclass(frozen=True, slots=True)
class Publish:
    """Release the digest, then wait until the platform has done so or given it up."""

    platform: Platform
    app: App
    build: Build
    definition: Mapping[str, object]
    strategy: str
    limit_s: float
    pause: Pause
    name: ClassVar[str] = "release"

    async def run(self, given: Pushed, emit: Emit) -> Released:
        emit(PhaseReason(self.name, f"releasing {given.reference}"))
        release = await self.platform.create_release(
            self.app,
            image=given.reference,
            build=self.build,
            strategy=self.strategy,
            definition=self.definition,
        )
        try:
            async with asyncio.timeout(self.limit_s):
                return Released(await self._completed(release, emit))
        except TimeoutError:
            await self._write_down(release, "failed", f"not complete in {self.limit_s:g} s", emit)
            raise ReleaseFailed(
                f"v{release.version} was not complete within {self.limit_s:g} s",
                hint="Look at the platform's log; the version before it, if any, still serves.",
            ) from None
        except asyncio.CancelledError:
            await self._write_down(release, "interrupted", "the command was interrupted", emit)
            raise

    async def _completed(self, release: Release, emit: Emit) -> Release:
        said = ""
        while release.in_progress and release.status not in FAILED:
            reason = f"v{release.version} is {release.status}"
            reason += f": {release.reason}" if release.reason else ""
            if reason != said:
                emit(PhaseReason(self.name, reason))
                said = reason
            await self.pause(POLL_S)
            release = await self.platform.release(self.app, release.version)
        if release.status in FAILED:
            raise ReleaseFailed(
                f"v{release.version} {release.status}: {release.reason or 'no reason was given'}",
                hint="Correct what it says above; the version before it, if any, still serves.",
            )
        return release

    async def _write_down(self, release: Release, status: str, why: str, emit: Emit) -> None:
        update = self.platform.update_release(release, status=status, metadata={"error": why})
        await settle(f"marking v{release.version} as {status}", update, emit)
