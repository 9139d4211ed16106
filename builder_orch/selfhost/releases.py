"""The release runner: from an image's digest to the one container that serves an app.

A release replaces the one before only when its container has answered; until then, and if it never
does, the container before keeps serving.
"""

import asyncio
import re
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv6Address
from socket import socket
from typing import Final, Protocol, Self

from builder_orch.errors import BuilderOrchError, ReleaseFailed
from builder_orch.selfhost.definition import (
    DEFAULT_PORT,
    Json,
    check_path,
    grace_s,
    memory_limit,
    serving_port,
)
from builder_orch.selfhost.engine import Container, EngineRefused, Image
from builder_orch.selfhost.process import Report
from builder_orch.selfhost.registry import USER

GRACE_S: Final = 30.0
POLL_S: Final = 0.25
PROBE_LIMIT_S: Final = 2.0
STATUS_LINE_OCTETS: Final = 4096
STOP_GRACE_S: Final = 10
CLEAN_UP_LIMIT_S: Final = 20.0
PIDS: Final = 1024
LABEL: Final = "fly-build"
PINNED: Final = re.compile(r"(?P<repository>[^@\s]+)@sha256:[0-9a-f]{64}")
CONTAINER_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")

Probe = Callable[[str, int, str], Awaitable[int]]
"""Given address, port and path: the HTTP status of the answer. `OSError` while there is none."""


class Status(StrEnum):
    """What becomes of a release."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETE = "complete"
    FAILED = "failed"
    SUPERSEDED = "superseded"


@dataclass(frozen=True, slots=True)
class Release:
    """One version of an app: the image by digest, and the app's definition as it was given."""

    version: int
    image: str
    definition: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Machine:
    """A container that serves an app, behind a private address of its own."""

    id: str
    app: str
    version: int
    address: IPv6Address
    container: str
    image: str
    port: int


@dataclass(frozen=True, slots=True)
class Kept:
    """A machine that the ledger has as serving, and the release to make it again from."""

    machine_id: str
    app: str
    address: IPv6Address
    release: Release


class Ledger(Protocol):
    """Where it is written down; calls are short and may not fail for reasons of content."""

    def release_status(self, app: str, version: int, status: str, reason: str | None) -> None:
        """Note what has become of a release; `reason` explains a failure in full."""

    def is_wanted(self, app: str, version: int) -> bool:
        """Whether nobody has ended a release that is under way."""
        ...

    def machine_started(
        self, app: str, machine_id: str, address: IPv6Address, container: str, image: str
    ) -> None:
        """Note a machine that answers and is about to serve."""

    def machine_retired(self, app: str, machine_id: str) -> None:
        """Note that a machine is gone; one that was never noted is fine."""


class EngineCalls(Protocol):
    """What a runner needs of `EngineClient`, with the same meaning."""

    async def pull(self, reference: str, *, username: str, password: str) -> None: ...
    async def image(self, reference: str) -> Image: ...
    async def create(self, name: str, body: Json) -> str: ...
    async def start(self, container: str) -> None: ...
    async def keep_running(self, container: str) -> None: ...
    async def inspect(self, container: str) -> Container: ...
    async def stop(self, container: str, *, grace_s: int) -> None: ...
    async def remove(self, container: str) -> None: ...
    async def containers(self, label: str) -> list[str]: ...
    async def logs(self, container: str) -> str: ...


class ConnectContainer(Protocol):
    """`Engine.connect_container`."""

    async def __call__(self, address: str, port: int, *, limit_s: float) -> socket: ...


class Surroundings(Protocol):
    """What the rest of the platform does for a runner."""

    def allot(self, app: str) -> tuple[str, IPv6Address]:
        """Give a new machine its id and private address."""
        ...

    def password(self, app: str) -> str:
        """Return a password that may pull the app's images from the registry."""
        ...

    async def routed(self, app: str, machine: Machine) -> None:
        """Make this the machine that serves the app."""

    async def withdrawn(self, app: str, machine: Machine) -> None:
        """Stop sending new connections to a machine that is about to end."""


class _NotWanted(Exception):
    """Whoever began the release has ended it in the ledger, which stays as it is."""


@dataclass(slots=True)
class _Line:
    """The releases of one app: the task at work and the one release that waits for it."""

    task: asyncio.Task[None]
    waiting: Release | None = None


def container_body(
    machine_id: str, app: str, release: Release, *, owner: str, port: int
) -> dict[str, object]:
    """Return what the engine is asked to make; nothing of it is published on the host."""
    env = release.definition.get("env")
    given = env if isinstance(env, Mapping) else {}
    variables = {
        "PORT": str(port),
        "FLY_APP_NAME": app,
        "FLY_MACHINE_ID": machine_id,
        **{str(name): str(value) for name, value in given.items()},
    }
    memory = memory_limit(release.definition)
    return {
        "Image": release.image,
        "Env": [f"{name}={value}" for name, value in variables.items()],
        "Labels": {
            LABEL: owner,
            f"{LABEL}.app": app,
            f"{LABEL}.version": str(release.version),
            f"{LABEL}.machine": machine_id,
            f"{LABEL}.port": str(port),
        },
        "HostConfig": {
            "Memory": memory,
            "MemorySwap": memory,
            "PidsLimit": PIDS,
            "SecurityOpt": ["no-new-privileges"],
            "PublishAllPorts": False,
        },
    }


class Runner:
    """Carries releases out, one at a time for each app; an async context manager.

    `owner` names the platform in labels, so that two of them on one engine leave each other alone.
    `registry` is the address whose images are pulled with credentials. `now` and `sleep` are
    seconds of one clock.
    """

    def __init__(
        self,
        engine: EngineCalls,
        *,
        owner: str,
        registry: str,
        ledger: Ledger,
        surroundings: Surroundings,
        connect: ConnectContainer,
        report: Report,
        now: Callable[[], float],
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        probe: Probe | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        self._engine = engine
        self._owner = owner
        self._registry = registry
        self._ledger = ledger
        self._surroundings = surroundings
        self._connect = connect
        self._report = report
        self._now = now
        self._sleep = sleep
        self._probe = probe or self._ask
        self._grace_s = grace_s
        self._lines: dict[str, _Line] = {}
        self._serving: dict[str, Machine] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Break off what is under way; what serves is left to the engine and the next start."""
        tasks = [line.task for line in self._lines.values()]
        for app, line in self._lines.items():
            if line.waiting is not None:
                self._note(app, line.waiting, Status.FAILED, "the platform was stopped")
            line.task.cancel()
        self._lines.clear()
        if tasks:
            await asyncio.wait(tasks)

    def begin(self, app: str, release: Release) -> None:
        """Carry a release out as soon as the app's release under way, if any, has ended.

        Of those that wait only the newest is carried out; the others end as superseded.
        """
        line = self._lines.get(app)
        if line is None:
            task = asyncio.create_task(self._work(app, release), name=f"release {app}")
            self._lines[app] = _Line(task)
            return
        if line.waiting is not None:
            newer = f"version {release.version} took its place before it began"
            self._note(app, line.waiting, Status.SUPERSEDED, newer)
        line.waiting = release
        self._note(app, release, Status.PENDING)

    def serving(self, app: str) -> Machine | None:
        """Return the machine that serves an app, if one does."""
        return self._serving.get(app)

    async def connect(self, machine: Machine, port: int) -> socket:
        """Return a non-blocking stream to a port of a machine; `OSError` as `connect` raises it.

        The engine is asked each time: a container that it restarted has another address, and the
        one it had may be somebody else's by now.
        """
        try:
            found = await self._engine.inspect(machine.container)
        except (BuilderOrchError, EngineRefused) as error:
            raise ConnectionRefusedError(f"{machine.app} is gone: {error}") from error
        if not found.running:
            raise ConnectionRefusedError(f"{machine.app} is {found.status}")
        return await self._connect(found.address, port, limit_s=PROBE_LIMIT_S * 5)

    async def remove(self, app: str) -> None:
        """End everything that an app has here."""
        line = self._lines.pop(app, None)
        if line is not None:
            if line.waiting is not None:
                self._note(app, line.waiting, Status.FAILED, "the app was removed")
            line.task.cancel()
            await asyncio.wait([line.task])
        machine = self._serving.pop(app, None)
        if machine is not None:
            await self._retire(machine)

    async def adopt(self, kept: Iterable[Kept]) -> None:
        """Take up after a restart: serve what still runs, start what should, remove what is left.

        Where a container is gone its release is carried out again, with a new machine.
        """
        found = {one.labels.get(f"{LABEL}.machine", ""): one for one in await self._ours()}
        newest: dict[str, Kept] = {}
        for one in sorted(kept, key=lambda one: one.release.version):
            older = newest.get(one.app)
            if older is not None:
                self._ledger.machine_retired(older.app, older.machine_id)
            newest[one.app] = one
        for one in newest.values():
            container = found.get(one.machine_id)
            if container is not None and await self._resume(one, container):
                del found[one.machine_id]
                continue
            self._report(
                f"{one.app} has no container any more; version {one.release.version} again"
            )
            self._ledger.machine_retired(one.app, one.machine_id)
            self.begin(one.app, one.release)
        for left in found.values():
            try:
                await self._engine.remove(left.id)
            except EngineRefused as refusal:
                self._report(f"the container {left.id[:12]} could not be removed: {refusal}")

    async def _ours(self) -> list[Container]:
        found = []
        for container in await self._engine.containers(f"{LABEL}={self._owner}"):
            # One may end between the list and the question.
            with suppress(EngineRefused):
                found.append(await self._engine.inspect(container))
        return found

    async def _resume(self, one: Kept, container: Container) -> bool:
        try:
            if not container.running:
                await self._engine.start(container.id)
        except EngineRefused as refusal:
            self._report(f"{one.app} does not start again: {refusal}")
            return False
        machine = Machine(
            id=one.machine_id,
            app=one.app,
            version=one.release.version,
            address=one.address,
            container=container.id,
            image=one.release.image,
            port=int(container.labels.get(f"{LABEL}.port", DEFAULT_PORT)),
        )
        await self._surroundings.routed(one.app, machine)
        self._serving[one.app] = machine
        return True

    async def _work(self, app: str, release: Release) -> None:
        upcoming: Release | None = release
        while upcoming is not None:
            await self._release(app, upcoming)
            line = self._lines[app]
            upcoming, line.waiting = line.waiting, None
            if upcoming is not None and not self._ledger.is_wanted(app, upcoming.version):
                upcoming = None
        del self._lines[app]

    async def _release(self, app: str, release: Release) -> None:
        self._note(app, release, Status.RUNNING)
        try:
            machine = await self._bring_up(app, release)
        except CancelledError:
            self._note(app, release, Status.FAILED, "it was broken off: the platform was stopped")
            raise
        except _NotWanted:
            self._report(f"release {release.version} of {app} was broken off by who began it")
            return
        except Exception as error:
            # Whatever it is, the app's other releases must not wait for ever behind this one.
            self._report(f"release {release.version} of {app} failed: {error!r}")
            self._note(app, release, Status.FAILED, str(error))
            return
        before, self._serving[app] = self._serving.get(app), machine
        try:
            if before is not None:
                await self._withdraw(before)
        finally:
            self._note(app, release, Status.COMPLETE)
        # Whoever waits for the release need not wait for the one before to take its leave.
        if before is not None:
            await self._end(before)

    async def _bring_up(self, app: str, release: Release) -> Machine:
        """Return the new machine once it has answered and is routed; else leave nothing of it."""
        image = await self._fetch(app, release)
        self._check_wanted(app, release.version)
        port = serving_port(release.definition, image.ports)
        machine_id, address = self._surroundings.allot(app)
        name = f"fly-build-{app}-v{release.version}-{machine_id}"
        if not CONTAINER_NAME.fullmatch(name):
            raise ReleaseFailed(f"{app!r} cannot name a container", hint="rename the app")
        body = container_body(machine_id, app, release, owner=self._owner, port=port)
        container = await self._create(name, body)
        machine = Machine(machine_id, app, release.version, address, container, release.image, port)
        try:
            await self._engine.start(container)
            await self._answered(machine, release.definition)
            # Not before: of a program that is started again and again no exit code is left.
            await self._engine.keep_running(container)
            self._ledger.machine_started(app, machine_id, address, container, release.image)
            await self._surroundings.routed(app, machine)
        except BaseException as error:
            log = await self._undo(machine)
            if isinstance(error, Exception) and not isinstance(error, _NotWanted):
                said = f"; the last it wrote:\n{log}" if log else "; it wrote nothing"
                raise ReleaseFailed(
                    f"version {release.version} of {app} did not become healthy: {error}{said}",
                    hint=f"it must answer HTTP on port {port} (variable PORT) of 0.0.0.0",
                ) from error
            raise
        return machine

    async def _create(self, name: str, body: Json) -> str:
        try:
            return await self._engine.create(name, body)
        except EngineRefused as refusal:
            if "no command specified" not in str(refusal).lower():
                raise
            raise ReleaseFailed(
                "the image does not say which program to run: neither CMD nor ENTRYPOINT",
                hint="end its Dockerfile with CMD or ENTRYPOINT",
            ) from None

    async def _fetch(self, app: str, release: Release) -> Image:
        pinned = PINNED.fullmatch(release.image)
        if pinned is None:
            raise ReleaseFailed(
                f"{release.image} is not pinned by a digest", hint="release repository@sha256:..."
            )
        ours = release.image.startswith(f"{self._registry}/")
        await self._engine.pull(
            release.image,
            username=USER if ours else "",
            password=self._surroundings.password(app) if ours else "",
        )
        image = await self._engine.image(release.image)
        digest = release.image.partition("@")[2]
        if not any(found.endswith(f"@{digest}") for found in image.digests):
            raise ReleaseFailed(
                f"the engine has no image of the digest {digest} after it was pulled",
                hint="push the image again",
            )
        return image

    async def _answered(self, machine: Machine, definition: Json) -> None:
        """Wait until the container answers HTTP with a status below 500, or is known not to."""
        path, limit_s = check_path(definition), grace_s(definition, self._grace_s)
        until = self._now() + limit_s
        last = "it was not running"
        while True:
            self._check_wanted(machine.app, machine.version)
            found = await self._engine.inspect(machine.container)
            if found.ended:
                why = "out of memory" if found.out_of_memory else f"exit code {found.exit_code}"
                raise ReleaseFailed(f"its program ended ({why})", hint="see what it wrote last")
            if found.running:
                try:
                    status = await self._probe(found.address, machine.port, path)
                except OSError as error:
                    last = str(error) or type(error).__name__
                else:
                    if status < 500:
                        # It may have been ended while it was asked.
                        self._check_wanted(machine.app, machine.version)
                        return
                    last = f"HTTP status {status}"
            if self._now() >= until:
                raise ReleaseFailed(
                    f"no answer to GET {path} on port {machine.port} within {limit_s:g} s ({last})",
                    hint="see what it wrote last",
                )
            await self._sleep(POLL_S)

    async def _ask(self, address: str, port: int, path: str) -> int:
        """Ask for a path and return the HTTP status; `OSError` for anything but an HTTP answer."""
        request = (
            f"GET {path} HTTP/1.1\r\nHost: {address}:{port}\r\nUser-Agent: fly-build\r\n"
            "Accept: */*\r\nConnection: close\r\n\r\n"
        )
        async with asyncio.timeout(PROBE_LIMIT_S):
            stream = await self._connect(address, port, limit_s=PROBE_LIMIT_S)
            reader, writer = await asyncio.open_connection(sock=stream, limit=STATUS_LINE_OCTETS)
            try:
                writer.write(request.encode())
                await writer.drain()
                return status_of(await reader.readline())
            except ValueError as error:
                raise OSError("the answer is not HTTP") from error
            finally:
                writer.transport.abort()

    def _check_wanted(self, app: str, version: int) -> None:
        if not self._ledger.is_wanted(app, version):
            raise _NotWanted

    async def _retire(self, machine: Machine) -> None:
        await self._withdraw(machine)
        await self._end(machine)

    async def _withdraw(self, machine: Machine) -> None:
        # Noted first: a container that the ledger does not know is removed at the next start.
        self._ledger.machine_retired(machine.app, machine.id)
        try:
            await self._surroundings.withdrawn(machine.app, machine)
        except (BuilderOrchError, OSError) as error:
            self._report(f"{machine.app} is still routed to {machine.address}: {error}")

    async def _end(self, machine: Machine) -> None:
        try:
            await self._engine.stop(machine.container, grace_s=STOP_GRACE_S)
            await self._engine.remove(machine.container)
        except (BuilderOrchError, EngineRefused, OSError) as error:
            self._report(f"version {machine.version} of {machine.app} could not be ended: {error}")

    async def _undo(self, machine: Machine) -> str:
        """Remove a machine that came to nothing and return what it wrote last."""
        self._ledger.machine_retired(machine.app, machine.id)
        log = ""
        try:
            async with asyncio.timeout(CLEAN_UP_LIMIT_S):
                with suppress(EngineRefused):
                    log = await self._engine.logs(machine.container)
                await self._engine.remove(machine.container)
        except (BuilderOrchError, EngineRefused, OSError) as error:
            self._report(f"the container of {machine.app} could not be removed: {error}")
        return log

    def _note(self, app: str, release: Release, status: Status, reason: str | None = None) -> None:
        self._ledger.release_status(app, release.version, str(status), reason)


def status_of(line: bytes) -> int:
    """Return the status of an HTTP/1 status line (RFC 9112 section 4); `OSError` for others."""
    found = re.fullmatch(rb"HTTP/1\.[01] ([1-5][0-9]{2})( [^\r\n]*)?\r?\n", line)
    if found is None:
        raise OSError("the answer is not HTTP" if line else "it closed the connection unanswered")
    return int(found[1])
