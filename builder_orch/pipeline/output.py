"""What becomes of a build's result: an image for a registry, or something on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from builder_orch.buildkit.export import DirectoryTarget, FileTarget, Target, Unsafe
from builder_orch.errors import NO_ROOM, BuilderLost, BuilderOrchError, LocalDiskFull, UsageFailure
from builder_orch.pipeline.amount import readable


class Form(Enum):
    """What a result may leave as; the words are those of `--dest type=`."""

    IMAGE = "image"
    DOCKER = "docker"
    LOCAL = "local"
    TAR = "tar"
    OCI = "oci"


@dataclass(frozen=True, slots=True)
class Output:
    """One result. `place` is a directory (LOCAL) or a file; DOCKER without one is loaded."""

    form: Form
    place: Path | None = None

    @property
    def exported(self) -> bool:
        """Does it leave in the build itself, and never become an image of the engine's?"""
        return self.form in {Form.LOCAL, Form.TAR, Form.OCI}

    def target(self) -> Target:
        """Where it is put."""
        assert self.place is not None
        return DirectoryTarget(self.place) if self.form is Form.LOCAL else FileTarget(self.place)


IMAGE = Output(Form.IMAGE)


@dataclass(frozen=True, slots=True)
class Exported:
    """A result that is on this machine now, and nowhere else. `digest` is that of an OCI image."""

    form: Form
    place: Path
    size_bytes: int
    digest: str = ""

    def __str__(self) -> str:
        return f"{self.form.value} in {self.place}, {readable(self.size_bytes)}"


@contextmanager
def discarding(target: Target | None, *, only_failed: bool = False) -> Iterator[None]:
    """What was not put in its place by the end of the block (or by its failure) is removed."""
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        if target is not None and not (succeeded and only_failed):
            target.discard()


def put_in_place(target: Target, output: Output, digest: str) -> Exported:
    """The last act of a build that succeeded."""
    assert output.place is not None
    octets = target.octets
    try:
        target.commit()
    except OSError as error:
        raise not_written(output.place, error) from None
    return Exported(output.form, output.place, octets, digest)


def not_written(place: Path, error: OSError | Unsafe) -> BuilderOrchError:
    """Whose fault it is that a result could not be kept."""
    if isinstance(error, Unsafe):
        return BuilderLost(
            f"the builder sent what may not be written below {place}: {error}",
            hint="Nothing was written. Take type=tar and look into it, or another builder.",
        )
    why = error.strerror or str(error)
    if error.errno in NO_ROOM:
        return LocalDiskFull(
            f"there is no room for the result in {place}: {why}",
            hint="Free some space, or name another place with --dest.",
        )
    return UsageFailure(
        f"the result cannot be written to {place}: {why}",
        hint="Nothing was changed there. Check the path and its permissions.",
    )
