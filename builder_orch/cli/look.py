"""A look at a context instead of a build: what is sent and why, what its lock is, what changed."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from builder_orch.cli.deploy import directory_of, memory_of
from builder_orch.cli.ingredients import own_node
from builder_orch.cli.lines import said
from builder_orch.cli.options import Flags
from builder_orch.cli.text import amount
from builder_orch.errors import UsageFailure
from builder_orch.events import Emit, Rebuilt, Warned
from builder_orch.pipeline.context import Context, scan
from builder_orch.pipeline.explain import Difference, forecast
from builder_orch.pipeline.history import hashed
from builder_orch.pipeline.lock import write_lock
from builder_orch.pipeline.manifest import marks_of
from builder_orch.pipeline.remember import Circumstances, key_for, links_of
from builder_orch.pipeline.survey import Survey, decision, largest_of
from builder_orch.pipeline.walk import Kind
from builder_orch.settings import Environment, find_project

SHOWN = 20
"""Lines for the ignore file, and files of a directory, that are shown as text."""

Values = dict[str, object]

_WHY = {
    "unused": "no COPY or ADD reaches it",
    "secret": "it looks like a secret",
    "usual": "images seldom need it",
}


def look(flags: Flags, emit: Emit) -> Values:
    """Whatever the flags ask to see, as a result with lines for people."""
    if flags.explain + flags.lock_context + (flags.explain_context is not None) > 1:
        raise UsageFailure(
            "--explain, --explain-context and --lock-context are three different things",
            hint="Run them one after the other.",
        )
    project = find_project(flags.path, flags.config)
    context = scan(directory_of(flags, project), _but_warnings_that_follow(emit))
    if flags.lock_context:
        return _lock(context)
    if flags.explain_context is not None:
        return _context(context, flags.explain_context)
    arguments = {**project.build_args, **dict(flags.build_arg)}
    return _changes(context, ",".join(flags.platform), arguments)


def _but_warnings_that_follow(emit: Emit) -> Emit:
    """What is about size is the result itself."""
    return lambda event: (
        emit(event) if isinstance(event, Warned) and event.id != "context-large" else None
    )


def _lock(context: Context) -> Values:
    path = write_lock(context)
    files = sum(1 for one in context.entries if one.kind is not Kind.DIRECTORY)
    return {"lock": str(path), "lines": [f"{path}: {_files(files)}"]}


def _context(context: Context, asked: str) -> Values:
    survey = context.survey()
    if asked:
        return _path(context, survey, _name(context, asked))
    weighed = survey.weighed()
    taken: Counter[tuple[int, str]] = Counter()
    octets: Counter[tuple[int, str]] = Counter()
    for entry in context.entries:
        if entry.kind is not Kind.DIRECTORY and (taker := survey.taker(entry.name)) is not None:
            taken[taker.line, taker.step] += 1
            octets[taker.line, taker.step] += entry.size
    steps = [
        {"line": line, "step": step, "files": taken[line, step], "bytes": octets[line, step]}
        for line, step in ((taker.line, taker.step) for taker in survey.takers)
    ]
    savings = [
        {"line": one.line, "why": one.why, "bytes": one.octets, "files": one.files}
        for one in survey.savings()
    ]
    made: Values = {
        "root": str(context.root),
        "dockerfile": context.dockerfile.path,
        "ignorefile": context.ignore.source or None,
        "files": weighed.files,
        "bytes": weighed.octets,
        "unused_bytes": weighed.unused,
        "largest": [{"path": path, "bytes": size} for path, size in weighed.largest],
        "steps": steps,
        "savings": savings,
    }
    return {"context": made, "lines": list(_told(context, survey))}


def _told(context: Context, survey: Survey) -> Iterator[str]:
    source = context.ignore.source or "no ignore file"
    yield f"{context.root}: {context} ({context.dockerfile.path}, {source})"
    for one in largest_of(context.entries):
        yield f"  {_size(one.octets)}  {one.name}"
    for taker in survey.takers:
        files = [one for one in context.entries if one.kind is not Kind.DIRECTORY]
        found = [one for one in files if taker.takes(one.name)]
        yield f"{context.dockerfile.path}:{taker.line}: {taker.step}"
        yield f"  {_size(sum(one.size for one in found))}  {_files(len(found))}"
    unused = survey.unused()
    if unused:
        yield f"out of reach of every COPY and ADD: {_files(len(unused))}"
        yield f"  {_size(sum(one.size for one in unused))}  see below"
    savings = survey.savings()
    if savings:
        yield "lines for .dockerignore, and what each would keep here:"
    for saving in savings[:SHOWN]:
        yield f"  {_size(saving.octets)}  {saving.line}  ({_WHY[saving.why]})"
    if len(savings) > SHOWN:
        yield f"  and {len(savings) - SHOWN} more (--output json has all)"


def _size(octets: int) -> str:
    return f"{amount(octets, 'bytes'):>10}"


def _name(context: Context, asked: str) -> str:
    """A path in the context: given from its top or, if it is absolute, from anywhere."""
    name = os.path.relpath(asked, context.root.resolve()) if Path(asked).is_absolute() else asked
    name = os.path.normpath(name)
    if name == ".." or name.startswith("../") or not os.path.lexists(context.root / name):
        raise UsageFailure(
            f"there is no {asked} in the build context {context.root}",
            hint="Name a file as it is called from the top of the context.",
        )
    return name


def _path(context: Context, survey: Survey, name: str) -> Values:
    inside = [
        one for one in context.entries if name in {".", one.name} or one.name.startswith(f"{name}/")
    ]
    why = decision(context.ignore, name)
    sent = bool(inside)
    if sent and why.startswith("dropped"):
        why += ", but needed by the builder or kept in parts"
    files = sum(one.kind is not Kind.DIRECTORY for one in inside)
    octets = sum(one.size for one in inside)
    taker = survey.taker(name)
    made: Values = {
        "path": name,
        "sent": sent,
        "rule": why,
        "files": files,
        "bytes": octets,
        "taken_by": None if taker is None else {"line": taker.line, "step": taker.step},
    }
    lines = [f"{name}: {why}"]
    if name in survey.own:
        lines.append("  read by the builder itself")
    elif taker is not None and sent:
        lines.append(f"  taken by {context.dockerfile.path}:{taker.line}: {taker.step}")
    elif sent and not any(survey.taker(one.name) for one in inside):
        lines.append(f"  no COPY or ADD of {context.dockerfile.path} reaches it")
    if (context.root / name).is_dir():
        lines.append(f"  of it {_files(files)} are sent, {amount(octets, 'bytes')}")
    return {"context_path": made, "lines": lines}


def _files(count: int) -> str:
    return f"{count} file{'s' if count != 1 else ''}"


def _changes(context: Context, platform: str, arguments: dict[str, str]) -> Values:
    environment = Environment.current()
    node = own_node(environment.state_folder().parent / "node")
    given = Circumstances(platform, arguments, node=node)
    before = memory_of(environment).load(key_for(context, given))
    if before is None:
        raise UsageFailure(
            f"no good build of {context.root} from here is remembered",
            hint="Build it once; from then on changes can be explained.",
        )
    marks = marks_of(context.entries, before.marks, before.taken_ns)
    now = replace(before, arguments=hashed(arguments, node), marks=marks)
    difference = Difference.between(before, now, links_of(context))
    coming = forecast(before, difference)
    made: Values = {
        "changed": dict(difference.paths),
        "arguments": sorted(difference.arguments),
        "rebuilt": [_rebuilt(one) for one in coming],
    }
    lines = [f"{how:<8} {path}" for path, how in list(difference.paths.items())[:SHOWN]]
    if len(difference.paths) > SHOWN:
        lines.append(f"and {len(difference.paths) - SHOWN} more (--output json has all)")
    lines += [f"changed  build argument {name}" for name in sorted(difference.arguments)]
    for one in coming:
        what = next(said(one)).removeprefix("cache").lstrip()
        lines.append(what.replace("was not cached", "will be built anew", 1))
    return {"changes": made, "lines": lines or ["nothing has changed since the last good build"]}


def _rebuilt(one: Rebuilt) -> Values:
    step = {"number": one.step.number, "total": one.step.total, "name": one.step.name}
    cost = {"cost_ms": round(one.cost_s * 1000)}
    return {**step, "cause": one.cause, "paths": list(one.paths), "more": one.more, **cost}
