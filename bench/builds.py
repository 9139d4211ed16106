"""Builds over a slow link: us, the docker CLI and docker-py, one engine, one tunnel, one link.

`python -m bench.builds [--rounds N --size MB]`: a context of many files over 100 Mbit/s and 20 ms,
built once, then again after one file changed. The engine is the distribution's, in namespaces of
its own; docker's programs reach it through a socket that a tunnel of ours forwards.
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.lab import FAR, FAR_HOST, GATEWAY_PORT, ROOT, Lab, build_peers, missing
from builder_orch.errors import EngineMissing
from builder_orch.selfhost.engine import Engine

RATE = "100mbit"
ONE_WAY = "10ms"
RELAY_PORT = 51823
ENGINE_PORT = 2375
FILES = 1000
SUBJECTS = ("ours", "docker CLI", "docker-py")
FIRST, AGAIN = "build, first", "build, one file changed"


class Site:
    """The engine, the link and the way to it; `close` ends all but the engine."""

    def __init__(self, lab: Lab, engine: Path, folder: Path) -> None:
        self._lab = lab
        self._engine = engine
        self._folder = folder
        self.socket = folder / "docker.sock"

    def open(self) -> None:
        """Shape the cable, start a gateway before the engine, forward for docker's programs."""
        lab = self._lab
        for name in (lab.near, lab.far):
            words = f"qdisc add dev v0 root tbf rate {RATE} burst 128kb latency 100ms"
            subprocess.run(["ip", "netns", "exec", name, "tc", *words.split()], check=True)
        lab.gateway(backend=str(self._engine))
        self.relay(RELAY_PORT)
        lab.lead(lab.to_gateway, "gateway", RELAY_PORT)
        # Docker's programs share a tunnel that stays, and a relay knows one caller only.
        self.relay(RELAY_PORT + 1)
        path = lab.out / "forward.conf"
        lab.lead(path, "gateway", RELAY_PORT + 1, other=True)
        forward = lab.python(lab.near, "forward", str(path), FAR, str(self.socket))
        assert forward.stdout is not None
        forward.stdout.readline()

    def relay(self, port: int) -> None:
        """Make the way to the gateway long, at another port of the far host."""
        words = [f"{FAR_HOST}:{port}", f"{FAR_HOST}:{GATEWAY_PORT}", ONE_WAY, "0", "0", "0ms", "1"]
        child = self._lab.start(self._lab.far, str(self._lab.peers), "relay", *words)
        assert child.stdout is not None
        child.stdout.readline()

    def clean(self) -> None:
        """Have the engine forget every build."""
        for words in (("builder", "prune", "-af"), ("image", "prune", "-af")):
            self._docker(*words)

    def build(self, subject: str, context: Path) -> tuple[float, int]:
        """One build as a whole process; its seconds and the octets that left this side."""
        before, began = self._sent(), time.perf_counter()
        if subject == "docker CLI":
            environment = {
                **os.environ,
                "DOCKER_HOST": f"unix://{self.socket}",
                "DOCKER_BUILDKIT": "1",
            }
            words = [_docker(), "build", "--progress", "plain", str(context)]
            done = self._run(words, environment)
        else:
            kind = "kit" if subject == "ours" else "classic"
            way = str(self._lab.to_gateway) if subject == "ours" else str(self.socket)
            words = [sys.executable, "-m", "bench.subject", kind, way, str(context)]
            done = self._run(words, dict(os.environ))
        if done.returncode:
            raise SystemExit(f"{subject} failed: {(done.stdout + done.stderr)[-2000:]}")
        return time.perf_counter() - began, self._sent() - before

    def _run(
        self, words: list[str], environment: dict[str, str]
    ) -> "subprocess.CompletedProcess[str]":
        inside = ["ip", "netns", "exec", self._lab.near, *words]
        return subprocess.run(
            inside, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )

    def _docker(self, *words: str) -> None:
        host = {**os.environ, "DOCKER_HOST": f"unix://{self._engine}"}
        subprocess.run([_docker(), *words], env=host, check=True, capture_output=True)

    def _sent(self) -> int:
        counter = "/sys/class/net/v0/statistics/tx_bytes"
        words = ["ip", "netns", "exec", self._lab.near, "cat", counter]
        return int(subprocess.run(words, check=True, capture_output=True).stdout)


def _docker() -> str:
    # The distribution's, which belongs to its engine; another may stand before it in PATH.
    return "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"


def fill(context: Path, size: int) -> None:
    """A context of FILES files with `size` octets in all, as a project has them: in folders."""
    shutil.rmtree(context, ignore_errors=True)
    for number in range(FILES):
        path = context / f"part{number % 20}" / f"file{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(size // FILES))
    (context / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")


def measured(site: Site, folder: Path, size: int, rounds: int) -> list[dict[str, object]]:
    """The rows: seconds and megabytes sent, by subject and work."""
    values: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(rounds):
        for subject in SUBJECTS:
            context = folder / f"context {subject}"
            fill(context, size)
            site.clean()
            for work in (FIRST, AGAIN):
                if work == AGAIN:
                    (context / "part7" / "file7").write_bytes(os.urandom(12_000))
                seconds, octets = site.build(subject, context)
                values.setdefault((subject, work, "s"), []).append(seconds)
                values.setdefault((subject, work, "MB sent"), []).append(octets / 1e6)
    return [
        {
            "subject": subject,
            "work": work,
            "direction": "up",
            "unit": unit,
            "values": [round(value, 3) for value in numbers],
            "median": round(statistics.median(numbers), 3),
        }
        for (subject, work, unit), numbers in values.items()
    ]


def ratios(rows: list[dict[str, object]]) -> dict[str, float]:
    """What the project promises of builds."""
    medians = {(row["subject"], row["work"], row["unit"]): row["median"] for row in rows}

    def ratio(above: tuple[str, str, str], below: tuple[str, str, str]) -> float:
        one, other = medians[above], medians[below]
        assert isinstance(one, float)
        assert isinstance(other, float)
        return round(one / other, 4)

    ours = ("ours", AGAIN, "s")
    return {
        "build_first_vs_docker_cli": ratio(("ours", FIRST, "s"), ("docker CLI", FIRST, "s")),
        "build_again_speedup_vs_docker_py": ratio(("docker-py", AGAIN, "s"), ours),
        "build_again_share_sent": ratio(("ours", AGAIN, "MB sent"), ("ours", FIRST, "MB sent")),
    }


async def main() -> int:
    """Measure and add the rows to bench/out/latest.json; 0 also where nothing can be measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.builds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=200, help="megabytes of the context")
    options = parser.parse_args()
    out = ROOT / "bench/out"
    out.mkdir(exist_ok=True)
    reason = missing()
    peers = None if reason else build_peers(out)
    if reason or peers is None:
        print(f"bench: no builds measured: {reason or 'needs a Go toolchain for the relay'}")
        return 0
    with tempfile.TemporaryDirectory(prefix="fly-") as name:
        folder = Path(name)
        lab = Lab(peers, out)
        try:
            async with Engine(folder / "engine", report=lambda _: None) as engine:
                try:
                    lab.open()
                    site = Site(lab, engine.docker_host, folder)
                    site.open()
                    size = options.size * 1_000_000
                    rows = await asyncio.to_thread(measured, site, folder, size, options.rounds)
                finally:
                    lab.close()
        except EngineMissing as error:
            print(f"bench: no builds measured: {error}")
            return 0
    latest = out / "latest.json"
    result = json.loads(latest.read_text()) if latest.exists() else {"rows": [], "ratios": {}}
    works = {FIRST, AGAIN}
    result["rows"] = [row for row in result["rows"] if row["work"] not in works] + rows
    result["ratios"] |= ratios(rows)
    latest.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(f"{row['work']:24} {row['subject']:10} {row['median']:>12} {row['unit']}")
    for ratio, value in ratios(rows).items():
        print(f"{ratio:32} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
