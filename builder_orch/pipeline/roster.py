"""The platform's peers and ours in one list, and what should be done about each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address

from builder_orch.api.keyring import ROTATE_AFTER_S, Entry, Keyring, Purpose
from builder_orch.api.models import Granted
from builder_orch.tunnel.config import encode_key


@dataclass(frozen=True, slots=True)
class Line:
    """One peer in a list: as the platform shows it, as we have it, or both."""

    name: str
    address: IPv6Address | None
    region: str
    known: bool | None
    entry: Entry | None

    def values(self, keyring: Keyring, now: float) -> dict[str, object]:
        """In JSON types; no key but the public one."""
        entry, record = self.entry, self.entry.record if self.entry else None
        return {
            "name": self.name,
            "address": str(self.address) if self.address else None,
            "region": self.region or None,
            "known_to_platform": self.known,
            "file": str(entry.path) if entry else None,
            "kind": record.purpose.value if record else None,
            "organization": record.organization.slug if record else None,
            "public_key": encode_key(record.public_key) if record else None,
            "age_s": round(max(0.0, now - record.made_at)) if record else None,
            "used_by_pid": entry.user.pid if entry and entry.user else None,
            "made_here": keyring.is_ours(record) if record else None,
            "remarks": remarks(self, keyring, now),
        }


def remarks(line: Line, keyring: Keyring, now: float) -> list[str]:
    """What somebody should do about a peer."""
    found: list[str] = []
    entry = line.entry
    if entry is None:
        return found
    if entry.record is None:
        return [entry.trouble]
    record = entry.record
    if line.known is False:
        found.append("the platform does not know it: fly-build wireguard reset")
    if not keyring.is_ours(record):
        found.append("made on another machine: a copy knocks the original off")
    if record.purpose is Purpose.RUN and entry.user is None:
        found.append("left by a run that was killed; the next command removes it")
    if record.purpose is Purpose.KEPT and now - record.made_at > ROTATE_AFTER_S:
        days = int((now - record.made_at) // 86400)
        found.append(f"{days} days old: fly-build wireguard reset")
    return found


def survey(
    granted: Sequence[Granted] | None, entries: Sequence[Entry], invalid: Iterable[str] = ()
) -> list[Line]:
    """The platform's list and ours in one, by name; `invalid` names those it disowned when asked.

    Without a list (None) nothing is said of what the platform knows, but for `invalid`.
    """
    disowned = set(invalid)
    ours = {entry.path.stem: entry for entry in entries}
    theirs = {one.name: one for one in granted or ()}
    lines = []
    for name in sorted({*ours, *theirs}):
        entry, one = ours.get(name), theirs.get(name)
        record = entry.record if entry else None
        address = one.address if one else record.address if record else None
        region = one.region if one else record.region if record else ""
        known = True if one else False if name in disowned or granted is not None else None
        lines.append(Line(name, address, region, known, entry))
    return lines
