"""Where context and Dockerfile come from: this machine, the standard input or a URL."""

import asyncio
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

from builder_orch.cli.options import Flags
from builder_orch.errors import UsageFailure
from builder_orch.events import Emit, PhaseReason

STDIN = "-"
STDIN_NAME = "the standard input"
DOCKERFILE_OCTETS = 1 << 20


@contextmanager
def brought(
    flags: Flags, stdin: IO[bytes], variables: Mapping[str, str], emit: Emit
) -> Iterator[Flags]:
    """The flags with everything from elsewhere in a directory of its own, which ends with the
    block; ContextRefused or UsageFailure where it cannot be had."""
    if not flags.context_from and not flags.dockerfile_from:
        yield flags
        return
    with tempfile.TemporaryDirectory(prefix="fly-build-") as name:
        folder = Path(name)
        if flags.context_from:
            flags = _context(flags, folder, variables, emit)
        if flags.dockerfile_from:
            flags = _dockerfile(flags, folder, stdin, variables, emit)
        yield flags


def _context(flags: Flags, folder: Path, variables: Mapping[str, str], emit: Emit) -> Flags:
    from builder_orch.pipeline import remote

    remote.check_url(flags.context_from)
    emit(PhaseReason("preflight", f"fetching the context from {remote.shown(flags.context_from)}"))
    limits = remote.Limits(remote.ARCHIVE_OCTETS)
    archive, into = folder / "archive", folder / "context"
    asyncio.run(remote.fetch(flags.context_from, archive, limits, variables))
    into.mkdir()
    root = remote.unpack(archive, into, remote.shown(flags.context_from))
    archive.unlink()
    found = flags.dockerfile
    if found is not None and not found.is_absolute():
        # As for a directory of this machine it would count from here, where the file is not.
        found = root / found
    return replace(flags, path=root, dockerfile=found)


def _dockerfile(
    flags: Flags, folder: Path, stdin: IO[bytes], variables: Mapping[str, str], emit: Emit
) -> Flags:
    path = folder / "Dockerfile"
    if flags.dockerfile_from == STDIN:
        octets = stdin.read(DOCKERFILE_OCTETS + 1)
        if len(octets) > DOCKERFILE_OCTETS:
            raise UsageFailure(
                f"{STDIN_NAME} is over {DOCKERFILE_OCTETS} bytes, which no Dockerfile is",
                hint="Give the Dockerfile's text, e.g. fly-build build . --file - < Dockerfile.",
            )
        path.write_bytes(octets)
        return replace(flags, dockerfile=path, dockerfile_from=STDIN_NAME)
    from builder_orch.pipeline import remote

    remote.check_url(flags.dockerfile_from)
    name = remote.shown(flags.dockerfile_from)
    emit(PhaseReason("preflight", f"fetching the Dockerfile from {name}"))
    limits = remote.Limits(remote.DOCKERFILE_OCTETS)
    asyncio.run(remote.fetch(flags.dockerfile_from, path, limits, variables))
    return replace(flags, dockerfile=path, dockerfile_from=name)
