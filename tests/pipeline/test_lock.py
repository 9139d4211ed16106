"""The hashes of a context, and the lock that refuses another one."""

import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.errors import ContextChanged, ContextRefused, UsageFailure
from builder_orch.pipeline.context import Context, Directory, scan
from builder_orch.pipeline.lock import LOCK_FILE, NAMED, check_lock, lock_of, parse_lock, write_lock
from builder_orch.pipeline.manifest import changes, marks_of
from builder_orch.pipeline.pack import Pack
from builder_orch.pipeline.walk import Entry, Kind


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    (tmp_path / "a b").write_text("one")
    (tmp_path / "run").write_text("#!/bin/sh\n")
    (tmp_path / "run").chmod(0o755)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "line\nend").write_text("two")
    (tmp_path / "link").symlink_to("a b")
    (tmp_path / ".dockerignore").write_text("*.log\n")
    return tmp_path


def scanned(root: Path) -> Context:
    return scan(Directory(root), lambda _: None)


def test_a_lock_is_a_line_a_file_and_is_read_back(root: Path) -> None:
    path = write_lock(scanned(root))
    text = path.read_text()
    assert text == lock_of(scanned(root))
    assert [line.split(" ", 3)[::3] for line in text.splitlines()[2:]] == [
        ["file", ".dockerignore"],
        ["file", "Dockerfile"],
        ["file", "a b"],
        ["file", '"d/line\\nend"'],
        ["link", "link"],
        ["exec", "run"],
    ]
    assert set(parse_lock(text, path)) == {
        ".dockerignore", "Dockerfile", "a b", "d/line\nend", "link", "run"
    }  # fmt: skip
    check_lock(scanned(root))


def test_what_a_checkout_does_not_keep_does_not_count(root: Path) -> None:
    write_lock(scanned(root))
    (root / "empty").mkdir()
    (root / "x.log").write_text("ignored")
    for path in root.rglob("*"):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & 0o700 | (0o700 if path.is_dir() else 0o640))
            os.utime(path, (1, 1))
    check_lock(scanned(root))


def unlock(root: Path) -> None:
    (root / LOCK_FILE).unlink()


def change(root: Path) -> None:
    (root / "a b").write_text("two")


def add(root: Path) -> None:
    (root / "big").write_bytes(bytes(3_000_000))


def remove(root: Path) -> None:
    (root / "run").unlink()


def make_executable(root: Path) -> None:
    (root / "a b").chmod(0o755)


def lead_elsewhere(root: Path) -> None:
    (root / "link").unlink()
    (root / "link").symlink_to("run")


def replace_by_link(root: Path) -> None:
    (root / "run").unlink()
    (root / "run").symlink_to("a b")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (change, "content  a b (3 bytes)"),
        (add, "new      big (3.0 MB)"),
        (remove, "gone     run"),
        (make_executable, "mode     a b"),
        (lead_elsewhere, "target   link"),
        (replace_by_link, "kind     run"),
    ],
)
def test_every_difference_is_named(root: Path, spoil: object, said: str) -> None:
    assert callable(spoil)
    write_lock(scanned(root))
    spoil(root)
    with pytest.raises(ContextChanged) as caught:
        check_lock(scanned(root))
    assert said in str(caught.value)
    assert int(caught.value.code) == 23
    assert "--lock-context" in caught.value.hint


def test_many_differences_are_counted(root: Path) -> None:
    write_lock(scanned(root))
    for number in range(NAMED + 4):
        (root / f"{number}").touch()
    with pytest.raises(ContextChanged, match="and 4 more"):
        check_lock(scanned(root))


async def test_preflight_checks_before_anything_is_asked_for(root: Path) -> None:
    directory = Directory(root, check=True)
    with pytest.raises(UsageFailure, match=r"context\.lock cannot be read.*No such file"):
        await Pack().run(directory, lambda _: None)
    write_lock(scanned(root))
    await Pack().run(directory, lambda _: None)
    change(root)
    with pytest.raises(ContextChanged):
        await Pack().run(directory, lambda _: None)


def test_a_lock_that_cannot_be_written_leaves_nothing(root: Path) -> None:
    (root / LOCK_FILE).mkdir()
    with pytest.raises(UsageFailure, match="cannot be written"):
        write_lock(scanned(root))
    assert {path.name for path in root.iterdir()} == {
        "Dockerfile", "a b", "run", "d", "link", ".dockerignore", LOCK_FILE
    }  # fmt: skip


HEAD = "# What the build context holds, by fly-build build --lock-context\nversion 1\n"
DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 1),
        ("version 1\n", 1),
        (HEAD.replace("1", "2"), 1),
        (f"{HEAD}file 1 {DIGEST}\n", 3),
        (f"{HEAD}file 1 {DIGEST} a\nfile x {DIGEST} a\n", 4),
        (f"{HEAD}file 1 {DIGEST[1:]} a\n", 3),
        (f"{HEAD}pipe 1 {DIGEST} a\n", 3),
        (f'{HEAD}file 1 {DIGEST} "a\n', 3),
        (f"{HEAD}file 1 {DIGEST} a\nfile 1 {DIGEST} b", 4),
    ],
)
def test_a_broken_lock_names_its_line(text: str, line: int) -> None:
    with pytest.raises(UsageFailure, match=rf"context\.lock:{line}: "):
        parse_lock(text, Path(LOCK_FILE))


@given(st.text('fileexclnk 0123456789ab"\\\n', max_size=200) | st.text(max_size=100))
def test_garbage_in_a_lock_is_a_failure_of_the_user(text: str) -> None:
    for given_text in (text, HEAD + text):
        with suppress(UsageFailure):
            parse_lock(given_text, Path(LOCK_FILE))


@given(st.dictionaries(st.text(min_size=1, max_size=8), st.binary(max_size=9), max_size=5))
def test_any_name_can_be_locked(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
) -> None:
    root = tmp_path_factory.mktemp("any")
    (root / "Dockerfile").write_text("FROM scratch\n")
    for name, content in files.items():
        if (
            "/" not in name
            and "\0" not in name
            and name not in {".", "..", "Dockerfile", LOCK_FILE}
        ):
            try:
                (root / name).write_bytes(content)
            except (OSError, UnicodeEncodeError):
                continue
    (root / ".dockerignore").unlink(missing_ok=True)
    write_lock(scanned(root))
    check_lock(scanned(root))


# --- hashes


def test_what_has_not_changed_is_not_read_again(root: Path) -> None:
    entries = scanned(root).entries
    first = marks_of(entries, {})
    known = {name: replace(mark, digest="known") for name, mark in first.items()}
    last_ns = max(max(mark.signature[1:]) for mark in first.values())
    again = marks_of(entries, known, last_ns + 10**10)
    files = [mark for mark in again.values() if mark.kind is Kind.FILE]
    assert {mark.digest for mark in files} == {"known"}
    # Within a tick of the clock a file may change twice: what was read just then is read again.
    assert marks_of(entries, known, last_ns) == first


def test_a_touched_file_is_the_same_to_a_builder(root: Path) -> None:
    first = marks_of(scanned(root).entries, {})
    os.utime(root / "a b", (5, 5))
    now = marks_of(scanned(root).entries, first, 1 << 62)
    assert changes(first, now) == {}
    (root / "a b").write_text("one more")
    (root / "d").chmod(0o700)
    os.utime(root / "a b", (5, 5))
    now = marks_of(scanned(root).entries, first, 1 << 62)
    assert changes(first, now) == {"a b": "content", "d": "mode"}


def test_reading_can_be_given_up_and_names_what_cannot_be_read(root: Path) -> None:
    entries = scanned(root).entries
    with pytest.raises(ContextRefused, match="given up"):
        marks_of(entries, {}, going_on=lambda: False)
    gone = Entry("gone", Kind.FILE, 1, root / "gone")
    with pytest.raises(ContextRefused, match="gone cannot be read: No such file"):
        marks_of([gone], {})
