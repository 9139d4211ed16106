"""In which form a command answers: `--output`, its short form and its variable."""

from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest

import click

OUTPUTS = ("text", "json", "ndjson")

_SHORT = f"{__name__}.json"
_NO = {"", "0", "f", "false", "n", "no", "off"}


def output_option(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command `--output` and `--json`, which come as one argument `output`."""
    for option in (_JSON, _OUTPUT):
        command = option(command)
    return command


def wished(words: Sequence[str], variables: Mapping[str, str]) -> str:
    """The form that a command line asks for, also one that click cannot read; text in doubt."""
    form = variables.get("FLY_BUILD_OUTPUT", "")
    short = variables.get("FLY_BUILD_JSON", "").strip().lower() not in _NO
    # What follows is for another program.
    own = list(words[: words.index("--")] if "--" in words else words)
    for word, following in zip_longest(own, own[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        short |= word == "--json"
        if name == "--output":
            form = value if equals else following
    return "json" if short else form if form in OUTPUTS else "text"


def _note(ctx: click.Context, _: click.Parameter, short: bool) -> None:
    ctx.meta[_SHORT] = short


def _chosen(ctx: click.Context, _: click.Parameter, form: str) -> str:
    return "json" if ctx.meta.get(_SHORT) else form


_OUTPUT = click.option(
    "--output",
    type=click.Choice(OUTPUTS),
    default="text",
    envvar="FLY_BUILD_OUTPUT",
    show_envvar=True,
    callback=_chosen,
    help="What stdout and stderr get.",
)
# Read before the other, whatever their order on the command line.
_JSON = click.option(
    "--json",
    is_flag=True,
    envvar="FLY_BUILD_JSON",
    show_envvar=True,
    is_eager=True,
    expose_value=False,
    callback=_note,
    help="The same as --output json.",
)
