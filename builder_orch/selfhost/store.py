"""The platform's memory: organizations, apps, peers, builds, releases, in one SQL database.

Every method is one short transaction. Rows come back detached: plain values to read, which nothing
writes back. Databases other than SQLite lock the row that something is counted on.
"""

import hmac
import re
import secrets
from collections.abc import Iterable
from hashlib import sha256
from ipaddress import IPv6Address
from types import MappingProxyType
from typing import Final

from sqlalchemy import delete, func, select

from builder_orch.selfhost.database import Code, Refused, new_id
from builder_orch.selfhost.names import Host, Zone
from builder_orch.selfhost.records import Records
from builder_orch.selfhost.rows import AppRow, MachineRow, OrganizationRow, PeerRow, TokenRow
from builder_orch.tunnel.config import PublicKey

REGION: Final = "local"
"""The one region there is."""
BUILDER_ROLE: Final = "remote-docker-builder"
BUILDER_PREFIX: Final = "fly-builder-"
ALL_SCOPES: Final = frozenset({"app", "peer", "build", "release", "ssh"})
"""What a token may change; reading needs none of them."""

_NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
_PEER_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,199}\Z")
_TOKEN: Final = re.compile(r"fbt_([0-9a-f]{16})_([A-Za-z0-9_-]{43})\Z")


class Store(Records):
    """All that the platform knows; see `Database` for the URL and the clock."""

    # --- organizations and tokens

    def ensure_organization(
        self, slug: str, *, name: str = "", personal: bool = False
    ) -> OrganizationRow:
        """The organization of that slug, made if there is none."""
        _check_name(slug, "an organization's slug")
        with self._write() as session:
            found = session.scalar(select(OrganizationRow).filter_by(slug=slug))
            if found is None:
                last = session.scalar(select(func.max(OrganizationRow.number))) or 0
                found = OrganizationRow(
                    id=new_id("org"),
                    number=last + 1,
                    slug=slug,
                    name=name or slug,
                    personal=personal,
                )
                session.add(found)
            return found

    def organizations(self, token: TokenRow) -> list[OrganizationRow]:
        """Those that the token reaches."""
        query = select(OrganizationRow).order_by(OrganizationRow.number)
        if token.organization_id is not None:
            query = query.filter_by(id=token.organization_id)
        with self._read() as session:
            return list(session.scalars(query))

    def organization(self, organization_id: str) -> OrganizationRow:
        """By its id; a slug does as well."""
        with self._read() as session:
            found = session.get(OrganizationRow, organization_id) or session.scalar(
                select(OrganizationRow).filter_by(slug=organization_id)
            )
        if found is None:
            raise Refused(Code.NOT_FOUND, "Could not find Organization")
        return found

    def issue_token(
        self,
        owner: str,
        *,
        lifetime_s: float,
        scopes: Iterable[str] = ALL_SCOPES,
        organization: OrganizationRow | None = None,
    ) -> str:
        """A new token, in clear for the only time. Without an organization it reaches them all."""
        wanted = sorted(set(scopes))
        if unknown := set(wanted) - ALL_SCOPES:
            raise ValueError(f"there is no scope {unknown}")
        token_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
        now = self._clock()
        with self._write() as session:
            session.add(
                TokenRow(
                    id=token_id,
                    owner=owner,
                    digest=_digest(secret),
                    scopes=wanted,
                    organization_id=None if organization is None else organization.id,
                    created_at=now,
                    expires_at=now + lifetime_s,
                )
            )
        return f"fbt_{token_id}_{secret}"

    def authenticate(self, token: str) -> TokenRow:
        """The row of a token that is good now."""
        parts = _TOKEN.match(token)
        if parts is None:
            raise Refused(Code.UNAUTHORIZED, "You must be authenticated to view this.")
        with self._read() as session:
            found = session.get(TokenRow, parts[1])
        # compared also when there is no such row, so that both answers take the same time
        good = hmac.compare_digest(_digest(parts[2]), found.digest if found else bytes(32))
        if found is None or not good:
            raise Refused(Code.UNAUTHORIZED, "You must be authenticated to view this.")
        if found.expires_at <= self._clock():
            raise Refused(Code.UNAUTHORIZED, "The token has expired.")
        return found

    def revoke_token(self, token_id: str) -> None:
        """End a token now."""
        with self._write() as session:
            found = session.get(TokenRow, token_id)
            if found is not None:
                found.expires_at = self._clock()

    # --- apps and machines

    def create_app(self, organization: OrganizationRow, name: str, *, role: str = "") -> AppRow:
        """A new app; names are unique across organizations."""
        _check_name(name, "an app's name")
        if name.startswith(BUILDER_PREFIX) and role != BUILDER_ROLE:
            raise Refused(
                Code.INVALID, f"names that begin with {BUILDER_PREFIX} are the platform's"
            )
        with self._write() as session:
            if session.scalar(select(AppRow.id).filter_by(name=name)) is not None:
                raise Refused(Code.INVALID, f"Name has already been taken: {name}")
            owner = session.get_one(OrganizationRow, organization.id)
            made = AppRow(
                id=new_id("app"),
                organization=owner,
                name=name,
                role=role,
                created_at=self._clock(),
            )
            session.add(made)
            return made

    def ensure_builder_app(self, organization: OrganizationRow) -> AppRow:
        """The app that the organization's builder runs as."""
        mine = {"organization_id": organization.id, "role": BUILDER_ROLE}
        with self._read() as session:
            found = session.scalar(select(AppRow).filter_by(**mine))
        if found is not None:
            return found
        try:
            name = f"{BUILDER_PREFIX}{organization.number}"
            return self.create_app(organization, name, role=BUILDER_ROLE)
        except Refused:
            # somebody else was quicker: the name is the platform's own, see create_app
            with self._read() as session:
                return session.scalars(select(AppRow).filter_by(**mine)).one()

    def app(self, name: str) -> AppRow:
        """By its name; an id does as well."""
        with self._read() as session:
            found = session.scalar(select(AppRow).filter_by(name=name)) or session.get(AppRow, name)
        if found is None:
            raise Refused(Code.NOT_FOUND, "Could not find App")
        return found

    def apps(self, organization: OrganizationRow) -> list[AppRow]:
        """All of an organization's, the platform's own as well."""
        query = select(AppRow).filter_by(organization_id=organization.id).order_by(AppRow.name)
        with self._read() as session:
            return list(session.scalars(query))

    def put_machine(
        self,
        app: AppRow,
        machine_id: str,
        address: IPv6Address,
        *,
        state: str,
        image: str = "",
        name: str = "",
        region: str = REGION,
    ) -> MachineRow:
        """Write down a machine, or how it has changed."""
        with self._write() as session:
            found = session.get(MachineRow, machine_id)
            if found is None:
                found = MachineRow(
                    id=machine_id,
                    app_id=app.id,
                    name=name or machine_id,
                    region=region,
                    created_at=self._clock(),
                )
            elif found.app_id != app.id:
                raise Refused(Code.INVALID, f"machine {machine_id} belongs to another app")
            # whoever had the address before is gone: an address is one machine's
            session.execute(
                delete(MachineRow).filter(
                    MachineRow.address == address, MachineRow.id != machine_id
                )
            )
            found.state, found.image, found.address = state, image, address
            session.add(found)
            return found

    def remove_machine(self, machine_id: str) -> None:
        """Forget a machine, and with it its names; nothing happens when there is none."""
        with self._write() as session:
            found = session.get(MachineRow, machine_id)
            if found is not None:
                session.delete(found)

    def machines(self, app: AppRow) -> list[MachineRow]:
        """An app's machines, oldest first."""
        query = select(MachineRow).filter_by(app_id=app.id)
        with self._read() as session:
            return list(session.scalars(query.order_by(MachineRow.created_at, MachineRow.id)))

    def allot(self, app: str) -> tuple[str, IPv6Address]:
        """The id and address of a machine that the app of that name is to get."""
        return secrets.token_hex(7), self.new_machine_address(self.app(app).organization)

    def machine_started(
        self, app: str, machine_id: str, address: IPv6Address, container: str, image: str
    ) -> None:
        """A machine of that app answers: from now on its names lead to it."""
        row = self.app(app)
        self.put_machine(row, machine_id, address, state="started", image=image, name=container)

    def machine_retired(self, app: str, machine_id: str) -> None:
        """A machine of that app is gone."""
        if machine_id in {machine.id for machine in self.machines(self.app(app))}:
            self.remove_machine(machine_id)

    def new_machine_address(self, organization: OrganizationRow) -> IPv6Address:
        """An address for a machine that is to be; each is given once."""
        with self._write() as session:
            owner = session.get_one(OrganizationRow, organization.id, with_for_update=True)
            owner.machines_made += 1
            return owner.plan.machine(owner.machines_made)

    def zone(self, organization: OrganizationRow) -> Zone:
        """What its resolver knows now: machines that run."""
        query = (
            select(AppRow.name, MachineRow)
            .join(MachineRow, (MachineRow.app_id == AppRow.id) & (MachineRow.state == "started"))
            .filter(AppRow.organization_id == organization.id)
            .order_by(MachineRow.created_at, MachineRow.id)
        )
        with self._read() as session:
            rows = session.execute(query).all()
            names = session.scalars(select(AppRow.name).filter_by(organization_id=organization.id))
            apps: dict[str, tuple[Host, ...]] = dict.fromkeys(names, ())
        for name, machine in rows:
            apps[name] += (Host(machine.id, machine.region, machine.address),)
        return Zone(organization.plan.gateway, MappingProxyType(apps))

    # --- peers

    def add_peer(
        self,
        token: TokenRow,
        organization: OrganizationRow,
        name: str,
        public_key: PublicKey,
        *,
        ephemeral: bool = False,
    ) -> tuple[PeerRow, bool]:
        """A peer, and whether it is new; the same key under the same name is the same peer."""
        if not _PEER_NAME.match(name):
            raise Refused(Code.INVALID, "A peer's name is made of letters, digits and hyphens.")
        if not any(public_key):
            raise Refused(Code.INVALID, "pubkey is a key of zeroes")
        now = self._clock()
        with self._write() as session:
            same_key = session.scalar(select(PeerRow).filter_by(public_key=public_key))
            if same_key is not None:
                same = (same_key.organization_id, same_key.name) == (organization.id, name)
                if not same or same_key.owner != token.owner:
                    raise Refused(Code.INVALID, "pubkey belongs to another peer")
                same_key.seen_at = now
                return same_key, False
            mine = {"organization_id": organization.id}
            if session.scalar(select(PeerRow.id).filter_by(name=name, **mine)) is not None:
                raise Refused(Code.INVALID, f"Name has already been taken: {name}")
            owner = session.get_one(OrganizationRow, organization.id, with_for_update=True)
            owner.peers_made += 1
            made = PeerRow(
                id=new_id("peer"),
                owner=token.owner,
                name=name,
                public_key=public_key,
                address=owner.plan.peer(owner.peers_made),
                ephemeral=ephemeral,
                created_at=now,
                seen_at=now,
                **mine,
            )
            session.add(made)
            return made, True

    def peer(self, organization: OrganizationRow, name: str) -> PeerRow | None:
        """By its name."""
        with self._read() as session:
            return session.scalar(
                select(PeerRow).filter_by(organization_id=organization.id, name=name)
            )

    def peers(self) -> list[PeerRow]:
        """All there are: what a gateway that starts has to let in."""
        with self._read() as session:
            return list(session.scalars(select(PeerRow).order_by(PeerRow.created_at)))

    def remove_peer(self, peer_id: str) -> None:
        """Forget a peer; nothing happens when there is none."""
        with self._write() as session:
            found = session.get(PeerRow, peer_id)
            if found is not None:
                session.delete(found)

    def seen_peers(
        self, organizations: Iterable[OrganizationRow], addresses: Iterable[IPv6Address]
    ) -> set[IPv6Address]:
        """Which of these are peers of the organizations; they are marked as seen now."""
        owners = [one.id for one in organizations]
        query = select(PeerRow).filter(
            PeerRow.organization_id.in_(owners), PeerRow.address.in_(list(addresses))
        )
        now = self._clock()
        with self._write() as session:
            found = list(session.scalars(query))
            for peer in found:
                peer.seen_at = now
            return {peer.address for peer in found}


def _digest(secret: str) -> bytes:
    # 256 random bits need no salt and no slow hash
    return sha256(secret.encode()).digest()


def _check_name(name: str, what: str) -> None:
    """Names are DNS labels, because each is one inside the tunnel."""
    if not _NAME.match(name):
        raise Refused(
            Code.INVALID,
            f"{what} is 1 to 63 of a-z, 0-9 and hyphens, and neither begins nor ends with one",
        )
