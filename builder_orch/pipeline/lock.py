"""context.lock: what a build context may hold, kept beside it so that CI notices anything else.

One line a file: its kind, its size, the SHA-256 of its content, its name. Only the executable bit
of a mode counts, and no directory does, because a checkout by git keeps no more than that.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from builder_orch.errors import ContextChanged, UsageFailure
from builder_orch.pipeline.amount import readable
from builder_orch.pipeline.context import Context
from builder_orch.pipeline.manifest import Mark, Marks, changes, marks_of
from builder_orch.pipeline.walk import Kind

LOCK_FILE = "context.lock"
NAMED = 10
"""Differences that are named before they are only counted."""
LARGEST = 64 << 20
"""Octets of a lock that is still read."""

_HEAD = "# What the build context holds, by fly-build build --lock-context\nversion 1\n"
_SIZE = re.compile(r"[0-9]{1,19}\Z", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_KINDS = {"file": (Kind.FILE, 0), "exec": (Kind.FILE, 0o111), "link": (Kind.LINK, 0)}


def lock_of(context: Context, *, going_on: Callable[[], bool] = lambda: True) -> str:
    """The text of a lock."""
    lines = [f"{_line(name, mark)}\n" for name, mark in sorted(_locked(context, going_on).items())]
    return _HEAD + "".join(lines)


def check_lock(context: Context, *, going_on: Callable[[], bool] = lambda: True) -> None:
    """Compare a context with its lock; ContextChanged names what differs."""
    path = context.root / LOCK_FILE
    try:
        if path.stat().st_size > LARGEST:
            raise _broken(path, 1)
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UsageFailure(
            f"{path} cannot be read: {error.strerror}",
            hint="Write it with fly-build build PATH --lock-context, and commit it.",
        ) from None
    before, now = parse_lock(text, path), _locked(context, going_on)
    found = changes(before, now)
    if not found:
        return
    named = [_told(name, how, now.get(name)) for name, how in list(found.items())[:NAMED]]
    more = f"\n  and {len(found) - NAMED} more" if len(found) > NAMED else ""
    raise ContextChanged(
        "\n".join([f"the build context is not what {path} says:", *named]) + more,
        hint="Is it meant? Write it anew with fly-build build PATH --lock-context.",
    )


def parse_lock(text: str, path: Path) -> Marks:
    """What a lock says; UsageFailure names the first line that is none."""
    if not text.startswith(_HEAD):
        raise _broken(path, 1)
    made: Marks = {}
    lines = text.removeprefix(_HEAD).split("\n")
    for number, line in enumerate(lines[:-1], 3):
        words = line.split(" ", 3)
        found = _read(*words) if len(words) == 4 else None
        if found is None:
            raise _broken(path, number)
        made[found[0]] = found[1]
    if lines[-1]:
        raise _broken(path, len(lines) + 2)
    return made


def _locked(context: Context, going_on: Callable[[], bool]) -> Marks:
    """Without the lock itself; of the mode only what git keeps."""
    entries = [
        one for one in context.entries if one.kind is not Kind.DIRECTORY and one.name != LOCK_FILE
    ]
    return {
        name: Mark(mark.kind, _executable(mark), mark.size, mark.digest)
        for name, mark in marks_of(entries, {}, going_on=going_on).items()
    }


def _executable(mark: Mark) -> int:
    return 0o111 if mark.kind is Kind.FILE and mark.mode & 0o100 else 0


def _line(name: str, mark: Mark) -> str:
    kind = "link" if mark.kind is Kind.LINK else "exec" if mark.mode else "file"
    return f"{kind} {mark.size} {mark.digest} {_write_name(name)}"


def _read(word: str, size: str, digest: str, written: str) -> tuple[str, Mark] | None:
    kind, name = _KINDS.get(word), _read_name(written)
    if kind is None or not name or not _SIZE.match(size) or not _DIGEST.match(digest):
        return None
    return name, Mark(kind[0], kind[1], int(size), digest)


def _write_name(name: str) -> str:
    """As it is, or as a JSON string where it could not be read back from a line."""
    return name if name.isprintable() and not name.startswith('"') else json.dumps(name)


def _read_name(text: str) -> str:
    if not text.startswith('"'):
        return text
    try:
        name = json.loads(text)
    except ValueError:
        return ""
    return name if isinstance(name, str) else ""


def _told(name: str, how: str, mark: Mark | None) -> str:
    size = f" ({readable(mark.size)})" if mark is not None and how in {"new", "content"} else ""
    return f"  {how:<8} {name}{size}"


def _broken(path: Path, line: int) -> UsageFailure:
    return UsageFailure(
        f"{path}:{line}: no line of a {LOCK_FILE}",
        hint="Write it anew with fly-build build PATH --lock-context.",
    )


def write_lock(context: Context, *, going_on: Callable[[], bool] = lambda: True) -> Path:
    """Write the lock beside the context, whole or not at all; UsageFailure where that fails."""
    path = context.root / LOCK_FILE
    text = lock_of(context, going_on=going_on)
    new = path.with_name(f".{LOCK_FILE}.{os.getpid()}")
    try:
        new.write_bytes(text.encode("utf-8", "surrogateescape"))
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise UsageFailure(
            f"{path} cannot be written: {error.strerror}", hint="Check the directory's permissions."
        ) from None
    return path
