"""What a context is made of: who takes which file, what nobody takes, what could stay away."""

import posixpath
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builder_orch.errors import BuilderOrchError, ContextRefused
from builder_orch.events import ContextWeighed, Event, Warned
from builder_orch.pipeline.context import Context, Directory, scan
from builder_orch.pipeline.dockerfile import Dockerfile, Taking, instruction, taken_by
from builder_orch.pipeline.ignore import Ignore
from builder_orch.pipeline.sources import takers
from builder_orch.pipeline.survey import Saving, decision, largest_of, line_for
from builder_orch.pipeline.walk import Entry, Kind, looks_secret


def write(root: Path, name: str, size: int = 0) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY src *.txt /\n")
    for name, size in [("src/a", 10), ("src/b/c", 20), ("x.txt", 5), ("data/big", 9000)]:
        write(tmp_path, name, size)
    write(tmp_path, ".git/objects/pack", 700)
    return tmp_path


def seen(root: Path, **more: int) -> tuple[Context, list[Event]]:
    events: list[Event] = []
    return scan(Directory(root, **more), events.append), events  # type: ignore[arg-type]


def dockerfile(root: Path, *lines: str) -> None:
    (root / "Dockerfile").write_text("\n".join(["FROM scratch", *lines, ""]))


# --- who takes what


@pytest.mark.parametrize(
    ("step", "patterns"),
    [
        ("COPY a b /x/", [("a", "b")]),
        ("COPY --chown=1 --link a /x", [("a",)]),
        ('COPY ["a b", "/x"]', [("a b",)]),
        ("ADD https://x.test/f git@x.test:r a /x", [("a",)]),
        ("COPY --from=other a /x", []),
        ("COPY <<EOF /x", []),
        ("COPY $A /x", [None]),
        ("COPY 'a b' /x", [None]),
        ('COPY ["a", 1]', [None]),
        ("RUN make", []),
        ("RUN --mount=type=bind,source=m,target=/m make", [("m",)]),
        ("RUN --mount=target=/m make", [(".",)]),
        ("RUN --mount=type=bind,from=base,target=/m make", []),
        ("RUN --mount=type=cache,target=/m --mount=type=secret,id=s make", []),
        ("ENTRYPOINT a", []),
    ],
)
def test_what_a_step_takes(step: str, patterns: list[tuple[str, ...] | None]) -> None:
    assert [taking.patterns for taking in taken_by(instruction(step))] == patterns


def test_the_line_of_a_step_is_known_by_its_text_unless_it_is_there_twice() -> None:
    text = "FROM x AS a\nRUN --mount=type=cache,target=/c  make \\\n  all\nRUN b\nFROM a\nRUN b\n"
    parsed = Dockerfile.parse(text, "D")
    assert parsed.line_of("RUN --mount=type=cache,target=/c make   all") == 2
    assert parsed.line_of("RUN b") == parsed.line_of("RUN c") == 0


def takes(patterns: tuple[str, ...] | None, path: str, links: dict[str, str]) -> bool:
    (taker,) = takers([Taking(1, "COPY", patterns)], links)
    return taker.takes(path)


@pytest.mark.parametrize(
    ("pattern", "links", "path", "expected"),
    [
        ("src", {}, "src/deep/file", True),
        ("/src/", {}, "src/x", True),
        ("../src", {}, "src/x", True),
        ("src", {}, "srcs", False),
        ("s*/*.py", {}, "src/a.py", True),
        ("s*/*.py", {}, "src/b/a.py", False),
        (".", {}, "anything", True),
        ("!odd", {}, "!odd", True),
        ("[", {}, "anything", True),
        ("link", {"link": "there"}, "there/x", True),
        ("link", {"link": "there"}, "other", False),
        ("l*/x", {"link": "/there"}, "there/x", True),
        ("a/link", {"a/link": "../b"}, "b", True),
        ("loop", {"loop": "loop"}, "x", False),
        ("grow/x", {"grow": "grow/grow"}, "anything", True),
    ],
)
def test_a_pattern_takes_what_it_matches_and_where_links_lead(
    pattern: str, links: dict[str, str], path: str, expected: bool
) -> None:
    assert takes((pattern,), path, links) is expected


def test_in_doubt_a_step_takes_everything() -> None:
    assert takes(None, "anything", {})


@given(st.text("COPYADRUN a.*[]\\\"'$<>=-,/\n#", max_size=60))
def test_no_dockerfile_upsets_it(text: str) -> None:
    try:
        parsed = Dockerfile.parse(f"FROM x\n{text}", "D")
    except BuilderOrchError:
        return
    for taker in takers(parsed.takings(""), {"l": "m", "m": "l/x"}):
        assert taker.takes("a/b") in {True, False}


# --- the report before anything is sent


def test_the_size_and_the_largest_paths_are_told(root: Path) -> None:
    _, events = seen(root)
    (weighed,) = [event for event in events if isinstance(event, ContextWeighed)]
    assert weighed.files == 6
    assert weighed.octets == 9735 + (root / "Dockerfile").stat().st_size
    assert weighed.largest == (("data/big", 9000), (".git/objects/pack", 700))
    assert weighed.unused == 9700
    assert not any(isinstance(event, Warned) for event in events)


def test_a_large_context_is_warned_of_and_one_over_the_limit_refused(root: Path) -> None:
    _, events = seen(root, warn_octets=9000, limit_octets=1_000_000)
    (warned,) = [event for event in events if isinstance(event, Warned)]
    assert warned.id == "context-large"
    assert "data/big 9.0 kB" in warned.message
    assert "no COPY or ADD reaches 9.7 kB of it" in warned.message
    with pytest.raises(ContextRefused, match=r"the limit 9\.5 kB; the largest: data/big") as caught:
        seen(root, limit_octets=9500)
    assert "--explain-context" in caught.value.hint


def entry(name: str, size: int = 1) -> Entry:
    return Entry(name, Kind.FILE, size, Path("/nowhere") / name)


def test_a_directory_is_named_by_what_makes_most_of_it() -> None:
    entries = [entry("a/b/c", 90), entry("a/b/d", 5), entry("a/x", 5), entry("z/1", 40)]
    entries += [entry("z/2", 40), entry("tiny", 1)]
    assert [(one.name, one.octets, one.files) for one in largest_of(entries)] == [
        ("a/b/c", 90, 1),
        ("z/", 80, 2),
    ]


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        (".env", True), ("a/.env.local", True), ("id_ed25519", True), ("key.pem", True),
        (".npmrc", True), ("a/credentials", True), ("credentials.json", True),
        ("service-account-prod.json", True), (".aws/credentials", True), (".pgpass", True),
        (".docker/config.json", True), ("home/.kube/config", True), ("t.tfstate", True),
        (".env.example", False), ("id_ed25519.pub", False), ("config.json", False),
        ("credentials.py", False), ("environment", False), ("kube/config", False),
    ],
)  # fmt: skip
def test_what_looks_like_a_secret(name: str, secret: bool) -> None:
    assert looks_secret(entry(name)) is secret


# --- rules and savings


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.log", "dropped by .dockerignore:2 (*.log)"),
        ("keep.log", "kept by .dockerignore:3 (!keep.log)"),
        ("deep/a.log", "kept: no rule of .dockerignore matches"),
        ("tmp/x/y", "dropped by .dockerignore:4 (tmp)"),
    ],
)
def test_the_rule_that_decides_is_named_with_its_line(name: str, expected: str) -> None:
    assert decision(Ignore.parse("# logs\n*.log\n!keep.log\ntmp\n"), name) == expected


def test_lines_are_suggested_for_what_nobody_takes_and_for_what_should_not_travel(
    root: Path,
) -> None:
    write(root, "src/.env", 3)
    write(root, "src/__pycache__/a.pyc", 50)
    assert seen(root)[0].survey().savings() == [
        Saving("/data", "unused", 9000, 1),
        Saving("/.git", "unused", 700, 1),
        Saving("/src/__pycache__", "usual", 50, 1),
        Saving("/src/.env", "secret", 3, 1),
    ]


NAMES = st.text("ab.*[]!# \\\n?-", min_size=1, max_size=4).filter(lambda n: n not in {".", ".."})
PATHS = st.lists(st.lists(NAMES, min_size=1, max_size=3).map("/".join), max_size=12)


@settings(max_examples=60, deadline=None)
@given(paths=PATHS, copied=st.sampled_from(["a", "a*", ".", "b/a", "ab/"]))
def test_a_suggested_line_saves_what_it_says_and_takes_nothing_from_a_step(
    tmp_path_factory: pytest.TempPathFactory, paths: list[str], copied: str
) -> None:
    root = tmp_path_factory.mktemp("tree")
    for number, path in enumerate(paths):
        try:
            write(root, path, number + 1)
        except OSError:
            continue  # it is a directory already, or lies below a file
    dockerfile(root, f"RUN --mount=source={copied},target=/x true")
    before, _ = seen(root)
    survey = before.survey()
    unused = [one for one in survey.savings() if one.why == "unused"]
    (root / ".dockerignore").write_text("".join(f"{one.line}\n" for one in unused))
    after, _ = seen(root)
    gone = {one.name for one in before.entries} - {one.name for one in after.entries}
    files = [one for one in before.entries if one.kind is Kind.FILE and one.name in gone]
    assert sum(one.size for one in files) == sum(one.octets for one in unused)
    assert len(files) == sum(one.files for one in unused)
    assert all(survey.taker(one.name) is None for one in files)
    assert all("\n" in one.name or " " in one.name for one in after.survey().unused())


@given(st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.text("ab*?[]\\!# /", max_size=5))
def test_a_line_matches_the_path_that_it_was_made_for_and_no_other(path: str, other: str) -> None:
    name = posixpath.normpath(path)
    line = line_for(name)
    assert bool(line) is not ("\n" in name or name.endswith(" "))
    if line:
        ignore = Ignore.parse(line)
        assert ignore.ignores(name)
        assert ignore.ignores(other) is (other == name or other.startswith(f"{name}/"))
