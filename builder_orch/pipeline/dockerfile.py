"""What can be known of a Dockerfile before anything is sent: its steps, its stages, its sources."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Self

from builder_orch.errors import DockerfileInvalid

INSTRUCTIONS = frozenset(
    {"ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL"}
    | {"MAINTAINER", "ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"}
)
_DIRECTIVE = re.compile(r"#\s*([A-Za-z][A-Za-z0-9]*)\s*=\s*(\S.*?)\s*\Z")
_HEREDOC = re.compile(r"<<(-?)([\"']?)([A-Za-z_]\w*)\2")
_CLASSIC_FLAGS = {
    "RUN": frozenset[str](),
    "COPY": frozenset({"--from", "--chown"}),
    "ADD": frozenset({"--chown"}),
}
"""Flags that an engine without BuildKit knows."""
_FLAG = re.compile(r"--[a-z][a-z-]*(=\S*)?\Z")
_REMOTE = re.compile(r"(https?|git|ssh)://|git@|<<")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One step: where it begins, its name in capitals, its flags and the rest of it."""

    line: int
    name: str
    flags: tuple[str, ...]
    rest: str


@dataclass(frozen=True, slots=True)
class Stage:
    """What begins with a FROM; `name` is "" without AS."""

    line: int
    base: str
    name: str
    steps: tuple[Instruction, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """A path that a step takes out of the build context, written without any wildcard."""

    line: int
    step: str
    path: str


@dataclass(frozen=True, slots=True)
class Taking:
    """What a step takes out of the build context: paths and patterns, None where that cannot be
    told without building, as it may then be anything."""

    line: int
    step: str
    patterns: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Dockerfile:
    """A Dockerfile that parses; what it means is the builder's to say."""

    path: str
    stages: tuple[Stage, ...]

    @classmethod
    def parse(cls, text: str, path: str) -> Self:
        """Read it; DockerfileInvalid names the line of the first thing that is wrong."""
        lines = text.removeprefix("\ufeff").split("\n")
        directives = dict(_directives(lines))
        # A frontend of the Dockerfile's own choice may know instructions that we do not.
        check_names = "syntax" not in directives
        stages: list[tuple[Instruction, list[Instruction]]] = []
        for step in _instructions(lines, directives.get("escape", "\\")):
            if check_names and step.name not in INSTRUCTIONS:
                raise _unknown(path, step)
            if step.name == "FROM":
                stages.append((step, []))
            elif stages:
                stages[-1][1].append(step)
            elif step.name != "ARG":
                raise DockerfileInvalid(
                    f"{path}:{step.line}: {step.name} comes before the first FROM",
                    hint="Begin the Dockerfile with FROM; only ARG may stand before it.",
                )
        if not stages:
            raise DockerfileInvalid(
                f"{path}: there is no FROM in it",
                hint="Say what to build from, e.g. `FROM debian:bookworm-slim` or `FROM scratch`.",
            )
        return cls(path, tuple(_stage(path, first, steps) for first, steps in stages))

    def upto(self, target: str) -> tuple[Stage, ...]:
        """The stages that are built for a target ("": the last); DockerfileInvalid for no such."""
        if not target:
            return self.stages
        for number, stage in enumerate(self.stages):
            # By its name only: no builder takes the number of a stage for a target.
            if target.lower() == stage.name.lower():
                return self.stages[: number + 1]
        names = ", ".join(stage.name for stage in self.stages if stage.name) or "none has a name"
        raise DockerfileInvalid(
            f"{self.path} has no stage {target!r}",
            hint=f"Choose one of its stages with --target: {names}.",
        )

    def sources(self, target: str) -> Iterator[Source]:
        """The plain paths that COPY and ADD take from the context on the way to the target."""
        for stage in self.upto(target):
            for step in stage.steps:
                if step.name not in {"COPY", "ADD"}:
                    continue
                if any(flag.startswith("--from") for flag in step.flags):
                    continue
                for word in _sources(step.rest):
                    yield Source(step.line, f"{step.name} {word}", word)

    def line_of(self, text: str) -> int:
        """Where the step is that an engine calls so; 0 for none, and for one of several."""
        wanted = text.split()
        found = [
            step.line
            for stage in self.stages
            for step in stage.steps
            if " ".join((step.name, *step.flags, step.rest)).split() == wanted
        ]
        return found[0] if len(found) == 1 else 0

    def takings(self, target: str) -> Iterator[Taking]:
        """The steps that take files out of the context on the way to the target.

        What the base image does by ONBUILD is not known here.
        """
        for stage in self.upto(target):
            for step in stage.steps:
                yield from taken_by(step)

    def beyond_classic(self, target: str) -> str:
        """The first step on the way to the target that only BuildKit can do; "" if none."""
        for stage in self.upto(target):
            for step in stage.steps:
                known = _CLASSIC_FLAGS.get(step.name)
                if known is None:
                    continue
                for flag in step.flags:
                    if flag.partition("=")[0] not in known:
                        return f"{self.path}:{step.line}: {step.name} {flag.partition('=')[0]}"
                if not step.rest.startswith("[") and _HEREDOC.search(step.rest):
                    return f"{self.path}:{step.line}: {step.name} with a here-document"
        return ""


def _directives(lines: list[str]) -> Iterator[tuple[str, str]]:
    """`# name=value` at the very top."""
    for line in lines:
        found = _DIRECTIVE.match(line.strip())
        if found is None:
            return
        yield found[1].lower(), found[2]


def _instructions(lines: list[str], escape: str) -> Iterator[Instruction]:
    continued = re.compile(re.escape(escape) + r"[ \t]*\Z")
    numbered = enumerate((line.rstrip("\r") for line in lines), 1)
    parts: list[str] = []
    first = 0
    for number, line in numbered:
        if line.lstrip().startswith("#") or (not line.strip()):
            continue
        first = first if parts else number
        more = continued.search(line)
        parts.append(line[: more.start()] if more else line)
        if more:
            continue
        text = "".join(parts).strip()
        parts = []
        if not text:
            continue
        step = _instruction(first, text)
        yield step
        if step.name in {"RUN", "COPY", "ADD"}:
            _skip_documents(step.rest, numbered)
    if text := "".join(parts).strip():
        yield _instruction(first, text)


def _instruction(line: int, text: str) -> Instruction:
    name, *words = text.split(None, 1)
    rest = words[0].strip() if words else ""
    flags: list[str] = []
    while rest:
        word, *others = rest.split(None, 1)
        if not _FLAG.match(word):
            break
        flags.append(word)
        rest = others[0] if others else ""
    return Instruction(line, name.upper(), tuple(flags), rest)


def _skip_documents(rest: str, numbered: Iterator[tuple[int, str]]) -> None:
    """Pass over the bodies of here-documents: they are no instructions."""
    for dash, _, word in _HEREDOC.findall(rest):
        for _, line in numbered:
            if (line.lstrip("\t") if dash else line) == word:
                break


def _stage(path: str, first: Instruction, steps: list[Instruction]) -> Stage:
    words = first.rest.split()
    if len(words) == 1:
        return Stage(first.line, words[0], "", tuple(steps))
    if len(words) == 3 and words[1].upper() == "AS":
        return Stage(first.line, words[0], words[2], tuple(steps))
    raise DockerfileInvalid(
        f"{path}:{first.line}: FROM takes an image, or an image AS a name, not {first.rest!r}",
        hint="Write `FROM image` or `FROM image AS name`.",
    )


def _unknown(path: str, step: Instruction) -> DockerfileInvalid:
    if not step.name.isascii() and re.search("[\udc80-\udcff]", step.name):
        return DockerfileInvalid(
            f"{path}:{step.line}: this is no text in UTF-8",
            hint="Save the Dockerfile as UTF-8, or name another one with --dockerfile.",
        )
    close = get_close_matches(step.name, sorted(INSTRUCTIONS), n=1)
    other = "Correct it, or end the line above with a backslash if this one goes on from there."
    hint = f"Did you mean {close[0]}?" if close else other
    return DockerfileInvalid(f"{path}:{step.line}: unknown instruction {step.name[:40]}", hint=hint)


def taken_by(step: Instruction) -> Iterator[Taking]:
    """What one step takes out of the context, if it is of a kind that does."""
    if step.name in {"COPY", "ADD"}:
        if any(flag.startswith("--from") for flag in step.flags):
            return
        words = _words(step.rest)
        shown = f"{step.name} {step.rest}"
        if words is None:
            yield Taking(step.line, shown, None)
        elif patterns := tuple(word for word in words[:-1] if not _REMOTE.match(word)):
            doubtful = any("$" in word for word in patterns)
            yield Taking(step.line, shown, None if doubtful else patterns)
    elif step.name == "RUN":
        for flag in step.flags:
            name, _, value = flag.partition("=")
            given = dict(word.partition("=")[::2] for word in value.split(","))
            if name == "--mount" and given.get("type", "bind") == "bind" and "from" not in given:
                source = given.get("source", given.get("src", "."))
                yield Taking(step.line, f"RUN {flag}", None if "$" in source else (source,))


def instruction(text: str) -> Instruction:
    """A step as an engine names it: one line, with its variables replaced."""
    return _instruction(0, text)


def _words(rest: str) -> list[str] | None:
    """The words of a COPY or ADD; None where quotes or escapes would have to be understood."""
    if rest.startswith("["):
        try:
            words = json.loads(rest)
        except ValueError:
            return None
        return words if isinstance(words, list) and all(isinstance(w, str) for w in words) else None
    return None if any(char in rest for char in "\"'\\") else rest.split()


def _sources(rest: str) -> list[str]:
    """All words but the last, where they are what they seem; none in any doubtful case."""
    return [
        word
        for word in (_words(rest) or [])[:-1]
        if word and not any(char in word for char in "*?[$") and not _REMOTE.match(word)
    ]
