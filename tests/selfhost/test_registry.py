"""The registry's door between a client and a registry program that is played here."""

import asyncio
import gzip
import hashlib
import json
import socket
from base64 import b64encode
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.errors import EngineMissing, PortInUse
from builder_orch.selfhost.registry import (
    LEAST_ROOM,
    PORTS,
    Action,
    Door,
    Errand,
    Registry,
    configuration,
    password_of,
    serving,
)

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
DIGEST = "sha256:" + "0a" * 32
GOOD = {"Authorization": "Basic " + b64encode(b"x:good").decode()}
BAD = {"Authorization": "Basic " + b64encode(b"x:bad").decode()}


def authorize(password: str, repository: str, action: Action) -> bool:
    """Good may do all with web and read base; nobody else may do anything."""
    grants = {("web", "push"), ("web", "pull"), ("team/base", "pull"), ("", "pull")}
    return password == "good" and (repository, action) in grants


@asynccontextmanager
async def door_to(
    answer: Answer, folder: Path, said: list[str] | None = None, room: int = LEAST_ROOM
) -> AsyncGenerator[aiohttp.ClientSession]:
    """A client of a door, behind which a function answers."""
    application = web.Application(client_max_size=1 << 30)
    application.router.add_route("*", "/{path:.*}", answer)
    below = web.AppRunner(application, access_log=None, auto_decompress=False)
    await below.setup()
    await web.UnixSite(below, str(folder / "below.sock")).start()
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    report = (said if said is not None else []).append
    try:
        async with Door(
            folder / "below.sock", authorize=authorize, report=report, room=lambda: room
        ) as door:
            runner = serving(door)
            await runner.setup()
            await web.SockSite(runner, listener).start()
            try:
                async with aiohttp.ClientSession(url, auto_decompress=False) as client:
                    yield client
            finally:
                await runner.cleanup()
    finally:
        listener.close()
        await below.cleanup()


async def never(request: web.Request) -> web.StreamResponse:
    raise AssertionError(f"{request.path} was passed on")


async def echo(request: web.Request) -> web.StreamResponse:
    """Say what arrived."""
    return web.json_response(
        {
            "method": request.method,
            "path": request.raw_path,
            "headers": {name.lower(): value for name, value in request.headers.items()},
            "body": (await request.read()).decode("latin-1"),
        }
    )


@pytest.mark.parametrize(
    "authorization",
    [None, "Bearer good", "Basic", "Basic !!!", "Basic " + b64encode(b"y:good").decode()],
)
async def test_without_credentials_of_our_user_there_is_a_challenge(
    home: Path, authorization: str | None
) -> None:
    headers = {"Authorization": authorization} if authorization else {}
    async with door_to(never, home) as client:
        for path in ("/v2/", f"/v2/web/blobs/{DIGEST}", "/anything"):
            async with client.get(path, headers=headers) as answer:
                assert answer.status == 401
                assert answer.headers["WWW-Authenticate"].startswith("Basic realm=")
                assert (await answer.json())["errors"][0]["code"] == "UNAUTHORIZED"


async def test_the_base_tells_whether_a_token_is_known(home: Path) -> None:
    async with door_to(never, home) as client:
        async with client.get("/v2/", headers=GOOD) as answer:
            assert answer.status == 200
        async with client.get("/v2/", headers=BAD) as answer:
            assert answer.status == 401


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v2/other/manifests/latest"),
        ("PUT", "/v2/team/base/manifests/latest"),
        ("POST", "/v2/team/base/blobs/uploads/"),
        ("GET", "/v2/team/base/blobs/uploads/some-id"),
    ],
)
async def test_what_a_token_may_not_do_is_denied_in_the_words_that_engines_know(
    home: Path, method: str, path: str
) -> None:
    async with (
        door_to(never, home) as client,
        client.request(method, path, headers=GOOD) as answer,
    ):
        assert answer.status == 403
        [error] = (await answer.json())["errors"]
        assert error["code"] == "DENIED"
        assert error["message"] == "requested access to the resource is denied"
        # With null here dockerd drops the message and repeats the request for 50 s.
        assert error["detail"] is not None


@pytest.mark.parametrize(
    ("method", "path", "errand"),
    [
        ("GET", "/v2/web/manifests/latest", Errand("web", Action.PULL)),
        ("HEAD", f"/v2/a/b/c/blobs/{DIGEST}", Errand("a/b/c", Action.PULL)),
        ("GET", "/v2/web/tags/list", Errand("web", Action.PULL)),
        ("PUT", f"/v2/web/manifests/{DIGEST}", Errand("web", Action.PUSH)),
        ("POST", "/v2/web/blobs/uploads/", Errand("web", Action.PUSH)),
        ("PATCH", "/v2/web/blobs/uploads/1-2_3=", Errand("web", Action.PUSH)),
        ("DELETE", "/v2/web/blobs/uploads/1", Errand("web", Action.PUSH)),
        ("POST", "/v2/blobs/uploads/blobs/uploads/", Errand("blobs/uploads", Action.PUSH)),
        ("DELETE", f"/v2/web/manifests/{DIGEST}", None),
        ("DELETE", f"/v2/web/blobs/{DIGEST}", None),
        ("PUT", f"/v2/web/blobs/{DIGEST}", None),
        ("GET", "/v2/_catalog", None),
        ("GET", "/v2/web/../other/manifests/x", None),
        ("GET", "/v2/web%2Fother/manifests/x", None),
        ("GET", "/v2/Web/manifests/x", None),
        ("GET", "/v2//manifests/x", None),
        ("GET", "/v2/web/manifests/x/", None),
        ("CONNECT", "/v2/web/manifests/x", None),
        ("GET", "/debug/vars", None),
    ],
)
def test_what_a_request_wants(method: str, path: str, errand: Errand | None) -> None:
    assert Errand.of(method, path) == errand


@given(st.text(max_size=60))
def test_any_path_and_header_is_read_without_a_fault(text: str) -> None:
    errand = Errand.of("GET", f"/v2/{text}")
    assert errand is None or ".." not in errand.repository.split("/")
    password = password_of(f"Basic {text}")
    assert password is None or password


async def test_a_request_arrives_as_it_was_sent_but_for_the_token(home: Path) -> None:
    headers = {
        "Host": "127.0.0.1:20001",
        "Accept": "application/a",
        "Content-Type": "application/vnd.docker.distribution.manifest.v2+json",
        "Connection": "X-Hop",
        "X-Hop": "1",
        "Content-Encoding": "gzip",
    }
    body = gzip.compress(b"manifest")
    async with (
        door_to(echo, home) as client,
        client.put("/v2/web/manifests/v1?a=1%2B1", data=body, headers=GOOD | headers) as answer,
    ):
        seen = await answer.json()
    assert seen["method"] == "PUT"
    assert seen["path"] == "/v2/web/manifests/v1?a=1%2B1"
    assert seen["body"].encode("latin-1") == body
    passed = seen["headers"]
    assert passed["host"] == "127.0.0.1:20001"
    assert passed["accept"] == "application/a"
    assert passed["content-type"] == headers["Content-Type"]
    assert passed["content-length"] == str(len(body))
    assert "transfer-encoding" not in passed
    assert passed.keys().isdisjoint({"authorization", "x-hop"})
    assert "good" not in json.dumps(passed)


async def test_an_answer_comes_back_as_it_was_given(home: Path) -> None:
    body = gzip.compress(b"layer")

    async def answer_below(request: web.Request) -> web.StreamResponse:
        if request.method == "POST":
            headers = {
                "Location": "/v2/web/blobs/uploads/1?_state=abc",
                "Docker-Upload-UUID": "1",
                "Range": "0-0",
            }
            return web.Response(status=202, headers=headers)
        headers = {"Docker-Content-Digest": DIGEST, "Content-Encoding": "gzip"}
        return web.Response(body=body, headers=headers)

    async with door_to(answer_below, home) as client:
        async with client.post("/v2/web/blobs/uploads/", headers=GOOD) as answer:
            assert answer.status == 202
            assert answer.headers["Location"] == "/v2/web/blobs/uploads/1?_state=abc"
            assert answer.headers["Docker-Upload-UUID"] == "1"
        async with client.get(f"/v2/web/blobs/{DIGEST}", headers=GOOD) as answer:
            assert answer.headers["Docker-Content-Digest"] == DIGEST
            assert answer.headers["Content-Encoding"] == "gzip"
            assert await answer.read() == body
        async with client.head(f"/v2/web/blobs/{DIGEST}", headers=GOOD) as answer:
            assert answer.status == 200
            assert answer.headers["Content-Length"] == str(len(body))
            assert await answer.read() == b""


async def test_bodies_are_passed_on_while_they_come(home: Path) -> None:
    came = asyncio.Event()
    taken = asyncio.Event()
    piece = bytes(range(256)) * 1024

    async def answer_below(request: web.Request) -> web.StreamResponse:
        if request.method == "PATCH":
            digest = hashlib.sha256(await request.content.readexactly(len(piece)))
            came.set()
            digest.update(await request.content.read())
            return web.Response(text=digest.hexdigest())
        response = web.StreamResponse(headers={"Content-Length": str(2 * len(piece))})
        await response.prepare(request)
        await response.write(piece)
        await taken.wait()
        await response.write(piece)
        return response

    async def upload() -> AsyncIterator[bytes]:
        yield piece
        # The rest is not even made before the first piece was seen below.
        await came.wait()
        yield piece

    async with door_to(answer_below, home) as client, asyncio.timeout(30):
        path = "/v2/web/blobs/uploads/1"
        async with client.patch(path, headers=GOOD, data=upload()) as answer:
            assert await answer.text() == hashlib.sha256(piece * 2).hexdigest()
        async with client.get(f"/v2/web/blobs/{DIGEST}", headers=GOOD) as answer:
            assert await answer.content.readexactly(len(piece)) == piece
            taken.set()
            assert await answer.content.read() == piece


@pytest.mark.parametrize("framing", ["Transfer-Encoding: chunked", "Content-Length: 9"])
async def test_an_upload_that_breaks_off_never_ends_in_order_below(
    home: Path, framing: str
) -> None:
    began = asyncio.Event()
    ends: asyncio.Queue[str] = asyncio.Queue()

    async def answer_below(request: web.Request) -> web.StreamResponse:
        assert await request.content.readexactly(4) == b"half"
        began.set()
        try:
            await request.content.read()
        except (aiohttp.ClientError, OSError, asyncio.CancelledError):
            ends.put_nowait("broken off")
            raise
        ends.put_nowait("ended in order")
        return web.Response()

    async with door_to(answer_below, home) as client, asyncio.timeout(30):
        host = client._base_url  # noqa: SLF001 (where the door listens)
        assert host is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", host.port)
        token = b64encode(b"x:good").decode()
        half = "4\r\nhalf\r\n" if "chunked" in framing else "half"
        writer.write(
            f"PATCH /v2/web/blobs/uploads/1 HTTP/1.1\r\nHost: h\r\nAuthorization: Basic {token}\r\n"
            f"{framing}\r\n\r\n{half}".encode()
        )
        await began.wait()
        writer.transport.abort()
        assert await ends.get() == "broken off"
        assert await reader.read() == b""


async def test_layers_are_mounted_only_from_where_the_token_may_read(home: Path) -> None:
    async with door_to(echo, home) as client:

        async def path_below(source: str) -> str:
            path = f"/v2/web/blobs/uploads/?mount={DIGEST}&from={source}"
            async with client.post(path, headers=GOOD) as answer:
                return str((await answer.json())["path"])

        assert "from=team%2Fbase" in await path_below("team/base")
        assert await path_below("secret") == "/v2/web/blobs/uploads/"
        assert await path_below("team/base&from=secret") == "/v2/web/blobs/uploads/"


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "Multipart/form-data; b=1"])
async def test_a_form_is_not_a_second_query(home: Path, kind: str) -> None:
    async with (
        door_to(echo, home) as client,
        client.post(
            "/v2/web/blobs/uploads/",
            data=f"mount={DIGEST}&from=secret".encode(),
            headers=GOOD | {"Content-Type": kind},
        ) as answer,
    ):
        assert "form" not in (await answer.json())["headers"].get("content-type", "")


async def test_a_full_disk_is_told_in_a_way_that_engines_show(home: Path) -> None:
    said: list[str] = []

    async def full(request: web.Request) -> web.StreamResponse:
        detail = {"DriverName": "filesystem", "Enclosed": {"Op": "write", "Err": 28}}
        error = {"code": "UNKNOWN", "message": "unknown error", "detail": detail}
        text = json.dumps({"errors": [error]}, separators=(",", ":"))
        return web.Response(status=500, text=text)

    async with (
        door_to(full, home, said) as client,
        client.put("/v2/web/blobs/uploads/1", headers=GOOD, data=b"layer") as answer,
    ):
        assert 400 <= answer.status < 500
        assert "no space left on device" in (await answer.json())["errors"][0]["message"]
    assert said == ["the registry's disk is full"]


@pytest.mark.parametrize("room", [LEAST_ROOM - 1, LEAST_ROOM])
async def test_an_upload_that_a_full_disk_swallowed_is_not_begun_again(
    home: Path, room: int
) -> None:
    """docker-registry takes a small layer, cannot write it, and then knows nothing of it."""
    said: list[str] = []

    async def forgetful(request: web.Request) -> web.StreamResponse:
        error = {"code": "BLOB_UPLOAD_INVALID", "message": "blob upload invalid"}
        return web.json_response({"errors": [error]}, status=404)

    async with door_to(forgetful, home, said, room) as client:
        async with client.put("/v2/web/blobs/uploads/1", headers=GOOD, data=b"") as answer:
            told = (await answer.json())["errors"][0]["message"]
            assert (answer.status, "no space left" in told) == (
                (413, True) if room < LEAST_ROOM else (404, False)
            )
        async with client.get("/v2/web/blobs/uploads/1", headers=GOOD) as answer:
            assert answer.status == 404
    assert said == ["the registry's disk is full"] * (room < LEAST_ROOM)


async def test_a_registry_that_is_down_or_fails_is_reported(home: Path) -> None:
    said: list[str] = []

    async def broken(request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            return web.Response(status=500, text="it broke")
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with door_to(broken, home, said) as client:
        async with client.get("/v2/web/tags/list", headers=GOOD) as answer:
            assert (answer.status, await answer.text()) == (500, "it broke")
        async with client.put("/v2/web/manifests/x", headers=GOOD, data=b"{}") as answer:
            assert answer.status == 503
            assert (await answer.json())["errors"][0]["code"] == "UNAVAILABLE"
    assert "it broke" in said[0]
    assert "did not answer" in said[1]


def test_the_program_listens_where_only_we_reach_it(home: Path) -> None:
    settings = configuration(home / "r.sock", home / "data", "secret")
    http, storage = settings["http"], settings["storage"]
    assert isinstance(http, dict)
    assert isinstance(storage, dict)
    assert (http["net"], http["addr"]) == ("unix", str(home / "r.sock"))
    assert http["relativeurls"] is True
    assert storage["delete"] == {"enabled": True}
    assert storage["filesystem"] == {"rootdirectory": str(home / "data")}


async def listen_on(port: int) -> socket.socket:
    return socket.create_server(("127.0.0.1", port))


async def test_without_the_program_its_package_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builder_orch.selfhost.registry.find_program", lambda name: None)
    registry = Registry(home, listen=listen_on, authorize=authorize, report=print)
    with pytest.raises(EngineMissing) as caught:
        await registry.__aenter__()
    assert "docker-registry" in caught.value.hint


async def test_the_port_in_image_names_is_kept_and_its_loss_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builder_orch.selfhost.registry.find_program", lambda name: "/bin/false")
    asked: list[int] = []

    async def listen(port: int) -> socket.socket:
        asked.append(port)
        if len(asked) == 1:
            raise OSError(98, "Address already in use")
        return await listen_on(0)

    registry = Registry(home, listen=listen, authorize=authorize, report=print)
    with pytest.raises(EngineMissing, match="did not start"):
        await registry.__aenter__()
    assert len(asked) == 2
    assert asked[1] in PORTS
    assert registry.address == f"127.0.0.1:{asked[1]}"

    async def taken(port: int) -> socket.socket:
        assert port == asked[1]
        raise OSError(98, "Address already in use")

    with pytest.raises(PortInUse, match=str(asked[1])) as caught:
        await Registry(home, listen=taken, authorize=authorize, report=print).__aenter__()
    assert "registry.port" in caught.value.hint
