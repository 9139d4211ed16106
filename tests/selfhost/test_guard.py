"""The guard before the builder's engine: what it lets through, and that nothing passes unseen."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.selfhost.guard import Refused, Request, attend, forbidden

LIMIT_S = 20
HELLO = {"Image": "hello", "HostConfig": {"Binds": None, "CapAdd": [], "NetworkMode": "default"}}


@dataclass
class Engine:
    """What reached the engine's end, until its caller stopped; it answers with `answer` first."""

    answer: bytes = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
    heard: bytes = b""
    done: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock)
        self.heard = await reader.read(1 << 20)
        if self.heard:
            writer.write(self.answer)
        self.heard += await reader.read()
        self.done.set()
        writer.close()


@asynccontextmanager
async def guarded(
    engine: Engine,
) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A caller's connection to an engine behind the guard."""
    near, theirs = socket.socketpair()
    ours, far = socket.socketpair()
    for sock in (near, theirs, ours, far):
        sock.setblocking(False)
    tasks = [asyncio.create_task(attend(theirs, ours)), asyncio.create_task(engine.serve(far))]
    reader, writer = await asyncio.open_connection(sock=near)
    try:
        async with asyncio.timeout(LIMIT_S):
            yield reader, writer
            writer.close()
            await asyncio.gather(*tasks)
    finally:
        writer.close()


async def said_to(request: bytes) -> tuple[bytes, bytes]:
    """What a caller is answered, and what the engine hears of it."""
    engine = Engine()
    async with guarded(engine) as (reader, writer):
        writer.write(request)
        writer.write_eof()
        answer = await reader.read()
    return answer, engine.heard


def post(path: str, body: object, *fields: str) -> bytes:
    octets = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: docker", f"Content-Length: {len(octets)}", *fields]
    return "\r\n".join([*lines, "", ""]).encode() + octets


@pytest.mark.parametrize(
    "request_",
    [
        b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: keep-alive\r\n\r\n",
        b"GET /v1.41/containers/json?all=1 HTTP/1.1\r\nHost: docker\r\n\r\n",
        b"DELETE /v1.41/images/hello HTTP/1.1\r\nHost: docker\r\n\r\n",
        b"POST /v1.41/build?t=x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nxx\r\n0\r\n\r\n",
        b"POST /v1.41/images/r.example/a/b/push?tag=1 HTTP/1.1\r\nX-Registry-Auth: e\r\n\r\n",
        b"POST /containers/x/attach?stdin=1 HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
        post("/v1.41/volumes/create", {"Name": "v", "Driver": "local", "DriverOpts": {}}),
        post("/containers/create?name=x", HELLO),
        post("/containers/x/exec", {"Cmd": ["true"], "Privileged": False}),
    ],
)
async def test_what_builds_and_their_containers_need_is_let_through_and_ends(
    request_: bytes,
) -> None:
    answer, heard = await said_to(request_)
    assert answer.startswith(b"HTTP/1.1 200")
    assert heard.splitlines()[0] == request_.splitlines()[0]
    assert heard.partition(b"\r\n\r\n")[2] == request_.partition(b"\r\n\r\n")[2]
    assert b"\r\nConnection: close\r\n" in heard
    assert b"keep-alive" not in heard


@pytest.mark.parametrize(
    "config",
    [
        {"Privileged": True},
        {"privileged": 1},
        {"Binds": ["/:/host"]},
        {"Binds": ["v:/a", "/etc:/b:ro"]},
        {"Mounts": [{"Type": "bind", "Source": "/", "Target": "/host"}]},
        {"Mounts": [{"Target": "/host"}]},
        {"Mounts": [{"Type": "volume", "VolumeOptions": {"DriverConfig": {"Options": {"o": ""}}}}]},
        {"PidMode": "host"},
        {"NETWORKMODE": "host"},
        {"IpcMode": "host"},
        {"UTSMode": "host"},
        {"UsernsMode": "host"},
        {"CgroupnsMode": "host"},
        {"Devices": [{"PathOnHost": "/dev/sda"}]},
        {"DeviceRequests": [{"Count": -1}]},
        {"DeviceCgroupRules": ["a *:* rwm"]},
        {"CapAdd": ["SYS_ADMIN"]},
        {"\u017fecurityOpt": ["seccomp=unconfined"]},
        {"MaskedPaths": []},
        {"ReadonlyPaths": []},
        {"Runtime": "other"},
        {"VolumeDriver": "other"},
    ],
)
@pytest.mark.parametrize("name", ["HostConfig", "hostconfig"])
async def test_rights_over_the_machine_are_refused(config: dict[str, object], name: str) -> None:
    answer, heard = await said_to(post("/v1.41/containers/create", {**HELLO, name: config}))
    assert answer.startswith(b"HTTP/1.1 403 Forbidden\r\n")
    assert "does not allow" in json.loads(answer.partition(b"\r\n\r\n")[2])["message"]
    assert heard == b""
    # Engines take it at the start of a container, too, if they are asked as of old.
    assert (await said_to(post("/v1.20/containers/x/start", config)))[1] == b""


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post("/containers/x/exec", {"Privileged": True}), 403),
        (post("/volumes/create", {"DriverOpts": {"device": "/etc", "o": "bind"}}), 403),
        (post("/volumes/create", {"Driver": "other"}), 403),
        (post("/plugins/pull?remote=x", []), 403),
        (post("/swarm/init", {}), 403),
        (post("/services/create", {}), 403),
        (post("/networks/create", {}), 403),
        (post("/v1.41/containers/%63reate", {"HostConfig": {"Privileged": True}}), 403),
        (post("//containers/create", {}), 400),
        (post("/build/../containers/create", {}), 400),
        (post("/containers/create", b"not JSON"), 400),
        (post("/containers/create", b"[" * 200_000), 400),
        (post("/containers/create", {}, "Transfer-Encoding: chunked"), 411),
        (post("/containers/create", {}, "Content-Length: 3"), 411),
        (b"POST /containers/create HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n", 413),
        (b"POST /containers/create HTTP/1.1\r\nContent-Length: 9\r\n\r\n{}", 400),
        (b"GET /_ping HTTP/1.1\nHost: x\n\nPOST /swarm/init HTTP/1.1\r\n\r\n", 400),
        (b"GET /_ping HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400),
        (b"GET /_ping HTTP/1.1\r\nConnection : keep-alive\r\n\r\n", 400),
        (b"GET http://docker/_ping HTTP/1.1\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET /" + b"x" * 70_000, 431),
    ],
)
async def test_what_is_not_for_builds_or_not_plain_is_refused(request_: bytes, status: int) -> None:
    answer, heard = await said_to(request_)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert heard == b""


async def test_the_engine_hears_what_was_understood_and_nothing_twice() -> None:
    doubled = b'{"HostConfig": {"Privileged": true}, "HostConfig": {}}'
    _, heard = await said_to(post("/containers/create", doubled))
    assert heard.endswith(b'\r\n\r\n{"HostConfig": {}}')
    assert heard.count(b"Content-Length") == 1


async def test_a_stream_goes_both_ways_after_its_request() -> None:
    engine = Engine(b"HTTP/1.1 101 UPGRADED\r\n\r\nhello")
    async with guarded(engine) as (reader, writer):
        writer.write(b"POST /grpc HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
        assert await reader.readuntil(b"hello")
        writer.write(b"POST /swarm/init is only octets here")
        writer.write_eof()
        assert await reader.read() == b""
    assert b"\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n" in engine.heard
    assert engine.heard.endswith(b"only octets here")


async def test_a_caller_that_leaves_before_it_asks_takes_the_engine_along() -> None:
    engine = Engine()
    async with guarded(engine) as (_, writer):
        writer.write(b"GET /_pi")
        writer.close()
        await engine.done.wait()
    assert engine.heard == b""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["HostConfig", "Binds", "Mounts", "Type", "x"]), inner)
    ),
    max_leaves=8,
)


@given(JSON)
def test_any_json_is_judged(value: object) -> None:
    assert isinstance(forbidden(value), str)


@given(st.binary(max_size=200))
def test_any_head_is_read_or_refused(octets: bytes) -> None:
    try:
        request = Request.parse(octets)
    except Refused:
        return
    assert b"\n" not in request.first
    assert request.head().count(b"\r\n\r\n") == 1
