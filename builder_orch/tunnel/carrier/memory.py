"""What answered last time, for each gateway and each address of ours: a small file, best effort.

The address is the next best thing to the name of a network, which nobody tells us: in the office it
is another one than at home.
"""

import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

EXPIRY_S = 4 * 3600.0
ENTRIES = 64


class Memory:
    """Wall-clock seconds throughout: the file outlives boots. Without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def recall(self, network: str, now: float | None = None) -> str:
        """The kind of carrier that answered on this network lately; empty when none did."""
        kind, at = self._read().get(network, ("", 0.0))
        age_s = (time.time() if now is None else now) - at
        # An entry from the future is from a clock that was wrong.
        return kind if 0 <= age_s < EXPIRY_S else ""

    def keep(self, network: str, kind: str, now: float | None = None) -> None:
        """Remember it. A full disk or a folder that is not ours costs only the head start."""
        if self._path is None:
            return
        entries = self._read()
        entries[network] = (kind, time.time() if now is None else now)
        latest = sorted(entries.items(), key=lambda entry: entry[1][1])[-ENTRIES:]
        with suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=self._path.parent, prefix=".carriers.")
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    json.dump(dict(latest), file)
                Path(name).replace(self._path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise

    def _read(self) -> dict[str, tuple[str, float]]:
        if self._path is None:
            return {}
        try:
            found = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        entries: dict[str, tuple[str, float]] = {}
        for network, entry in found.items() if isinstance(found, dict) else ():
            match entry:
                case [("udp" | "websocket") as kind, int(at) | float(at)]:
                    entries[network] = (kind, float(at))
                case _:
                    continue
        return entries
