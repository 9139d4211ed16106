"""The Docker Engine API over a dialled stream; the one user of docker-py."""

import asyncio
import http.client
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import docker
import docker.errors
import urllib3.exceptions
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_delay,
    wait_random_exponential,
)

from builder_orch.api.models import Secret
from builder_orch.buildkit.control import Tls
from builder_orch.buildkit.http2 import Vigilance
from builder_orch.buildkit.messages import Cache
from builder_orch.buildkit.sshagent import Agent
from builder_orch.errors import BuilderLost, BuilderNotProvisioned, BuilderOrchError, NotAllowed
from builder_orch.events import Emit, Event, Warned
from builder_orch.pipeline.line import Line, pool_over
from builder_orch.pipeline.output import IMAGE, Output
from builder_orch.pipeline.thread import in_thread

PORT = 2375
"""Where an engine listens in plain: only members of the private network reach it."""
OLDEST_API = "1.24"
DIAL_S = 10.0
"""How long one connection to the engine may take."""
ANSWER_S = 30.0
"""How long the engine may take to answer a short question."""
LONG_S = 600.0
"""How long it may take to count or to throw away what it holds."""
PING_S = 3.0
"""How long it may take to answer a ping or to tell its version, once it is connected."""
SIGN_S = 4.0
"""How long it all may take when nothing else was heard of the engine."""
VIGIL_EVERY_S = 10.0
VIGIL_AGAIN_S = 3.0
VIGIL_MISSES = 3
"""So many pings without an answer, and nothing else heard meanwhile, mean that it is gone."""

ASKED_AGAIN = (0.05, 0.2)
"""The shares of a wait for an engine after which the platform is asked for the builder again."""

Again = Callable[[], Awaitable[IPv6Address]]
"""Asks for the builder again; where it is now."""
Dial = Callable[[str, int], Awaitable[socket.socket]]
Pause = Callable[[float], Awaitable[None]]
Take = Callable[[bytes], None]
Made = TypeVar("Made")
Client = Any

_TRANSPORT = (OSError, urllib3.exceptions.HTTPError, http.client.HTTPException)


@dataclass(frozen=True, slots=True)
class Login:
    """What a registry asks for; without a name the password is an identity token."""

    username: str
    password: Secret


AUTO, BUILDKIT, CLASSIC = "auto", "buildkit", "classic"
BUILDERS = (AUTO, BUILDKIT, CLASSIC)
"""Which of an engine's two builders: the better one that it has, or just that one."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a build is told besides its context.

    `secrets` are read when a step asks for them, `agents` sign for ssh, both by their ids.
    `contexts` are directories of this machine, or what the engine fetches by a URL, by their names.
    `node` is this user's own, and with the directory says whose files the engine has.
    """

    dockerfile: str
    build_args: dict[str, str] = field(default_factory=dict, repr=False)
    target: str = ""
    no_cache: bool = False
    labels: dict[str, str] = field(default_factory=dict)
    platforms: tuple[str, ...] = ()
    network: str = ""
    hosts: dict[str, str] = field(default_factory=dict)
    cache_from: tuple[Cache, ...] = ()
    cache_to: tuple[Cache, ...] = ()
    ulimits: dict[str, str] = field(default_factory=dict)
    contexts: dict[str, Path | str] = field(default_factory=dict)
    secrets: dict[str, Callable[[], bytes]] = field(default_factory=dict, repr=False)
    agents: dict[str, Agent] = field(default_factory=dict)
    output: Output = IMAGE
    builder: str = AUTO
    node: str = field(default="", repr=False)
    name: str = ""


@dataclass(frozen=True, slots=True)
class Image:
    """An image as the engine has it. `digests` are `repository@sha256:...`, `ports` those of TCP
    that the image says it listens on."""

    id: str
    size_bytes: int
    digests: tuple[str, ...]
    ports: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """An engine and its disk: octets of its images' layers and of what builds have cached."""

    version: str
    processors: int
    memory: int
    images: int
    layers: int
    cache: int


def unheard(event: Event) -> None:
    """Nobody listens."""


class Refused(Exception):
    """The engine answered a request with an HTTP error; `status` is its code."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _NotYet(Exception):
    """The engine is not ready; the text says why."""


class _Client(docker.APIClient):  # type: ignore[misc]
    """docker-py without the user's own registry passwords: a builder is not shown them."""

    def _set_auth_headers(self, headers: dict[str, str]) -> None:
        """Called for every build; the parent class would read ~/.docker/config.json."""


@dataclass(frozen=True, slots=True)
class Engine:
    """One engine, reached by `dial`. Each question has a connection of its own.

    Failures: BuilderLost when the connection breaks, NotAllowed when it turns us away, and
    `Refused` for the answers that the asking stage has to understand.
    """

    address: IPv6Address
    dial: Dial
    version: str = OLDEST_API
    port: int = PORT
    pause: Pause = asyncio.sleep
    emit: Emit = unheard
    vigilance: Vigilance = field(default_factory=Vigilance)
    bare: ClassVar[bool] = False
    tls: ClassVar[Tls | None] = None

    @property
    def url(self) -> str:
        """Its base URL, which nothing but our own dialling can reach."""
        return f"http://[{self.address}]:{self.port}"

    async def build(
        self, recipe: Recipe, body: Callable[[Line], Iterator[bytes]], take: Take
    ) -> None:
        """Send a context and hand what the engine says to `take`, in a thread.

        `body` has to make the line fragile until its last octet was taken.
        """

        def work(client: Client, line: Line) -> None:
            answer = client.build(
                fileobj=body(line),
                custom_context=True,
                dockerfile=recipe.dockerfile,
                buildargs=dict(recipe.build_args),
                target=recipe.target or None,
                nocache=recipe.no_cache,
                labels=dict(recipe.labels),
                platform=",".join(recipe.platforms) or None,
                network_mode=recipe.network or None,
                extra_hosts=dict(recipe.hosts) or None,
                cache_from=[one.attributes["ref"] for one in recipe.cache_from] or None,
                rm=True,
                forcerm=True,
            )
            _drain(answer, take)

        await self._long("the build", work)

    async def push(self, repository: str, tag: str, login: Login | None, take: Take) -> None:
        """Have a tag pushed; what the engine says goes to `take`, in a thread."""

        def work(client: Client, _: Line) -> None:
            registry = repository.partition("/")[0]
            auth = {} if login is None else _header(login, registry)
            _drain(client.push(repository, tag=tag, stream=True, auth_config=auth), take)

        await self._long("the push", work)

    async def save(self, image: str, take: Take) -> None:
        """Have an image as the archive that `load` takes; its octets go to `take`, in a thread."""
        await self._long(
            "fetching the image", lambda client, _: _drain(client.get_image(image), take)
        )

    async def load(self, pieces: Callable[[], Iterator[bytes]]) -> None:
        """Give the engine the images of an archive."""

        def work(client: Client, _: Line) -> None:
            for message in client.load_image(pieces()):
                said = message if isinstance(message, dict) else {}
                if failure := said.get("error") or said.get("message"):
                    raise Refused(400, str(failure)[:2000])

        await self._long("loading the image", work)

    async def tag(self, image_id: str, repository: str, tag: str) -> None:
        """Give an image a name."""
        await self._short(
            "naming the image", lambda client, _: client.tag(image_id, repository, tag=tag)
        )

    async def inspect(self, reference: str) -> Image | None:
        """Read an image back; None when the engine has no such image."""
        try:
            found = await self._short(
                "reading the image back", lambda client, _: client.inspect_image(reference)
            )
        except Refused as error:
            if error.status == 404:
                return None
            raise
        match found:
            case {"Id": str(name), "Size": int(size)}:
                digests = found.get("RepoDigests") or []
                names = tuple(text for text in digests if isinstance(text, str))
                return Image(name, size, names, _exposed(found.get("Config")))
            case _:
                raise lost("reading the image back", "it answered with something else")

    async def ping(self) -> None:
        """One question that any engine answers at once."""
        await self._ask("the ping", lambda client, _: client.ping(), PING_S)

    async def usage(self) -> Usage:
        """What it is and what lies on its disk; BuilderLost when it says something else."""
        doing = "asking what it holds"
        info = await self._short(doing, lambda client, _: client.info())
        match info, await self._ask(doing, lambda client, _: client.df(), LONG_S):
            case (
                {"ServerVersion": str(version), "NCPU": int(processors), "MemTotal": int(memory)},
                {"LayersSize": int(layers), "Images": images, "BuildCache": cache},
            ):
                sizes = [_size(one) for one in cache or ()]
                return Usage(version, processors, memory, len(images or ()), layers, sum(sizes))
            case _:
                raise lost(doing, "it answered with something else")

    async def prune(self, *, images: bool) -> int:
        """Throw away what builds have cached and images without a name, or with `images` all that
        no container uses; how many octets that gave back."""
        unused = {"dangling": not images}
        works: tuple[Callable[[Client, Line], object], ...] = (
            lambda client, _: client.prune_images(unused),
            lambda client, _: client.prune_builds(all=True),
        )
        freed = 0
        for work in works:
            match await self._ask("pruning", work, LONG_S):
                case {"SpaceReclaimed": int(octets)}:
                    freed += octets
                case _:
                    raise lost("pruning", "it answered with something else")
        return freed

    async def api_version(self) -> str:
        """The newest API it speaks, which any engine tells at once; Refused if it is none at all.

        No ping is needed before: to ask two things is two more ways there and back.
        """
        said = await self._ask(
            "asking for its version", lambda client, _: client.version(api_version=False), PING_S
        )
        match said:
            case {"ApiVersion": str(version)} if version.replace(".", "").isdecimal():
                return version
            case _:
                raise Refused(200, "no Docker engine answers there")

    async def _short(self, doing: str, work: Callable[[Client, Line], Made]) -> Made:
        return await self._ask(doing, work, ANSWER_S)

    async def _long(self, doing: str, work: Callable[[Client, Line], None]) -> None:
        """Without a time limit, but with a watch over the engine."""
        lines: list[Line] = []

        def noted(client: Client, line: Line) -> None:
            lines.append(line)
            work(client, line)

        working = asyncio.create_task(self._ask(doing, noted, None))
        await self.attend(doing, working, lambda: sum(line.moved for line in lines))

    async def attend(
        self, doing: str, working: asyncio.Task[Made], moved: Callable[[], int]
    ) -> Made:
        """Wait for work that may take long; BuilderLost when the engine shows no sign of life.

        `moved` tells how many octets the work's connection has moved. What is sent counts only as
        far as nothing of ours makes that by itself: a local buffer takes it from us in any case.
        """
        watching = asyncio.create_task(self._watch(moved))
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise lost(doing, await watching)
            return await working
        finally:
            for task in (working, watching):
                task.cancel()
            await asyncio.gather(working, watching, return_exceptions=True)

    async def connect(self, doing: str) -> socket.socket:
        """A connection of its own for whoever speaks another protocol; BuilderLost without one."""
        try:
            async with asyncio.timeout(DIAL_S):
                return await self.dial(str(self.address), self.port)
        except OSError as error:
            raise lost(doing, f"no connection to {self.url}: {_why(error)}") from None

    async def _watch(self, octets: Callable[[], int]) -> str:
        """Return, with the reason, when the engine has been silent for too long."""
        misses, heard, alive_at = 0, 0, time.monotonic()
        while True:
            await self.pause(VIGIL_AGAIN_S if misses else VIGIL_EVERY_S)
            moved = octets()
            if moved != heard:
                misses, heard, alive_at = 0, moved, time.monotonic()
                continue
            try:
                await self._sign()
                misses, alive_at = 0, time.monotonic()
            except (BuilderOrchError, Refused) as error:
                misses += 1
                silence = f"no sign of life in {time.monotonic() - alive_at:.0f} s"
                if misses >= VIGIL_MISSES:
                    return f"{silence} ({error})"
                self.emit(Warned("builder-silent", f"the builder gives {silence}: {error}"))

    async def _sign(self) -> None:
        try:
            async with asyncio.timeout(SIGN_S):
                await self.ping()
        except TimeoutError:
            raise lost("the ping", f"no answer in {SIGN_S:g} s") from None

    async def _ask(
        self, doing: str, work: Callable[[Client, Line], Made], timeout_s: float | None
    ) -> Made:
        """One connection, one request, in a thread; cancelling resets the connection."""
        line = Line(await self.connect(doing))

        def run() -> Made:
            try:
                client = _Client(base_url=self.url, version=self.version, timeout=timeout_s)
                with client:
                    # No proxy of the environment: the address means nothing outside the tunnel.
                    client.trust_env = False
                    pools = client.get_adapter(self.url).poolmanager
                    pools.pool_classes_by_scheme = {"http": pool_over(line)}
                    return work(client, line)
            finally:
                line.end()

        try:
            return await in_thread(run, give_up=line.give_up)
        except docker.errors.APIError as error:
            raise self._refusal(error) from None
        except _TRANSPORT as error:
            raise lost(doing, _why(error)) from None
        except (docker.errors.DockerException, ValueError) as error:
            raise lost(doing, f"it answered with something else: {error}"[:500]) from None

    def _refusal(self, error: Exception) -> Exception:
        status = getattr(error, "status_code", None) or 0
        message = str(getattr(error, "explanation", None) or error)[:2000]
        if status in {401, 403}:
            return NotAllowed(
                f"the builder turned us away: {message}",
                hint="Check that the token reaches this app and its organization's builder.",
            )
        return Refused(status, message)


async def wait_for_engine(
    engine: Engine, report: Callable[[str], None], *, limit_s: float, again: Again | None = None
) -> Engine:
    """Ask until it answers; the engine with the API version that it speaks.

    An engine may have died after the platform was asked for it, which starts it `again` for whoever
    asks. BuilderNotProvisioned after `limit_s`, with the reason of the last attempt.
    """
    began, there = time.monotonic(), engine
    due = [began + share * limit_s for share in ASKED_AGAIN]

    async def attempt() -> Engine:
        nonlocal there
        try:
            version = await there.api_version()
        except (BuilderLost, Refused) as error:
            if again is not None and due and time.monotonic() >= due[0]:
                del due[0]
                there = replace(there, address=await again())
            raise _NotYet(str(error)) from None
        return replace(there, version=version)

    def tell(state: RetryCallState) -> None:
        assert state.outcome is not None
        report(str(state.outcome.exception()))

    try:
        return await AsyncRetrying(
            retry=retry_if_exception_type(_NotYet),
            stop=stop_after_delay(limit_s),
            wait=wait_random_exponential(multiplier=0.2, max=3),
            before_sleep=tell,
            sleep=engine.pause,
            reraise=True,
        )(attempt)
    except _NotYet as error:
        raise BuilderNotProvisioned(
            f"the tunnel is up, but the builder's engine was not ready in {limit_s:g} s: {error}",
            hint="Run it again; if it stays so, look at the builder's own log.",
        ) from None


def _header(login: Login, registry: str) -> dict[str, str]:
    secret = login.password.reveal()
    if not login.username:
        return {"identitytoken": secret, "serveraddress": registry}
    return {"username": login.username, "password": secret, "serveraddress": registry}


def _size(found: object) -> int:
    size = found.get("Size") if isinstance(found, dict) else None
    return size if isinstance(size, int) else 0


def _drain(answer: Iterator[bytes | str], take: Take) -> None:
    for piece in answer:
        # docker-py gives text where an answer came in one piece
        take(piece.encode() if isinstance(piece, str) else piece)


def _exposed(config: object) -> tuple[int, ...]:
    """The ports of `EXPOSE 8080`, which an engine lists as {"8080/tcp": {}}."""
    listed = config.get("ExposedPorts") if isinstance(config, dict) else None
    names = [str(name) for name in listed] if isinstance(listed, dict) else []
    split = [name.partition("/") for name in names]
    return tuple(sorted(int(port) for port, _, kind in split if port.isdecimal() and kind == "tcp"))


def lost(doing: str, why: str) -> BuilderLost:
    """What a stage ends with when the engine is gone."""
    return BuilderLost(
        f"the builder was lost during {doing}: {why}",
        hint="Run it again; what was built so far is cached.",
    )


def _why(error: BaseException) -> str:
    """The reason in words: clients wrap a reset into several exceptions."""
    seen = list(_chain(error))
    for kinds, words in _REASONS:
        if any(isinstance(one, kinds) for one in seen):
            return words
    return str(seen[-1]) or type(seen[-1]).__name__


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it was made from, outermost first."""
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return
        yield seen
        wrapped = next((arg for arg in seen.args if isinstance(arg, BaseException)), None)
        seen = seen.__cause__ or seen.__context__ or wrapped


_REASONS: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
    ((ConnectionRefusedError,), "connection refused"),
    ((ConnectionResetError, BrokenPipeError), "connection reset"),
    ((TimeoutError, urllib3.exceptions.TimeoutError), "no answer in time"),
    (
        (
            http.client.IncompleteRead,
            http.client.RemoteDisconnected,
            urllib3.exceptions.IncompleteRead,
            urllib3.exceptions.InvalidChunkLength,
        ),
        "the connection ended in the middle of an answer",
    ),
)
