"""The platform: one method per operation, over GraphQL; every retry of an API call is in here."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import cache, partial
from importlib.resources import files
from ipaddress import IPv6Address
from time import time as wall_clock
from types import TracebackType
from typing import Final, Self
from uuid import uuid4

from aiohttp import ClientTimeout
from gql import GraphQLRequest
from gql.transport.aiohttp import AIOHTTPTransport
from gql.transport.exceptions import TransportError
from graphql import (
    DocumentNode,
    ExecutionResult,
    OperationDefinitionNode,
    OperationType,
    parse,
    separate_operations,
)
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_base

from builder_orch.api import clock
from builder_orch.api.failures import LATER, Trouble, from_errors, from_transport
from builder_orch.api.models import (
    Answer,
    App,
    Build,
    Builder,
    Granted,
    Organization,
    Peer,
    Region,
    Release,
    Secret,
    told_installed,
)
from builder_orch.api.transport import authorization, checked_url, is_this_machine, open_transport
from builder_orch.errors import (
    AppUnknown,
    BuilderOrchError,
    NotAllowed,
    NotLoggedIn,
    PlatformRefused,
    PlatformUnavailable,
    UsageFailure,
)
from builder_orch.events import Emit, Retry, Warned
from builder_orch.tunnel.carrier.proxy import Outside

Failure = BuilderOrchError | Trouble

TRIES: Final = 3
CALL_LIMIT_S: Final = 60.0
"""Seconds for one call with all its tries."""
CONNECT_LIMIT_S: Final = 10.0
BUILDER_CALLS: Final = 3
"""How many times that long a call may take that makes and starts a machine."""
LOG_LIMIT: Final = 4096
"""Octets of a build's log that are sent: its end."""

IDEMPOTENT: Final = frozenset(
    {"AddWireGuardPeer", "RemoveWireGuardPeer", "ValidateWireGuardPeers", "FinishBuild"}
)
"""Mutations that may be repeated after a lost answer on any platform."""
IDEMPOTENT_SELFHOST: Final = IDEMPOTENT | {
    "CreateBuild",
    "CreateRelease",
    "EnsureMachineRemoteBuilder",
    "UpdateRelease",
}
"""The same for selfhost, which knows a repetition by its clientMutationId."""

ASKED: Final = {
    "Organizations": "for the organizations",
    "FindApp": "for the app",
    "NearestRegion": "for the nearest region",
    "FindPeers": "for the WireGuard peers",
    "FindMachines": "for the state of a machine",
    "FindRelease": "for the release",
    "CreateApp": "to create the app",
    "AddWireGuardPeer": "to add a WireGuard peer",
    "RemoveWireGuardPeer": "to remove a WireGuard peer",
    "ValidateWireGuardPeers": "which WireGuard peers it knows",
    "EnsureMachineRemoteBuilder": "for a builder",
    "CreateBuild": "to record that a build begins",
    "FinishBuild": "to record that a build has ended",
    "CreateRelease": "to release the image",
    "UpdateRelease": "to record how the release went",
    "IssueCertificate": "for a certificate",
}
"""What the platform is asked by each operation, for people."""
_TIMINGS: Final = {
    "build_and_push": "buildAndPushMs",
    "build": "buildMs",
    "builder_init": "builderInitMs",
    "context_build": "contextBuildMs",
    "image_build": "imageBuildMs",
    "push": "pushMs",
}


@cache
def operations() -> Mapping[str, DocumentNode]:
    """Each of our operations by its name, with the fragments that it uses."""
    text = files("builder_orch.api").joinpath("operations.graphql").read_text("utf-8")
    return separate_operations(parse(text, no_location=True))


def is_mutation(document: DocumentNode) -> bool:
    """Does the document change anything?"""
    return any(
        isinstance(part, OperationDefinitionNode) and part.operation is OperationType.MUTATION
        for part in document.definitions
    )


class Platform:
    """The GraphQL API, Fly.io's or selfhost's; an async context manager.

    Each method is one call, limited in time with all its tries, and raises leaves of `errors`:
    NotLoggedIn, NotAllowed, AppUnknown, PlatformRefused, PlatformUnavailable.
    """

    def __init__(
        self,
        url: str,
        token: Secret,
        *,
        timeout_s: float = CALL_LIMIT_S,
        idempotent: frozenset[str] = IDEMPOTENT,
        local: bool | None = None,
        outside: Outside | None = None,
        emit: Emit | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`idempotent` names the mutations that this platform carries out once however often they
        are sent. `local`: may its gateway have an address that is not public? (None: if the API is
        on this machine.) `outside` is how to get out of this network. Retries are announced to
        `emit` and waited for by `sleep`."""
        self._url = checked_url(url)
        authorization(token)
        self._token = token
        self._local = is_this_machine(self._url) if local is None else local
        self._timeout_s = timeout_s
        self._idempotent = idempotent
        self._outside = outside or Outside()
        self._emit = emit
        self._sleep = sleep
        self._transport: AIOHTTPTransport | None = None
        self._skew_s: float | None = None

    async def __aenter__(self) -> Self:
        self._transport = open_transport(
            self._url, self._token, outside=self._outside, dated=self._note_date
        )
        await self._transport.connect()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._transport is not None:
            await self._transport.close()
            self._transport = None

    # --- organizations and apps

    async def organizations(self) -> list[Organization]:
        """All that the token reaches."""
        answer = await self._call("Organizations", {})
        return [Organization.parse(node) for node in answer.nodes("organizations")]

    async def organization(self, slug: str | None) -> Organization:
        """The organization of that slug; None: the personal one, or the only one there is."""
        found = await self.organizations()
        if slug is not None:
            chosen = [one for one in found if slug in {one.slug, one.raw_slug}]
        else:
            chosen = [one for one in found if one.personal] or found
        if not chosen:
            what = "any organization" if slug is None else f"an organization {slug!r}"
            raise NotAllowed(
                f"the token does not reach {what}",
                hint=f"it reaches: {', '.join(one.slug for one in found) or 'none'}",
            )
        if slug is None and len(chosen) > 1:
            slugs = ", ".join(one.slug for one in chosen)
            raise UsageFailure("there are several organizations", hint=f"name one of: {slugs}")
        return chosen[0]

    async def app(self, name: str) -> App:
        """The app of that name; AppUnknown when there is none or it is not shown."""
        answer = await self._call("FindApp", {"name": name})
        if not answer.has("app"):
            raise _app_unknown(name)
        return App.parse(answer.at("app"))

    async def create_app(self, organization: Organization, name: str) -> App:
        """A new app."""
        given = {"organizationId": organization.id, "name": name}
        return App.parse((await self._mutate("CreateApp", given)).at("app"))

    async def nearest_region(self) -> Region:
        """The region whose gateway the platform holds nearest to us."""
        return Region.parse((await self._call("NearestRegion", {})).at("nearestRegion"))

    # --- peers

    async def add_peer(
        self,
        organization: Organization,
        name: str,
        public_key: str,
        *,
        region: str | None,
        ephemeral: bool,
    ) -> Peer:
        """Let our key (base64) into the organization's network."""
        given: dict[str, object] = {
            "organizationId": organization.id,
            "name": name,
            "pubkey": public_key,
            "ephemeral": ephemeral,
        }
        if region is not None:
            given["region"] = region
        return Peer.parse(await self._mutate("AddWireGuardPeer", given), local=self._local)

    async def remove_peer(self, organization: Organization, name: str) -> None:
        """Shut a key out again."""
        given = {"organizationId": organization.id, "name": name}
        await self._mutate("RemoveWireGuardPeer", given)

    async def validate_peers(self, addresses: Iterable[IPv6Address]) -> list[IPv6Address]:
        """Those of our peers' addresses that the platform no longer knows."""
        asked = {str(address): address for address in addresses}
        answer = await self._mutate("ValidateWireGuardPeers", {"peerIps": list(asked)})
        return [asked[text] for text in answer.texts("invalidPeerIps") if text in asked]

    async def is_installed(self, address: IPv6Address) -> bool | None:
        """Does its gateway answer this peer of ours? None where the platform does not say."""
        answer = await self._mutate("ValidateWireGuardPeers", {"peerIps": [str(address)]})
        return told_installed(answer.extensions, address)

    async def peers(self, organization: Organization) -> list[Granted]:
        """All keys that are let into the organization's network."""
        answer = await self._call("FindPeers", {"slug": organization.slug})
        if not answer.has("organization"):
            raise NotAllowed(
                f"the platform shows no organization {organization.slug!r}",
                hint="check its name, and that the token reaches it",
            )
        return [Granted.parse(node) for node in answer.at("organization").nodes("wireGuardPeers")]

    # --- builder and builds

    async def machine_state(self, app_name: str, machine_id: str) -> str:
        """What the platform says of a machine, as `started`; "" when it has no such machine."""
        answer = await self._call("FindMachines", {"app": app_name})
        if not answer.has("app"):
            return ""
        found = {node.text("id"): node.text("state") for node in answer.at("app").nodes("machines")}
        return found.get(machine_id, "")

    async def ensure_builder(self, app: App, region: str | None) -> Builder:
        """The machine that builds for the app's organization; made or started if need be."""
        given: dict[str, object] = {"appName": app.name}
        if region is not None:
            given["region"] = region
        limit_s = BUILDER_CALLS * self._timeout_s
        answer = await self._mutate("EnsureMachineRemoteBuilder", given, limit_s=limit_s)
        return Builder.parse(answer)

    async def create_build(self, app: App, *, machine_id: str, strategies: Iterable[str]) -> Build:
        """Open the record of a build."""
        given = {
            "appName": app.name,
            "builderType": "remote",
            "machineId": machine_id,
            "strategiesAvailable": list(strategies),
        }
        return Build.parse(await self._mutate("CreateBuild", given))

    async def finish_build(
        self,
        app: App,
        build: Build,
        *,
        status: str,
        image: tuple[str, str, int] | None,
        logs: str,
        timings_ms: Mapping[str, float],
    ) -> Build:
        """Close the record: `completed`, `failed` or `cancelled`.

        `image` is (id, tag, size in octets). Of `logs` the end is sent. `timings_ms` may hold
        build_and_push, build, builder_init, context_build, image_build and push; the record has no
        place for others.
        """
        end = logs.encode("utf-8", "replace")[-LOG_LIMIT:].decode("utf-8", "ignore")
        timings = {_TIMINGS[k]: round(v) for k, v in timings_ms.items() if k in _TIMINGS}
        given: dict[str, object] = {
            "appName": app.name,
            "buildId": build.id,
            "status": status,
            "logs": end,
            "timings": timings,
        }
        if image is not None:
            given["finalImage"] = {"id": image[0], "tag": image[1], "sizeBytes": image[2]}
        return Build.parse(await self._mutate("FinishBuild", given))

    # --- releases

    async def create_release(
        self,
        app: App,
        *,
        image: str,
        build: Build,
        strategy: str,
        definition: Mapping[str, object],
    ) -> Release:
        """Release an image named by its digest."""
        given = {
            "appId": app.id,
            "buildId": build.id,
            "image": image,
            "strategy": strategy.upper(),
            "definition": dict(definition),
            "platformVersion": "machines",
        }
        answer = await self._mutate("CreateRelease", given)
        return Release.parse(answer.at("release"), answer.at("app"))

    async def release(self, app: App, version: int) -> Release:
        """How far the release of that version has come."""
        answer = await self._call("FindRelease", {"app": app.name, "version": version})
        if not answer.has("app"):
            raise _app_unknown(app.name)
        found = answer.at("app")
        if not found.has("release"):
            raise PlatformRefused(
                f"the app {app.name!r} has no release with the version {version}",
                hint="see which releases there are",
            )
        return Release.parse(found.at("release"), found)

    async def update_release(
        self, release: Release, *, status: str, metadata: Mapping[str, object]
    ) -> Release:
        """Write down how a release went."""
        given = {"releaseId": release.id, "status": status, "metadata": dict(metadata)}
        return Release.parse((await self._mutate("UpdateRelease", given)).at("release"))

    # --- ssh

    async def issue_certificate(
        self,
        organization: Organization,
        *,
        public_key: str,
        principals: Iterable[str],
        apps: Iterable[str] = (),
        valid_hours: int = 1,
    ) -> str:
        """An SSH certificate for our public key (both as authorized_keys lines)."""
        given: dict[str, object] = {
            "organizationId": organization.id,
            "publicKey": public_key,
            "principals": list(principals),
            "validHours": valid_hours,
        }
        if names := list(apps):
            given["appNames"] = names
        return (await self._mutate("IssueCertificate", given)).text("certificate")

    # --- one call

    async def _mutate(
        self, operation: str, given: Mapping[str, object], *, limit_s: float | None = None
    ) -> Answer:
        # one id for all tries of one call: the platform can know a repetition by it
        whole = {**given, "clientMutationId": uuid4().hex}
        answer = await self._call(operation, {"input": whole}, limit_s=limit_s)
        return answer.at(operation[0].lower() + operation[1:])

    async def _call(
        self, operation: str, variables: Mapping[str, object], *, limit_s: float | None = None
    ) -> Answer:
        document = operations()[operation]
        request = GraphQLRequest(
            document, variable_values=dict(variables), operation_name=operation
        )
        query = not is_mutation(document)
        repeatable = query or operation in self._idempotent
        whole_s = self._timeout_s if limit_s is None else limit_s
        deadline = asyncio.get_running_loop().time() + whole_s
        tries = AsyncRetrying(
            sleep=self._sleep,
            stop=stop_after_attempt(TRIES),
            wait=_Wait(),
            retry=retry_if_exception(partial(_may_repeat, repeatable, deadline)),
            before_sleep=partial(self._announce, operation),
            reraise=True,
        )
        # a query that hangs leaves time for the next try; a mutation may take its time
        limit = ClientTimeout(
            total=whole_s / TRIES if query else None, sock_connect=min(CONNECT_LIMIT_S, whole_s)
        )
        try:
            async with asyncio.timeout(whole_s):
                result: ExecutionResult = await tries(self._try, request, limit)
        except Trouble as trouble:
            unsure = trouble.sent and not repeatable
            raise self._unavailable(operation, str(trouble), trouble.hint, unsure) from trouble
        except TimeoutError as error:
            cause = f"no answer within {whole_s:g} s"
            raise self._unavailable(operation, cause, LATER, not repeatable) from error
        return Answer(result.data, operation, result.extensions)

    async def _try(self, request: GraphQLRequest, limit: ClientTimeout) -> ExecutionResult:
        assert self._transport is not None, "a Platform is used inside its `async with`"
        arguments = {"allow_redirects": False, "timeout": limit}
        try:
            result = await self._transport.execute(request, extra_args=arguments)
        except TransportError as error:
            raise self._explained(from_transport(error)) from error
        if result.errors:
            raise self._explained(from_errors(result.errors))
        return result

    def _note_date(self, date: str | None) -> None:
        """Compare clocks with each answer; a difference that matters is told once."""
        before, self._skew_s = self._skew_s, clock.skew(date, wall_clock())
        news = clock.is_skewed(self._skew_s) and not clock.is_skewed(before)
        if news and self._skew_s is not None and self._emit is not None:
            self._emit(Warned("clock-skew", clock.told(self._skew_s)))

    def _explained(self, failure: Failure) -> Failure:
        if isinstance(failure, NotLoggedIn):
            return clock.explained(failure, self._skew_s)
        return failure

    def _announce(self, operation: str, state: RetryCallState) -> None:
        if self._emit is None or state.outcome is None or state.next_action is None:
            return
        cause = f"{self._asking(operation)}: {state.outcome.exception()}"
        self._emit(Retry("platform", state.attempt_number, cause, state.next_action.sleep))

    def _asking(self, operation: str) -> str:
        return f"asking {self._url.origin()} {ASKED[operation]}"

    def _unavailable(
        self, operation: str, cause: str, hint: str, unsure: bool
    ) -> PlatformUnavailable:
        if unsure:
            cause += "; whether it was carried out is not known"
            hint = f"look before you repeat it; {hint}"
        return PlatformUnavailable(f"{self._asking(operation)} failed: {cause}", hint=hint)


class _Wait(wait_base):
    """As long as the server asked, else 0.2, 0.4 s ... plus as much again by chance."""

    def __call__(self, retry_state: RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome is not None else None
        if isinstance(error, Trouble) and error.wait_s is not None:
            return error.wait_s
        step: float = 0.1 * 2**retry_state.attempt_number
        return step * random.uniform(1, 2)  # noqa: S311 (spreads load, keeps no secret)


def _may_repeat(repeatable: bool, deadline: float, error: BaseException) -> bool:
    if not isinstance(error, Trouble) or error.lasting:
        return False
    if error.sent and not repeatable:
        return False
    left_s = deadline - asyncio.get_running_loop().time()
    return error.wait_s is None or error.wait_s < left_s


def _app_unknown(name: str) -> BuilderOrchError:
    return AppUnknown(
        f"the platform shows no app {name!r}",
        hint="check the name, and that the token reaches its organization",
    )
