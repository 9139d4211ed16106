"""Which files the engine is shown, in which order, and what it is told of each."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from hypothesis import given
from hypothesis import strategies as st

from builder_orch.buildkit.tree import Matches, Member, Stats, Tree, Wanted
from builder_orch.pipeline.ignore import Ignore

PARTS = st.sampled_from(["a", "b", "a-b", "a.b", "ä", "B", "ab", "!x"])
PATHS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
PATTERNS = st.lists(
    st.tuples(st.sampled_from(["", "!"]), PATHS | st.sampled_from(["*", "**/b", "a*", "*/a"])).map(
        "".join
    ),
    max_size=4,
)


def compiled(patterns: Sequence[str]) -> Matches:
    return Ignore.of(patterns).matcher()


def with_directories(paths: set[str]) -> list[Member]:
    """All of them with the directories above them, in any order."""
    names = {str(above) for path in paths for above in PurePosixPath(path).parents} - {"."}
    return [Member(name, Path("/") / name) for name in sorted(names | paths)]


def accepted(names: list[str]) -> bool:
    """The engine's rule: the directory came before, and names of one directory only grow."""
    last: dict[str, bytes] = {}
    for name in names:
        above, _, base = name.rpartition("/")
        if above and above not in last:
            return False
        if os.fsencode(base) <= last.get(above + "/", b""):
            return False
        last[above + "/"] = os.fsencode(base)
        last[name] = b""
        for other in [one for one in last if one.startswith(name + "/")]:
            del last[other]
    return True


def test_the_judge_of_orders_knows_a_wrong_one() -> None:
    assert accepted(["a", "a/b", "a-b"])
    assert not accepted(["a-b", "a"])
    assert not accepted(["a/b"])


@given(st.sets(PATHS, max_size=12), PATTERNS, PATTERNS)
def test_the_order_and_the_choice_are_the_engines(
    paths: set[str], exclude: list[str], include: list[str]
) -> None:
    members = with_directories(paths)
    tree = Tree(members, compiled, Path("/"))
    chosen = [one.name for one in tree.select(Wanted(exclude=exclude, include=include))]
    assert accepted(chosen)
    excluded, included = Ignore.of(exclude), Ignore.of(include)
    kept = {
        one.name
        for one in members
        if not excluded.ignores(one.name) and (not include or included.ignores(one.name))
    }
    above = {str(one) for name in kept for one in PurePosixPath(name).parents} - {"."}
    assert set(chosen) == kept | above


def tree_of(root: Path) -> Tree:
    members = [Member(path.relative_to(root).as_posix(), path) for path in root.rglob("*")]
    return Tree(members, compiled, root)


def names(tree: Tree, *follow: str) -> list[str]:
    return [one.name for one in tree.select(Wanted(follow=follow))]


def test_links_are_followed_inside_the_tree(tmp_path: Path) -> None:
    (tmp_path / "real" / "deep").mkdir(parents=True)
    (tmp_path / "real" / "deep" / "file").touch()
    (tmp_path / "other").touch()
    (tmp_path / "!odd").touch()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "up").symlink_to("../../../other")
    (tmp_path / "absolute").symlink_to("/real/deep")
    (tmp_path / "circle").symlink_to("circle")
    tree = tree_of(tmp_path)
    assert names(tree, "link/deep") == ["link", "real", "real/deep", "real/deep/file"]
    assert names(tree, "real/up") == ["other", "real", "real/up"]
    assert names(tree, "absolute/file") == ["absolute", "real", "real/deep", "real/deep/file"]
    assert names(tree, "circle") == ["circle"]
    assert names(tree, "l*") == ["link", "real", "real/deep", "real/deep/file", "real/up"]
    assert names(tree, "o*") == ["other"]
    assert names(tree, "!odd") == ["!odd"]
    assert names(tree, "gone") == []
    assert len(names(tree, ".")) == len(names(tree)) == 9


def test_a_second_name_of_a_file_is_a_hard_link_if_the_first_is_shown(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("12345")
    os.link(tmp_path / "one", tmp_path / "two")
    os.setxattr(tmp_path / "one", "user.mark", b"x")
    (tmp_path / "one").chmod(0o4755)
    stats = Stats()
    first, second = (stats.look(Member(name, tmp_path / name))[0] for name in ("one", "two"))
    assert (first.linkname, second.linkname) == ("", "one")
    assert first.size == second.size == 5
    assert first.mode == 1 << 23 | 0o755
    assert first.xattrs == {"user.mark": b"x"}
    alone, _ = Stats().look(Member("two", tmp_path / "two"))
    assert alone.linkname == ""


def test_what_lies_nowhere_has_a_time_of_its_content() -> None:
    one, two, same = (Stats().look(Member("f", content=octets))[0] for octets in (b"a", b"b", b"a"))
    assert one == same
    assert one.size == two.size
    assert one.mtime_ns != two.mtime_ns
