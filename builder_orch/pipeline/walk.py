"""The walk: every path of a directory that no rule ignores, in the order it travels."""

import os
import posixpath
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from builder_orch.errors import ContextRefused
from builder_orch.pipeline.ignore import Ignore, Matched

_SECRET = re.compile(
    r"(\.env(\..+)?|id_(rsa|dsa|ecdsa|ed25519)|.+\.(pem|p12|pfx|kdbx|key)|\.netrc|\.pypirc|\.npmrc"
    r"|\.git-credentials|\.htpasswd|\.pgpass|\.dockercfg|\.vault-token|.+\.(jks|keystore|tfstate)"
    r"|credentials(\.(json|ya?ml|csv|ini|txt))?|service[-_]?account.*\.json)\Z",
    re.IGNORECASE,
)
_SECRET_PLACE = re.compile(r"(.*/)?(\.docker/config\.json|\.kube/config)\Z")
_NO_SECRET = re.compile(r"\.env\.(example|sample|template|dist|defaults?)\Z", re.IGNORECASE)


class Kind(Enum):
    """What a path may be; everything else is refused."""

    FILE = "a file"
    DIRECTORY = "a directory"
    LINK = "a link"


@dataclass(frozen=True, slots=True)
class Entry:
    """One member: its name in the archive, what it was when it was found, and where it lies."""

    name: str
    kind: Kind
    size: int
    path: Path


def walk(root: Path, ignore: Ignore) -> Iterator[Entry]:
    """Every path that is sent: by name, a directory before what is in it.

    A directory that is ignored is entered only where a later rule could keep something in it, and
    is not itself sent.
    """
    stack: list[tuple[Iterator[os.DirEntry[str]], str, Matched]] = [(_listed(root), "", ())]
    while stack:
        listing, prefix, above = stack[-1]
        found = next(listing, None)
        if found is None:
            stack.pop()
            continue
        name = prefix + found.name
        matched = ignore.match(name, above)
        rule = ignore.decisive(matched)
        ignored = rule is not None and not rule.keep
        is_directory = found.is_dir(follow_symlinks=False)
        if not ignored:
            yield _entry(found, name)
        if is_directory and (rule is None or rule.keep or ignore.may_keep_below(name, rule)):
            stack.append((_listed(Path(found.path)), name + "/", matched))


def _listed(directory: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(directory) as listing:
            return iter(sorted(listing, key=lambda entry: os.fsencode(entry.name)))
    except OSError as error:
        raise ContextRefused(
            f"the directory {directory} cannot be read: {error.strerror}",
            hint="Check its permissions, or list it in .dockerignore.",
        ) from None


def _entry(found: os.DirEntry[str], name: str) -> Entry:
    try:
        status = found.stat(follow_symlinks=False)
    except OSError as error:
        raise ContextRefused(
            f"{name} cannot be looked at: {error.strerror}",
            hint="Something else changes this directory; wait for it, then run again.",
        ) from None
    kind = kind_of(status.st_mode)
    if kind is None:
        raise ContextRefused(
            f"{name} is {special(status.st_mode)}, which an image cannot hold",
            hint=f"Remove it, or add {name} to .dockerignore.",
        )
    path = Path(found.path)
    if kind is Kind.FILE and not os.access(path, os.R_OK, effective_ids=_EFFECTIVE):
        raise unreadable(name)
    return Entry(name, kind, status.st_size if kind is Kind.FILE else 0, path)


_EFFECTIVE = os.access in os.supports_effective_ids


def unreadable(name: str) -> ContextRefused:
    """The refusal of a file that may not be read."""
    return ContextRefused(
        f"{name} cannot be read: permission denied",
        hint=f"Make it readable (chmod u+r), or add {name} to .dockerignore.",
    )


def kind_of(mode: int) -> Kind | None:
    """What a member of an archive is by its st_mode; None for what cannot be one."""
    if stat.S_ISREG(mode):
        return Kind.FILE
    if stat.S_ISDIR(mode):
        return Kind.DIRECTORY
    return Kind.LINK if stat.S_ISLNK(mode) else None


def special(mode: int) -> str:
    """What something is that an image cannot hold."""
    if stat.S_ISSOCK(mode):
        return "a socket"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a device"


def looks_secret(entry: Entry) -> bool:
    """Does a file have the name of one that holds keys or passwords?"""
    name = posixpath.basename(entry.name)
    if entry.kind is not Kind.FILE or _NO_SECRET.match(name):
        return False
    return bool(_SECRET.match(name) or _SECRET_PLACE.match(entry.name))
