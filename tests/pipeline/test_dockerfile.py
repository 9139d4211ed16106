"""What is known of a Dockerfile without an engine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.errors import DockerfileInvalid
from builder_orch.pipeline.dockerfile import INSTRUCTIONS, Dockerfile


def sources(text: str, target: str = "") -> list[str]:
    return [source.path for source in Dockerfile.parse(text, "Dockerfile").sources(target)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Dockerfile: there is no FROM"),
        ("# only a comment\n\n", "there is no FROM"),
        ("ARG A\n", "there is no FROM"),
        ("RUN true\n", "Dockerfile:1: RUN comes before the first FROM"),
        ("FROM scratch\n\nFORM x\n", "Dockerfile:3: unknown instruction FORM"),
        ("FROM\n", "Dockerfile:1: FROM takes"),
        ("FROM a b\n", "Dockerfile:1: FROM takes"),
        ("FROM a AS\n", "Dockerfile:1: FROM takes"),
        ("FROM scratch\nRUN a \\\n  b \\\n# c\n\n  d\nOOPS\n", "Dockerfile:7: unknown"),
        ("\x00\x01", "unknown instruction"),
        ("\udcff\udcfeF\x00R\x00O\x00M\x00", "Dockerfile:1: this is no text in UTF-8"),
    ],
)
def test_a_broken_file_names_its_line(text: str, said: str) -> None:
    with pytest.raises(DockerfileInvalid) as caught:
        Dockerfile.parse(text, "Dockerfile")
    assert said in str(caught.value)


def test_a_typing_error_is_answered_with_the_right_word() -> None:
    with pytest.raises(DockerfileInvalid) as caught:
        Dockerfile.parse("FROM scratch\nCPOY a /\n", "Dockerfile")
    assert "COPY" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "from scratch\ncopy . /\n",
        "ARG V=1\nFROM x:${V} AS y\n",
        "FROM --platform=linux/amd64 x AS y\n",
        "\ufeffFROM scratch\r\nRUN true\r\n",
        "# escape=`\nFROM scratch\nRUN a `\n  OOPS\n",
        "# syntax=docker/dockerfile:1\nFROM scratch\nNEWTHING x\n",
        "FROM scratch\nRUN <<EOF\nOOPS\nEOF\nRUN <<-'A' <<B\nOOPS\n\tA\nOOPS\nB\nENV a=b\n",
        "FROM scratch\nRUN a \\   \n OOPS\n",
    ],
)
def test_what_docker_accepts_is_accepted(text: str) -> None:
    assert Dockerfile.parse(text, "Dockerfile").stages


def test_an_unknown_target_is_answered_with_the_names_there_are() -> None:
    parsed = Dockerfile.parse("FROM a AS one\nFROM b AS two\nFROM c\n", "D")
    assert len(parsed.upto("")) == 3
    assert len(parsed.upto("ONE")) == 1
    with pytest.raises(DockerfileInvalid, match="no stage '1'"):
        parsed.upto("1")
    with pytest.raises(DockerfileInvalid, match="no stage 'three'") as caught:
        parsed.upto("three")
    assert "one, two" in caught.value.hint


def test_only_plain_sources_on_the_way_to_the_target_are_checked() -> None:
    text = """FROM a AS one
COPY a b/c /x
ADD https://example.com/f git@h:r.git d /
COPY --from=0 e /
COPY --chown=1:1 f /
COPY g* "h i" /
COPY [ "j k", "/x" ]
COPY $V l\\ m /
FROM one AS two
COPY n /
"""
    assert sources(text, "one") == ["a", "b/c", "d", "f", "j k"]
    assert sources(text) == ["a", "b/c", "d", "f", "j k", "n"]


WORDS = st.sampled_from([*sorted(INSTRUCTIONS), "FROM x", "<<E", "\\\n", "\n", " ", "#", "[", "x"])


@given(st.one_of(st.text(max_size=200), st.lists(WORDS, max_size=12).map("".join)))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parsed = Dockerfile.parse(text, "Dockerfile")
    except DockerfileInvalid:
        return
    assert parsed.stages
    assert all(source.path for source in parsed.sources(""))


@pytest.mark.parametrize(
    ("step", "beyond"),
    [
        ("RUN --mount=type=cache,target=/c true", "F:2: RUN --mount"),
        ("RUN --network=none true", "F:2: RUN --network"),
        ("COPY --chmod=755 a b", "F:2: COPY --chmod"),
        ("ADD --checksum=sha256:1 a b", "F:2: ADD --checksum"),
        ("RUN <<EOF\nRUN true\nEOF", "F:2: RUN with a here-document"),
        ("COPY --from=x --chown=1 a b", ""),
        ('RUN ["echo", "<<EOF"]', ""),
        ("HEALTHCHECK --interval=1s CMD true", ""),
        ("RUN true --mount=x", ""),
    ],
)
def test_what_only_buildkit_can_do_is_named(step: str, beyond: str) -> None:
    assert Dockerfile.parse(f"FROM scratch\n{step}\n", "F").beyond_classic("") == beyond


def test_stages_that_are_not_built_may_need_anything() -> None:
    text = "FROM scratch AS one\nRUN true\nFROM scratch\nRUN --mount=type=ssh true\n"
    assert Dockerfile.parse(text, "F").beyond_classic("one") == ""
