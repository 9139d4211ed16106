"""What users get wrong, and what each of it gets: a message, a class, a next step, an exit code."""

import json
import os
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from builder_orch.errors import Exit
from tests.system.conftest import SERVE
from tests.system.embedded import Embedded, Ended, app

pytestmark = pytest.mark.system

FAILING = (
    'RUN ["/bin/busybox", "sh", "-c", "echo planting; /bin/busybox sleep 0.2; echo withered; '
    'exit 7"]'
)
WITHOUT_RIGHTS = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
"""Root that has to respect permissions, as everybody else does."""
STRANGER = 65534


def dockerfile(text: str | None) -> Callable[[Path], None]:
    """A Dockerfile of this text; None takes it away."""

    def spoil(folder: Path) -> None:
        path = folder / "Dockerfile"
        path.unlink()
        if text is not None:
            path.write_text(text)

    return spoil


def copying(source: str) -> Callable[[Path], None]:
    return dockerfile(f"FROM scratch\nCOPY {source} /\n")


def link_that_leaves(folder: Path) -> None:
    (folder / "passwd").symlink_to("/proc/version")
    copying("passwd")(folder)


def links_in_a_circle(folder: Path) -> None:
    (folder / "one").symlink_to("two")
    (folder / "two").symlink_to("one")
    copying("one*")(folder)


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")


def unix_socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(folder / "socket"))


def unreadable(folder: Path) -> None:
    path = folder / "private"
    path.write_text("mine")
    path.chmod(0o600)
    os.chown(path, STRANGER, STRANGER)


def closed_folder(folder: Path) -> None:
    path = folder / "closed"
    path.mkdir(mode=0o700)
    os.chown(path, STRANGER, STRANGER)


def folder_instead(folder: Path) -> None:
    (folder / "Dockerfile").unlink()
    (folder / "Dockerfile").mkdir()


def nothing(folder: Path) -> None:
    """Nothing is wrong with the directory."""


CASES: dict[str, tuple[Callable[[Path], None], str, str, tuple[str, ...]]] = {
    "no Dockerfile": (dockerfile(None), "RB-DOCKERFILE", "there is no Dockerfile in", ()),
    "a folder": (folder_instead, "RB-DOCKERFILE", "Dockerfile is a directory", ()),
    "empty": (dockerfile(""), "RB-DOCKERFILE", "there is no FROM in it", ()),
    "unknown": (dockerfile("FROM scratch\nCOPPY a b\n"), "RB-DOCKERFILE", "Dockerfile:2", ()),
    "no FROM": (dockerfile("RUN true\n"), "RB-DOCKERFILE", "before the first FROM", ()),
    "broken continuation": (
        dockerfile("FROM scratch\nCOPY busybox \\\n\nCMD x /b\n"),
        "RB-BUILD-STEP",
        "Dockerfile:2: COPY CMD: there is no CMD",
        (),
    ),
    "broken list": (
        dockerfile('FROM scratch\nCOPY busybox /b\nRUN ["/b", \\\n'),
        "RB-BUILD-STEP",
        "step 3/3",
        (),
    ),
    "stage": (nothing, "RB-DOCKERFILE", "no stage 'gone'", ("--target", "gone")),
    "COPY": (copying("gone"), "RB-BUILD-STEP", "Dockerfile:2: COPY gone: there is no gone", ()),
    "COPY above": (copying("../gone"), "RB-BUILD-STEP", "there is no ../gone", ()),
    "COPY pattern": (copying("gone*"), "RB-BUILD-STEP", "no source files", ()),
    "link outside": (link_that_leaves, "RB-BUILD-STEP", "passwd is or goes through a link", ()),
    "links in a circle": (links_in_a_circle, "RB-BUILD-STEP", "step 2/2 (COPY one* /)", ()),
    "pipe": (pipe, "RB-CONTEXT", "pipe is a pipe", ()),
    "socket": (unix_socket, "RB-CONTEXT", "socket is a socket", ()),
    "unreadable": (unreadable, "RB-CONTEXT", "private cannot be read: permission denied", ()),
    "closed folder": (closed_folder, "RB-CONTEXT", "closed cannot be read", ()),
    "failing step": (
        dockerfile(f"FROM scratch\nCOPY busybox /bin/busybox\n{FAILING}\n"),
        "RB-BUILD-STEP",
        "failed with exit code 7\n  | planting\n  | withered\ncause: ",
        (),
    ),
    "unknown app": (nothing, "RB-APP-UNKNOWN", "there is no app nobodys", ("--app", "nobodys")),
}
CODES = {
    "RB-DOCKERFILE": Exit.BUILD_FAILED,
    "RB-BUILD-STEP": Exit.BUILD_FAILED,
    "RB-CONTEXT": Exit.CONTEXT_REFUSED,
    "RB-APP-UNKNOWN": Exit.NOT_ALLOWED,
}


@pytest.fixture(scope="module")
def outcomes(
    embedded: Embedded, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, "Future[Ended]"]]:
    """All the commands with a bad directory, some at a time: they do not disturb each other."""
    root = tmp_path_factory.mktemp("bad")
    made = embedded.run("deploy", app(root / "good", "STOPSIGNAL SIGKILL", SERVE), "--create-app")
    assert made.code == 0, made.said
    with ThreadPoolExecutor(3) as pool:
        futures = {}
        for number, (name, (spoil, _, _, words)) in enumerate(CASES.items()):
            folder = app(root / str(number), SERVE)
            spoil(folder)
            prefix = WITHOUT_RIGHTS if spoil in {unreadable, closed_folder} else ()
            futures[name] = pool.submit(embedded.run_by, prefix, "deploy", folder, *words)
        yield futures


def told(ended: Ended, kind: str, code: int) -> list[str]:
    """The card of a failure, checked for what every one has; its lines."""
    assert ended.code == code, ended.said
    assert "Traceback" not in ended.said
    assert ended.out == ""
    lines = ended.err[ended.err.index("error: ") :].splitlines()
    assert lines[-3].startswith("cause: ")
    assert lines[-2].startswith("next:  ")
    assert len(lines[-2]) > len("next:  ") + 10
    assert lines[-1].startswith(f"id:    {kind}, exit code {code}")
    return lines


@pytest.mark.parametrize("name", CASES)
def test_a_bad_directory_is_told_apart(outcomes: dict[str, "Future[Ended]"], name: str) -> None:
    ended = outcomes[name].result()
    _, kind, said, _ = CASES[name]
    told(ended, kind, CODES[kind])
    assert said in ended.err


def test_bad_directories_leave_nothing(
    embedded: Embedded, outcomes: dict[str, "Future[Ended]"]
) -> None:
    ended = [outcome.result() for outcome in outcomes.values()]
    assert any("asking for a WireGuard peer" in one.said for one in ended)
    assert not embedded.peers(*ended)
    assert set(embedded.builds("hello")) <= {"completed", "failed"}
    assert embedded.builds("hello").count("completed") == 1
    assert embedded.releases("hello") == [(1, "complete")]


def test_a_file_that_changes_while_it_is_sent_breaks_the_build_off(
    embedded: Embedded, tmp_path: Path
) -> None:
    folder = app(tmp_path / "app", "COPY growing /", SERVE, name="growing")
    growing = folder / "growing"
    growing.write_bytes(bytes(20_000_000))
    enough = threading.Event()

    def grow() -> None:
        with growing.open("ab", buffering=0) as file:
            while not enough.wait(0.001):
                file.write(b"more")

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        ended = embedded.run("build", folder, "--create-app")
    finally:
        enough.set()
        writer.join()
    told(ended, "RB-CONTEXT", Exit.CONTEXT_REFUSED)
    assert "growing grew while the build context was sent" in ended.err
    assert embedded.builds("growing") == ["failed"]


@pytest.mark.parametrize("token", ["expired", "revoked", "garbage", "two words"])
def test_a_token_that_is_no_good(embedded: Embedded, tmp_path: Path, token: str) -> None:
    if token in {"expired", "revoked"}:
        made = embedded.run("selfhost", "token", "--expires", "0.001s")
        assert made.code == 0
        token = made.out.strip()
    there = embedded.elsewhere(token)
    ended = embedded.run("deploy", app(tmp_path / "app", SERVE), **there)
    told(ended, "RB-AUTH-TOKEN", Exit.NOT_LOGGED_IN)
    assert token not in ended.said
    assert not (Path(there["FLY_BUILD_HOME"]) / "selfhost").exists(), "none was started instead"


def test_a_second_start_and_a_port_in_use(embedded: Embedded, tmp_path: Path) -> None:
    second = embedded.run("selfhost", "start")
    told(second, "RB-LOCKED", Exit.LOCKED)
    assert f"pid {embedded.record['pid']}" in second.err
    port = embedded.record["api_url"].rpartition(":")[2].removesuffix("/graphql")
    taken = embedded.run("selfhost", "start", "--port", port, FLY_BUILD_HOME=str(tmp_path))
    told(taken, "RB-PORT-IN-USE", Exit.USAGE)
    assert embedded.run("selfhost", "status", FLY_BUILD_HOME=str(tmp_path)).code == 1
    assert embedded.run("selfhost", "status").code == 0


def test_no_room_for_the_state(embedded: Embedded, tmp_path: Path) -> None:
    small = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "fly-build", str(tmp_path)]
    subprocess.run(small, check=True)
    try:
        ended = embedded.run("selfhost", "start", FLY_BUILD_HOME=str(tmp_path))
        told(ended, "RB-LOCAL-DISK", Exit.BUILDER_LOST)
        assert not (tmp_path / "selfhost/platform.json").exists()
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@contextmanager
def wrong_key(api_url: str) -> Iterator[str]:
    """An API that is the platform's, but that it gives another key for the gateway."""

    class Liar(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name: self.headers[name] for name in ("Authorization", "Content-Type")}
            asked = urllib.request.Request(api_url, body, headers)
            with urllib.request.urlopen(asked) as answer:
                given = json.load(answer)
            if (peer := (given.get("data") or {}).get("addWireGuardPeer")) is not None:
                peer["pubkey"] = "q" * 42 + "s="
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(given).encode())

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Liar) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/graphql"
        finally:
            server.shutdown()
            serving.join()


def test_a_gateway_with_another_key_never_answers(embedded: Embedded, tmp_path: Path) -> None:
    token = embedded.run("selfhost", "token").out.strip()
    with wrong_key(embedded.record["api_url"]) as url:
        there = {**embedded.elsewhere(token), "FLY_BUILD_API_URL": url}
        folder = app(tmp_path / "app", SERVE, name="unheard")
        words = ("--create-app", "--tunnel-timeout", "2s")
        ended = embedded.run("deploy", folder, *words, **there)
    lines = told(ended, "RB-TUNNEL", Exit.TUNNEL_NOT_UP)
    assert "does not answer this peer within 2 s, though it knows it" in lines[0]
    assert "another key" in lines[2]
    assert embedded.builds("unheard") == ["failed"]
    assert not embedded.peers(ended)
