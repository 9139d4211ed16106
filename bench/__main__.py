"""Measure and compare: `python -m bench [--rounds N] [--size MB] [--only WORK]`.

Every row is the median of interleaved rounds in one run; only the ratios mean anything on another
day. Results go to bench/out/latest.json and, as a table, to standard output.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass

from bench.lab import FAR, NEAR, PLAIN_FAR, ROOT, Lab, Path, build_peers, missing

SUBJECTS = ("ours", "inside", "hosted", "netstack", "kernel-wg", "kernel")
"""`ours` and `netstack` are libraries in the process that uses them; `hosted` is ours in a process
of its own, as the commands have it. The streams of `ours` are sockets; those of `inside` are not,
which is how netstack's are too."""
REACHING = ("ours", "netstack", "kernel-wg")
CARRIERS = ("ours", "websocket")
"""Both to a gateway of ours: over UDP and over WebSocket."""


@dataclass(frozen=True)
class Task:
    """One kind of work: `kind` as the subjects know it, octets (round trips for echo), streams."""

    name: str
    kind: str
    octets: int
    streams: int = 1
    subjects: tuple[str, ...] = SUBJECTS
    path: Path | None = None

    @property
    def meets_gateway(self) -> bool:
        """Whether the far end is a gateway of ours and not wireguard-go."""
        return self.subjects == CARRIERS


def tasks(size: int) -> list[Task]:
    """What is measured, `size` octets a stream at a time."""
    return [
        Task("up", "up", size),
        Task("down", "down", size),
        Task("both", "both", size),
        Task("up, 8 streams", "up", size, 8),
        Task("echo 64 B", "echo", 2000),
        Task("up, 5 % reordered", "up", size // 4, 1, REACHING, Path(4, reorder=0.05)),
        Task("up, same way, in order", "up", size // 4, 1, REACHING, Path(4)),
        Task("up, 0.1 % lost, 40 ms", "up", size // 4, 1, REACHING, Path(40, loss=0.001)),
        Task("up, 1 % lost, 20 ms", "up", size // 16, 1, REACHING, Path(20, loss=0.01)),
        Task("up, 20 ms", "up", size // 8, 1, REACHING, Path(20)),
        Task("up, 100 ms", "up", size // 8, 1, REACHING, Path(100)),
        Task("up, busy thread", "busy-up", size, 1, ("hosted", "ours")),
        Task("up, our gateway", "up", size, 1, CARRIERS),
        Task("down, our gateway", "down", size, 1, CARRIERS),
    ]


def run_one(lab: Lab, subject: str, task: Task) -> dict[str, float]:
    """One round of one subject; its figures."""
    words = [task.kind, str(task.octets), str(task.streams)]
    wireguard = None
    if subject == "netstack":
        target = f"[{FAR}]:{lab.ports[FAR]}"
        child = lab.start(lab.near, str(lab.peers), "netstack", NEAR, target, *words)
        assert child.stdin is not None
        child.stdin.write(lab.uapi("near"))
        child.stdin.close()
    elif subject in {"ours", "inside", "hosted", "websocket"}:
        config = lab.to_gateway if task.meets_gateway else lab.config
        child = lab.python(lab.near, subject, str(config), FAR, str(lab.ports[FAR]), *words)
    elif subject == "kernel-wg":
        wireguard = lab.tun(lab.near, NEAR, lab.uapi("near"))
        child = lab.python(lab.near, "kernel", FAR, str(lab.ports[FAR]), *words)
    else:
        child = lab.python(lab.near, "kernel", PLAIN_FAR, str(lab.ports[PLAIN_FAR]), *words)
    assert child.stdout is not None
    said = child.stdout.read()
    child.wait()
    lab.children.remove(child)
    if wireguard is not None:
        lab.end(wireguard)
    if child.returncode:
        raise SystemExit(f"{subject} failed at {task.name}")
    figures: dict[str, float] = json.loads(said)
    return figures


def rows_of(task: Task, subject: str, rounds: list[dict[str, float]]) -> list[dict[str, object]]:
    """The rows that one task of one subject gives."""
    moved = task.octets * (2 if task.kind == "both" else 1)
    values = {
        "MB/s": [moved / figures["seconds"] / 1e6 for figures in rounds],
        "CPU s/GB": [figures["cpu_s"] / moved * 1e9 for figures in rounds],
    }
    if task.kind == "echo":
        values = {
            "round trip us": [figures["round_trip_s"] * 1e6 for figures in rounds],
            "first byte ms": [figures["first_byte_s"] * 1e3 for figures in rounds],
        }
    values["RSS MB"] = [figures["rss_bytes"] / 1e6 for figures in rounds]
    return [
        {
            "subject": subject,
            "work": task.name,
            "direction": task.kind.rpartition("-")[2],
            "unit": unit,
            "values": [round(value, 3) for value in numbers],
            "median": round(statistics.median(numbers), 3),
        }
        for unit, numbers in values.items()
    ]


def ratios(rows: list[dict[str, object]]) -> dict[str, float | None]:
    """The ratios that the project promises; None where a side was not measured."""
    medians = {(row["subject"], row["work"], row["unit"]): row["median"] for row in rows}

    def ratio(above: tuple[str, str, str], below: tuple[str, str, str]) -> float | None:
        one, other = medians.get(above), medians.get(below)
        if not isinstance(one, float) or not isinstance(other, float) or not other:
            return None
        return round(one / other, 3)

    def against(work: str, unit: str) -> float | None:
        return ratio(("ours", work, unit), ("netstack", work, unit))

    up = ("ours", "up", "MB/s")
    return {
        "upload_vs_netstack": against("up", "MB/s"),
        "download_vs_netstack": against("down", "MB/s"),
        "cpu_up_vs_netstack": against("up", "CPU s/GB"),
        "cpu_down_vs_netstack": against("down", "CPU s/GB"),
        "rss_vs_netstack": against("up", "RSS MB"),
        "streams8_vs_1": ratio(("ours", "up, 8 streams", "MB/s"), up),
        "reorder5_vs_clean": ratio(
            ("ours", "up, 5 % reordered", "MB/s"), ("ours", "up, same way, in order", "MB/s")
        ),
        "loss01_40ms_vs_netstack": against("up, 0.1 % lost, 40 ms", "MB/s"),
        "loss1_20ms_vs_netstack": against("up, 1 % lost, 20 ms", "MB/s"),
        "busy_app_vs_idle": ratio(("hosted", "up, busy thread", "MB/s"), ("hosted", "up", "MB/s")),
        **{
            f"websocket_vs_udp_{way}": ratio(
                ("websocket", f"{way}, our gateway", "MB/s"),
                ("ours", f"{way}, our gateway", "MB/s"),
            )
            for way in ("up", "down")
        },
    }


def main() -> int:
    """Measure all that can be measured here; 0 also where nothing can, with the reason."""
    parser = argparse.ArgumentParser(prog="python -m bench")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, help="megabytes for each task")
    parser.add_argument("--only", action="append", help="name of a task; may be repeated")
    parser.add_argument("--subject", action="append", choices=(*SUBJECTS, "websocket"))
    options = parser.parse_args()
    out = ROOT / "bench/out"
    out.mkdir(exist_ok=True)
    reason = missing()
    peers = None if reason else build_peers(out)
    if reason or peers is None:
        print(f"bench: nothing measured: {reason or 'needs a Go toolchain for the peers'}")
        return 0
    lab = Lab(peers, out)
    rows: list[dict[str, object]] = []
    try:
        lab.open()
        lab.gateway()
        for task in tasks(options.size * 1_000_000):
            if options.only and task.name not in options.only:
                continue
            subjects = [
                name
                for name in task.subjects
                if name in (options.subject or (*SUBJECTS, *CARRIERS))
            ]
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in subjects}
            if task.path is not None:
                lab.impair(task.path)
            for _ in range(options.rounds):
                for subject in subjects:
                    rounds[subject].append(run_one(lab, subject, task))
            lab.clear()
            for subject in subjects:
                made = rows_of(task, subject, rounds[subject])
                rows += made
                for row in made:
                    print(f"{task.name:22} {subject:10} {row['median']:>12} {row['unit']}")
            sys.stdout.flush()
    finally:
        lab.close()
    result = {"rows": rows, "ratios": ratios(rows)}
    (out / "latest.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, value in result["ratios"].items():
        print(f"{name:24} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
