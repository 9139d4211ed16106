"""The tables of the store, typed; a row that was read is a plain value."""

from ipaddress import IPv6Address
from typing import Final

from sqlalchemy import JSON, ForeignKey, LargeBinary, String, UniqueConstraint
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator

from builder_orch.selfhost.names import Plan
from builder_orch.tunnel.config import PublicKey

OPEN_RELEASE: Final = frozenset({"pending", "running"})
CLOSED_RELEASE: Final = frozenset({"complete", "failed", "interrupted", "superseded"})


class _Address(TypeDecorator[IPv6Address]):
    impl = String(39)
    cache_ok = True

    def process_bind_param(self, value: IPv6Address | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else str(value)

    def process_result_value(self, value: object, dialect: Dialect) -> IPv6Address | None:  # noqa: ARG002
        return None if value is None else IPv6Address(str(value))


class Row(DeclarativeBase):
    """What every table has in common: how its columns are typed."""

    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy reads it as it is)
        IPv6Address: _Address,
        PublicKey: LargeBinary(32),
        dict[str, object]: JSON,
        list[str]: JSON,
    }


class OrganizationRow(Row):
    """`number` decides the addresses: see names.Plan. Both counters only grow: an address that was
    somebody's is never given to anybody else."""

    __tablename__ = "organizations"
    id: Mapped[str] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(unique=True)
    slug: Mapped[str] = mapped_column(unique=True)
    name: Mapped[str]
    personal: Mapped[bool]
    peers_made: Mapped[int] = mapped_column(default=0)
    machines_made: Mapped[int] = mapped_column(default=0)

    @property
    def plan(self) -> Plan:
        """Its addresses."""
        return Plan(self.number)


class TokenRow(Row):
    """A token's hash; the token itself is shown once and kept nowhere.

    Tokens of one owner stand for the same person.
    """

    __tablename__ = "tokens"
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    digest: Mapped[bytes]
    scopes: Mapped[list[str]]
    organization_id: Mapped[str | None] = mapped_column(ForeignKey("organizations.id"))
    created_at: Mapped[float]
    expires_at: Mapped[float]


class AppRow(Row):
    """`role` is "" or what the platform itself runs under that name."""

    __tablename__ = "apps"
    id: Mapped[str] = mapped_column(primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    name: Mapped[str] = mapped_column(unique=True)
    role: Mapped[str]
    created_at: Mapped[float]
    organization: Mapped[OrganizationRow] = relationship(lazy="joined", innerjoin=True)


class PeerRow(Row):
    """A key that the gateway lets in, at `address`."""

    __tablename__ = "peers"
    __table_args__ = (UniqueConstraint("organization_id", "name"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    owner: Mapped[str]
    name: Mapped[str]
    public_key: Mapped[PublicKey] = mapped_column(unique=True)
    address: Mapped[IPv6Address] = mapped_column(unique=True)
    ephemeral: Mapped[bool]
    created_at: Mapped[float]
    seen_at: Mapped[float]


class MachineRow(Row):
    """A container or an engine with an address of its own inside."""

    __tablename__ = "machines"
    id: Mapped[str] = mapped_column(primary_key=True)
    app_id: Mapped[str] = mapped_column(ForeignKey("apps.id"), index=True)
    name: Mapped[str]
    region: Mapped[str]
    state: Mapped[str]
    image: Mapped[str]
    address: Mapped[IPv6Address] = mapped_column(unique=True)
    created_at: Mapped[float]


class BuildRow(Row):
    """One build; `mutation` is the id by which its creation is known when it is repeated."""

    __tablename__ = "builds"
    __table_args__ = (UniqueConstraint("app_id", "mutation"),)
    id: Mapped[str] = mapped_column(primary_key=True)
    app_id: Mapped[str] = mapped_column(ForeignKey("apps.id"), index=True)
    mutation: Mapped[str | None]
    machine_id: Mapped[str]
    builder_type: Mapped[str]
    strategies: Mapped[list[str]]
    status: Mapped[str]
    image: Mapped[dict[str, object]]
    timings: Mapped[dict[str, object]]
    logs: Mapped[str]
    created_at: Mapped[float]
    finished_at: Mapped[float | None]


class ReleaseRow(Row):
    """One version of an app, pinned by digest."""

    __tablename__ = "releases"
    __table_args__ = (
        UniqueConstraint("app_id", "version"),
        UniqueConstraint("app_id", "mutation"),
    )
    id: Mapped[str] = mapped_column(primary_key=True)
    app_id: Mapped[str] = mapped_column(ForeignKey("apps.id"), index=True)
    mutation: Mapped[str | None]
    version: Mapped[int]
    build_id: Mapped[str | None] = mapped_column(ForeignKey("builds.id"))
    image: Mapped[str]
    strategy: Mapped[str]
    definition: Mapped[dict[str, object]]
    status: Mapped[str]
    reason: Mapped[str]
    notes: Mapped[dict[str, object]]
    created_at: Mapped[float]
    updated_at: Mapped[float]

    @property
    def in_progress(self) -> bool:
        """Has it not ended yet?"""
        return self.status in OPEN_RELEASE


class CertificateRow(Row):
    """Every SSH certificate that was issued; the serial is its number."""

    __tablename__ = "certificates"
    serial: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    token_id: Mapped[str] = mapped_column(ForeignKey("tokens.id"))
    principals: Mapped[list[str]]
    apps: Mapped[list[str]]
    public_key: Mapped[str]
    valid_from: Mapped[float]
    valid_until: Mapped[float]


class AuthorityRow(Row):
    """A private key of the platform's own, by what it is for."""

    __tablename__ = "authorities"
    purpose: Mapped[str] = mapped_column(primary_key=True)
    private_key: Mapped[bytes]


class AuditRow(Row):
    """Who asked for which change, and what came of it."""

    __tablename__ = "audit"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    at: Mapped[float]
    token_id: Mapped[str]
    mutation: Mapped[str]
    subject: Mapped[str]
    outcome: Mapped[str]
    request_id: Mapped[str]
    client_mutation_id: Mapped[str]
