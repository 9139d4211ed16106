"""The tunnels that the agent holds: one for each key, as long as somebody uses it.

A tunnel is asked for by the file that describes it, so a private key is read where it is used and
never told to anybody; a file that changed describes another tunnel. A key is never in two tunnels:
each would take the session of the other away.
"""

import asyncio
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import structlog

from builder_orch.api.keylock import hold_key
from builder_orch.api.keyring import SUFFIX, Record
from builder_orch.api.peer import public_key
from builder_orch.errors import AlreadyRunning, BuilderOrchError, TunnelNotUp, UsageFailure
from builder_orch.tunnel.carrier.choice import Choice
from builder_orch.tunnel.config import PrivateKey, TunnelConfig
from builder_orch.tunnel.driver import Tunnel, open_tunnel
from builder_orch.tunnel.stamps import Stamps
from builder_orch.tunnel.wireguard.timers import INITIATION_SPACING

FILE_LIMIT = 1 << 16
ANSWER_S = 1.5
REOPEN_PAUSE_S = 2 * INITIATION_SPACING
_log = structlog.get_logger()


class Unusable(Exception):
    """The file does not describe a tunnel of this user's, or lets others read its key."""


class Busy(Exception):
    """The key is in use, by another process or with another configuration."""


def read_config(path: str) -> TunnelConfig:
    """What a file says: a peer's of `api.keyring`, or wg-quick text. Unusable says what is wrong.

    The file has to be a plain one of this user's that nobody else can read; no link is followed.
    """
    try:
        text = _private_text(path)
        config = Record.parse(text).config if text.startswith("{") else TunnelConfig.parse(text)
    except OSError as error:
        raise Unusable(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Unusable(f"{path}: {error}") from None
    if config is None:
        raise Unusable(f"the private key of {path} is not kept there")
    if len(config.peers) != 1 or config.peers[0].endpoint is None:
        raise Unusable(f"{path} has to name one peer with an endpoint")
    return config


def _private_text(path: str) -> str:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise Unusable(f"{path} is not a file of yours")
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise Unusable(f"{path} can be read by others; its mode has to be 0600")
        return os.read(descriptor, FILE_LIMIT).decode().lstrip()
    finally:
        os.close(descriptor)


class Held:
    """One tunnel, open until `close`; no other process has its key as long."""

    def __init__(self, path: str, config: TunnelConfig, choice: Choice, stamps: Stamps) -> None:
        self.path = path
        self.config = config
        self.choice = choice
        self.users: set[object] = set()
        self.superseded = False
        self.tunnel: Tunnel | None = None
        self._key = public_key(config.private_key)
        loop = asyncio.get_running_loop()
        self.used_at = loop.time()
        self._opened: asyncio.Future[Tunnel] = loop.create_future()
        self._enough = asyncio.Event()
        self._task = asyncio.ensure_future(self._hold(stamps))

    @property
    def streams(self) -> int:
        """Connections that are open in it."""
        return 0 if self.tunnel is None else self.tunnel.streams

    @property
    def in_use(self) -> bool:
        """Whether a client or a stream would miss it."""
        return bool(self.users or self.streams)

    @property
    def going(self) -> bool:
        """Whether it is closed or about to be, or could not be opened."""
        return self._enough.is_set() or self._task.done()

    async def opened(self) -> Tunnel:
        """The tunnel when it is open; Busy, TunnelNotUp or OSError if it cannot be."""
        return await asyncio.shield(self._opened)

    async def can_be_joined(self) -> bool:
        """Whether it is of use to one more. When nobody uses it, the far end is asked: it may have
        begun anew meanwhile, and WireGuard by itself would take 15 s to notice."""
        useful = self.in_use or await self._answers() or self.in_use
        return useful and not self.going

    async def _answers(self) -> bool:
        if self.config.dns is None:
            return True
        try:
            tunnel = await self.opened()
            await tunnel.ping(self.config.dns, timeout_s=ANSWER_S)
        except (Busy, BuilderOrchError, OSError):
            return False
        return True

    async def close(self) -> None:
        """Reset what is open and let go of the key."""
        self._enough.set()
        await asyncio.wait({self._task})

    async def _hold(self, stamps: Stamps) -> None:
        try:
            with ExitStack() as stack:
                await asyncio.to_thread(stack.enter_context, hold_key(self._key, self.path))
                opening = open_tunnel(self.config, choice=self.choice, stamps=stamps)
                async with opening as self.tunnel:
                    self._opened.set_result(self.tunnel)
                    await self._enough.wait()
        except AlreadyRunning as error:
            self._fail(Busy(str(error)))
        except (TunnelNotUp, UsageFailure, OSError) as error:
            self._fail(error)
        finally:
            self.tunnel = None
            if not self._opened.done():
                # A defect, which the loop tells of; whoever waits must not wait for ever.
                self._fail(OSError("the tunnel could not be opened"))

    def _fail(self, error: Exception) -> None:
        if self._opened.done():
            raise error
        self._opened.set_exception(error)
        # Whoever asked for it may be gone by now.
        self._opened.exception()


class Tunnels:
    """The table, by private key."""

    def __init__(self, stamps: Path) -> None:
        self._stamps = stamps
        self._held: dict[PrivateKey, Held] = {}

    def __iter__(self) -> Iterator[Held]:
        return iter(list(self._held.values()))

    @property
    def in_use(self) -> bool:
        """Whether any is."""
        return any(held.in_use for held in self)

    @property
    def streams(self) -> int:
        """Connections that are open in all of them."""
        return sum(held.streams for held in self)

    async def take(self, path: str, choice: Choice, user: object) -> Tunnel:
        """The tunnel that the file describes now, for `user` until `release`; opened if need be.

        Unusable, Busy; TunnelNotUp or OSError when it cannot be opened.
        """
        while True:
            config = read_config(path)
            held = self._held.get(config.private_key)
            if held is None:
                held = self._begin(path, config, choice)
                break
            if not held.going:
                if (held.config, held.choice) != (config, choice):
                    if held.in_use:
                        raise Busy(f"the key of {path} is in use with another configuration")
                elif await held.can_be_joined():
                    break
            await held.close()
            if self._held.get(config.private_key) is held:
                del self._held[config.private_key]
            # A gateway passes over an initiation that follows another of that key too closely.
            await asyncio.sleep(REOPEN_PAUSE_S)
        for other in self:
            # The file has described another key before: that tunnel ends with its last user.
            other.superseded = other.superseded or (other is not held and other.path == path)
        held.users.add(user)
        try:
            return await held.opened()
        except BaseException:
            held.users.discard(user)
            raise

    def release(self, user: object) -> None:
        """`user` is gone; what it dialled stays."""
        for held in self:
            if user in held.users:
                held.users.discard(user)
                held.used_at = asyncio.get_running_loop().time()

    async def tidy(self, idle_s: float) -> None:
        """Close those that nobody has used for `idle_s`, and at once those of changed files."""
        now = asyncio.get_running_loop().time()
        for key, held in list(self._held.items()):
            if held.in_use:
                held.used_at = now
            elif held.going or held.superseded or now - held.used_at >= idle_s:
                await held.close()
                if self._held.get(key) is held:
                    del self._held[key]
                _log.info("tunnel closed", file=held.path)

    async def close(self) -> None:
        """Close all."""
        for held in self:
            await held.close()
        self._held.clear()

    def _begin(self, path: str, config: TunnelConfig, choice: Choice) -> Held:
        # A peer's file has its stamps beside it, for whoever uses it next.
        stamps = Path(path).with_suffix(".stamp")
        if not path.endswith(SUFFIX):
            stamps = self._stamps / hashlib.sha256(path.encode()).hexdigest()[:32]
        held = Held(path, config, choice, Stamps(stamps))
        self._held[config.private_key] = held
        _log.info("tunnel", file=path, carrier=choice.kind)
        return held
