"""Contexts that we add to Docker's own files, and what we leave of these."""

import json
import os
import stat
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from docker.context import ContextAPI
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.cli.contexts import MARK, Contexts
from builder_orch.errors import UsageFailure

URL = "unix:///run/somewhere/docker.sock"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "docker"


def config(folder: Path) -> object:
    return json.loads((folder / "config.json").read_text())


def write(folder: Path, content: object) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / "config.json"
    file.write_text(json.dumps(content))
    return file


def files(folder: Path) -> list[str]:
    found = folder.rglob("*")
    return sorted(str(path.relative_to(folder)) for path in found if path.is_file())


def leave_behind(folder: Path, name: str) -> None:
    """As a run that was killed does."""
    program = (
        "import os, sys; from pathlib import Path; from builder_orch.cli.contexts import Contexts\n"
        "with Contexts(Path(sys.argv[1])).added(sys.argv[2], 'unix:///gone', use=True):\n"
        "    os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, str(folder), name], check=False)


def test_docker_py_finds_it_while_it_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    write(folder, {"auths": {"r.test": {"auth": "planted"}}})
    with Contexts.of(dict(os.environ)).added("build-er", URL, use=True):
        found = ContextAPI.get_context("build-er")
        assert found.Host == URL
        assert ContextAPI.get_current_context().name == "build-er"
    assert ContextAPI.get_context("build-er") is None
    assert files(folder) == ["config.json"]


@pytest.mark.parametrize("before", [{}, {"currentContext": "work", "psFormat": "\u2603"}])
def test_what_was_used_before_is_used_again(folder: Path, before: dict[str, str]) -> None:
    file = write(folder, before)
    file.chmod(0o640)
    with Contexts(folder).added("x1", URL, use=True):
        assert config(folder) == {**before, "currentContext": "x1"}
    assert config(folder) == before
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_without_use_the_configuration_is_not_touched(folder: Path) -> None:
    file = write(folder, {"a": 1})
    file.write_text(" {}\n")
    with Contexts(folder).added("x1", URL):
        assert file.read_text() == " {}\n"
    assert file.read_text() == " {}\n"


def test_where_there_is_no_configuration_its_file_is_private(folder: Path) -> None:
    with Contexts(folder).added("x1", URL, use=True):
        assert stat.S_IMODE((folder / "config.json").stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert config(folder) == {}


def test_what_somebody_chose_meanwhile_stays_chosen(folder: Path) -> None:
    with Contexts(folder).added("x1", URL, use=True):
        write(folder, {"currentContext": "their-choice"})
    assert config(folder) == {"currentContext": "their-choice"}


@pytest.mark.parametrize("first_to_end", ["x1", "x2"])
def test_two_that_are_used_at_once_leave_what_was_before_both(
    folder: Path, first_to_end: str
) -> None:
    write(folder, {"currentContext": "work"})
    one, two = (
        Contexts(folder).added("x1", URL, use=True),
        Contexts(folder).added("x2", URL, use=True),
    )
    one.__enter__()
    two.__enter__()
    for context in (one, two) if first_to_end == "x1" else (two, one):
        context.__exit__(None, None, None)
    assert config(folder) == {"currentContext": "work"}
    assert files(folder) == ["config.json"]


def test_the_link_that_stands_for_a_configuration_stays_one(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "dotfiles").mkdir()
    real = write(tmp_path / "dotfiles", {"a": 1})
    folder.mkdir()
    (folder / "config.json").symlink_to(real)
    with Contexts(folder).added("x1", URL, use=True):
        assert json.loads(real.read_text()) == {"a": 1, "currentContext": "x1"}
    assert (folder / "config.json").is_symlink()
    assert json.loads(real.read_text()) == {"a": 1}


@pytest.mark.parametrize("left", [["x1"], ["x1", "x1"], ["x0", "x1"], ["x2"]])
def test_what_a_killed_run_left_behind_is_replaced(folder: Path, left: list[str]) -> None:
    write(folder, {"currentContext": "work"})
    for name in left:
        leave_behind(folder, name)
        assert config(folder) == {"currentContext": name}
    with Contexts(folder).added("x1", URL, use=True):
        assert config(folder) == {"currentContext": "x1"}
    assert config(folder) == {"currentContext": "work"}


def test_somebody_elses_context_is_never_touched(folder: Path) -> None:
    meta = folder / "contexts" / "meta" / sha256(b"x1").hexdigest() / "meta.json"
    meta.parent.mkdir(parents=True)
    theirs = {"Name": "x1", "Metadata": {}, "Endpoints": {"docker": {"Host": "ssh://me@there"}}}
    meta.write_text(json.dumps(theirs))
    with pytest.raises(UsageFailure, match="not of our making"):
        Contexts(folder).added("x1", URL).__enter__()
    assert json.loads(meta.read_text()) == theirs


def test_a_name_that_is_in_use_is_refused(folder: Path) -> None:
    with (
        Contexts(folder).added("x1", URL),
        pytest.raises(UsageFailure, match=f"belongs to process {os.getpid()}"),
    ):
        Contexts(folder).added("x1", URL).__enter__()
    assert files(folder) == []


@pytest.mark.parametrize("name", ["default", "", "x", "-x", "a/b", "../x", "a b", "ü1", "x\n"])
def test_a_name_that_docker_would_not_take_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(UsageFailure, match="cannot be the name"):
        Contexts(folder).added(name, URL).__enter__()
    assert not folder.exists()


@pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 100_000])
def test_a_configuration_that_is_none_is_left_as_it_is(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageFailure, match="is not JSON"):
        Contexts(folder).added("x1", URL, use=True).__enter__()
    assert files(folder) == ["config.json"]
    assert (folder / "config.json").read_bytes() == text.encode("latin-1")


def test_a_folder_that_is_none_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageFailure, match="cannot be kept"):
        Contexts(tmp_path / "file").added("x1", URL).__enter__()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["Name", "Metadata", "Endpoints", "docker", "Host", MARK, "before"]),
            inner,
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_no_context_of_others_is_taken_for_ours_by_accident(found: object) -> None:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="fly-") as name:
        folder = Path(name)
        meta = folder / "contexts" / "meta" / sha256(b"x1").hexdigest() / "meta.json"
        meta.parent.mkdir(parents=True)
        meta.write_text(json.dumps(found))
        with pytest.raises(UsageFailure):
            Contexts(folder).added("x1", URL).__enter__()
        assert json.loads(meta.read_text()) == found
