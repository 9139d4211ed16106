"""Docker contexts in the files of Docker's own clients, so that these find a builder by name.

A context is `contexts/meta/<SHA-256 of its name>/meta.json` in the folder that DOCKER_CONFIG names;
which one is used is `currentContext` in config.json there.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from builder_orch.errors import UsageFailure

USUAL_NAME = "fly-build"
MARK = "fly-build"
"""The key in a context's metadata by which ours are known; its value is the pid that owns it."""
NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.+-]+\Z")
"""What Docker's client takes for the name of a context."""
RESERVED = "default"


@dataclass(frozen=True, slots=True)
class Contexts:
    """The contexts of one folder; UsageFailure where it cannot be read or written."""

    folder: Path

    @classmethod
    def of(cls, variables: Mapping[str, str]) -> "Contexts":
        """Those of this user."""
        named = variables.get("DOCKER_CONFIG", "")
        return cls(Path(named) if named else Path(variables.get("HOME") or Path.home()) / ".docker")

    @contextmanager
    def added(self, name: str, url: str, *, use: bool = False) -> Iterator[None]:
        """A context that leads to `url`, and is what Docker's clients use if asked for.

        It is removed at the end of the block, and what was used before is used again unless
        somebody has chosen another meanwhile. A context that is not ours is never touched.
        """
        self.check(name)
        before = self._before() if use else ""
        try:
            with self._failures():
                self._write(_Context(name, url, os.getpid(), before))
                if use:
                    self._choose(name)
            yield
        finally:
            with self._failures():
                self._withdraw(name)

    def _withdraw(self, name: str) -> None:
        own = _Context.read(self._meta(name))
        if own is None or own.owner != os.getpid():
            return
        for meta in self._meta(name).parent.parent.glob("*/meta.json"):
            # Who came after us would go back to what is gone.
            other = _Context.read(meta)
            if other is not None and other.before == name:
                self._write(replace(other, before=own.before))
        _remove(self._meta(name))
        if self._current() == name:
            self._choose(own.before)

    def check(self, name: str) -> None:
        """UsageFailure for a name that is not to be had; one that a killed run left behind is."""
        if name == RESERVED or not NAME.match(name):
            raise UsageFailure(
                f"{name!r} cannot be the name of a Docker context",
                hint="Two or more letters, digits, dots, dashes, plus signs and underscores, "
                'other than "default".',
            )
        meta = self._meta(name)
        if not meta.exists():
            return
        found = _Context.read(meta)
        if found is None:
            raise UsageFailure(
                f"there is a Docker context {name} already, which is not of our making",
                hint="Choose another name with --context.",
            )
        if _is_alive(found.owner):
            raise UsageFailure(
                f"the Docker context {name} belongs to process {found.owner}, which still runs",
                hint="Choose another name with --context, or end that process.",
            )

    def _meta(self, name: str) -> Path:
        return self.folder / "contexts" / "meta" / sha256(name.encode()).hexdigest() / "meta.json"

    def _write(self, context: "_Context") -> None:
        meta = self._meta(context.name)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        meta.parent.mkdir(parents=True, exist_ok=True)
        _replace(meta, json.dumps(context.content()), 0o644)

    def _before(self) -> str:
        """What is used now, or was before runs that were killed."""
        name, seen = self._current(), set[str]()
        while name not in seen and (found := _Context.read(self._meta(name))):
            seen.add(name)
            if _is_alive(found.owner):
                break
            name = found.before
        return name

    def _current(self) -> str:
        found = self._config().get("currentContext", "")
        return found if isinstance(found, str) else ""

    def _choose(self, name: str) -> None:
        config = self._config()
        if name:
            config["currentContext"] = name
        else:
            config.pop("currentContext", None)
        file = self._file()
        mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
        _replace(file, json.dumps(config, indent="\t", ensure_ascii=False), mode)

    def _config(self) -> dict[str, object]:
        file = self._file()
        try:
            found = json.loads(file.read_bytes() or b"{}")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UsageFailure(
                f"{file} cannot be read: {error.strerror}", hint="Check its permissions."
            ) from None
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UsageFailure(
                f"{file} is not JSON as Docker's client writes it",
                hint="Correct it, or name another folder in DOCKER_CONFIG.",
            )
        return found

    def _file(self) -> Path:
        """The file itself, also where a link stands for it: the link stays one."""
        return (self.folder / "config.json").resolve()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.filename is None or not str(error.filename).startswith(str(self.folder)):
                raise
            raise UsageFailure(
                f"the Docker context cannot be kept in {self.folder}: {error.strerror}",
                hint="Name a folder that you may write to in DOCKER_CONFIG.",
            ) from None


@dataclass(frozen=True, slots=True)
class _Context:
    """One of ours: what it leads to, whose it is, and what was used before it, if it is used."""

    name: str
    url: str
    owner: int
    before: str

    def content(self) -> dict[str, object]:
        mark = {MARK: self.owner, "before": self.before}
        return {
            "Name": self.name,
            "Metadata": {"Description": "a builder, while fly-build runs", **mark},
            "Endpoints": {"docker": {"Host": self.url, "SkipTLSVerify": False}},
        }

    @classmethod
    def read(cls, meta: Path) -> "_Context | None":
        """None for what is not there or not of our making."""
        try:
            found = json.loads(meta.read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        match found:
            case {
                "Name": str(name),
                "Metadata": {"fly-build": int(pid), "before": str(before)},
                "Endpoints": {"docker": {"Host": str(url)}},
            }:
                return cls(name, url, pid, before)
            case _:
                return None


def _replace(path: Path, text: str, mode: int) -> None:
    """Write a file in one step: whoever reads it meanwhile finds the old or the new one."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), mode)
            file.write(text + "\n")
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _remove(meta: Path) -> None:
    meta.unlink(missing_ok=True)
    with suppress(OSError):
        meta.parent.rmdir()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
