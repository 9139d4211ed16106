"""The status stream as events: whose line it is, how long a step took, what was warned of."""

from hypothesis import given
from hypothesis import strategies as st

from builder_orch.buildkit.messages import StatusResponse, Vertex, VertexLog
from builder_orch.buildkit.progress import Watching
from builder_orch.buildkit.wire import message_field, number_field, text_field
from builder_orch.events import Event, Log, Step, StepFinished, Warned
from builder_orch.tunnel.machine import Malformed

SECOND = 1_000_000_000


def told(*vertices: Vertex) -> list[Event]:
    watching = Watching()
    return [event for one in vertices for event in watching.take(StatusResponse((one,)))]


def test_a_step_says_how_long_it_took_by_the_engines_clock() -> None:
    name = "[build 2/3] RUN make"
    events = told(
        Vertex("d", name),
        Vertex("d", name, 5 * SECOND),
        Vertex("d", name, 5 * SECOND, 7 * SECOND + SECOND // 2),
        Vertex("d", name, 5 * SECOND, 9 * SECOND),
    )
    step = Step(2, 3, "RUN make (build)")
    assert events == [step, StepFinished(step, 2.5)]
    assert isinstance(events[0], Step)
    assert events[0].stage == "build"


def test_a_cached_step_took_nothing_and_a_clock_may_go_backwards() -> None:
    cached = Vertex("d", "[2/3] COPY a /", SECOND, 2 * SECOND, cached=True)
    assert told(cached) == [Step(2, 3, "COPY a /", cached=True)]
    back = Vertex("d", "[2/3] COPY a /", 5 * SECOND, 2 * SECOND)
    assert told(back) == [Step(2, 3, "COPY a /"), StepFinished(Step(2, 3, "COPY a /"), 0.0)]


def test_a_line_knows_its_step() -> None:
    watching = Watching()
    start = StatusResponse((Vertex("d", "[2/3] RUN a", SECOND), Vertex("e", "exporting", SECOND)))
    logs = StatusResponse(logs=(VertexLog("d", 1, b"one\n"), VertexLog("e", 2, b"two\n")))
    events = [event for status in (start, logs) for event in watching.take(status)]
    lines = [event for event in events if isinstance(event, Log) and event.stream != "engine"]
    assert [(line.text, line.step) for line in lines] == [
        ("one", Step(2, 3, "RUN a")),
        ("two", None),
    ]


def test_a_warning_names_the_line_of_the_dockerfile_once() -> None:
    where = message_field(1, number_field(1, 7))
    found = text_field(3, "odd casing") + text_field(5, "https://docs.test/odd")
    octets = message_field(4, found + message_field(7, where))
    watching = Watching()
    events = [event for _ in range(2) for event in watching.take(StatusResponse.decode(octets))]
    said = "Dockerfile line 7: odd casing (https://docs.test/odd)"
    assert events == [Warned("dockerfile", said, 7)]


@given(st.binary(max_size=80))
def test_garbage_is_malformed_or_means_something(octets: bytes) -> None:
    for field in (1, 2, 3, 4):
        try:
            status = StatusResponse.decode(message_field(field, octets))
        except Malformed:
            continue
        assert all(isinstance(event, object) for event in Watching().take(status))
