"""Requests that no client of ours would send, and what the platform tells about itself."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import ClientSession
from graphql import GraphQLError, parse
from structlog.testing import capture_logs

from builder_orch.selfhost.api import BODY_LIMIT, check_size
from tests.api.rig import Selfhost, codes, post, selfhost

IMAGE = "127.0.0.1:5000/hello@sha256:" + "a" * 64


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Selfhost]:
    async with selfhost(tmp_path) as running:
        yield running


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b'{"query": 5}', 400),
        (b'{"query": "{nearestRegion{code}}", "variables": []}', 200),
        (b'{"query": "{nearestRegion{code}}", "variables": [1]}', 400),
        (b'{"query": "{nearestRegion{code}}", "operationName": 1}', 400),
        (b"[" * 100_000, 400),
        (b"\xff", 400),
        (b" " * (BODY_LIMIT + 1), 413),
    ],
)
async def test_bodies_that_are_no_request(host: Selfhost, body: bytes, status: int) -> None:
    seen, answer = await post(host, body)
    assert seen == status
    if status != 200:
        assert codes(answer) == ["INVALID"]


async def test_another_content_type_is_not_read(host: Selfhost) -> None:
    status, answer = await post(host, {}, headers={"Content-Type": "text/plain"})
    assert (status, codes(answer)) == (415, ["INVALID"])


DEEP = '{app(name:"a"){release(version:1){id}machines{nodes{ips{nodes{id}}}}}}'
FRAGMENTS = "{...a0}" + "".join(
    f"fragment a{i} on Queries{{...a{i + 1} ...a{i + 1}}}" for i in range(30)
) + "fragment a30 on Queries{nearestRegion{code}}"  # fmt: skip


@pytest.mark.parametrize(
    "query",
    [
        "",
        "{",
        "{nothing}",
        "query A{nearestRegion{code}} query B{nearestRegion{code}}",
        "{" * 500,
        "{a" * 600 + "}" * 600,
        "{app(name:" + "[" * 900 + "]" * 900 + "){id}}",
        "{" + "nearestRegion{code}" * 1000 + "}",
        "{" + " ".join(f"r{i}:nearestRegion{{code}}" for i in range(150)) + "}",
        FRAGMENTS,
        "{...a} fragment a on Queries{...a}",
        "{__schema{types{name}}}",
        "subscription{x}",
        "mutation{createApp(input:{}){app{id}}}",
        "{app{id}}",
    ],
)
async def test_documents_that_are_refused(host: Selfhost, query: str) -> None:
    status, answer = await post(host, {"query": query})
    assert status == 200
    assert set(codes(answer)) == {"INVALID"}
    assert answer["data"] in (None, {"app": None})


async def test_long_documents_are_given_up_before_they_are_read_whole(host: Selfhost) -> None:
    _, answer = await post(host, {"query": "{app(name:[" + "1 " * 3000 + "]){id}}"})
    assert codes(answer) == ["INVALID"]
    assert "tokens" in json.dumps(answer)


def test_depth_and_fields_are_counted_through_fragments() -> None:
    check_size(parse(DEEP))
    with pytest.raises(GraphQLError, match="deep"):
        check_size(parse("{a" * 13 + "}" * 13))
    with pytest.raises(GraphQLError, match="fields"):
        check_size(parse(FRAGMENTS))
    check_size(parse("{...a} fragment a on Q{...b} fragment b on Q{...a ...c}"))


async def test_introspection_is_on_when_asked_for(tmp_path: Path) -> None:
    async with selfhost(tmp_path, introspection=True) as host:
        _, answer = await post(host, {"query": "{__schema{queryType{name}}}"})
    assert answer == {"data": {"__schema": {"queryType": {"name": "Queries"}}}}


async def test_what_breaks_inside_is_logged_with_its_request_and_not_told(
    host: Selfhost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the inside story")

    monkeypatch.setattr(host.store, "organizations", fail)
    with capture_logs() as logs:
        _, answer = await post(host, {"query": "{organizations{nodes{id}}}"})
    assert codes(answer) == ["SERVER_ERROR"]
    assert "inside story" not in json.dumps(answer)
    (failure,) = [entry for entry in logs if "failure" in entry]
    assert "inside story" in failure["failure"]
    assert failure["request_id"] in json.dumps(answer)
    assert host.token not in json.dumps(logs, default=str)


async def test_logs_say_who_and_what_without_the_token(host: Selfhost) -> None:
    with capture_logs() as logs:
        async with host.platform() as platform:
            await platform.nearest_region()
    (entry,) = logs
    assert (entry["event"], entry["operation"], entry["codes"]) == ("answered", "NearestRegion", [])
    assert entry["token_id"] in host.token
    assert host.token not in json.dumps(logs, default=str)


async def test_health_without_a_token(host: Selfhost) -> None:
    url = host.url.removesuffix("graphql") + "healthz"
    async with ClientSession() as session, session.get(url) as response:
        assert (response.status, await response.json()) == (200, {"status": "ok"})


async def test_the_mutation_id_comes_back(host: Selfhost) -> None:
    query = "mutation($i:CreateAppInput!){createApp(input:$i){clientMutationId app{id}}}"
    given = {"organizationId": host.organization.id, "name": "a", "clientMutationId": "m1"}
    _, answer = await post(host, {"query": query, "variables": {"i": given}})
    data = answer["data"]
    assert isinstance(data, dict)
    assert data["createApp"]["clientMutationId"] == "m1"


async def test_a_release_asked_for_twice_is_made_once(host: Selfhost) -> None:
    host.store.create_app(host.organization, "hello")
    query = "mutation($i:CreateReleaseInput!){createRelease(input:$i){release{version}}}"
    given = {
        "appId": "hello",
        "image": IMAGE,
        "strategy": "ROLLING",
        "definition": {},
        "platformVersion": "machines",
    }
    for i in range(20):
        variables = {"i": {**given, "clientMutationId": f"m{i}"}}
        both = [await post(host, {"query": query, "variables": variables}) for _ in range(2)]
        assert both[0] == both[1]
    assert [version for _, version in host.runner.begun] == list(range(1, 21))
