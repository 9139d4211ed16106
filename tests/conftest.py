"""What many tests share: a home of their own and, for system tests, one engine for the session."""

import asyncio
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty FLY_BUILD_HOME for every test; its path is short enough for a unix socket in it.

    Autouse, because a test that forgot it would work on the user's own platform.
    """
    for name in [name for name in os.environ if name.startswith(("FLY_", "DOCKER_"))]:
        monkeypatch.delenv(name)
    with tempfile.TemporaryDirectory(prefix="fly-") as folder:
        monkeypatch.setenv("FLY_BUILD_HOME", folder)
        yield Path(folder)


Endings = Callable[[Callable[[], object]], None]


@pytest.fixture(scope="session")
def endings() -> Iterator[Endings]:
    """Takes what ends something that lasted for the session; all of it is done at the same time."""
    with ThreadPoolExecutor() as pool:
        begun: list[Future[object]] = []
        yield lambda end: begun.append(pool.submit(end))
        for end in begun:
            end.result()


@pytest.fixture(scope="session")
def engine_socket(endings: Endings) -> Iterator[Path]:
    """The unix socket of a Docker engine that all system tests of a session share.

    It runs on a loop of its own, because each test has another one.
    """
    from builder_orch.errors import EngineMissing
    from builder_orch.selfhost.engine import Engine

    reported: list[str] = []
    folder = tempfile.TemporaryDirectory(prefix="fly-")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="engine")
    thread.start()

    def leave() -> None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        folder.cleanup()

    engine = Engine(Path(folder.name), report=reported.append)
    try:
        asyncio.run_coroutine_threadsafe(engine.__aenter__(), loop).result()
    except BaseException as failure:
        leave()
        if isinstance(failure, EngineMissing):
            pytest.skip(str(failure))
        raise

    def end() -> None:
        closing = engine.__aexit__(None, None, None)
        asyncio.run_coroutine_threadsafe(closing, loop).result()
        leave()

    yield engine.docker_host
    endings(end)
