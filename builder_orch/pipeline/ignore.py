"""Which paths stay at home: .dockerignore as Docker reads it, for every kind of build."""

import posixpath
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

Matched = tuple[bool, ...]
"""For one path, rule by rule: does the rule match it or a directory above it?"""


@dataclass(frozen=True, slots=True)
class Rule:
    """One line; `keep` for those that begin with an exclamation mark.

    `reach` is the text before the first wildcard: a path that neither begins with it nor is a
    beginning of it cannot match.
    """

    number: int
    text: str
    keep: bool
    regex: re.Pattern[str]
    reach: str

    def matches(self, path: str) -> bool:
        """Does this line match that very path, regardless of the directories above it?"""
        return self.regex.fullmatch(path) is not None

    def may_match_below(self, directory: str) -> bool:
        """Could a path inside the directory match?"""
        below = directory + "/"
        return self.reach.startswith(below) or below.startswith(self.reach)


@dataclass(frozen=True, slots=True)
class Ignore:
    """The rules of one file in their order; the last one that matches a path decides.

    A rule matches whatever is below a directory it matches. This is BuildKit's reading, where a
    kept file inside an ignored directory is sent whatever the shape of the rule that keeps it.
    """

    rules: tuple[Rule, ...] = ()
    source: str = ""

    @classmethod
    def parse(cls, text: str, source: str = ".dockerignore") -> Self:
        """Read the file's text; ValueError names the line of a pattern that is none."""
        rules: list[Rule] = []
        # Only \n ends a line: str.splitlines would also split at form feeds and U+2028.
        for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
            if line.startswith("#") or not line.strip():
                continue
            try:
                rules.append(_rule(number, line.strip()))
            except ValueError as error:
                raise ValueError(f"{source}:{number}: {error}") from None
        return cls(tuple(rules), source)

    @classmethod
    def of(cls, patterns: Sequence[str]) -> Self:
        """The rules of patterns that somebody else has read; ValueError for one that is none."""
        return cls(tuple(_rule(number, text) for number, text in enumerate(patterns, 1)))

    def match(self, path: str, above: Matched = ()) -> Matched:
        """Rule by rule for `path`, whose directory gave `above`."""
        above = above or (False,) * len(self.rules)
        return tuple(was or rule.matches(path) for was, rule in zip(above, self.rules, strict=True))

    def decisive(self, matched: Matched) -> Rule | None:
        """The last rule that matched."""
        for rule, hit in zip(reversed(self.rules), reversed(matched), strict=True):
            if hit:
                return rule
        return None

    def decides(self, path: str) -> Rule | None:
        """The rule that says what happens to a path, which may have directories in it."""
        matched: Matched = ()
        parts = path.split("/")
        for depth in range(1, len(parts) + 1):
            matched = self.match("/".join(parts[:depth]), matched)
        return self.decisive(matched)

    def ignores(self, path: str) -> bool:
        """Does this path stay at home?"""
        rule = self.decides(path)
        return rule is not None and not rule.keep

    def matcher(self) -> Callable[[str], bool]:
        """`ignores` for many paths: what was found for their directories is remembered."""
        known: dict[str, Matched] = {"": ()}

        def matched(directory: str) -> Matched:
            if directory not in known:
                above = matched(posixpath.dirname(directory))
                known[directory] = self.match(directory, above)
            return known[directory]

        def ignores(path: str) -> bool:
            rule = self.decisive(self.match(path, matched(posixpath.dirname(path))))
            return rule is not None and not rule.keep

        return ignores

    def may_keep_below(self, directory: str, decisive: Rule) -> bool:
        """Could something inside a directory that `decisive` ignores be kept by a later rule?"""
        return any(
            rule.keep and rule.number > decisive.number and rule.may_match_below(directory)
            for rule in self.rules
        )


def _rule(number: int, text: str) -> Rule:
    keep = text.startswith("!")
    pattern = text[1:].strip() if keep else text
    if not pattern:
        raise ValueError('"!" alone keeps nothing; name what is to be kept')
    pattern = _clean(pattern)
    expression, reach = _translate(pattern)
    return Rule(number, text, keep, re.compile(expression, re.DOTALL), reach)


def _clean(pattern: str) -> str:
    """The shortest equal path, relative to the context; normpath would keep two leading slashes."""
    if pattern.startswith("//"):
        pattern = "/" + pattern.lstrip("/")
    cleaned = posixpath.normpath(pattern)
    return cleaned[1:] if len(cleaned) > 1 and cleaned.startswith("/") else cleaned


def _translate(pattern: str) -> tuple[str, str]:
    """A regular expression for the pattern, and the plain text it begins with.

    The cases are those of moby's pattern matcher; its two surprises are that `**x` without any
    other wildcard matches every path that ends in x, and that a class may match a slash.
    """
    if pattern.startswith("**") and pattern[2:3] not in ("/", "") and not _is_wild(pattern[2:]):
        return ".*" + re.escape(pattern[2:]), ""
    made: list[str] = []
    reach: list[str] = []
    plain = True
    at = 0
    while at < len(pattern):
        char = pattern[at]
        if char == "*" and pattern.startswith("**", at):
            at += 3 if pattern.startswith("**/", at) else 2
            made.append(".*" if at >= len(pattern) else "(?:.*/)?")
            plain = False
            continue
        if char == "[":
            expression, at = _class(pattern, at)
            made.append(expression)
            plain = False
            continue
        if char == "\\":
            at += 1
            if at == len(pattern):
                raise ValueError(f"{pattern!r} ends in a backslash")
            char = pattern[at]
            made.append(re.escape(char))
        elif char in "*?":
            made.append("[^/]*" if char == "*" else "[^/]")
            plain = False
        else:
            made.append(re.escape(char))
        if plain:
            reach.append(char)
        at += 1
    return "".join(made), "".join(reach)


def _is_wild(text: str) -> bool:
    return any(char in "*?[]\\" for char in text)


def _class(pattern: str, start: int) -> tuple[str, int]:
    """One `[...]` from `start`; `^` negates, `!` is a character like others."""
    at = start + 1
    negated = pattern.startswith("^", at)
    at += negated
    parts: list[str] = []
    while not (pattern.startswith("]", at) and parts):
        low, at = _member(pattern, at)
        high = low
        if pattern.startswith("-", at):
            high, at = _member(pattern, at + 1)
        if low <= high:
            parts.append(f"{re.escape(low)}-{re.escape(high)}")
        else:
            # An empty range matches nothing: so does this, which is no character at all.
            parts.append("")
    body = "".join(parts)
    if not body:
        return ("." if negated else "(?!)"), at + 1
    return f"[{'^' if negated else ''}{body}]", at + 1


def _member(pattern: str, at: int) -> tuple[str, int]:
    if pattern.startswith("\\", at):
        at += 1
    elif at < len(pattern) and pattern[at] in "-]":
        raise ValueError(f"{pattern!r} has a class that is none")
    if at >= len(pattern) - 1:
        raise ValueError(f"{pattern!r} has a class without an end")
    return pattern[at], at + 1
