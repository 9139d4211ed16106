"""What a run looks like, to people and to programs; and that nobody else's text can draw on it."""

import errno
import io
import json
from unicodedata import category

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.cli.render import Renderer, card
from builder_orch.cli.text import plain
from builder_orch.errors import BuilderLost, BuilderOrchError, BuildFailed, NotLoggedIn
from builder_orch.events import (
    Event,
    Finished,
    Log,
    PhaseFailed,
    PhaseFinished,
    PhaseReason,
    PhaseStarted,
    Progress,
    Retry,
    Step,
    Transport,
    Warned,
)

FAILURE = BuildFailed("step 1/2 (RUN x) failed with exit code 2\n  | boom", hint="Correct it.")
STORY: list[Event] = [
    PhaseStarted("tunnel", 30.0),
    PhaseReason("tunnel", "waiting for the handshake"),
    Transport("udp", "192.0.2.1:51820", 0.0123),
    PhaseFinished("tunnel", 1.25, "up"),
    PhaseStarted("build"),
    Step(1, 2, "FROM scratch"),
    Step(1, 2, "FROM scratch", cached=True),
    Log(" ---> 123", "engine"),
    Log("\x1b[91mred\x1b[0m\r\n"),
    Progress("build", 1_000_000, 2_000_000),
    Retry("push", 1, "reset", 1.5),
    Warned("secret-in-context", ".env will be sent"),
    PhaseFailed("build", 2.0, FAILURE),
]
GOOD = Finished(True, 0, 3.5, {"image": "r/a@sha256:1", "lines": ["image: r/a@sha256:1", "a v3"]})


class Clock:
    """Every look at it is a second later."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def shown(mode: str, *events: Event) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    renderer = Renderer(mode, "RUN1", out, err, clock=Clock(), wall=lambda: 1.5)
    renderer.start("deploy")
    for event in events:
        renderer(event)
    return out.getvalue(), err.getvalue()


def test_text_tells_the_story_line_by_line_on_stderr() -> None:
    out, err = shown("text", *STORY, GOOD)
    assert out == "image: r/a@sha256:1\na v3\n"
    assert [line[10:] for line in err.splitlines()] == [
        "tunnel     ... (at most 30 s)",
        "tunnel     waiting for the handshake",
        "tunnel     udp 192.0.2.1:51820, handshake 12 ms",
        "tunnel     done in 1.2 s: up",
        "build      ...",
        "build      step 1/2 FROM scratch",
        "build      step 1/2 is cached",
        "build      | red",
        "push       try 1: reset; again in 1.5 s",
        "warning    .env will be sent [secret-in-context]",
        "build      failed after 2.0 s",
    ]
    assert err.startswith("    1.0s  tunnel")


def test_progress_is_told_now_and_then() -> None:
    steps = [Progress("context", n * 1_000_000, 9_000_000) for n in range(1, 13)]
    _, err = shown("text", *steps)
    assert [line[10:] for line in err.splitlines()] == [
        "context    6.0 MB of 9.0 MB",
        "context    10.0 MB of 9.0 MB",
    ]


def test_a_failure_is_a_card_with_the_fault_the_next_step_and_its_id() -> None:
    out, err = shown("text", Finished(False, 20, 1.0, error=FAILURE))
    assert out == ""
    assert err.splitlines() == [
        "error: step 1/2 (RUN x) failed with exit code 2",
        "  | boom",
        "cause: what was given (yours to correct)",
        "next:  Correct it.",
        "id:    RB-BUILD-STEP, exit code 20, run RUN1",
    ]


@pytest.mark.parametrize("kind", BuilderOrchError.__subclasses__())
def test_every_failure_has_a_card(kind: type[BuilderOrchError]) -> None:
    lines = list(card(kind("it broke", hint="mend it")))
    assert len(lines) == 4
    assert ("may work later" in lines[1]) is kind.retryable


def test_json_is_one_object_at_the_end() -> None:
    out, err = shown("json", *STORY, GOOD)
    assert json.loads(out) == {
        "ok": True, "run": "RUN1", "exit_code": 0, "elapsed_ms": 3500, "image": "r/a@sha256:1"
    }  # fmt: skip
    assert "tunnel" in err
    out, err = shown("json", Finished(False, 12, 1.0, error=BuilderLost("gone", hint="again")))
    assert json.loads(out)["error"] == {
        "id": "RB-BUILDER-LOST", "class": "BuilderLost", "message": "gone", "blame": "builder",
        "retryable": True, "hint": "again", "exit_code": 12,
    }  # fmt: skip
    assert "error: gone" in err


def test_ndjson_is_an_event_a_line_and_the_result_is_last() -> None:
    out, err = shown("ndjson", *STORY, Finished(False, 20, 1.0, error=FAILURE))
    assert err == ""
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert {(event["v"], event["run"], event["at_ms"]) for event in events} == {(1, "RUN1", 1500)}
    assert [event["t"] for event in events] == [
        "run.start", "phase.start", "phase.reason", "transport", "phase.end", "phase.start",
        "step", "step", "log", "log", "progress", "retry", "warning", "phase.end", "error",
        "result",
    ]  # fmt: skip
    by_kind = {event["t"]: event for event in events}
    assert by_kind["error"]["phase"] == "build"
    assert by_kind["phase.end"]["error"] == "RB-BUILD-STEP"
    assert by_kind["log"]["text"] == "\x1b[91mred\x1b[0m\r\n"
    assert by_kind["result"]["ok"] is False
    assert by_kind["result"]["error"]["id"] == "RB-BUILD-STEP"
    assert out.isascii()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain\n", "plain"),
        ("\x1b[31;1mred\x1b[0m", "red"),
        ("\x1b]0;title\x07x\x1b]8;;http://x\x1b\\y", "xy"),
        ("\x1b[2J\x1b[H\x1bcx", "x"),
        ("\x9b31mred", "red"),
        ("10%\r50%\r100%", "100%"),
        ("100%\r", "100%"),
        ("a\tb", "a    b"),
        ("a\x00\x08\x7fb", "a\\x00\\x08\\x7fb"),
        ("abc\u202edef", "abc\\u202edef"),
        ("a\u2028b", "a\\u2028b"),
        ("\x1b", "\\x1b"),
        ("\udcff", "\\udcff"),
        ("naïve 日本", "naïve 日本"),
        ("x" * 9000, "x" * 3997 + "..."),
    ],
)
def test_the_text_of_others_is_made_harmless(text: str, expected: str) -> None:
    assert plain(text) == expected


@given(st.text() | st.text("\x1b[]0;?mJ\x07\x9b\\\r\n\x90ab", max_size=40))
def test_nothing_that_moves_a_cursor_comes_out(text: str) -> None:
    out = plain(text)
    assert all(category(char) not in {"Cc", "Cs", "Zl", "Zp"} for char in out)


def test_a_terminal_that_cannot_show_a_letter_still_gets_the_line() -> None:
    raw = io.BytesIO()
    err = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    renderer = Renderer("text", "R", io.StringIO(), err, clock=Clock())
    renderer(Log("naïve"))
    assert b"na\\xefve" in raw.getvalue()


def test_a_defect_ends_the_events_as_well() -> None:
    out, _ = shown("ndjson", Finished(False, 1, 0.0))
    assert json.loads(out.splitlines()[-1])["exit_code"] == 1
    assert NotLoggedIn("x", hint="y").code == 3


class Gone(io.StringIO):
    """A terminal that was closed: whatever is printed there fails."""

    def write(self, _text: str, /) -> int:
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("mode", ["text", "json"])
def test_a_run_goes_on_when_its_terminal_has_gone(mode: str) -> None:
    out = io.StringIO()
    renderer = Renderer(mode, "run", out, Gone())
    for event in [*STORY, Finished(False, 20, 1.0, error=FAILURE)]:
        renderer(event)
    if mode == "json":
        assert json.loads(out.getvalue())["error"]["id"] == FAILURE.kind
