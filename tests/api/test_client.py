"""The client against a server that goes wrong in every way, and against a platform that works."""

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import IPv6Address
from pathlib import Path

import pytest
from gql.transport.exceptions import TransportConnectionFailed
from yarl import URL

from builder_orch.api.client import IDEMPOTENT_SELFHOST, TRIES, Platform
from builder_orch.api.failures import Elsewhere, Trouble, from_errors, from_transport
from builder_orch.api.models import App, Build, Organization, Release, Secret
from builder_orch.api.transport import ANSWER_LIMIT, authorization, open_transport
from builder_orch.errors import (
    AppUnknown,
    BuilderOrchError,
    NotAllowed,
    NotLoggedIn,
    PlatformRefused,
    PlatformUnavailable,
    UsageFailure,
)
from builder_orch.events import Event, Retry
from builder_orch.tunnel.carrier.proxy import Outside
from builder_orch.tunnel.config import encode_key
from tests.api.rig import (
    CANARY,
    Script,
    Step,
    Waits,
    answer,
    bound,
    certificate_for,
    hang,
    octets,
    reset,
    scripted,
    slow_headers,
)

REGION = answer({"nearestRegion": {"code": "ams", "name": "Amsterdam"}})
PERSONAL = Organization("org1", "personal", "Personal")
APP = App("app1", "hello", PERSONAL)
BUILD = Build("build1", "running")
RELEASE = {"id": "r1", "version": 4, "status": "pending", "inProgress": True, "reason": ""}
RELEASED = answer({"createRelease": {"app": {"hostname": "h"}, "release": RELEASE}})
PEER_ADDED = answer(
    {
        "addWireGuardPeer": {
            "peerip": "fdaa::1:2",
            "endpointip": "127.0.0.1:40000",
            "pubkey": encode_key(bytes(range(32))),
        }
    }
)


class Opened:
    """Opens clients and servers for a test and closes them after it."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self.waits = Waits()
        self.events: list[Event] = []

    async def server(self, *steps: Step) -> Script:
        """A server that takes these steps."""
        return await self._stack.enter_async_context(scripted(*steps))

    async def client(
        self,
        url: str,
        *,
        timeout_s: float = 60.0,
        idempotent: frozenset[str] = frozenset(),
        token: str = CANARY,
    ) -> Platform:
        """A client that never really waits."""
        platform = Platform(
            url,
            Secret(token),
            timeout_s=timeout_s,
            idempotent=idempotent,
            emit=self.events.append,
            sleep=self.waits,
        )
        return await self._stack.enter_async_context(platform)

    async def pair(self, *steps: Step, **given: float) -> tuple[Script, Platform]:
        """Both."""
        script = await self.server(*steps)
        return script, await self.client(script.url, timeout_s=given.get("timeout_s", 60.0))


@pytest.fixture
async def opened() -> AsyncIterator[Opened]:
    async with AsyncExitStack() as stack:
        yield Opened(stack)


async def release_once(platform: Platform) -> Release:
    return await platform.create_release(
        APP, image="i@sha256:" + "0" * 64, build=BUILD, strategy="rolling", definition={}
    )


async def add_peer_once(platform: Platform) -> None:
    await platform.add_peer(PERSONAL, "p", "key", region=None, ephemeral=True)


# --- what is sent


async def test_token_agent_and_operation_are_sent(opened: Opened) -> None:
    script, platform = await opened.pair(REGION)
    assert (await platform.nearest_region()).code == "ams"
    (request,) = script.requests
    assert request.headers["authorization"] == f"Bearer {CANARY}"
    assert request.headers["user-agent"].startswith("fly-build/")
    assert request.body["operationName"] == "NearestRegion"
    assert "cookie" not in request.headers


@pytest.mark.parametrize(
    ("token", "value"),
    [
        ("fo1_abc", "Bearer fo1_abc"),
        ("fm1r_abc", "FlyV1 fm1r_abc"),
        ("fm1a_abc,fo1_x", "FlyV1 fm1a_abc,fo1_x"),
        ("fo1_x,fm2_abc", "FlyV1 fo1_x,fm2_abc"),
        ("FlyV1 fm2_abc\n", "FlyV1 fm2_abc"),
        ("Bearer fo1_abc", "Bearer fo1_abc"),
        ("fbt_0123_abc", "Bearer fbt_0123_abc"),
    ],
)
def test_the_scheme_follows_from_the_kind_of_token(token: str, value: str) -> None:
    assert authorization(Secret(token)).reveal() == value


@pytest.mark.parametrize("token", ["", "  ", "Bearer ", "a b", "a\nb", "tökn", "a\x00"])
def test_no_token_or_one_that_no_header_may_hold(token: str) -> None:
    with pytest.raises(NotLoggedIn):
        Platform("https://api.example/graphql", Secret(token))


@pytest.mark.parametrize(
    "url",
    [
        "http://api.example/graphql",
        "http://10.0.0.1/graphql",
        "https://user:secret@api.example/",
        "ftp://api.example/",
        "graphql",
        "",
        "http://127.0.0.1.example/",
    ],
)
def test_a_url_to_which_no_token_may_go(url: str) -> None:
    with pytest.raises(UsageFailure):
        Platform(url, Secret(CANARY))


# --- retries


@pytest.mark.parametrize(
    "trouble",
    [
        octets(b"", status=500),
        octets(b"<html>502</html>", status=502),
        octets(b"", status=503, headers="Retry-After: 7\r\n"),
        octets(b"", status=429),
        reset,
        octets(b'{"data"', length=100),
        answer(None, errors=[{"message": "oh", "extensions": {"code": "SERVER_ERROR"}}]),
    ],
)
async def test_a_query_is_tried_again(opened: Opened, trouble: Step) -> None:
    script, platform = await opened.pair(trouble, trouble, REGION)
    assert (await platform.nearest_region()).code == "ams"
    assert len(script.requests) == TRIES
    assert len(opened.waits.seconds) == TRIES - 1
    assert [type(event) for event in opened.events] == [Retry, Retry]


async def test_a_query_is_given_up_after_its_tries(opened: Opened) -> None:
    script, platform = await opened.pair(*[octets(b"", status=503)] * TRIES)
    with pytest.raises(PlatformUnavailable, match="503") as caught:
        await platform.nearest_region()
    assert len(script.requests) == TRIES
    assert isinstance(caught.value.__cause__, Trouble)


async def test_waits_grow_and_differ(opened: Opened) -> None:
    _, platform = await opened.pair(*[reset] * TRIES)
    with pytest.raises(PlatformUnavailable):
        await platform.nearest_region()
    first, second = opened.waits.seconds
    assert 0.2 <= first <= 0.4 <= second <= 0.8


@pytest.mark.parametrize("asked", ["30", "date"])
async def test_the_server_says_how_long_to_wait(opened: Opened, asked: str) -> None:
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=30))
    header = f"Retry-After: {when if asked == 'date' else asked}\r\n"
    _, platform = await opened.pair(octets(b"", status=429, headers=header), REGION)
    await platform.nearest_region()
    assert opened.waits.seconds == [pytest.approx(30, abs=5)]


async def test_a_wait_beyond_the_deadline_is_not_begun(opened: Opened) -> None:
    busy = octets(b"", status=503, headers="Retry-After: 3600\r\n")
    script, platform = await opened.pair(busy)
    with pytest.raises(PlatformUnavailable):
        await platform.nearest_region()
    assert len(script.requests) == 1
    assert opened.waits.seconds == []


@pytest.mark.parametrize(
    "trouble", [octets(b"", status=502), reset, octets(b'{"data"', length=100)]
)
async def test_a_mutation_that_may_be_done_is_not_repeated(opened: Opened, trouble: Step) -> None:
    script, platform = await opened.pair(trouble)
    with pytest.raises(PlatformUnavailable, match="not known"):
        await release_once(platform)
    assert len(script.requests) == 1


@pytest.mark.parametrize("trouble", [octets(b"", status=502), reset])
async def test_an_idempotent_mutation_is_repeated_under_the_same_id(
    opened: Opened, trouble: Step
) -> None:
    script = await opened.server(trouble, RELEASED)
    platform = await opened.client(script.url, idempotent=IDEMPOTENT_SELFHOST)
    assert (await release_once(platform)).version == 4
    first, second = (request.body["variables"] for request in script.requests)
    assert first == second
    assert isinstance(first, dict)
    assert first["input"]["clientMutationId"]


async def test_two_calls_are_two_mutations(opened: Opened) -> None:
    script, platform = await opened.pair(RELEASED, RELEASED)
    await release_once(platform)
    await release_once(platform)
    first, second = (request.body["variables"] for request in script.requests)
    assert first != second


async def test_a_mutation_refused_for_its_rate_was_not_done(opened: Opened) -> None:
    script, platform = await opened.pair(octets(b"", status=429), RELEASED)
    assert (await release_once(platform)).id == "r1"
    assert len(script.requests) == 2


async def test_a_mutation_that_never_left_is_repeated(opened: Opened) -> None:
    listener = bound()
    script = Script([PEER_ADDED], url=f"http://127.0.0.1:{listener.getsockname()[1]}/graphql")
    servers: list[asyncio.Server] = []

    async def come_up(seconds: float) -> None:
        servers.append(await script.serve(listener))

    async with Platform(script.url, Secret(CANARY), idempotent=frozenset(), sleep=come_up) as one:
        await add_peer_once(one)
    assert len(script.requests) == 1
    servers[0].close()
    await servers[0].wait_closed()


async def test_nobody_listens(opened: Opened) -> None:
    listener = bound()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/graphql"
    platform = await opened.client(url)
    origin = url.removesuffix("/graphql")
    why = f"no connection to {origin.removeprefix('http://')}: Connection refused"
    told = f"asking {origin} to release the image failed: {why}"
    with pytest.raises(PlatformUnavailable) as caught:
        await release_once(platform)
    assert str(caught.value) == told
    assert "FLY_BUILD_API_URL" in caught.value.hint
    assert len(opened.waits.seconds) == TRIES - 1
    tries = [(event.phase, event.cause) for event in opened.events if isinstance(event, Retry)]
    assert tries == [("platform", told.replace(" failed", ""))] * (TRIES - 1)
    listener.close()


# --- deadlines and limits


@pytest.mark.parametrize("step", [hang, slow_headers])
async def test_a_query_ends_by_its_deadline(opened: Opened, step: Step) -> None:
    _, platform = await opened.pair(*[step] * TRIES, timeout_s=0.09)
    with pytest.raises(PlatformUnavailable, match="no answer within"):
        await platform.nearest_region()


async def test_a_mutation_that_hangs_is_sent_once(opened: Opened) -> None:
    script, platform = await opened.pair(slow_headers, timeout_s=1.0)
    with pytest.raises(PlatformUnavailable, match=r"no answer within 1 s; .*not known"):
        await release_once(platform)
    assert len(script.requests) == 1


async def test_an_answer_over_the_limit_is_dropped(opened: Opened) -> None:
    script, platform = await opened.pair(octets(b" " * (ANSWER_LIMIT + 1)))
    with pytest.raises(PlatformUnavailable, match="16 MB"):
        await platform.nearest_region()
    assert len(script.requests) == 1


async def test_a_small_answer_that_unpacks_to_a_large_one_is_dropped(opened: Opened) -> None:
    bomb = gzip.compress(bytes(ANSWER_LIMIT * 4))
    assert len(bomb) < ANSWER_LIMIT / 100
    _, platform = await opened.pair(octets(bomb, headers="Content-Encoding: gzip\r\n"))
    with pytest.raises(PlatformUnavailable, match="16 MB"):
        await platform.nearest_region()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html><body>Welcome to the hotel</body></html>",
        b"{",
        b"[]",
        b"5",
        b"null",
        b'"errors"',
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"data": 5}',
        b'{"data": null}',
        b'{"data": {"nearestRegion": []}}',
        b'{"errors": {"a": 1}}',
        b'{"errors": "no"}',
        b'{"errors": [null]}',
        b'{"errors": [{"message": {"a": []}, "extensions": []}]}',
    ],
)
async def test_an_answer_that_is_not_graphql(opened: Opened, body: bytes) -> None:
    _, platform = await opened.pair(*[octets(body)] * TRIES)
    with pytest.raises((PlatformUnavailable, PlatformRefused)) as caught:
        await platform.nearest_region()
    assert CANARY not in str(caught.value)
    assert "hotel" not in str(caught.value)


# --- redirects


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed(opened: Opened, status: int) -> None:
    other = await opened.server()
    moved = octets(b"", status=status, headers=f"Location: {other.url}\r\n")
    script, platform = await opened.pair(moved)
    with pytest.raises(PlatformUnavailable, match="redirects"):
        await platform.nearest_region()
    assert other.requests == []
    assert len(script.requests) == 1


async def test_the_token_is_attached_for_one_origin_alone(opened: Opened) -> None:
    script, other = await opened.server(), await opened.server()
    transport = open_transport(URL(script.url), Secret(CANARY), outside=Outside())
    await transport.connect()
    assert transport.session is not None
    for url in (other.url, script.url.replace("127.0.0.1", "localhost")):
        with pytest.raises(Elsewhere):
            await transport.session.post(url)
    await transport.close()
    assert other.requests == script.requests == []


# --- translation


def gone(message: str, code: str | None = None) -> Step:
    extensions = {} if code is None else {"extensions": {"code": code}}
    return answer(None, errors=[{"message": message, **extensions}])


@pytest.mark.parametrize(
    ("step", "leaf", "words"),
    [
        (gone("You must be authenticated", "UNAUTHORIZED"), NotLoggedIn, "not accept"),
        (gone("Token has expired", "UNAUTHORIZED"), NotLoggedIn, "expired"),
        (gone("Not authorized to deploy this app", "UNAUTHORIZED"), NotAllowed, "reach"),
        (gone("no", "FORBIDDEN"), NotAllowed, "reach"),
        (gone("Could not find App"), AppUnknown, "Could not find App"),
        (gone("Could not find App", "NOT_FOUND"), AppUnknown, "Could not find App"),
        (gone("Region is full", "INVALID"), PlatformRefused, "Region is full"),
        (gone("Region is full"), PlatformRefused, "Region is full"),
        (octets(b"", status=401), NotLoggedIn, "not accept"),
        (octets(b'{"error":"token expired"}', status=401), NotLoggedIn, "expired"),
        (octets(b"", status=403), NotAllowed, "forbids"),
        (octets(b"", status=404), PlatformUnavailable, "404|not GraphQL"),
    ],
)
async def test_what_the_platform_says_becomes_a_leaf(
    opened: Opened, step: Step, leaf: type[BuilderOrchError], words: str
) -> None:
    script, platform = await opened.pair(step)
    with pytest.raises(leaf, match=words) as caught:
        await platform.app("hello")
    assert caught.value.hint
    assert CANARY not in f"{caught.value} {caught.value.hint}"
    assert len(script.requests) == 1


async def test_partial_data_with_an_error_is_an_error(opened: Opened) -> None:
    partial = answer({"nearestRegion": {"code": "ams", "name": "A"}}, errors=[{"message": "half"}])
    _, platform = await opened.pair(partial)
    with pytest.raises(PlatformRefused, match="half"):
        await platform.nearest_region()


async def test_words_of_the_platform_cannot_steer_a_terminal(opened: Opened) -> None:
    _, platform = await opened.pair(gone("\x1b]0;owned\x07\r\nDone.\u202e" + "x" * 9999))
    with pytest.raises(PlatformRefused) as caught:
        await platform.nearest_region()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


async def test_no_app_and_no_error_is_no_app(opened: Opened) -> None:
    _, platform = await opened.pair(answer({"app": None}))
    with pytest.raises(AppUnknown, match="hello"):
        await platform.app("hello")


@pytest.mark.parametrize("errors", [[], None, 5, "x", [[]], [{"message": None}], {}])
def test_errors_of_any_form_become_one_failure(errors: object) -> None:
    assert isinstance(from_errors(errors), BuilderOrchError | Trouble)


def test_a_transport_without_a_cause_is_told_all_the_same() -> None:
    assert isinstance(from_transport(TransportConnectionFailed("odd\x1b")), Trouble)


# --- organizations


def organizations(*slugs: str, personal: str = "") -> Step:
    nodes = [
        {
            "id": f"id-{slug}",
            "slug": slug,
            "rawSlug": f"raw-{slug}",
            "name": slug,
            "type": "PERSONAL" if slug == personal else "SHARED",
        }
        for slug in slugs
    ]
    return answer({"organizations": {"nodes": nodes}})


async def test_which_organization(opened: Opened) -> None:
    mine = organizations("acme", "personal", personal="personal")
    _, platform = await opened.pair(mine, mine, mine, organizations("only"))
    assert (await platform.organization(None)).slug == "personal"
    assert (await platform.organization("acme")).id == "id-acme"
    assert (await platform.organization("raw-acme")).id == "id-acme"
    assert (await platform.organization(None)).slug == "only"


async def test_no_or_more_than_one_organization(opened: Opened) -> None:
    _, platform = await opened.pair(organizations("a", "b"), organizations("a"), organizations())
    with pytest.raises(UsageFailure, match="several"):
        await platform.organization(None)
    with pytest.raises(NotAllowed, match="'b'"):
        await platform.organization("b")
    with pytest.raises(NotAllowed, match="any"):
        await platform.organization(None)


async def test_invalid_peers_are_among_those_asked_for(opened: Opened) -> None:
    said = answer({"validateWireGuardPeers": {"invalidPeerIps": ["fdaa::2", "fdaa::9"]}})
    _, platform = await opened.pair(said)
    asked = [IPv6Address("fdaa::1"), IPv6Address("fdaa::2")]
    assert await platform.validate_peers(asked) == [IPv6Address("fdaa::2")]


# --- certificates


@pytest.mark.parametrize(
    ("begins_d", "ends_d", "trusted", "hint"),
    [(1, 2, True, "clock"), (-2, -1, True, "clock"), (-1, 1, False, "trusts")],
)
async def test_a_certificate_that_cannot_be_trusted(
    tmp_path: Path,
    begins_d: int,
    ends_d: int,
    trusted: bool,
    hint: str,
) -> None:
    days = {"begins": timedelta(days=begins_d), "ends": timedelta(days=ends_d)}
    path = certificate_for(tmp_path, "localhost", **days)
    outside = Outside(ca_files=(str(path),) if trusted else ())
    waits = Waits()
    async with (
        scripted(certificate=path, host="localhost") as script,
        Platform(script.url, Secret(CANARY), outside=outside, sleep=waits) as platform,
    ):
        with pytest.raises(PlatformUnavailable, match="certificate") as caught:
            await platform.nearest_region()
    assert hint in caught.value.hint
    assert ("by this machine's clock, which says 2" in str(caught.value)) is (hint == "clock")
    assert waits.seconds == []
    assert script.requests == []
