"""A look at a context instead of a build, and where context and Dockerfile may come from."""

import asyncio
import io
import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from builder_orch.cli.build import build
from builder_orch.cli.options import Size
from builder_orch.errors import Exit
from builder_orch.events import Event, Step, StepFinished
from builder_orch.pipeline.context import Directory, scan
from builder_orch.pipeline.history import Memory
from builder_orch.pipeline.remember import Circumstances, remembering

ELSEWHERE = {
    "FLY_BUILD_API_URL": "http://127.0.0.1:9/graphql",
    "FLY_BUILD_TOKEN": "planted-token",
    "FLY_BUILD_REGISTRY": "registry.test",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "context"
    for name, octets in (("src/a", 10), ("src/x.log", 5), ("data/big", 5000), ("src/.env", 3)):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(octets))
    (root / "Dockerfile").write_text("FROM scratch\nCOPY src /src\n")
    (root / ".dockerignore").write_text("**/*.log\n")
    return root


def look(*words: object, stdin: str = "") -> Result:
    """Nothing here needs a platform, and none is asked."""
    return CliRunner().invoke(build, list(map(str, words)), input=stdin)


def refused(*words: object, stdin: str = "") -> Result:
    """A build that ends before anything is asked of the platform, which is not there."""
    return CliRunner().invoke(build, [*map(str, words), "--app", "x"], input=stdin, env=ELSEWHERE)


def test_the_whole_context_is_explained(root: Path) -> None:
    result = look(root, "--explain-context")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"{root}: 5 files, 5.0 kB (Dockerfile, .dockerignore)",
        "      5.0 kB  data/big",
        "Dockerfile:2: COPY src /src",
        "    13 bytes  2 files",
        "out of reach of every COPY and ADD: 1 file",
        "      5.0 kB  see below",
        "lines for .dockerignore, and what each would keep here:",
        "      5.0 kB  /data  (no COPY or ADD reaches it)",
        "     3 bytes  /src/.env  (it looks like a secret)",
    ]
    assert "src/.env will be sent" in result.stderr


def test_the_same_as_json(root: Path) -> None:
    made = json.loads(look(root, "--explain-context", "--json").stdout)["context"]
    assert made["unused_bytes"] == 5000
    assert made["steps"] == [{"line": 2, "step": "COPY src /src", "files": 2, "bytes": 13}]
    assert made["savings"][0] == {"line": "/data", "why": "unused", "bytes": 5000, "files": 1}
    assert made["ignorefile"] == ".dockerignore"


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("src/a", ["src/a: kept: no rule of .dockerignore matches",
                   "  taken by Dockerfile:2: COPY src /src"]),
        ("src/x.log", ["src/x.log: dropped by .dockerignore:1 (**/*.log)"]),
        ("data/big", ["data/big: kept: no rule of .dockerignore matches",
                      "  no COPY or ADD of Dockerfile reaches it"]),
        ("Dockerfile", ["Dockerfile: kept: no rule of .dockerignore matches",
                        "  read by the builder itself"]),
        ("./src/", ["src: kept: no rule of .dockerignore matches",
                    "  taken by Dockerfile:2: COPY src /src",
                    "  of it 2 files are sent, 13 bytes"]),
    ],
)  # fmt: skip
def test_one_path_is_explained(root: Path, name: str, lines: list[str]) -> None:
    assert look(root, "--explain-context", name).stdout.splitlines() == lines
    absolute = look(root, "--explain-context", root / name)
    assert absolute.stdout.splitlines() == lines
    made = json.loads(look(root, "--explain-context", name, "--json").stdout)["context_path"]
    assert made["rule"] == lines[0].partition(": ")[2]
    assert made["sent"] is (name != "src/x.log")


def test_one_look_at_a_time(root: Path) -> None:
    result = look(root, "--lock-context", "--explain-context")
    assert result.exit_code == Exit.USAGE
    assert not (root / "context.lock").exists()


def test_a_path_that_is_not_there_is_told(root: Path) -> None:
    for name in ("gone", "..", "/etc/passwd"):
        result = look(root, "--explain-context", name)
        assert result.exit_code == Exit.USAGE
        assert f"there is no {name} in the build context" in result.stderr


def test_a_lock_is_written_and_then_checked_before_anybody_is_asked(root: Path) -> None:
    assert look(root, "--lock-context").stdout == f"{root}/context.lock: 5 files\n"
    (root / "src" / "a").write_text("changed")
    (root / "new").touch()
    result = refused(root, "--check-context")
    assert result.exit_code == 23
    assert "  new      new (0 bytes)\n  content  src/a (7 bytes)\n" in result.stderr
    assert "RB-CONTEXT-LOCK, exit code 23" in result.stderr


def test_a_context_over_its_limit_is_refused(root: Path) -> None:
    result = refused(root, "--context-limit", "5kB", "--context-warn", "1kB")
    assert result.exit_code == Exit.CONTEXT_REFUSED
    assert "and the limit 5.0 kB; the largest: data/big 5.0 kB" in result.stderr


@pytest.mark.parametrize(
    ("text", "octets"),
    [("1500", 1500), ("200kB", 200_000), ("1.5GB", 1_500_000_000), ("500MiB", 500 << 20),
     ("2g", 2_000_000_000), ("1 KiB", 1024), ("7B", 7)],
)  # fmt: skip
def test_sizes_are_written_as_people_do(text: str, octets: int) -> None:
    assert Size().convert(text, None, None) == octets


@pytest.mark.parametrize("text", ["", "much", "-1", "1kBB", "1..5GB", "1e9", "٣"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Size().convert(text, None, None)


# --- what changed


async def good_build(root: Path, home: Path) -> None:
    context = scan(Directory(root), lambda _: None)
    step = Step(2, 2, "COPY src /src")
    async with remembering(Memory(home / "history"), context, Circumstances(), ignored) as kept:
        kept.emit(step)
        kept.emit(StepFinished(step, 4.5))
        await kept.built("m1")


def ignored(event: Event) -> None:
    """Nobody listens."""


def test_what_changed_since_the_last_good_build_is_explained(root: Path, home: Path) -> None:
    result = look(root, "--explain")
    assert result.exit_code == Exit.USAGE
    assert "no good build" in result.stderr
    asyncio.run(good_build(root, home))
    result = look(root, "--explain")
    assert result.stdout == "nothing has changed since the last good build\n"
    (root / "src" / "a").write_text("changed")
    (root / "src" / "x.log").write_text("ignored")
    assert look(root, "--explain").stdout.splitlines() == [
        "content  src/a",
        "step 2/2 COPY src /src will be built anew: changed: src/a; that cost 4.5 s",
    ]
    made = json.loads(look(root, "--explain", "--json", "--build-arg", "A=1").stdout)["changes"]
    assert made["changed"] == {"src/a": "content"}
    assert made["arguments"] == ["A"]
    assert made["rebuilt"][0]["cost_ms"] == 4500


# --- from elsewhere


@contextmanager
def server(answers: dict[str, bytes]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = answers.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            """Nobody reads it."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = Thread(target=httpd.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}"
        finally:
            httpd.shutdown()
            thread.join()


def packed(root: Path) -> bytes:
    octets = io.BytesIO()
    with tarfile.open(fileobj=octets, mode="w:gz") as tar:
        tar.add(root, "app-1.0")
    return octets.getvalue()


def test_a_dockerfile_comes_from_the_standard_input(root: Path) -> None:
    result = look(root, "--file", "-", "--explain-context", stdin="FROM scratch\nADD data /\n")
    assert "the standard input:2: ADD data /" in result.stdout
    result = refused(root, "--file", "-", stdin="FRM scratch\n")
    assert result.exit_code == Exit.BUILD_FAILED
    assert "the standard input:1: unknown instruction FRM" in result.stderr
    result = refused(root, "--file", "-", stdin="#" * ((1 << 20) + 1))
    assert "over 1048576 bytes" in result.stderr


def test_a_dockerfile_comes_from_a_url(root: Path) -> None:
    with server({"/D": b"FROM scratch\nADD data /\n"}) as origin:
        result = look(root, "--file", f"{origin}/D", "--explain-context")
        assert f"{origin}/D:2: ADD data /" in result.stdout
        result = refused(root, "--file", f"{origin}/gone")
    assert result.exit_code == Exit.CONTEXT_REFUSED
    assert "the answer was 404" in result.stderr


def test_a_context_comes_from_a_url_with_a_dockerfile_of_its_own(root: Path) -> None:
    (root / "Other").write_text("FROM scratch\nADD data /other\n")
    with server({"/c.tgz": packed(root), "/text": b"FROM scratch\n"}) as origin:
        result = look(f"{origin}/c.tgz", "--explain-context", "src/x.log")
        assert result.stdout == "src/x.log: dropped by .dockerignore:1 (**/*.log)\n"
        result = look(f"{origin}/c.tgz", "--file", "Other", "--explain-context")
        assert "Other:2: ADD data /other" in result.stdout
        result = look(f"{origin}/text", "--explain-context")
    assert result.exit_code == Exit.CONTEXT_REFUSED
    assert "is no tar archive" in result.stderr


def test_nothing_that_was_fetched_stays(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with server({"/c.tgz": packed(root), "/D": b"FRM"}) as origin:
        assert look(f"{origin}/c.tgz", "--explain-context").exit_code == 0
        refused(f"{origin}/c.tgz", "--file", f"{origin}/D")
    assert list((tmp_path / "temporary").iterdir()) == []


@pytest.mark.parametrize(
    "words", [["https://github.com/a/b.git"], [".", "--file", "git@github.com:a/b.git"]]
)
def test_a_git_repository_is_refused_with_the_reason(words: list[str]) -> None:
    result = refused(*words)
    assert result.exit_code == Exit.USAGE
    assert "those are not cloned" in result.stderr
    assert "next:  Clone it yourself" in result.stderr
