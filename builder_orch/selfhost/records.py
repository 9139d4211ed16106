"""What the platform writes down as work goes on: builds, releases, certificates, an audit."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from builder_orch.selfhost.database import Code, Database, Refused, new_id
from builder_orch.selfhost.rows import (
    CLOSED_RELEASE,
    OPEN_RELEASE,
    AppRow,
    AuditRow,
    AuthorityRow,
    BuildRow,
    CertificateRow,
    OrganizationRow,
    ReleaseRow,
    TokenRow,
)

LOG_LIMIT: Final = 8192
"""Characters of a build's log that are kept: its end."""
CLOSED_BUILD: Final = frozenset({"completed", "failed", "cancelled"})

_DIGEST: Final = re.compile(r"[\x21-\x7e]{1,400}@sha256:[0-9a-f]{64}\Z")


class Records(Database):
    """The half of the store that only grows; each method is one short transaction."""

    # --- builds

    def create_build(
        self,
        app: AppRow,
        *,
        builder_type: str,
        strategies: Iterable[str],
        machine_id: str = "",
        mutation: str | None = None,
    ) -> BuildRow:
        """Open a build's record; the same `mutation` again is the same build."""
        with self._write() as session:
            if mutation is not None:
                same = session.scalar(select(BuildRow).filter_by(app_id=app.id, mutation=mutation))
                if same is not None:
                    return same
            made = BuildRow(
                id=new_id("build"),
                app_id=app.id,
                mutation=mutation,
                machine_id=machine_id,
                builder_type=builder_type,
                strategies=list(strategies),
                status="running",
                image={},
                timings={},
                logs="",
                created_at=self._clock(),
                finished_at=None,
            )
            session.add(made)
            return made

    def build(self, app: AppRow, build_id: str) -> BuildRow:
        """A build of the app by its id."""
        with self._read() as session:
            return _build(session, app, build_id)

    def finish_build(
        self,
        app: AppRow,
        build_id: str,
        *,
        status: str,
        image: Mapping[str, object],
        timings: Mapping[str, object],
        logs: str,
    ) -> BuildRow:
        """How a build ended, once and for all: the same status again changes nothing."""
        if status not in CLOSED_BUILD:
            raise Refused(Code.INVALID, f"status is none of {', '.join(sorted(CLOSED_BUILD))}")
        with self._write() as session:
            build = _build(session, app, build_id)
            if build.status in CLOSED_BUILD:
                if build.status != status:
                    raise Refused(Code.INVALID, f"the build has already {build.status}")
                return build
            build.status, build.logs = status, logs[-LOG_LIMIT:]
            build.image, build.timings = dict(image), dict(timings)
            build.finished_at = self._clock()
            return build

    def abandon_builds(self, logs: str) -> int:
        """Fail all that are open: those who sent them cannot reach their builder any more."""
        with self._write() as session:
            lost = list(session.scalars(select(BuildRow).filter_by(status="running")))
            for build in lost:
                build.status, build.logs, build.finished_at = "failed", logs, self._clock()
            return len(lost)

    # --- releases

    def create_release(
        self,
        app: AppRow,
        *,
        image: str,
        strategy: str,
        definition: Mapping[str, object],
        build_id: str | None = None,
        mutation: str | None = None,
    ) -> tuple[ReleaseRow, bool]:
        """The next version of the app, and whether it is new; the same `mutation` is the same."""
        if not _DIGEST.match(image):
            raise Refused(Code.INVALID, "image must be pinned by its digest: name@sha256:<64 hex>")
        now = self._clock()
        with self._write() as session:
            # two writers count one after the other, also where the database itself does not queue
            session.execute(select(AppRow.id).filter_by(id=app.id).with_for_update())
            if mutation is not None:
                same = session.scalar(
                    select(ReleaseRow).filter_by(app_id=app.id, mutation=mutation)
                )
                if same is not None:
                    return same, False
            if build_id is not None:
                _build(session, app, build_id)
            last = session.scalar(select(func.max(ReleaseRow.version)).filter_by(app_id=app.id))
            made = ReleaseRow(
                id=new_id("rel"),
                app_id=app.id,
                mutation=mutation,
                version=(last or 0) + 1,
                build_id=build_id,
                image=image,
                strategy=strategy,
                definition=dict(definition),
                status="pending",
                reason="",
                notes={},
                created_at=now,
                updated_at=now,
            )
            session.add(made)
            return made, True

    def release(self, release_id: str) -> ReleaseRow:
        """By its id."""
        with self._read() as session:
            found = session.get(ReleaseRow, release_id)
        if found is None:
            raise Refused(Code.NOT_FOUND, "Could not find Release")
        return found

    def releases(self, app: AppRow) -> list[ReleaseRow]:
        """An app's releases, newest first."""
        query = select(ReleaseRow).filter_by(app_id=app.id).order_by(ReleaseRow.version.desc())
        with self._read() as session:
            return list(session.scalars(query))

    def open_releases(self) -> list[ReleaseRow]:
        """Those that had not ended: what a runner that starts has to take up or to fail."""
        query = select(ReleaseRow).filter(ReleaseRow.status.in_(OPEN_RELEASE))
        with self._read() as session:
            return list(session.scalars(query.order_by(ReleaseRow.created_at)))

    def update_release(
        self,
        release_id: str,
        *,
        status: str | None = None,
        reason: str = "",
        notes: Mapping[str, object] | None = None,
    ) -> ReleaseRow:
        """How far it is. One that has ended keeps its status; to say it again is harmless."""
        if status is not None and status not in OPEN_RELEASE | CLOSED_RELEASE:
            raise Refused(Code.INVALID, f"{status!r} is not the status of a release")
        with self._write() as session:
            found = session.get(ReleaseRow, release_id, with_for_update=True)
            if found is None:
                raise Refused(Code.NOT_FOUND, "Could not find Release")
            if status is not None and status != found.status:
                if found.status in CLOSED_RELEASE:
                    raise Refused(Code.INVALID, f"the release is already {found.status}")
                found.status, found.reason = status, reason
            if notes is not None:
                found.notes = dict(notes)
            found.updated_at = self._clock()
            return found

    def release_status(self, app: str, version: int, status: str, reason: str | None) -> None:
        """What a runner says of the app's release is so, whatever was said of it before."""
        with self._write() as session:
            found = session.scalars(
                select(ReleaseRow)
                .join(AppRow, AppRow.id == ReleaseRow.app_id)
                .filter(AppRow.name == app, ReleaseRow.version == version)
            ).one()
            found.status, found.reason = status, reason or ""
            found.updated_at = self._clock()

    def is_wanted(self, app: str, version: int) -> bool:
        """Whether the app's release has not ended."""
        query = (
            select(ReleaseRow.status)
            .join(AppRow, AppRow.id == ReleaseRow.app_id)
            .filter(AppRow.name == app, ReleaseRow.version == version)
        )
        with self._read() as session:
            return session.scalar(query) in OPEN_RELEASE

    # --- ssh and audit

    def record_certificate(
        self,
        token: TokenRow,
        organization: OrganizationRow,
        *,
        principals: Iterable[str],
        apps: Iterable[str],
        public_key: str,
        valid_from: float,
        valid_until: float,
    ) -> int:
        """Write down a certificate before it is signed; its serial number."""
        with self._write() as session:
            row = CertificateRow(
                organization_id=organization.id,
                token_id=token.id,
                principals=list(principals),
                apps=list(apps),
                public_key=public_key,
                valid_from=valid_from,
                valid_until=valid_until,
            )
            session.add(row)
            session.flush()
            return row.serial

    def authority(self, purpose: str, make: Callable[[], bytes]) -> bytes:
        """The platform's private key for a purpose; made the first time, and then kept."""
        with self._write() as session:
            found = session.get(AuthorityRow, purpose)
            if found is None:
                found = AuthorityRow(purpose=purpose, private_key=make())
                session.add(found)
            return found.private_key

    def audit(
        self,
        *,
        token_id: str,
        mutation: str,
        subject: str,
        outcome: str,
        request_id: str,
        client_mutation_id: str,
    ) -> None:
        """One line about one mutation, carried out or not."""
        with self._write() as session:
            session.add(
                AuditRow(
                    at=self._clock(),
                    token_id=token_id,
                    mutation=mutation,
                    subject=subject,
                    outcome=outcome,
                    request_id=request_id,
                    client_mutation_id=client_mutation_id,
                )
            )

    def audited(self) -> list[AuditRow]:
        """All that was written down, oldest first."""
        with self._read() as session:
            return list(session.scalars(select(AuditRow).order_by(AuditRow.id)))


def _build(session: Session, app: AppRow, build_id: str) -> BuildRow:
    found = session.get(BuildRow, build_id, with_for_update=True)
    if found is None or found.app_id != app.id:
        raise Refused(Code.NOT_FOUND, "Could not find Build")
    return found
