"""The engine's JSON stream, however it is cut and whatever is in it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.errors import (
    BuilderFull,
    BuilderLost,
    BuilderOrchError,
    BuildFailed,
    DockerfileInvalid,
    PushDenied,
)
from builder_orch.events import Event, Log, Progress, Step, StepFinished
from builder_orch.pipeline.build import judge
from builder_orch.pipeline.messages import (
    LINE_LIMIT,
    TAIL,
    BuildMessages,
    Failure,
    PushMessages,
    StepTimes,
)
from tests.pipeline.fake_engine import built, image_id, message, pushed


def told(messages: BuildMessages, *pieces: bytes) -> list[Event]:
    events = [event for piece in pieces for event in messages.feed(piece)]
    return [*events, *messages.finish()]


def test_a_build_is_told_step_by_step() -> None:
    messages = BuildMessages()
    events = told(
        messages,
        message(stream="Step 1/2 : FROM scratch"),
        message(stream="\n"),
        message(stream=" ---> \n"),
        message(stream="Step 2/2 : RUN make\n"),
        message(stream=" ---> Using cache\n ---> 0123456789ab\n"),
        message(stream="half a line, "),
        message(stream="and its end\n\x1b[91mred\n\x1b[0mRemoving intermediate container 0123\n"),
        message(status="Pulling from library/x", id="latest"),
        message(status="Downloading", id="a1", progressDetail={"current": 1, "total": 2}),
        message(aux={"ID": image_id("x")}),
    )
    assert events == [
        Step(1, 2, "FROM scratch"),
        Log(" ---> ", "engine"),
        Step(2, 2, "RUN make"),
        Step(2, 2, "RUN make", cached=True),
        Log(" ---> 0123456789ab", "engine"),
        Log("half a line, and its end"),
        Log("\x1b[91mred"),
        Log("Removing intermediate container 0123", "engine"),
        Log("latest: Pulling from library/x", "engine"),
    ]
    assert messages.image_id == image_id("x")
    assert list(messages.tail) == ["half a line, and its end", "red"]


def test_a_step_ends_when_the_next_begins_and_a_cached_one_never_began() -> None:
    seconds = iter([1.0, 4.0, 4.0, 9.5, 9.5])
    times = StepTimes(lambda: next(seconds))
    one, two, three = Step(1, 3, "FROM x"), Step(2, 3, "RUN a"), Step(3, 3, "RUN b")
    cached = Step(3, 3, "RUN b", cached=True)
    events = [each for event in (one, Log("x"), two, three, cached) for each in times.take(event)]
    ended = [StepFinished(one, 3.0), StepFinished(two, 5.5)]
    assert events == [one, Log("x"), ended[0], two, ended[1], three, cached]
    assert list(times.finish()) == []


@given(st.data())
def test_it_does_not_matter_where_the_stream_is_cut(data: st.DataObject) -> None:
    whole = b"".join([*built(), message(stream="é" * 50 + "\nlast"), b"garbage\n"])
    cuts = data.draw(st.lists(st.integers(0, len(whole)), max_size=12).map(sorted))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    one, many = BuildMessages(), BuildMessages()
    assert told(one, whole) == told(many, *pieces)
    assert one.image_id == many.image_id == image_id("image")
    assert one.lines.garbage == many.lines.garbage == 1


KEYS = ["stream", "aux", "ID", "error", "errorDetail", "message", "code", "status", "id"]
KEYS += ["progressDetail", "current", "total", "Digest"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
PIECES = st.lists(st.binary(max_size=40) | JSON.map(lambda one: json.dumps(one).encode() + b"\n"))


@given(PIECES)
def test_nothing_an_engine_sends_breaks_the_parser_or_makes_a_success(pieces: list[bytes]) -> None:
    build, push = BuildMessages(), PushMessages()
    told(build, *pieces)
    assert build.image_id == ""
    for piece in pieces:
        list(push.feed(piece))
    list(push.finish())
    assert push.digest == ""
    assert isinstance(judge(build, build.failure or Failure("x")), BuilderOrchError)


def test_a_message_of_many_megabytes_is_read_and_one_beyond_any_limit_is_dropped() -> None:
    messages = BuildMessages()
    events = told(messages, message(stream="x" * (5 << 20) + "\n"), *built())
    assert sum(len(event.text) for event in events if isinstance(event, Log)) >= 5 << 20
    assert messages.image_id
    assert messages.lines.garbage == 0
    piece = b"y" * (1 << 20)
    endless = BuildMessages()
    told(endless, *[piece] * (2 * LINE_LIMIT // len(piece) + 3), b"\n", *built())
    assert endless.lines.garbage == 1
    assert endless.image_id


def test_only_the_last_lines_are_kept_for_the_report() -> None:
    messages = BuildMessages()
    told(messages, message(stream="".join(f"line {n}\n" for n in range(1000))))
    assert list(messages.tail) == [f"line {n}" for n in range(1000 - TAIL, 1000)]


def test_the_failure_that_came_first_is_the_cause() -> None:
    messages = BuildMessages()
    told(
        messages,
        message(errorDetail={"message": "first", "code": 3}, error="first"),
        message(error="second"),
        message(aux={"ID": image_id("x")}),
    )
    assert messages.failure == Failure("first", 3)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"errorDetail": {}}, "the engine failed without a reason"),
        ({"errorDetail": {"message": 7}}, "the engine failed without a reason"),
        ({"error": ""}, "the engine failed without a reason"),
        ({"error": "x"}, "x"),
        ({"message": "x"}, "x"),
    ],
)
def test_any_sign_of_failure_is_one(fields: dict[str, object], text: str) -> None:
    messages = BuildMessages()
    told(messages, message(**fields))
    assert messages.failure == Failure(text)


@pytest.mark.parametrize(
    ("said", "status", "step", "kind"),
    [
        ("write /x: no space left on device", 200, True, BuilderFull),
        ("failed to push r.test/a:1: unexpected status: 403 Forbidden", 200, False, PushDenied),
        ("dockerfile parse error on line 2: unknown instruction: X", 400, False, DockerfileInvalid),
        ('failed to reach build target x: target stage "x" could', 400, False, DockerfileInvalid),
        ('failed to parse stage name "A:::b": invalid', 400, False, DockerfileInvalid),
        ("the --mount option requires BuildKit", 200, True, DockerfileInvalid),
        ("COPY failed: stat a: file does not exist", 200, True, BuildFailed),
        ("pull access denied for x, repository does not exist", 200, True, BuildFailed),
        ("Get https://x/v2/: dial tcp: i/o timeout", 200, True, BuildFailed),
        ("Error processing tar file: unexpected EOF", 500, False, BuilderLost),
        ("server is on fire", 500, False, BuilderLost),
        ("something new", 200, True, BuildFailed),
    ],
)
def test_the_engines_words_are_sorted_by_whose_fault_they_tell_of(
    said: str, status: int, step: bool, kind: type[BuilderOrchError]
) -> None:
    messages = BuildMessages()
    if step:
        told(messages, message(stream="Step 2/3 : RUN x\n"))
    error = judge(messages, Failure(said), status)
    assert type(error) is kind
    assert said in str(error)
    assert error.hint


def test_a_failing_step_is_told_with_its_code_and_its_last_words() -> None:
    messages = BuildMessages()
    command = "The command '/bin/sh -c echo \"syntax error\"; no space left on device' returned a"
    told(
        messages,
        message(stream="Step 2/3 : RUN make\n"),
        message(stream="compiling\nboom\n"),
        message(errorDetail={"message": f"{command} non-zero code: 2", "code": 2}),
    )
    assert messages.failure is not None
    error = judge(messages, messages.failure)
    assert type(error) is BuildFailed
    assert str(error) == "step 2/3 (RUN make) failed with exit code 2\n  | compiling\n  | boom"


def test_a_program_that_the_image_lacks_is_told_by_what_the_step_printed() -> None:
    messages = BuildMessages()
    lacking = 'runc run failed: unable to start container process: exec: "/bin/sh"'
    told(messages, message(stream="Step 2/3 : RUN make\n"), message(stream=f"{lacking}\n"))
    error = judge(messages, Failure("returned a non-zero code: 1", 1))
    assert "lacks that program" in error.hint


def test_a_step_that_was_killed_or_met_a_full_disk_is_told_so() -> None:
    messages = BuildMessages()
    told(messages, message(stream="Step 2/3 : RUN make\n"))
    assert "memory" in judge(messages, Failure("returned a non-zero code: 137", 137)).hint
    told(messages, message(stream="cp: write error: No space left on device\n"))
    assert type(judge(messages, Failure("returned a non-zero code: 1", 1))) is BuilderFull


def test_a_push_is_told_by_how_far_it_has_come() -> None:
    messages = PushMessages()
    digest = image_id("manifest")
    layer = message(id="b", status="Pushing", progressDetail={"current": 3 << 20, "total": 4 << 20})
    events = [event for piece in [*pushed(digest), layer] for event in messages.feed(piece)]
    assert messages.digest == digest
    assert events == [
        Progress("push", 512, 2048),
        Progress("push", (3 << 20) + 512, (4 << 20) + 2048),
    ]
