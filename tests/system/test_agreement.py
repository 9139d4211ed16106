"""The docker command line as judge of generated trees and rules: it has to find our build cached.

A step `COPY . /` is found again by the content of all that it copies: a file more or less, another
mode, link or attribute, and it would be done anew.
"""

import asyncio
import os
import posixpath
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder_orch.pipeline.engine import BUILDKIT, Recipe
from tests.system.test_results import build, connect

DOCKER = next((path for path in ("/usr/bin/docker",) if Path(path).is_file()), "")

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not DOCKER, reason="there is no docker command line to compare with"),
]

TREES = 50
"""In one context, each with rules of its own."""
NAMES = (
    "a", "b", "ab", "abc", "a.log", "b.log", "x.tar.gz", ".hid", "A", "a b", "é", "-d", "[a]",
    "a+b", "!a", "#a", "node_modules", "a^b", "a\\b", "(a", "$a",
)  # fmt: skip
WORDS = (
    "a", "b", "ab", "*", "**", "?", "a*", "*b", "*.log", "?.log", "[ab]", "[^a]", "[a-c]*", ".hid",
    ".*", "é", "a b", "node_modules", "A", "**.log", "a?c", "*.*.gz", "\\[a]", "\\*", "$a",
)  # fmt: skip
"""Without `+`, `(` and `^`: for Docker 20.10 they were part of a regular expression, later not."""
PLAIN = ("a", "b", "ab", "a.log", ".hid", "é", "a b", "node_modules", "A", "$a")
"""For exceptions: Docker 20.10 did not look into ignored directories for one with a wildcard."""


def grow(folder: Path, chance: random.Random, depth: int = 0) -> None:
    """Files, links and directories, with whatever a file system can say of them."""
    files: list[Path] = []
    for name in chance.sample(NAMES, chance.randint(1, 5)):
        path = folder / name
        kind = chance.random()
        if kind < 0.35 and depth < 3:
            path.mkdir(mode=chance.choice([0o755, 0o700, 0o1777]))
            grow(path, chance, depth + 1)
            continue
        if kind < 0.5:
            path.symlink_to(chance.choice(["a", "../b", "/etc/hosts", "gone", ".", "a/../.."]))
            continue
        if kind < 0.6 and files:
            os.link(chance.choice(files), path)
            continue
        path.write_bytes(chance.randbytes(chance.choice([0, 1, 100, 5000])))
        path.chmod(chance.choice([0o644, 0o600, 0o755, 0o4755]))
        if chance.random() < 0.1:
            os.setxattr(path, "user.mark", b"x")
        files.append(path)


def rules(prefix: str, chance: random.Random) -> Iterator[str]:
    """Lines of a .dockerignore that concern what is below a prefix."""
    for _ in range(chance.randint(0, 5)):
        keep = chance.random() < 0.3
        alphabet = PLAIN if keep else WORDS
        words = [chance.choice(alphabet) for _ in range(chance.choice([1, 1, 1, 2, 2, 3]))]
        rule = chance.choice(["", "", "", "/", "./", "x/../"]) + "/".join([prefix, *words])
        yield "!" * keep + rule + chance.choice(["", "", "/", "/.", "  "])
        if chance.random() < 0.1:
            yield chance.choice(["", "# a comment", "   "])


def fill(root: Path, lines: list[str]) -> Iterator[str]:
    """Something to keep in every directory on the way to an exception.

    A directory that is ignored, but lies there, came empty from Docker 20.10; later not at all.
    """
    for line in lines:
        if not line.startswith("!"):
            continue
        name = ""
        for part in posixpath.normpath(line[1:].strip()).strip("/").split("/"):
            name = f"{name}/{part}".lstrip("/")
            if (root / name).is_symlink() or not (root / name).is_dir():
                break
            (root / name / "kept").touch()
            yield f"!{name}/kept"


def plant(root: Path, seed: int) -> None:
    """A context of many trees; what is random in it comes from the seed, but for its own mark."""
    chance = random.Random(seed)
    everywhere: list[str] = []
    lines: list[str] = []
    for number in range(TREES):
        (root / f"t{number}").mkdir()
        grow(root / f"t{number}", chance)
        own = list(rules(f"t{number}", chance))
        lines += [*own, *fill(root, own)]
        if chance.random() < 0.02:
            everywhere += [f"**/{rule}" for rule in rules("a", chance) if rule[:1] not in "!#"]
    # Those for everywhere come first: what an exception names has to be kept in the end.
    lines = [*everywhere, *lines, "!id", chance.choice(["Dockerfile", ".dockerignore", ""])]
    (root / ".dockerignore").write_text("\n".join([*lines, ""]))
    (root / "id").write_text(os.urandom(16).hex())
    (root / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")


async def judged(root: Path, socket: Path) -> list[str]:
    """What the docker command line says of the steps of a build."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(root.parent),
        "DOCKER_BUILDKIT": "1",
        "DOCKER_HOST": f"unix://{socket}",
    }
    process = await asyncio.create_subprocess_exec(
        DOCKER, "build", "--progress", "plain", str(root),
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
    return said.decode().splitlines()


@pytest.mark.parametrize("contexts", [1, pytest.param(40, marks=pytest.mark.long)])
async def test_the_docker_command_finds_what_we_sent_cached(
    engine_socket: Path, tmp_path: Path, contexts: int
) -> None:
    engine = await connect(engine_socket)
    first = random.SystemRandom().randrange(1 << 32)
    for seed in range(first, first + contexts):
        # A new directory for each: Docker 20.10 does not always renew the digests of what it kept
        # of the one before, though it has the same files.
        root = tmp_path / str(seed)
        root.mkdir()
        plant(root, seed)
        await build(engine, root, Recipe("Dockerfile", builder=BUILDKIT, node="tests"))
        lines = await judged(root, engine_socket)
        step = next(line.split()[0] for line in lines if "[1/1] COPY . /" in line)
        assert f"{step} CACHED" in lines, f"seed {seed}"
        shutil.rmtree(root)
