"""What each field of the schema means: who may ask, what is looked up, what is set in motion."""

from asyncio import Lock
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from ipaddress import IPv6Address
from typing import Final, Protocol, TypeAlias
from weakref import WeakValueDictionary

from graphql import GraphQLResolveInfo, GraphQLSchema

from builder_orch.selfhost.database import Code, Refused
from builder_orch.selfhost.resolvers_ssh import issue
from builder_orch.selfhost.rows import (
    AppRow,
    MachineRow,
    OrganizationRow,
    PeerRow,
    ReleaseRow,
    TokenRow,
)
from builder_orch.selfhost.store import REGION, Store
from builder_orch.tunnel.config import Door, PublicKey, decode_key, encode_key
from builder_orch.tunnel.machine import Endpoint

PEERS_ASKED: Final = 1000
STRATEGIES: Final = 32
SUBJECT_LIMIT: Final = 200

View = dict[str, object]
Given = Mapping[str, object]


class Gateway(Protocol):
    """What lets peers into the network."""

    @property
    def public_key(self) -> PublicKey:
        """Its own key."""
        ...

    @property
    def endpoint(self) -> Endpoint:
        """Where clients send their datagrams."""
        ...

    @property
    def websocket(self) -> Door | None:
        """Where clients call that cannot use UDP."""
        ...

    async def install(self, public_key: PublicKey, address: IPv6Address) -> None:
        """Returns when the peer's handshake will be answered; a peer may be installed again."""
        ...

    async def remove(self, public_key: PublicKey) -> None:
        """Shut a key out; nothing happens when it was not in."""
        ...

    def installed(self) -> set[IPv6Address]:
        """The addresses of the peers that it answers."""
        ...


class Builder(Protocol):
    """What has a Docker engine for those inside."""

    async def ensure(self, app: str) -> tuple[str, str, IPv6Address]:
        """The machine (id, state, address) behind a builder app's name, started if need be."""
        ...


class Runner(Protocol):
    """What runs releases."""

    def begin(self, app: AppRow, release: ReleaseRow) -> None:
        """Take a new release up; how it goes is written to the store."""
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """What the resolvers work with; the same for all requests."""

    store: Store
    gateway: Gateway
    builder: Builder
    runner: Runner
    clock: Callable[[], float]
    locks: WeakValueDictionary[PublicKey, Lock]


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, in which request."""

    services: Services
    token: TokenRow
    request_id: str
    extensions: dict[str, object] = field(default_factory=dict)
    """What the answer says beside its data (GraphQL specification, 7.1)."""

    @property
    def store(self) -> Store:
        """The store, for short."""
        return self.services.store

    def demand(self, scope: str) -> None:
        """Refuse what the token was not made for."""
        if scope not in self.token.scopes:
            raise Refused(Code.FORBIDDEN, f"The token's scopes do not hold {scope!r}.")

    def organization(self, organization_id: str) -> OrganizationRow:
        """An organization that the token reaches; others are not there."""
        found = self.store.organization(organization_id)
        if self.token.organization_id not in {None, found.id}:
            raise Refused(Code.NOT_FOUND, "Could not find Organization")
        return found

    def app(self, name: str) -> AppRow:
        """An app that the token reaches; others are not there."""
        found = self.store.app(name)
        if self.token.organization_id not in {None, found.organization_id}:
            raise Refused(Code.NOT_FOUND, "Could not find App")
        return found


Info: TypeAlias = "GraphQLResolveInfo[Asker]"
Resolver = Callable[..., object]
Mutation = Callable[[Asker, Given], Awaitable[View]]

_MUTATIONS: Final[dict[str, Resolver]] = {}


def bind(schema: GraphQLSchema) -> None:
    """Give the schema's root fields their resolvers; the rest are values in what these return."""
    assert schema.query_type is not None
    assert schema.mutation_type is not None
    for name, resolve in _QUERIES.items():
        schema.query_type.fields[name].resolve = resolve
    for name, mutation in schema.mutation_type.fields.items():
        mutation.resolve = _MUTATIONS[name]


def _mutation(name: str, *, scope: str, subject: str) -> Callable[[Mutation], Mutation]:
    """Register a mutation: it needs `scope`, and is written down with its input's `subject`."""

    def register(change: Mutation) -> Mutation:
        @wraps(change)
        async def resolve(_root: object, info: Info, **arguments: object) -> View:
            asker = info.context
            given = arguments["input"]
            assert isinstance(given, dict)
            mutation_id = given.get("clientMutationId")
            outcome = "failed"
            try:
                asker.demand(scope)
                payload = await change(asker, given)
                outcome = "done"
            except Refused as refused:
                outcome = f"refused: {refused}"
                raise
            finally:
                asker.store.audit(
                    token_id=asker.token.id,
                    mutation=name,
                    subject=str(given.get(subject, ""))[:SUBJECT_LIMIT],
                    outcome=outcome,
                    request_id=asker.request_id,
                    client_mutation_id=str(mutation_id or ""),
                )
            return {**payload, "clientMutationId": mutation_id}

        _MUTATIONS[name] = resolve
        return change

    return register


# --- queries


def _organizations(_root: object, info: Info) -> View:
    asker = info.context
    return _connection([_organization(row) for row in asker.store.organizations(asker.token)])


def _app(_root: object, info: Info, name: str | None = None) -> View:
    asker = info.context
    if name is None:
        raise Refused(Code.INVALID, "name is missing")
    return _app_view(asker, asker.app(name))


def _one_organization(
    _root: object,
    info: Info,
    id: str | None = None,  # noqa: A002 (the schema's name)
    slug: str | None = None,
) -> View:
    wanted = id or slug
    if not wanted:
        raise Refused(Code.INVALID, "organization needs an id or a slug")
    return _organization(info.context.organization(wanted))


def _nearest_region(_root: object, _info: Info, **_arguments: object) -> View:
    return {"code": REGION, "name": "this machine", "gatewayAvailable": True}


_QUERIES: Final[dict[str, Resolver]] = {
    "organizations": _organizations,
    "app": _app,
    "nearestRegion": _nearest_region,
    "organization": _one_organization,
}


# --- what rows look like from outside


def _connection(nodes: list[View]) -> View:
    return {"nodes": nodes, "totalCount": len(nodes)}


def _organization(row: OrganizationRow) -> View:
    def peers(info: Info) -> View:
        mine = [one for one in info.context.store.peers() if one.organization_id == row.id]
        return _connection([_peer(one) for one in mine])

    return {
        "id": row.id,
        "slug": row.slug,
        "rawSlug": row.slug,
        "name": row.name,
        "type": "PERSONAL" if row.personal else "SHARED",
        "wireGuardPeers": peers,
    }


def _peer(row: PeerRow) -> View:
    return {
        "id": row.id,
        "name": row.name,
        "network": None,
        "peerip": str(row.address),
        "pubkey": encode_key(row.public_key),
        "region": REGION,
    }


def _app_view(asker: Asker, row: AppRow) -> View:
    def release(
        _info: Info,
        id: str | None = None,  # noqa: A002 (the schema's name)
        version: int | None = None,
    ) -> View | None:
        if id is None and version is None:
            raise Refused(Code.INVALID, "release needs an id or a version")
        for one in asker.store.releases(row):
            if id in {None, one.id} and version in {None, one.version}:
                return _release(one)
        return None

    def is_deployed(_info: Info) -> bool:
        return any(one.status == "complete" for one in asker.store.releases(row))

    def machines(_info: Info) -> View:
        return _connection([_machine(one) for one in asker.store.machines(row)])

    return {
        "id": row.id,
        "name": row.name,
        "organization": _organization(row.organization),
        "hostname": f"{row.name}.internal",
        "status": lambda info: "deployed" if is_deployed(info) else "pending",
        "deployed": is_deployed,
        "release": release,
        "machines": machines,
    }


def _machine(row: MachineRow) -> View:
    address: View = {
        "id": f"{row.id}-ip",
        "family": "v6",
        "kind": "privatenet",
        "ip": str(row.address),
    }
    return {
        "id": row.id,
        "name": row.name,
        "region": row.region,
        "state": row.state,
        "ips": _connection([address]),
    }


def _release(row: ReleaseRow) -> View:
    return {
        "id": row.id,
        "version": row.version,
        "status": row.status,
        "reason": row.reason,
        "imageRef": row.image,
        "inProgress": row.in_progress,
        "stable": row.status == "complete",
        "deploymentStrategy": row.strategy,
        "metadata": row.notes,
    }


# --- peers


@_mutation("addWireGuardPeer", scope="peer", subject="name")
async def _add_peer(asker: Asker, given: Given) -> View:
    services = asker.services
    organization = asker.organization(str(given["organizationId"]))
    try:
        key = PublicKey(decode_key(str(given["pubkey"])))
    except ValueError as error:
        raise Refused(Code.INVALID, f"pubkey: {error}") from None
    # the same request twice at once: the second waits for what becomes of the first
    async with services.locks.setdefault(key, Lock()):
        peer, is_new = asker.store.add_peer(
            asker.token,
            organization,
            str(given["name"]),
            key,
            ephemeral=bool(given.get("ephemeral")),
        )
        try:
            await services.gateway.install(peer.public_key, peer.address)
        except BaseException:
            if is_new:
                asker.store.remove_peer(peer.id)
            raise
    host, port = services.gateway.endpoint
    if (door := services.gateway.websocket) is not None:
        # Not a field: the public schema has none for it, and clients of others pass over this.
        asker.extensions["wgtcpd"] = {"port": door.port, "spkiSha256": door.pin.hex()}
    return {
        "peerip": str(peer.address),
        "endpointip": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        "pubkey": encode_key(services.gateway.public_key),
    }


@_mutation("removeWireGuardPeer", scope="peer", subject="name")
async def _remove_peer(asker: Asker, given: Given) -> View:
    organization = asker.organization(str(given["organizationId"]))
    peer = asker.store.peer(organization, str(given["name"]))
    if peer is not None:
        async with asker.services.locks.setdefault(peer.public_key, Lock()):
            # the gateway first: should the store fail, the peer can be removed again
            await asker.services.gateway.remove(peer.public_key)
            asker.store.remove_peer(peer.id)
    return {"organization": _organization(organization)}


@_mutation("validateWireGuardPeers", scope="peer", subject="peerIps")
async def _validate_peers(asker: Asker, given: Given) -> View:
    asked = _texts(given, "peerIps", PEERS_ASKED)
    addresses: dict[str, IPv6Address] = {}
    for text in asked:
        try:
            addresses[text] = IPv6Address(text)
        except ValueError:
            continue  # no peer has it
    organizations = asker.store.organizations(asker.token)
    seen = asker.store.seen_peers(organizations, addresses.values())
    valid = [text for text in asked if addresses.get(text) in seen]
    # Not a field, as above: whether a peer that we know is known to the gateway by now.
    installed = asker.services.gateway.installed()
    told = [text for text in valid if addresses[text] in installed]
    asker.extensions["gateway"] = {"installedPeerIps": told}
    return {
        "validPeerIps": valid,
        "invalidPeerIps": [text for text in asked if text not in set(valid)],
    }


# --- apps, builder, builds


@_mutation("createApp", scope="app", subject="name")
async def _create_app(asker: Asker, given: Given) -> View:
    organization = asker.organization(str(given["organizationId"]))
    app = asker.store.create_app(organization, str(given.get("name") or ""))
    return {"app": _app_view(asker, app)}


@_mutation("ensureMachineRemoteBuilder", scope="build", subject="appName")
async def _ensure_builder(asker: Asker, given: Given) -> View:
    if given.get("appName") is not None:
        organization = asker.app(str(given["appName"])).organization
    elif given.get("organizationId") is not None:
        organization = asker.organization(str(given["organizationId"]))
    else:
        raise Refused(Code.INVALID, "appName or organizationId is needed")
    app = asker.store.ensure_builder_app(organization)
    machine_id, state, address = await asker.services.builder.ensure(app.name)
    machine = asker.store.put_machine(app, machine_id, address, state=state)
    return {"app": _app_view(asker, app), "machine": _machine(machine)}


@_mutation("createBuild", scope="build", subject="appName")
async def _create_build(asker: Asker, given: Given) -> View:
    build = asker.store.create_build(
        asker.app(str(given["appName"])),
        builder_type=str(given["builderType"]),
        strategies=_texts(given, "strategiesAvailable", STRATEGIES),
        machine_id=str(given.get("machineId") or ""),
        mutation=_mutation_id(asker, given),
    )
    return {"id": build.id, "status": build.status}


@_mutation("finishBuild", scope="build", subject="buildId")
async def _finish_build(asker: Asker, given: Given) -> View:
    image, timings = given.get("finalImage"), given.get("timings")
    build = asker.store.finish_build(
        asker.app(str(given["appName"])),
        str(given["buildId"]),
        status=str(given["status"]),
        image=image if isinstance(image, dict) else {},
        timings=timings if isinstance(timings, dict) else {},
        logs=str(given.get("logs") or ""),
    )
    took_s = (build.finished_at or build.created_at) - build.created_at
    return {"id": build.id, "status": build.status, "wallclockTimeMs": round(took_s * 1000)}


# --- releases


@_mutation("createRelease", scope="release", subject="image")
async def _create_release(asker: Asker, given: Given) -> View:
    app = asker.app(str(given["appId"]))
    definition = given["definition"]
    if not isinstance(definition, dict):
        raise Refused(Code.INVALID, "definition is not an object")
    if given["platformVersion"] != "machines":
        raise Refused(Code.INVALID, "platformVersion is not machines")
    build_id = given.get("buildId")
    release, is_new = asker.store.create_release(
        app,
        image=str(given["image"]),
        strategy=str(given["strategy"]),
        definition=definition,
        build_id=None if build_id is None else str(build_id),
        mutation=_mutation_id(asker, given),
    )
    if is_new:
        try:
            asker.services.runner.begin(app, release)
        except BaseException:
            asker.store.update_release(release.id, status="failed", reason="it was not taken up")
            raise
    return {"app": _app_view(asker, app), "release": _release(release)}


@_mutation("updateRelease", scope="release", subject="releaseId")
async def _update_release(asker: Asker, given: Given) -> View:
    release = asker.store.release(str(given["releaseId"]))
    try:
        asker.app(release.app_id)
    except Refused:
        raise Refused(Code.NOT_FOUND, "Could not find Release") from None
    status, notes = given.get("status"), given.get("metadata")
    if notes is not None and not isinstance(notes, dict):
        raise Refused(Code.INVALID, "metadata is not an object")
    changed = asker.store.update_release(
        release.id, status=None if status is None else str(status), notes=notes
    )
    return {"release": _release(changed)}


# --- ssh


@_mutation("issueCertificate", scope="ssh", subject="principals")
async def _issue_certificate(asker: Asker, given: Given) -> View:
    organization = asker.organization(str(given["organizationId"]))
    names = _texts(given, "appNames", PEERS_ASKED) if given.get("appNames") is not None else []
    for name in names:
        if asker.app(name).organization_id != organization.id:
            raise Refused(Code.NOT_FOUND, "Could not find App")
    hours = given.get("validHours")
    line = issue(
        asker.store,
        asker.token,
        organization,
        public_key=str(given.get("publicKey") or ""),
        principals=_texts(given, "principals", STRATEGIES) if given.get("principals") else [],
        apps=names,
        hours=hours if isinstance(hours, int) else None,
        now=asker.services.clock(),
    )
    return {"certificate": line}


def _texts(given: Given, field: str, limit: int) -> list[str]:
    items = given[field]
    if not isinstance(items, list) or len(items) > limit:
        raise Refused(Code.INVALID, f"{field} has more than {limit} items")
    return [str(item) for item in items]


def _mutation_id(asker: Asker, given: Given) -> str | None:
    """What a repetition is known by; another owner's ids are other ids."""
    given_id = given.get("clientMutationId")
    return f"{asker.token.owner}:{given_id}" if given_id else None
