"""A platform with a real gateway and a real API in a thread of the test, without any engine."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from pathlib import Path

import structlog

from builder_orch.selfhost import names
from builder_orch.selfhost.api import application
from builder_orch.selfhost.gateway import Gateway, open_gateway
from builder_orch.selfhost.serve import sweep
from builder_orch.selfhost.store import Store
from builder_orch.tunnel.config import Door, PrivateKey, PublicKey
from builder_orch.tunnel.machine import Endpoint
from tests.api.rig import FakeBuilder, FakeRunner, serving

KEY = PrivateKey(bytes(range(1, 33)))


@dataclass
class Front:
    """What the API sees of the gateway; it can be told to lie about where it is."""

    gateway: Gateway
    elsewhere: Endpoint | None = None
    deaf: bool = False

    @property
    def public_key(self) -> PublicKey:
        return self.gateway.public_key

    @property
    def endpoint(self) -> Endpoint:
        return self.elsewhere or self.gateway.endpoint

    @property
    def websocket(self) -> Door | None:
        return self.gateway.websocket

    async def install(self, public_key: PublicKey, address: IPv6Address) -> None:
        if not self.deaf:
            await self.gateway.install(public_key, address)

    async def remove(self, public_key: PublicKey) -> None:
        await self.gateway.remove(public_key)

    def installed(self) -> set[IPv6Address]:
        return self.gateway.installed()


@dataclass
class Here:
    """The platform as a test uses it, from the test's own thread."""

    url: str
    token: str
    store: Store
    front: Front
    websocket_port: int
    loop: asyncio.AbstractEventLoop
    builder: FakeBuilder = field(default_factory=FakeBuilder)

    @property
    def environment(self) -> dict[str, str]:
        """The variables of somebody who uses it."""
        return {
            "FLY_BUILD_API_URL": self.url,
            "FLY_BUILD_TOKEN": self.token,
            "FLY_BUILD_REGISTRY": "127.0.0.1:1",
        }

    def sweep(self, idle_s: float) -> list[str]:
        """Let the platform collect ephemeral peers as if it were so much later."""
        later = time.time() + idle_s + 1
        sweeping = sweep(self.store, self.front.gateway, idle_s, later)
        return asyncio.run_coroutine_threadsafe(sweeping, self.loop).result(30)

    def names(self) -> set[str]:
        """Of the peers that the platform knows."""
        return {peer.name for peer in self.store.peers()}


@contextmanager
def platform_here(
    folder: Path, *, install_delay_s: float = 0.0, resolver: bool = True
) -> Iterator[Here]:
    """Serve until the block ends; without `resolver` questions for names are swallowed."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="platform")
    thread.start()
    stack = AsyncExitStack()
    try:
        # Its log would come between what the commands print.
        with structlog.testing.capture_logs():
            opening = _open(stack, folder, install_delay_s, resolver)
            try:
                yield asyncio.run_coroutine_threadsafe(opening, loop).result(30)
            finally:
                asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _open(
    stack: AsyncExitStack, folder: Path, install_delay_s: float, resolver: bool
) -> Here:
    store = Store(f"sqlite:///{folder / 'state.db'}")
    stack.callback(store.close)
    organization = store.ensure_organization("personal", name="Personal", personal=True)
    token = store.issue_token("someone", lifetime_s=3600)
    address = organization.plan.gateway
    opening = open_gateway(
        KEY, address, install_delay_s=install_delay_s, certificate=folder / "wgtcpd.pem"
    )
    gateway = await stack.enter_async_context(opening)

    def answer(query: bytes, stream: bool) -> bytes:
        return names.answer(query, store.zone(organization), stream=stream) if resolver else b""

    gateway.name_with(answer, address)
    front, builder = Front(gateway), FakeBuilder()
    app = application(store, gateway=front, builder=builder, runner=FakeRunner())
    base = await stack.enter_async_context(serving(app))
    assert gateway.websocket is not None
    door = gateway.websocket.port
    loop = asyncio.get_running_loop()
    return Here(f"{base}/graphql", token, store, front, door, loop, builder)
