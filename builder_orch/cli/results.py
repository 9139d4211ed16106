"""What a build's caches, results and further contexts are called on the command line."""

import csv
import re
from collections.abc import Iterable
from pathlib import Path

from builder_orch.buildkit.messages import Cache
from builder_orch.errors import UsageFailure
from builder_orch.pipeline.output import IMAGE, Form, Output

SOURCES = ("docker-image://", "https://", "http://", "git://", "git@", "ssh://")
"""What the engine fetches by itself for `--build-context`."""

_REFERENCE = re.compile(
    r"(?:[A-Za-z0-9.-]+(?::[0-9]+)?/|\[[0-9a-f:]+\](?::[0-9]+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127}))?\Z"
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*\Z")


def words(text: str, option: str, example: str) -> dict[str, str]:
    """`type=registry,ref=IMAGE` as a mapping; UsageFailure for what is none."""
    try:
        (row,) = csv.reader([text], strict=True)
    except (csv.Error, ValueError):
        row = [""]
    pairs = [word.partition("=") for word in row]
    if not all(name and equals for name, equals, _ in pairs):
        raise UsageFailure(f"{option} {text}: it is not NAME=VALUE,...", hint=f"E.g. {example}.")
    return {name.strip().lower(): value for name, _, value in pairs}


def read_caches(given: Iterable[str], option: str) -> tuple[Cache, ...]:
    """From IMAGE or `type=registry,ref=IMAGE`, and `type=inline` for `--cache-to`."""
    return tuple(_cache(text, option) for text in given)


def _cache(text: str, option: str) -> Cache:
    example = f"{option} type=registry,ref=registry.example/app:cache"
    if "=" not in text:
        return Cache("registry", {"ref": _reference(text, option, example)})
    attributes = words(text, option, example)
    kind = attributes.pop("type", "registry")
    if kind == "inline" and option == "--cache-to":
        return Cache(kind, attributes)
    if kind != "registry":
        raise UsageFailure(
            f"{option} type={kind} is not known here",
            hint="Caches are kept in a registry: type=registry,ref=IMAGE"
            + (" or, in the image itself, type=inline." if option == "--cache-to" else "."),
        )
    _reference(attributes.get("ref", ""), option, example)
    return Cache(kind, attributes)


def _reference(text: str, option: str, example: str) -> str:
    if not _REFERENCE.match(text.partition("@")[0]):
        raise UsageFailure(f"{option}: {text!r} is no name of an image", hint=f"E.g. {example}.")
    return text


def read_tag(text: str, option: str = "--tag") -> str:
    """`REPOSITORY:TAG`; `latest` where there is no tag."""
    found = _REFERENCE.match(text)
    if found is None:
        raise UsageFailure(
            f"{option}: {text!r} is no name of an image",
            hint="E.g. registry.example/team/app:1.2; the tag may be left out.",
        )
    return text if found["tag"] else f"{text}:latest"


def read_dest(text: str) -> tuple[Output, str, bool]:
    """The output, the image's name if it says one, and whether it is to be pushed.

    From `type=local,dest=DIR`, `type=tar|oci|docker,dest=FILE`, `type=docker`,
    `type=image[,name=NAME][,push=true]`, `type=registry[,name=NAME]` or a directory's name.
    """
    example = "--dest type=local,dest=out"
    if "=" not in text:
        if not text or text == "-":
            raise UsageFailure("--dest needs a place: stdout is for results", hint=example)
        return Output(Form.LOCAL, Path(text)), "", False
    given = words(text, "--dest", example)
    kind, place = given.pop("type", "local"), given.pop("dest", "")
    if kind in {"image", "registry"} and not place:
        push = given.pop("push", "true" if kind == "registry" else "false")
        name = given.pop("name", "")
        if push in {"true", "false"} and not given:
            return IMAGE, read_tag(name, "--dest name") if name else "", push == "true"
    elif kind == "docker" and not place and not given:
        return Output(Form.DOCKER), "", False
    elif kind in {"local", "tar", "oci", "docker"} and place not in {"", "-"} and not given:
        return Output(Form(kind), Path(place)), "", False
    raise UsageFailure(
        f"--dest {text} is not understood",
        hint="Take type=local,dest=DIR, type=tar,dest=FILE, type=oci,dest=FILE, "
        "type=docker[,dest=FILE], or type=image,name=REPOSITORY:TAG,push=true.",
    )


def read_contexts(given: Iterable[tuple[str, str]]) -> dict[str, Path | str]:
    """From NAME=DIRECTORY or NAME=docker-image://IMAGE; a directory must be there."""
    found: dict[str, Path | str] = {}
    for name, value in given:
        if not _NAME.match(name):
            raise UsageFailure(
                f"--build-context {name}: no name for FROM or --from",
                hint="E.g. --build-context assets=../assets.",
            )
        if value.startswith(SOURCES):
            found[name] = value
        elif Path(value).is_dir():
            found[name] = Path(value)
        else:
            raise UsageFailure(
                f"--build-context {name}: {value} is no directory",
                hint=f"An image is written {name}=docker-image://{value}.",
            )
    return found
