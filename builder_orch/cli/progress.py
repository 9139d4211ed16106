"""How a run is shown while it goes on: `--progress`, and what `auto` means here."""

from collections.abc import Mapping
from typing import TextIO

from builder_orch.cli.lines import Display, Lines, Nothing, Quiet

AUTO, TTY, PLAIN, QUIET, RAWJSON, NONE = "auto", "tty", "plain", "quiet", "rawjson", "none"
MODES = (AUTO, TTY, PLAIN, QUIET, RAWJSON, NONE)


def open_display(wished: str, err: TextIO, variables: Mapping[str, str]) -> Display:
    """What shows a run on `err`; a terminal that cannot be drawn on gets lines."""
    match chosen(wished, err, variables):
        case "tty":
            from builder_orch.cli.screen import Drawing, Screen

            return Drawing(Screen(err, variables))
        case "quiet":
            return Quiet(err)
        case "rawjson":
            from builder_orch.cli.rawjson import RawJson

            return RawJson(err)
        case "none":
            return Nothing()
        case _:
            return Lines(err)


def chosen(wished: str, err: TextIO, variables: Mapping[str, str]) -> str:
    """One of MODES but `auto`. BuildKit's own variable counts where nobody said otherwise."""
    if wished == AUTO and variables.get("BUILDKIT_PROGRESS", "") in MODES:
        wished = variables["BUILDKIT_PROGRESS"]
    if wished not in {AUTO, TTY}:
        return wished
    drawable = err.isatty() and variables.get("TERM", "") not in {"", "dumb"}
    if not drawable or (wished == AUTO and variables.get("CI", "") not in {"", "0", "false"}):
        return PLAIN
    return TTY
