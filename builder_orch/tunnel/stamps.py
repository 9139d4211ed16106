"""The last handshake stamp of a key, kept over restarts.

A gateway answers an initiation only if its TAI64N stamp is later than the last one of that key
(whitepaper 5.1). A wall clock that was set back would lock a key out for as long as it was ahead,
so what was sent is written down, and the next process begins behind it.
"""

import os
import tempfile
from pathlib import Path

STEP_S = 0.02
"""More than the 16.8 ms to which stamps are rounded."""


class Stamps:
    """One file for one key; its text is Unix seconds."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def epoch(self, wall: float, now: float) -> float:
        """Wall-clock seconds at `now == 0`, such that no stamp is sent twice or goes back."""
        try:
            last = float(self._path.read_text())
        except (FileNotFoundError, ValueError):
            # A first start, or a file that somebody else wrote: the wall clock is all there is.
            return wall - now
        return max(wall, last + STEP_S) - now

    def keep(self, stamp: float) -> None:
        """Write down that `stamp` is about to be sent; OSError if it cannot be."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(f"{stamp:.9f}\n")
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self._path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
