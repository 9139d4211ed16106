"""Docker's rules for .dockerignore, case by case, and what holds for all of them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder_orch.pipeline.ignore import Ignore

TABLE = [
    # rules, ignored, kept
    ("a", ["a", "a/b", "a/b/c"], ["b", "ab", "b/a"]),
    ("/a", ["a", "a/b"], ["b/a"]),
    ("a/", ["a", "a/b"], ["ab"]),
    ("./a", ["a"], ["b"]),
    ("a//b/../c", ["a/c"], ["a/b", "a"]),
    ("//a", ["a"], ["b"]),
    ("a\r\nb\r\n", ["a", "b"], ["c"]),
    ("  a  ", ["a"], ["b"]),
    ("\ufeffa", ["a"], ["b"]),
    ("# a\na#b", ["a#b"], ["a", "# a"]),
    (" # a", ["# a"], ["a"]),
    ("*", ["a", "a/b", ".hidden"], []),
    ("*.md", ["x.md", ".md"], ["a/x.md", "x.mdx"]),
    ("*/x", ["a/x", "a/x/y"], ["x", "a/b/x"]),
    ("a?c", ["abc", "a.c"], ["ac", "a/c", "abbc"]),
    ("**", ["a", "a/b/c"], []),
    ("**/x", ["x", "a/x", "a/b/x", "x/y"], ["ax", "a/ax"]),
    ("**/*.pyc", ["x.pyc", "a/b/x.pyc"], ["x.py"]),
    ("a/**", ["a/b", "a/b/c"], ["a", "ab"]),
    ("a/**/b", ["a/b", "a/x/b", "a/x/y/b"], ["a/bc", "b", "xa/b"]),
    ("**/a/**", ["a/x", "b/a/x"], ["a", "b/a"]),
    ("a**", ["a", "ab", "a/b"], ["ba"]),
    ("**foo", ["foo", "barfoo", "a/barfoo"], ["foobar"]),
    ("a**b", ["ab", "ax/b"], ["axb"]),
    ("**/", ["a"], []),
    ("[ab]x", ["ax", "bx"], ["cx"]),
    ("[^ab]x", ["cx", "^x"], ["ax", "bx", "x"]),
    ("[!ab]x", ["!x", "ax"], ["cx"]),
    ("[a-c]", ["a", "b", "c"], ["d", "-"]),
    (r"[\]a]", ["]", "a"], ["\\"]),
    (r"[\-a]", ["-", "a"], ["b"]),
    (r"a\*b", ["a*b"], ["aab", r"a\*b"]),
    (r"\!a", ["!a"], ["a"]),
    (r"\#a", ["#a"], ["a"]),
    ("a.b+(c)|{d}$", ["a.b+(c)|{d}$"], ["aXb+(c)|{d}$", "d"]),
    ("[[]", ["["], ["]"]),
    ("[a&&b]", ["&", "a"], ["c"]),
    ("*\n!a", ["b"], ["a", "a/b"]),
    ("*\n!a/b", ["a", "a/c"], ["a/b"]),
    ("a\n!a/b\na/b/c", ["a", "a/x", "a/b/c"], ["a/b", "a/b/d"]),
    ("!a\na", ["a"], []),
    ("*.md\n!README*.md\nREADME-secret.md", ["x.md", "README-secret.md"], ["README.md"]),
    ("*\n!**/*.go", ["a/x.c"], ["x.go", "a/b/x.go"]),
    ("! a", [], ["a"]),
    ("*\n! a", ["b"], ["a"]),
    ("*\n!a/../b", ["a"], ["b"]),
    ("..\n../x\n.", [], ["x", "a"]),
    ("/", [], ["a"]),
    ("a\x0bb", ["a\x0bb"], ["a", "b"]),
    ("ünï*", ["ünïcode"], ["uni"]),
    ("", [], ["a"]),
]


@pytest.mark.parametrize(("text", "ignored", "kept"), TABLE)
def test_rules_as_docker_reads_them(text: str, ignored: list[str], kept: list[str]) -> None:
    rules = Ignore.parse(text)
    assert [path for path in ignored if not rules.ignores(path)] == []
    assert [path for path in kept if rules.ignores(path)] == []


@pytest.mark.parametrize(
    "text", ["[a", "[", "[]", "[]a]", "[a-]", "[-a]", "a\\", "!", "!  ", "[\\"]
)
def test_a_pattern_that_is_none_names_its_file_and_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"x\.dockerignore:2: "):
        Ignore.parse(f"fine\n{text}", "x.dockerignore")


NAMES = st.text("ab.é-", min_size=1, max_size=4).filter(lambda name: name not in {".", ".."})
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)
PATTERNS = st.text("ab.*?/!é-#[]^\\ ", max_size=10)


@given(st.lists(PATTERNS, max_size=6), PATHS)
def test_any_text_either_parses_or_names_a_line(lines: list[str], path: str) -> None:
    try:
        rules = Ignore.parse("\n".join(lines))
    except ValueError as error:
        said = str(error)
    else:
        assert rules.ignores(path) in {True, False}
        return
    assert re.match(r"\.dockerignore:\d+: ", said)


SANE = st.lists(st.sampled_from(["a", "b", "*", "**", "?", "a*"]), min_size=1, max_size=3)
RULES = st.lists(st.tuples(st.booleans(), SANE.map("/".join)), max_size=6)


def written(rules: list[tuple[bool, str]]) -> str:
    return "\n".join(f"{'!' if keep else ''}{text}" for keep, text in rules)


@given(RULES, PATHS)
def test_the_last_rule_that_matches_a_path_or_its_parents_decides(
    rules: list[tuple[bool, str]], path: str
) -> None:
    expected = False
    parts = path.split("/")
    above = ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
    for keep, text in rules:
        (alone,) = Ignore.parse(text).rules
        if any(alone.matches(part) for part in above):
            expected = not keep
    assert Ignore.parse(written(rules)).ignores(path) is expected


@given(RULES, PATHS, PATHS)
def test_nothing_is_kept_below_a_directory_that_need_not_be_entered(
    rules: list[tuple[bool, str]], directory: str, below: str
) -> None:
    ignore = Ignore.parse(written(rules))
    rule = ignore.decides(directory)
    if rule is not None and not rule.keep and not ignore.may_keep_below(directory, rule):
        assert ignore.ignores(f"{directory}/{below}")


@given(st.text(min_size=1, max_size=12).filter(lambda text: "/" not in text))
def test_a_name_with_all_its_specials_escaped_matches_itself_alone(name: str) -> None:
    escaped = re.sub(r"([*?\[\]\\!#])", r"\\\1", name)
    if name.strip() != name or name in {".", ".."} or "\n" in name or name.startswith("\ufeff"):
        return
    assert Ignore.parse(escaped).ignores(name)
    assert not Ignore.parse(escaped).ignores(name + "x")


@given(
    st.lists(st.sampled_from(["a", "!a/b", "*", "**/b", "!b", "a/*/c", "!**/c"]), max_size=4),
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join), max_size=8),
)
def test_many_paths_are_judged_like_each_alone(patterns: list[str], paths: list[str]) -> None:
    ignore = Ignore.of(patterns)
    many = ignore.matcher()
    assert [many(path) for path in paths] == [ignore.ignores(path) for path in paths]
