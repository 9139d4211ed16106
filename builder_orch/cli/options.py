"""The flags that `deploy` and `build` share; each is an environment variable as well."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import click

OUTPUTS = ("text", "json", "ndjson")
BUILDERS = ("auto", "buildkit", "classic")
CARRIERS = ("auto", "udp", "websocket")

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?\Z")
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_PLATFORM = re.compile(r"[a-z0-9]+/[a-z0-9]+(?:/[a-z0-9]+)?\Z")
_APP = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")


class Duration(click.ParamType[float]):
    """`90`, `90s`, `10m` or `1h30m`, as seconds."""

    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        found = _DURATION.match(str(value).strip())
        if found is None or not any(found.groups()):
            self.fail(f"{value!r} is not a duration; write 90s, 10m or 1h30m", param, ctx)
        hours, minutes, seconds = found.groups(default="0")
        total = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        if not 0 < total < 1e9:
            self.fail(f"{value!r} has to be longer than nothing", param, ctx)
        return total


class Pair(click.ParamType[tuple[str, str]]):
    """`NAME=VALUE`."""

    name = "name=value"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, text = str(value).partition("=")
        if not equals or not name.strip():
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)
        return name.strip(), text


class Host(click.ParamType[tuple[str, str]]):
    """`NAME:ADDRESS`, where the address may be one of IPv6."""

    name = "name:address"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, _, address = str(value).partition(":")
        if not name or not address or "," in str(value):
            self.fail(f"{value!r} is not NAME:ADDRESS", param, ctx)
        return name, address


class Matching(click.ParamType[str]):
    """A text of a certain form."""

    def __init__(self, name: str, form: re.Pattern[str], rule: str) -> None:
        self.name = name
        self._form = form
        self._rule = rule

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        text = str(value)
        # Empty is what an option is that nobody gave, and what an unset variable may look like.
        if text and not self._form.match(text):
            self.fail(f"{text!r} is no {self.name}: {self._rule}", param, ctx)
        return text


APP = Matching("app name", _APP, "lower-case letters, digits and dashes, at most 63")
PLATFORM = Matching("platform", _PLATFORM, "one of the kind linux/amd64; several need several runs")
LABEL = Matching("image label", _LABEL, "letters, digits, dots, dashes, underscores, at most 128")


@dataclass(frozen=True, slots=True)
class Flags:
    """What stood on the command line or in its variables."""

    path: Path
    app: str = ""
    org: str | None = None
    config: Path | None = None
    dockerfile: Path | None = None
    ignorefile: Path | None = None
    build_arg: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    target: str = ""
    no_cache: bool = False
    builder: str = "auto"
    secret: tuple[str, ...] = field(default=(), repr=False)
    ssh: tuple[str, ...] = ()
    cache_from: tuple[str, ...] = ()
    platform: str = ""
    network: str = ""
    add_host: tuple[tuple[str, str], ...] = ()
    label: tuple[tuple[str, str], ...] = ()
    image_label: str = ""
    create_app: bool = False
    push: bool = True
    build_only: bool = False
    api_url: str = ""
    timeout: float | None = None
    tunnel_timeout: float | None = None
    carrier: str = "auto"
    capture: Path | None = None
    output: str = "text"
    json: bool = False

    @property
    def mode(self) -> str:
        """text, json or ndjson."""
        return "json" if self.json else self.output


def _option(*names: str, **how: Any) -> Callable[[Any], Any]:  # noqa: ANN401 - click's own types
    """An option with its variable: FLY_BUILD_ and its long name."""
    long = next(name for name in names if name.startswith("--"))
    variable = "FLY_BUILD_" + long.partition("/")[0].lstrip("-").replace("-", "_").upper()
    return click.option(*names, envvar=variable, show_envvar=True, **how)


_FILE = click.Path(path_type=Path, dir_okay=False)

_OPTIONS = (
    click.argument("path", type=click.Path(path_type=Path), default=Path()),
    _option("--app", "-a", type=APP, default="", help="The app; else FLY_APP, else fly.toml's."),
    _option("--org", "-o", default=None, help="The organization of an app that is created."),
    _option("--config", "-c", type=_FILE, help="The fly.toml; else found from PATH upward."),
    _option("--dockerfile", "--file", "-f", type=_FILE, help="The Dockerfile to build."),
    _option("--ignorefile", type=_FILE, help="To be read instead of .dockerignore."),
    _option("--build-arg", type=Pair(), multiple=True, help="A value for an ARG; many times."),
    _option("--target", "--build-target", default="", help="The stage to build."),
    _option("--no-cache", is_flag=True, help="Build every step anew."),
    _option(
        "--builder",
        type=click.Choice(BUILDERS),
        default="auto",
        help="The engine's BuildKit or its classic builder; auto takes BuildKit where it is.",
    ),
    _option(
        "--secret", multiple=True, help="For RUN --mount: id=NAME,src=FILE or id=NAME,env=VAR."
    ),
    _option(
        "--ssh", multiple=True, help="An agent for RUN --mount=type=ssh: default or ID=SOCKET."
    ),
    _option("--cache-from", multiple=True, help="An image to take cached steps from; many times."),
    _option("--platform", type=PLATFORM, default="", help="What to build for: linux/arm64."),
    _option("--network", default="", help="The network of RUN: default, none or host."),
    _option("--add-host", type=Host(), multiple=True, help="NAME:ADDRESS for RUN; many times."),
    _option("--label", type=Pair(), multiple=True, help="A label in the image; many times."),
    _option("--image-label", type=LABEL, default="", help="The image's tag; else one of its own."),
    _option("--create-app", is_flag=True, help="Create the app if the platform has none."),
    _option("--push/--no-push", default=True, help="Push the image to the registry."),
    _option("--api-url", default="", help="The platform's GraphQL endpoint."),
    _option("--timeout", type=Duration(), default=None, help="For the whole run: 90s, 10m, 1h."),
    _option("--tunnel-timeout", type=Duration(), default=None, help="For the handshake; else 2m."),
    _option(
        "--carrier",
        type=click.Choice(CARRIERS),
        default="auto",
        help="The way to the gateway; auto tries UDP, then WebSocket (HTTPS).",
    ),
    _option("--capture", type=_FILE, help="A new pcap file for the packets inside the tunnel."),
    _option(
        "--output", type=click.Choice(OUTPUTS), default="text", help="What stdout and stderr get."
    ),
    _option("--json", is_flag=True, help="The same as --output json."),
)


def build_flags(command: Callable[[click.Context, Flags], None]) -> Callable[..., None]:
    """Give a command the path and all flags of a build, as one value."""

    @click.pass_context
    @wraps(command)
    def collected(ctx: click.Context, /, **given: Any) -> None:  # noqa: ANN401 - click's own types
        command(ctx, Flags(**given))

    made: Callable[..., None] = collected
    for option in reversed(_OPTIONS):
        made = option(made)
    return made


def build_only_flag(command: Callable[..., None]) -> Callable[..., None]:
    """`--build-only`, for the command that would go further."""
    made: Callable[..., None] = _option("--build-only", is_flag=True, help="Make no release.")(
        command
    )
    return made
