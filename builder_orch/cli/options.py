"""The flags that `deploy` and `build` share; each is an environment variable as well."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import click

from builder_orch.cli.form import OUTPUTS
from builder_orch.cli.progress import MODES
from builder_orch.settings import APP_NAME, APP_RULE

BUILDERS = ("auto", "buildkit", "classic")
CARRIERS = ("auto", "udp", "websocket")
AGENT_MODES = ("auto", "on", "off")

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?\Z")
_LIMIT = re.compile(r"([a-z]+)=(-1|\d{1,18})(?::(-1|\d{1,18}))?\Z")
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?) ?((?:[kmgt]i?)?b?)\Z", re.IGNORECASE | re.ASCII)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*://|git@|github\.com/")
_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_PLATFORM = re.compile(r"(?:(?:\A|,)[a-z0-9]+/[a-z0-9]+(?:/[a-z0-9]+)?)+\Z")


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


class Size(click.ParamType[int]):
    """`1500`, `200kB`, `1.5GB` or `1500MiB`, as octets."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        if isinstance(value, int):
            return value
        found = _SIZE.match(str(value).strip())
        if found is None:
            self.fail(f"{value!r} is not a size; write 200kB, 1.5GB or 1500MiB", param, ctx)
        return int(float(found[1]) * _UNITS[(found[2] or "b").lower().removesuffix("b")])


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


class Limit(click.ParamType[tuple[str, str]]):
    """`NAME=SOFT` or `NAME=SOFT:HARD`, as the name and `SOFT:HARD`."""

    name = "limit"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        found = _LIMIT.match(str(value))
        if found is None:
            self.fail(f"{value!r} is not NAME=SOFT or NAME=SOFT:HARD", param, ctx)
        name, soft, hard = found.groups()
        return name, f"{soft}:{hard or soft}"


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


APP = Matching("app name", APP_NAME, APP_RULE)
PLATFORM = Matching("platform", _PLATFORM, "linux/amd64, linux/arm64 ..., with commas between them")
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
    platform: tuple[str, ...] = ()
    cache_to: tuple[str, ...] = ()
    ulimit: tuple[tuple[str, str], ...] = ()
    build_context: tuple[tuple[str, str], ...] = ()
    network: str = ""
    add_host: tuple[tuple[str, str], ...] = ()
    label: tuple[tuple[str, str], ...] = ()
    image_label: str = ""
    create_app: bool = False
    push: bool | None = None
    build_only: bool = False
    tag: str = ""
    dest: str = ""
    load: bool = False
    buildkit_host: str = ""
    buildkit_certs: Path | None = None
    api_url: str = ""
    timeout: float | None = None
    tunnel_timeout: float | None = None
    build_timeout: float | None = None
    stall_timeout: float | None = None
    carrier: str = "auto"
    agent: str = "auto"
    capture: Path | None = None
    output: str = "text"
    json: bool = False
    progress: str = "auto"
    context_warn: int | None = None
    context_limit: int | None = None
    check_context: bool = False
    context_from: str = ""
    dockerfile_from: str = ""
    explain: bool = False
    explain_context: str | None = None
    lock_context: bool = False

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
    click.argument("path", default="."),
    _option(
        "--app",
        "-a",
        type=APP,
        default="",
        metavar="NAME",
        help="The app; else FLY_APP, else fly.toml's.",
    ),
    _option("--org", "-o", default=None, help="The organization of an app that is created."),
    _option("--config", "-c", type=_FILE, help="The fly.toml; else found from PATH upward."),
    _option("--dockerfile", "--file", "-f", help="The Dockerfile: a file, - for stdin or a URL."),
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
        "--secret",
        multiple=True,
        help="For RUN --mount: id=NAME,src=FILE, id=NAME,env=VAR, or id=NAME for either.",
    ),
    _option(
        "--ssh",
        multiple=True,
        help="For RUN --mount=type=ssh: default, ID=SOCKET or ID=KEYFILE.",
    ),
    _option("--cache-from", multiple=True, help="An image to take cached steps from; many times."),
    _option("--cache-to", multiple=True, help="type=inline, or type=registry,ref=IMAGE."),
    _option("--platform", type=PLATFORM, multiple=True, help="What to build for: linux/arm64."),
    _option("--ulimit", type=Limit(), multiple=True, help="For RUN: nofile=1024 or SOFT:HARD."),
    _option(
        "--build-context",
        type=Pair(),
        multiple=True,
        help="NAME=DIRECTORY or NAME=docker-image://IMAGE, for FROM and --from.",
    ),
    _option("--network", default="", help="The network of RUN: default, none or host."),
    _option("--add-host", type=Host(), multiple=True, help="NAME:ADDRESS for RUN; many times."),
    _option("--label", type=Pair(), multiple=True, help="A label in the image; many times."),
    _option(
        "--image-label",
        type=LABEL,
        default="",
        metavar="TAG",
        help="The image's tag; else one of its own.",
    ),
    _option("--create-app", is_flag=True, help="Create the app if the platform has none."),
    _option("--push/--no-push", default=None, help="Push the image to the registry."),
    _option("--api-url", default="", help="The platform's GraphQL endpoint."),
    _option("--timeout", type=Duration(), default=None, help="For the whole run: 90s, 10m, 1h."),
    _option(
        "--build-timeout", type=Duration(), default=None, help="For the context and the build."
    ),
    _option(
        "--stall-timeout",
        type=Duration(),
        default=None,
        help="For a time in which no step runs and nothing moves; else 10m.",
    ),
    _option("--tunnel-timeout", type=Duration(), default=None, help="For the handshake; else 2m."),
    _option(
        "--carrier",
        type=click.Choice(CARRIERS),
        default="auto",
        help="The way to the gateway; auto tries UDP, then WebSocket (HTTPS).",
    ),
    _option(
        "--agent",
        type=click.Choice(AGENT_MODES),
        default="auto",
        help="Whether the agent holds the tunnel; auto uses one that runs, on starts it.",
    ),
    _option("--capture", type=_FILE, help="A new pcap file for the packets inside the tunnel."),
    _option(
        "--output", type=click.Choice(OUTPUTS), default="text", help="What stdout and stderr get."
    ),
    _option("--json", is_flag=True, help="The same as --output json."),
    _option(
        "--progress",
        type=click.Choice(MODES),
        default="auto",
        help="How stderr shows the run; auto draws on a terminal and adds lines elsewhere.",
    ),
    _option("--context-warn", type=Size(), help="Warn of a larger context; else of one of 100MB."),
    _option("--context-limit", type=Size(), help="Refuse a larger context: 200kB, 1.5GB, 500MiB."),
    _option("--check-context", is_flag=True, help="Refuse a context that its context.lock is not."),
)


def build_flags(command: Callable[[click.Context, Flags], None]) -> Callable[..., None]:
    """Give a command the path and all flags of a build, as one value."""

    @click.pass_context
    @wraps(command)
    def collected(ctx: click.Context, /, **given: Any) -> None:  # noqa: ANN401 - click's own types
        command(ctx, Flags(**_placed(given)))

    made: Callable[..., None] = collected
    for option in reversed(_OPTIONS):
        made = option(made)
    return made


def _placed(given: dict[str, Any]) -> dict[str, Any]:
    """Places elsewhere told apart from paths; `-` is the standard input."""
    path, dockerfile = given["path"], given["dockerfile"]
    given["path"] = Path() if _is_elsewhere(path) else Path(path)
    given["context_from"] = path if _is_elsewhere(path) else ""
    given["dockerfile_from"] = dockerfile if dockerfile == "-" or _is_elsewhere(dockerfile) else ""
    given["dockerfile"] = None if given["dockerfile_from"] or not dockerfile else Path(dockerfile)
    return given


def _is_elsewhere(text: str | None) -> bool:
    return text is not None and bool(_ELSEWHERE.match(text)) and not Path(text).exists()


_LOOKS = (
    _option("--explain", is_flag=True, help="Say what changed since the last good build, and end."),
    _option(
        "--explain-context",
        is_flag=False,
        flag_value="",
        default=None,
        metavar="[FILE]",
        help="Say what is sent, why, and what could stay here; then end.",
    ),
    _option("--lock-context", is_flag=True, help="Write context.lock for --check-context; end."),
)


def look_flags(command: Callable[..., None]) -> Callable[..., None]:
    """The flags that have a look at the context instead of building it."""
    made: Callable[..., None] = command
    for option in reversed(_LOOKS):
        made = option(made)
    return made


_RESULTS = (
    _option("--tag", "-t", default="", help="REPOSITORY:TAG, in whatever registry."),
    _option(
        "--dest",
        default="",
        help="type=local,dest=DIR, or type=tar|oci|docker,dest=FILE: no push then.",
    ),
    _option("--load", is_flag=True, help="Load the image into the Docker engine here."),
    _option(
        "--buildkit-host",
        default="",
        help="Build by this buildkitd, without a platform: unix:///PATH or tcp://HOST:PORT.",
    ),
    _option(
        "--buildkit-certs",
        type=click.Path(path_type=Path, file_okay=False),
        help="A directory with ca.pem, cert.pem and key.pem for it.",
    ),
)


def result_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Where the result goes, and who else may build: for the command that releases nothing."""
    made: Callable[..., None] = command
    for option in reversed(_RESULTS):
        made = option(made)
    return made


def build_only_flag(command: Callable[..., None]) -> Callable[..., None]:
    """`--build-only`, for the command that would go further."""
    made: Callable[..., None] = _option("--build-only", is_flag=True, help="Make no release.")(
        command
    )
    return made
