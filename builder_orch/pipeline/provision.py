"""The app and the machine that builds for it."""

import asyncio
from dataclasses import dataclass
from typing import ClassVar

from builder_orch.api.models import App, Builder
from builder_orch.errors import AppUnknown, BuilderNotProvisioned
from builder_orch.events import Emit, PhaseReason
from builder_orch.pipeline.outside import Platform

FAILED = "failed"
"""The state of a machine that no waiting brings up."""


@dataclass(frozen=True, slots=True)
class Found:
    """An app that the token reaches."""

    app: App

    def __str__(self) -> str:
        return f"app {self.app.name} of {self.app.organization.slug}"


@dataclass(frozen=True, slots=True)
class Ready:
    """A builder that the platform says is there."""

    builder: Builder

    def __str__(self) -> str:
        return f"builder {self.builder.app_name}, machine {self.builder.machine_id}"


@dataclass(frozen=True, slots=True)
class Authorize:
    """Show the token and find the app by its name; make it if that was asked for."""

    platform: Platform
    create_app: bool = False
    organization: str | None = None
    name: ClassVar[str] = "auth"

    async def run(self, given: str, emit: Emit) -> Found:
        try:
            return Found(await self.platform.app(given))
        except AppUnknown:
            if not self.create_app:
                raise AppUnknown(
                    f"there is no app {given}, or the token does not reach it",
                    hint="Check the name, or create it with --create-app.",
                ) from None
        emit(PhaseReason(self.name, f"there is no app {given} yet: creating it"))
        organization = await self.platform.organization(self.organization)
        return Found(await self.platform.create_app(organization, given))


@dataclass(frozen=True, slots=True)
class Provision:
    """Ask for the builder machine and wait until the platform has it."""

    platform: Platform
    limit_s: float
    name: ClassVar[str] = "provision"

    async def run(self, given: App, emit: Emit) -> Ready:
        try:
            async with asyncio.timeout(self.limit_s):
                emit(PhaseReason(self.name, "asking for the nearest region"))
                region = await self.platform.nearest_region()
                emit(PhaseReason(self.name, f"asking for a builder in {region.code}"))
                builder = await self.platform.ensure_builder(given, region.code)
        except TimeoutError:
            raise BuilderNotProvisioned(
                f"the platform gave no builder within {self.limit_s:g} s",
                hint="Run it again; if it stays so, ask whether the platform has room.",
            ) from None
        if builder.state == FAILED:
            raise BuilderNotProvisioned(
                f"the platform's builder {builder.app_name}, machine {builder.machine_id}, "
                "has failed and does not start again",
                hint="Look at the builder's log; on a platform of your own: fly-build selfhost "
                "logs, then fly-build selfhost stop and start.",
            )
        return Ready(builder)
