"""How a run is shown: which way is taken, on a pty what a person sees, elsewhere only lines."""

import io
import json
import re
from base64 import b64decode
from collections.abc import Callable, Iterator
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.buildkit.wire import bytes_field, message_field, number_field, text_field
from builder_orch.cli.lines import STEP_CHARACTERS, STEP_LINES, Lines
from builder_orch.cli.progress import MODES, chosen, open_display
from builder_orch.cli.render import Renderer
from builder_orch.cli.screen import TAIL, Screen
from builder_orch.errors import BuildFailed
from builder_orch.events import (
    ContextWeighed,
    EngineStatus,
    Event,
    Finished,
    Log,
    PhaseFailed,
    PhaseFinished,
    PhaseReason,
    PhaseStarted,
    Progress,
    Rebuilt,
    Step,
    StepFinished,
    Warned,
)
from tests.buildkit.fake_daemon import log, vertex
from tests.cli.terminal import Pty, Seen, pty

COPY, RUN, TEST = Step(1, 3, "COPY . /"), Step(2, 3, "RUN make"), Step(3, 3, "RUN make test")
GONE = BuildFailed("step 3/3 (RUN make test) failed with exit code 2\n  | boom", hint="Mend it.")
TERMINAL = {"TERM": "xterm-256color"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("wished", "terminal", "variables", "expected"),
    [
        ("auto", True, TERMINAL, "tty"),
        ("auto", False, TERMINAL, "plain"),
        ("auto", True, {**TERMINAL, "CI": "true"}, "plain"),
        ("auto", True, {**TERMINAL, "CI": "false"}, "tty"),
        ("auto", True, {"TERM": "dumb"}, "plain"),
        ("auto", True, {}, "plain"),
        ("tty", True, {**TERMINAL, "CI": "1"}, "tty"),
        ("tty", False, TERMINAL, "plain"),
        ("tty", True, {"TERM": "dumb"}, "plain"),
        ("auto", True, {**TERMINAL, "BUILDKIT_PROGRESS": "plain"}, "plain"),
        ("auto", False, {"BUILDKIT_PROGRESS": "rawjson"}, "rawjson"),
        ("auto", True, {**TERMINAL, "BUILDKIT_PROGRESS": "nonsense"}, "tty"),
        ("quiet", True, {**TERMINAL, "BUILDKIT_PROGRESS": "plain"}, "quiet"),
        ("none", True, TERMINAL, "none"),
    ],
)
def test_auto_draws_only_where_somebody_looks_at_a_terminal(
    wished: str, terminal: bool, variables: dict[str, str], expected: str
) -> None:
    err = Terminal() if terminal else io.StringIO()
    assert chosen(wished, err, variables) == expected


# --- tty


@pytest.fixture
def terminal() -> Iterator[Pty]:
    with pty() as made:
        yield made


def ticking() -> Callable[[], float]:
    seconds = count()
    return lambda: float(next(seconds))


def screen(terminal: Pty, **variables: str) -> Screen:
    return Screen(terminal.end, {**TERMINAL, **variables}, clock=ticking())


def test_what_is_over_stays_and_what_goes_on_is_gone_in_the_end(terminal: Pty) -> None:
    drawn = screen(terminal)
    story: list[Event] = [
        PhaseStarted("context"),
        Progress("context", 1_000_000, 4_000_000),
        Progress("context", 3_000_000, 4_000_000),
        PhaseFinished("context", 1.5, "4.0 MB sent"),
        PhaseStarted("build"),
        Step(1, 3, "COPY . /", cached=True),
        RUN,
        TEST,
        Log("compiling a.c", step=RUN),
        Warned("dockerfile", "Dockerfile line 3: odd", 3),
        StepFinished(RUN, 12.25),
    ]
    for event in story:
        drawn.show(event)
        drawn.tick()
    drawn.close()
    drawn.close()
    seen = Seen(80).feed(terminal.written())
    assert seen.lines() == [
        "✓ context    4.0 MB sent  1.5s",
        "= [1/3] COPY . /  cached",
        "  warning    Dockerfile line 3: odd [dockerfile]",
        "✓ [2/3] RUN make  12.2s",
    ]
    assert seen.cursor


def test_meanwhile_running_steps_their_last_lines_and_octets_are_seen(terminal: Pty) -> None:
    drawn = screen(terminal)
    for event in (PhaseStarted("build"), RUN, TEST):
        drawn.show(event)
    for number in range(TAIL + 3):
        drawn.show(Log(f"line {number}", step=RUN))
    drawn.show(Progress("build", 1_000_000, 9_000_000))
    drawn.show(Progress("build", 3_000_000, 9_000_000))
    drawn.tick()
    lines = Seen(80).feed(terminal.written()).lines()
    assert lines[0].startswith("▸ [2/3] RUN make  ")
    assert lines[1 : TAIL + 1] == [f"    line {number}" for number in range(3, TAIL + 3)]
    assert lines[TAIL + 1].startswith("▸ [3/3] RUN make test  ")
    assert "3.0 MB of 9.0 MB, " in lines[TAIL + 2]
    assert "MB/s" in lines[TAIL + 2]


def test_it_fits_a_terminal_whose_size_changes(terminal: Pty) -> None:
    drawn = screen(terminal)
    drawn.show(PhaseStarted("build"))
    for number in range(1, 41):
        step = Step(number, 40, "RUN " + "x" * 300)
        drawn.show(step)
        drawn.show(Log("y" * 300, step=step))
    drawn.tick()
    terminal.resize(40, 10)
    drawn.tick()
    drawn.tick()
    drawn.close()
    frames = re.split(r"(?:\r?\x1b\[(?:1A|2K))+", terminal.written())
    wide, *_, narrow = [Seen(200).feed(frame) for frame in frames if "RUN" in frame]
    assert (wide.widest, len(wide.lines())) == (79, 22)
    assert (narrow.widest, len(narrow.lines())) == (39, 8)
    assert narrow.lines()[-1] == "  and 74 more lines"


def test_on_a_tiny_terminal_nothing_is_drawn_but_lines_still_come(terminal: Pty) -> None:
    terminal.resize(10, 3)
    drawn = screen(terminal)
    for event in (PhaseStarted("build"), RUN, PhaseFinished("build", 1.0, "done")):
        drawn.show(event)
        drawn.tick()
    drawn.close()
    assert "".join(Seen(10).feed(terminal.written()).lines()).endswith("done  1.0s")


HOSTILE = "\x1b[2J\x1b]0;owned\x07[red]x[/red]\x1b[999B\rlast\x9b31m \u202eevil \x08"


@pytest.mark.parametrize("event", [Log(HOSTILE, step=RUN), Step(9, 9, HOSTILE), RUN])
def test_text_of_a_build_cannot_draw_on_the_terminal(terminal: Pty, event: Event) -> None:
    drawn = screen(terminal)
    story: list[Event] = [PhaseStarted("build"), PhaseReason("build", HOSTILE), RUN, event]
    story += [Warned("x", HOSTILE), PhaseFinished("build", 1.0, HOSTILE)]
    for one in story:
        drawn.show(one)
        drawn.tick()
    drawn.close()
    seen = Seen(80).feed(terminal.written())  # which refuses every sequence that is not ours
    assert seen.cursor
    assert "owned" not in "".join(seen.lines())


@given(st.lists(st.text(max_size=30) | st.text("\x1b[]0;?mJ\x07\x9b\r\n\x90", max_size=30)))
def test_whatever_a_step_prints_only_our_own_sequences_come_out(texts: list[str]) -> None:
    with pty() as terminal:
        drawn = screen(terminal)
        drawn.show(RUN)
        for text in texts:
            drawn.show(Log(text, step=RUN))
        drawn.tick()
        drawn.close()
        assert Seen(80).feed(terminal.written()).lines() == []


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_can_be_had_without(
    terminal: Pty, variables: dict[str, str], coloured: bool
) -> None:
    drawn = screen(terminal, **variables)
    drawn.show(PhaseFinished("build", 1.0, "done"))
    drawn.close()
    assert ("\x1b[32m" in terminal.written()) is coloured


def test_a_terminal_without_utf8_gets_marks_that_it_has() -> None:
    with pty(encoding="ascii") as terminal:
        drawn = screen(terminal)
        drawn.show(PhaseFinished("build", 1.0, "naïve"))
        drawn.close()
        assert Seen(80).feed(terminal.written()).lines() == ["+ build      na\\xefve  1.0s"]


def test_a_failure_is_told_last_and_below_everything_that_was_drawn(terminal: Pty) -> None:
    display = open_display("tty", terminal.end, TERMINAL)
    out = io.StringIO()
    renderer = Renderer("text", "RUN1", out, terminal.end, display=display)
    for event in (
        PhaseStarted("build"),
        TEST,
        Log("boom", step=TEST),
        PhaseFailed("build", 1, GONE),
    ):
        renderer(event)
    renderer(Finished(False, 20, 1.0, error=GONE))
    seen = Seen(80).feed(terminal.written())
    assert seen.lines() == [
        "✗ build  1.0s",
        "error: step 3/3 (RUN make test) failed with exit code 2",
        "  | boom",
        "cause: what was given (yours to correct)",
        "next:  Mend it.",
        "id:    RB-BUILD-STEP, exit code 20, run RUN1",
    ]
    assert seen.cursor
    assert out.getvalue() == ""


# --- plain


def added(*events: Event) -> list[str]:
    err = io.StringIO()
    lines = Lines(err, ticking())
    for event in events:
        lines.show(event)
    return [line[10:] for line in err.getvalue().splitlines()]


def test_lines_of_steps_that_run_side_by_side_say_whose_they_are() -> None:
    assert added(RUN, Log("a", step=RUN), TEST, Log("b", step=TEST), Log("c", step=RUN)) == [
        "           step 2/3 RUN make",
        "           | a",
        "           step 3/3 RUN make test",
        "           | b",
        "           | [2/3] c",
    ]


def test_a_step_that_prints_too_many_lines_is_cut_and_says_so() -> None:
    logs = [Log(f"line {number}", step=RUN) for number in range(STEP_LINES + 7)]
    lines = added(RUN, *logs, Log("other", step=TEST), StepFinished(RUN, 0.1))
    shown = [line for line in lines if "| line" in line]
    assert len(shown) == STEP_LINES
    assert lines[-3:] == [
        "           step 2/3: the rest of its output is not shown (--output ndjson has it)",
        "           | [3/3] other",
        "           step 2/3: 7 lines of its output were not shown",
    ]


def test_a_step_that_prints_too_many_octets_is_cut() -> None:
    logs = [Log("x" * 3000, step=RUN)] * (STEP_CHARACTERS // 3000 + 50)
    lines = added(RUN, *logs)
    assert sum(map(len, lines)) < STEP_CHARACTERS + 20_000
    assert "not shown" in lines[-1]


def test_a_long_step_says_how_long_it_was_and_a_rebuilt_one_why() -> None:
    assert added(
        StepFinished(RUN, 0.5),
        StepFinished(RUN, 61.25),
        Rebuilt(COPY, "changed", ("a\x1b[31mb",), 2, 9),
        ContextWeighed(3, 999),
        ContextWeighed(1204, 41_000_000, (("data/x", 40_000_000),), 1_500_000),
    ) == [
        "           step 2/3 took 61.2 s",
        "cache      step 1/3 COPY . / was not cached: changed: ab and 2 more; that cost 9.0 s",
        "context    41.0 MB in 1204 files, 1.5 MB of it out of reach of every COPY and ADD",
        "context       40.0 MB  data/x",
    ]


@pytest.mark.parametrize("mode", MODES)
def test_no_mode_writes_anything_but_text_where_there_is_no_terminal(mode: str) -> None:
    err, out = io.StringIO(), io.StringIO()
    renderer = Renderer("text", "R", out, err, display=open_display(mode, err, TERMINAL))
    story: list[Event] = [
        PhaseStarted("build"),
        RUN,
        Log(HOSTILE, step=RUN),
        Warned("x", "careful"),
    ]
    for event in story:
        renderer(event)
    renderer(Finished(False, 20, 1.0, error=GONE))
    assert "\x1b" not in err.getvalue()
    assert "boom" in err.getvalue()
    assert ("careful" in err.getvalue()) is (mode not in {"none", "rawjson"})
    assert ("RUN make\n" in err.getvalue()) is (mode in {"auto", "plain", "tty"})


# --- rawjson


def timestamp(seconds: int, ns: int = 0) -> bytes:
    return number_field(1, seconds) + number_field(2, ns)


def whole_status() -> bytes:
    """One of everything."""
    status = message_field(
        1,
        text_field(1, "sha256:a")
        + text_field(2, "sha256:b")
        + text_field(2, "sha256:c")
        + text_field(3, "[1/2] RUN x")
        + message_field(5, timestamp(1_700_000_000, 5_000_000))
        + message_field(6, timestamp(1_700_000_001)),
    )
    status += message_field(
        2, text_field(1, "extracting") + text_field(2, "sha256:a") + number_field(4, 7)
    )
    status += message_field(
        3,
        text_field(1, "sha256:a")
        + message_field(2, timestamp(1_700_000_000))
        + number_field(3, 2)
        + bytes_field(4, b"\xff\x1b[31m\n"),
    )
    status += message_field(
        4,
        text_field(1, "sha256:a")
        + number_field(2, 1)
        + text_field(3, "odd")
        + bytes_field(4, b"more")
        + text_field(5, "https://docs.test/odd")
        + message_field(7, line(4)),
    )
    return status


def test_rawjson_is_the_status_stream_in_the_words_of_buildx() -> None:
    err = io.StringIO()
    open_display("rawjson", err, {}).show(EngineStatus(whole_status()))
    (written,) = err.getvalue().splitlines()
    assert json.loads(written) == {
        "vertexes": [
            {
                "digest": "sha256:a",
                "inputs": ["sha256:b", "sha256:c"],
                "name": "[1/2] RUN x",
                "started": "2023-11-14T22:13:20.005000000Z",
                "completed": "2023-11-14T22:13:21.000000000Z",
            }
        ],
        "statuses": [{"id": "extracting", "current": 7, "vertex": "sha256:a"}],
        "logs": [
            {
                "vertex": "sha256:a",
                "stream": 2,
                "data": "/xtbMzFtCg==",
                "timestamp": "2023-11-14T22:13:20.000000000Z",
            }
        ],
        "warnings": [
            {
                "vertex": "sha256:a",
                "level": 1,
                "short": "b2Rk",
                "detail": ["bW9yZQ=="],
                "url": "https://docs.test/odd",
                "range": [{"start": {"line": 4}}],
            }
        ],
    }


def line(number: int) -> bytes:
    """A Range that begins there."""
    return message_field(1, number_field(1, number))


def test_a_failure_in_rawjson_is_one_more_object() -> None:
    err = io.StringIO()
    renderer = Renderer("text", "R", io.StringIO(), err, display=open_display("rawjson", err, {}))
    story: list[Event] = [PhaseStarted("build"), EngineStatus(vertex("[1/1] RUN x")), RUN]
    story += [EngineStatus(log("[1/1] RUN x", b"boom\n")), EngineStatus(b"\xff")]
    for event in story:
        renderer(event)
    renderer(Finished(False, 20, 1.0, error=GONE))
    first, second, last = map(json.loads, err.getvalue().splitlines())
    assert first["vertexes"][0]["name"] == "[1/1] RUN x"
    assert b64decode(second["logs"][0]["data"]) == b"boom\n"
    assert last["error"]["id"] == "RB-BUILD-STEP"


@given(st.binary(max_size=60))
def test_garbage_in_the_status_stream_is_left_out(octets: bytes) -> None:
    err = io.StringIO()
    open_display("rawjson", err, {}).show(EngineStatus(octets))
    assert all(isinstance(json.loads(line), dict) for line in err.getvalue().splitlines())
