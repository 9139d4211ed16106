"""What will be sent: the files of a directory that no rule ignores, in the order they travel."""

import os
import posixpath
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from builder_orch.errors import BuildFailed, ContextRefused, DockerfileInvalid, UsageFailure
from builder_orch.events import Emit, Warned
from builder_orch.pipeline.amount import readable
from builder_orch.pipeline.dockerfile import Dockerfile, Source
from builder_orch.pipeline.ignore import Ignore
from builder_orch.pipeline.survey import Survey
from builder_orch.pipeline.walk import Entry, Kind, looks_secret, special, walk

IGNORE_FILE = ".dockerignore"
OUTSIDE_NAME = ".fly-build.Dockerfile"
"""How a Dockerfile from elsewhere is called in the archive."""
NAMED = 5
"""How many files a warning names before it only counts."""
LINKS = 40
"""Links that a path may go through before it is taken for a circle, as Linux has it."""
WARN_OCTETS = 100_000_000
"""A context of more than this is warned of, unless something else is said."""


@dataclass(frozen=True, slots=True)
class Directory:
    """What the user points at: the root of the context and, if not the usual, its two files.

    `dockerfile_from` is what the Dockerfile is called when `dockerfile` is only a copy of it. A
    context of over `warn_octets` is warned of, one of over `limit_octets` refused; `check` has it
    compared with its context.lock.
    """

    root: Path
    dockerfile: Path | None = None
    ignorefile: Path | None = None
    target: str = ""
    dockerfile_from: str = ""
    warn_octets: int = WARN_OCTETS
    limit_octets: int | None = None
    check: bool = False


@dataclass(frozen=True, slots=True)
class Context:
    """A scanned directory. The Dockerfile is the last entry, `.dockerignore` the one before it.

    That order is a safeguard: an engine builds a truncated archive without complaint, unless the
    truncation takes the Dockerfile away.
    """

    root: Path
    entries: tuple[Entry, ...]
    dockerfile: Dockerfile
    dockerfile_name: str
    ignore: Ignore = field(repr=False)
    target: str = ""

    def survey(self) -> Survey:
        """What each file of it is there for."""
        own = frozenset({self.dockerfile_name, IGNORE_FILE, self.ignore.source})
        return Survey.of(self.entries, self.dockerfile, self.target, own)

    @property
    def size(self) -> int:
        """Octets of all files together."""
        return sum(entry.size for entry in self.entries)

    def __str__(self) -> str:
        files = sum(entry.kind is not Kind.DIRECTORY for entry in self.entries)
        return f"{files} file{'s' if files != 1 else ''}, {readable(self.size)}"


def scan(
    directory: Directory, emit: Emit, *, going_on: Callable[[], bool] = lambda: True
) -> Context:
    """Walk the directory and check all that can be known before anything is sent.

    DockerfileInvalid, ContextRefused, BuildFailed (a COPY of what is not there) or UsageFailure;
    `going_on` is asked now and then, and ends the walk with ContextRefused when it says no.
    """
    root = directory.root
    if not root.is_dir():
        raise UsageFailure(f"{root} is not a directory", hint="Name the directory to build.")
    path = _dockerfile(directory)
    text = _text(path, "the Dockerfile")
    dockerfile = Dockerfile.parse(text, directory.dockerfile_from or _shown(path, root))
    ignore = _ignore(directory, path)
    inside = _inside(path, root)
    found: list[Entry] = []
    for entry in walk(root, ignore):
        if not going_on():
            raise ContextRefused("the walk was given up", hint="Run the command again.")
        found.append(entry)
    _check_sources(root, dockerfile, directory.target, ignore)
    _warn(root, found, emit)
    name = inside or OUTSIDE_NAME
    last = [entry for entry in _ignore_file(root, ignore) if entry.name != name]
    last.append(Entry(name, Kind.FILE, path.stat().st_size, path.resolve()))
    moved = {entry.name for entry in last}
    entries = [entry for entry in found if entry.name not in moved] + last
    context = Context(root, tuple(entries), dockerfile, name, ignore, directory.target)
    _weigh(context, directory, emit)
    return context


def members_of(root: Path) -> list[Entry]:
    """What is sent of a directory that has another name than the build context's.

    Its `.dockerignore` is obeyed; ContextRefused for what cannot be sent.
    """
    ignore = _ignore(Directory(root), root / IGNORE_FILE)
    members = [entry for entry in walk(root, ignore) if entry.name != IGNORE_FILE]
    return [*members, *_ignore_file(root, ignore)]


def _weigh(context: Context, directory: Directory, emit: Emit) -> None:
    """Say how much it is; ContextRefused for more than was allowed."""
    weighed = context.survey().weighed()
    emit(weighed)
    largest = ", ".join(f"{path} {readable(octets)}" for path, octets in weighed.largest)
    limit = directory.limit_octets
    if limit is not None and weighed.octets > limit:
        raise ContextRefused(
            f"the build context is {context}, and the limit {readable(limit)}; the largest: "
            f"{largest}",
            hint="See with fly-build build PATH --explain-context what can be left out.",
        )
    if weighed.octets > directory.warn_octets:
        unused = f"; no COPY or ADD reaches {readable(weighed.unused)} of it"
        what = f"the build context is {context}{unused if weighed.unused else ''}"
        hint = "fly-build build PATH --explain-context says what can be left out"
        emit(Warned("context-large", f"{what}; the largest: {largest}; {hint}"))


def _dockerfile(directory: Directory) -> Path:
    if directory.dockerfile is not None:
        if directory.dockerfile.is_file():
            return directory.dockerfile
        raise _no_file(directory.dockerfile) or DockerfileInvalid(
            f"there is no Dockerfile {directory.dockerfile}",
            hint="Check --dockerfile, or [build] dockerfile in fly.toml.",
        )
    usual = [directory.root / name for name in ("Dockerfile", "dockerfile")]
    for path in usual:
        if path.is_file():
            return path
    for path in usual:
        if (error := _no_file(path)) is not None:
            raise error
    raise DockerfileInvalid(
        f"there is no Dockerfile in {directory.root}",
        hint="Write one, or name another file with --dockerfile.",
    )


def _no_file(path: Path) -> DockerfileInvalid | None:
    """Why what has the Dockerfile's name is none; None when nothing has it."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return None
    if stat.S_ISLNK(mode):
        what = f"a link to {os.readlink(path)}, where there is no file"  # noqa: PTH115
    else:
        what = Kind.DIRECTORY.value if stat.S_ISDIR(mode) else special(mode)
    return DockerfileInvalid(
        f"{path} is {what}", hint="Put a file there, or name another one with --dockerfile."
    )


def _inside(path: Path, root: Path) -> str:
    """The Dockerfile's name in the context; "" if it is not a plain file of it.

    A link on the way counts as outside: the engine would follow it inside the context only.
    """
    name = os.path.relpath(path, root)
    if name == ".." or name.startswith("../") or _goes_through_link(root, name):
        return ""
    return name


def _ignore(directory: Directory, dockerfile: Path) -> Ignore:
    """The rules of the first there is: the file asked for, <Dockerfile>.dockerignore, the usual."""
    asked = directory.ignorefile
    if asked is not None and not asked.is_file():
        raise UsageFailure(f"there is no ignore file {asked}", hint="Check --ignorefile.")
    own = dockerfile.with_name(f"{dockerfile.name}{IGNORE_FILE}")
    for path in (asked, own, directory.root / IGNORE_FILE):
        if path is not None and path.is_file():
            try:
                return Ignore.parse(_text(path, "the ignore file"), _shown(path, directory.root))
            except ValueError as error:
                raise ContextRefused(str(error), hint="Correct the pattern.") from None
    return Ignore()


def _ignore_file(root: Path, ignore: Ignore) -> Iterator[Entry]:
    """`.dockerignore` itself travels even if it is ignored: by it the engine takes itself and the
    Dockerfile out again, where it says so. Not so if another file gave the rules."""
    path = root / IGNORE_FILE
    if not path.is_file() or path.is_symlink():
        return
    if ignore.source == IGNORE_FILE or not ignore.ignores(IGNORE_FILE):
        yield Entry(IGNORE_FILE, Kind.FILE, path.stat().st_size, path)


def _text(path: Path, what: str) -> str:
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise ContextRefused(
            f"{what} {path} cannot be read: {error.strerror}", hint="Check its permissions."
        ) from None


def _shown(path: Path, root: Path) -> str:
    # fly.toml's is absolute, the context often is not.
    for top in (root, root.resolve()):
        if path.is_relative_to(top):
            return path.relative_to(top).as_posix()
    return str(path)


def _check_sources(root: Path, dockerfile: Dockerfile, target: str, ignore: Ignore) -> None:
    """BuildFailed for the first COPY or ADD of a plain path that will not be in the context."""
    for source in dockerfile.sources(target):
        name = posixpath.normpath("/" + source.path).lstrip("/")
        where = f"{dockerfile.path}:{source.line}: {source.step}"
        if name and _goes_through_link(root, name):
            _check_linked(root, name, where, source)
            continue
        if not name:
            continue
        if not os.path.lexists(root / name):
            raise BuildFailed(
                f"{where}: there is no {source.path} in the build context {root}",
                hint="Check the path: it counts from the context, whose top is as high as .. goes.",
            )
        _check_kept(root / name, name, where, source, ignore)


def _check_linked(root: Path, name: str, where: str, source: Source) -> None:
    if not _leads_somewhere(root, name):
        raise BuildFailed(
            f"{where}: {source.path} is or goes through a link to what is not in the build "
            f"context {root}",
            hint="A link's target is looked for in the context only: put the file itself there.",
        )


def _leads_somewhere(root: Path, name: str) -> bool:
    """Whether a path exists for an engine, which takes the context for the whole file system."""
    parts, at = name.split("/")[::-1], ""
    links = LINKS
    while parts:
        part = parts.pop()
        if part in {"", "."}:
            continue
        at = posixpath.normpath(posixpath.join("/", at, part)).lstrip("/")
        path = root / at
        if not path.is_symlink():
            continue
        links -= 1
        if not links:
            return False
        target = os.readlink(path)  # noqa: PTH115 - Path would tidy it
        at = "" if target.startswith("/") else posixpath.dirname(at)
        parts += target.split("/")[::-1]
    return os.path.lexists(root / at)


def _check_kept(path: Path, name: str, where: str, source: Source, ignore: Ignore) -> None:
    rule = ignore.decides(name)
    if rule is None or rule.keep or (path.is_dir() and ignore.may_keep_below(name, rule)):
        return
    raise BuildFailed(
        f"{where}: {source.path} is ignored by {ignore.source}:{rule.number} ({rule.text})",
        hint=f"Take it out of {ignore.source}, or add !{name} below that line.",
    )


def _goes_through_link(root: Path, name: str) -> bool:
    path = root
    for part in name.split("/"):
        path /= part
        if path.is_symlink():
            return True
    return False


def _warn(root: Path, entries: list[Entry], emit: Emit) -> None:
    secrets = [entry.name for entry in entries if looks_secret(entry)]
    if secrets:
        emit(Warned("secret-in-context", f"{_some(secrets)} will be sent and may end in the image"))
    links = [entry.name for entry in entries if entry.kind is Kind.LINK and _leaves(root, entry)]
    if links:
        emit(
            Warned(
                "link-leaves-context",
                f"{_some(links)}: leads out of the context; its target is not sent",
            )
        )


def _leaves(root: Path, entry: Entry) -> bool:
    try:
        target = os.readlink(root / entry.name)  # noqa: PTH115 - Path would tidy it
    except OSError:
        # It changed since it was listed; what it is now is found when it is sent.
        return False
    joined = posixpath.normpath(posixpath.join(posixpath.dirname(entry.name), target))
    return joined.startswith(("/", "../")) or joined == ".."


def _some(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
