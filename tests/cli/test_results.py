"""What is taken for a cache, a result and a further context, and what is refused with a hint."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.buildkit.messages import Cache
from builder_orch.cli.deploy import results
from builder_orch.cli.options import Flags
from builder_orch.cli.results import read_caches, read_contexts, read_dest, read_tag
from builder_orch.errors import UsageFailure
from builder_orch.pipeline.output import IMAGE, Form, Output


def test_a_cache_is_an_image_or_what_docker_writes() -> None:
    texts = ["r.test:5000/a/b:c", "type=registry,ref=r.test/a:b,mode=max", "type=inline"]
    assert read_caches(texts, "--cache-to") == (
        Cache("registry", {"ref": "r.test:5000/a/b:c"}),
        Cache("registry", {"ref": "r.test/a:b", "mode": "max"}),
        Cache("inline", {}),
    )


@pytest.mark.parametrize(
    "text", ["", "type=registry", "type=gha", "ref=A", "a b", "type=local,dest=x"]
)
def test_any_other_cache_is_refused(text: str) -> None:
    for option in ("--cache-from", "--cache-to"):
        with pytest.raises(UsageFailure) as caught:
            read_caches([text], option)
        assert caught.value.hint
    with pytest.raises(UsageFailure):
        read_caches(["type=inline"], "--cache-from")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("out", (Output(Form.LOCAL, Path("out")), "", False)),
        ("type=local,dest=a b", (Output(Form.LOCAL, Path("a b")), "", False)),
        ('"type=local","dest=a,b"', (Output(Form.LOCAL, Path("a,b")), "", False)),
        ("type=tar,dest=o.tar", (Output(Form.TAR, Path("o.tar")), "", False)),
        ("type=oci,dest=o.tar", (Output(Form.OCI, Path("o.tar")), "", False)),
        ("type=docker,dest=o.tar", (Output(Form.DOCKER, Path("o.tar")), "", False)),
        ("type=docker", (Output(Form.DOCKER), "", False)),
        ("type=image,name=r.test/a,push=true", (IMAGE, "r.test/a:latest", True)),
        ("type=image,name=r.test/a:1", (IMAGE, "r.test/a:1", False)),
        ("type=registry,name=r.test:5000/a:1", (IMAGE, "r.test:5000/a:1", True)),
        ("type=registry", (IMAGE, "", True)),
    ],
)
def test_a_result_is_written_as_for_docker(text: str, expected: object) -> None:
    assert read_dest(text) == expected


@pytest.mark.parametrize(
    "text",
    ["-", "type=tar,dest=-", "type=tar", "type=local", "type=what,dest=x", "dest=",
     "type=local,x=y",
     "type=image,push=maybe", "type=image,name=UPPER", "type=docker,dest=x,extra=1", 'a="b'],
)  # fmt: skip
def test_any_other_result_is_refused(text: str) -> None:
    with pytest.raises(UsageFailure) as caught:
        read_dest(text)
    assert caught.value.hint


@given(st.text(max_size=30))
def test_whatever_is_written_is_taken_or_refused(text: str) -> None:
    for read in (read_dest, read_tag, lambda one: read_caches([one], "--cache-to")):
        try:
            read(text)
        except UsageFailure as refusal:
            assert refusal.hint  # noqa: PT017


def test_a_context_is_a_directory_or_what_the_engine_fetches(tmp_path: Path) -> None:
    given = [("a", str(tmp_path)), ("b", "docker-image://busybox:1"), ("c", "https://x.test/c.git")]
    assert read_contexts(given) == {"a": tmp_path, **dict(given[1:])}
    for name, value in (("a", str(tmp_path / "gone")), ("", str(tmp_path)), ("a", "busybox")):
        with pytest.raises(UsageFailure):
            read_contexts([(name, value)])


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, (IMAGE, "", True)),
        ({"push": False}, (IMAGE, "", False)),
        ({"load": True}, (Output(Form.DOCKER), "", False)),
        ({"load": True, "push": True}, (Output(Form.DOCKER), "", True)),
        ({"dest": "out"}, (Output(Form.LOCAL, Path("out")), "", False)),
        ({"tag": "r.test/a:1"}, (IMAGE, "r.test/a:1", True)),
        ({"dest": "type=docker", "tag": "a"}, (Output(Form.DOCKER), "a:latest", False)),
    ],
)
def test_what_comes_here_is_not_pushed_unless_that_is_said(
    more: dict[str, object], expected: object
) -> None:
    assert results(Flags(Path(), **more)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("more", [{"load": True, "dest": "x"}, {"dest": "x", "push": True}])
def test_results_that_exclude_each_other_are_refused(more: dict[str, object]) -> None:
    with pytest.raises(UsageFailure):
        results(Flags(Path(), **more))  # type: ignore[arg-type]
