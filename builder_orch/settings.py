"""The one reader of the environment and of files that hold settings.

A flag beats the environment, the environment a project file, that file the default. A variable that
is set but empty counts as unset. Paths inside a file are relative to that file.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from builder_orch.errors import NotLoggedIn, UsageFailure

FLY_API = "https://api.fly.io/graphql"
FLY_REGISTRY = "registry.fly.io"
FLY_TOKENS = ("FLY_API_TOKEN", "FLY_ACCESS_TOKEN")
PROJECT_FILE = "fly.toml"
PLATFORM_FILE = "platform.json"
PLATFORM_VERSION = 1

_UNSUPPORTED = ("image", "builder", "buildpacks", "builtin", "compose", "settings")
_PORT = re.compile(r"[1-9][0-9]{0,4}\Z")
APP_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\Z")
APP_RULE = "lower-case letters, digits and dashes, at most 63"
_LINE = re.compile(r"\(at line (\d+), column \d+\)|\(at end of document\)")


@dataclass(frozen=True, slots=True)
class PlatformFile:
    """What a selfhost platform that runs here says of itself."""

    api_url: str
    token: str = field(repr=False)
    registry: str
    pid: int
    organization: str
    websocket_port: int = 0
    websocket_pin: str = ""

    @classmethod
    def read(cls, folder: Path) -> "PlatformFile | None":
        """The file in a state directory; None when there is none, or its process is gone."""
        path = folder / PLATFORM_FILE
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageFailure(
                f"{path} cannot be read: {error.strerror}",
                hint="Run as the user who started the selfhost platform, or set FLY_BUILD_API_URL.",
            ) from None
        except ValueError:
            found = None
        match found:
            case {
                "version": int(version),
                "api_url": str(url),
                "token": str(token),
                "registry": str(registry),
                "pid": int(pid),
                "organization": str(organization),
            } if version == PLATFORM_VERSION:
                if not _is_alive(pid):
                    return None
                match found:
                    case {"websocket_port": int(door), "websocket_pin": str(pin)}:
                        return cls(url, token, registry, pid, organization, door, pin)
                    case _:
                        return cls(url, token, registry, pid, organization)
            case _:
                raise UsageFailure(
                    f"{path} is not what this version of fly-build writes",
                    hint="Restart it: fly-build selfhost stop, then fly-build selfhost start.",
                )


@dataclass(frozen=True, slots=True)
class PlatformSettings:
    """Which platform to ask, and where that was said.

    `websocket_port` is where its gateway's wgtcpd listens (0: where its API says), `websocket_pin`
    the SHA-256 of that one's public key in hexadecimal, if it is known.
    """

    api_url: str
    token: str = field(repr=False)
    registry: str
    origin: str
    selfhost: bool = False
    websocket_port: int = 0
    websocket_pin: str = ""


@dataclass(frozen=True, slots=True)
class Project:
    """What a fly.toml says of the app; without one, what is true of any app."""

    path: Path | None = None
    app: str = ""
    dockerfile: Path | None = None
    ignorefile: Path | None = None
    target: str = ""
    build_args: Mapping[str, str] = field(default_factory=dict, repr=False)
    port: int | None = None
    definition: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Environment:
    """Variables, of which an empty one is none."""

    variables: Mapping[str, str] = field(repr=False)

    @classmethod
    def current(cls) -> "Environment":
        """That of this process."""
        return cls(dict(os.environ))

    def first(self, *names: str) -> tuple[str, str]:
        """The first of these that is set, as (value, name); ("", "") for none."""
        for name in names:
            if value := self.variables.get(name, "").strip():
                return value, name
        return "", ""

    def state_folder(self) -> Path:
        """Where the selfhost platform of this user keeps what it has."""
        home, _ = self.first("FLY_BUILD_HOME")
        return (Path(home) if home else _data()) / "selfhost"

    def agent_folder(self) -> Path:
        """Where this user's agent has its socket, its lock and the peers that commands share."""
        home, _ = self.first("FLY_BUILD_HOME")
        runtime, _ = self.first("XDG_RUNTIME_DIR")
        if home:
            return Path(home) / "agent"
        if runtime and _is_own(Path(runtime)):
            return Path(runtime) / "fly-build"
        return _data() / "agent"

    def docker_config(self) -> Path:
        """Where `docker login` keeps what it was told; it need not be there."""
        folder, _ = self.first("DOCKER_CONFIG")
        home, _ = self.first("HOME")
        return (Path(folder) if folder else Path(home or "/") / ".docker") / "config.json"

    def app(self, flag: str, project: Project) -> str:
        """Which app; UsageFailure when nobody says, or says what no app can be called."""
        variable, origin = self.first("FLY_APP")
        name = flag or variable or project.app
        if not name:
            raise UsageFailure(
                "no app was named", hint='Use --app NAME, or write app = "NAME" in fly.toml.'
            )
        if not APP_NAME.match(name):
            where = "--app" if flag else origin or str(project.path)
            raise UsageFailure(f"{where}: {name!r} is no app name", hint=f"It has {APP_RULE}.")
        return name

    def platform(self, url_flag: str = "") -> PlatformSettings | None:
        """The platform by flag and variables, else the selfhost platform here; None for neither.

        A token without a URL is for Fly.io. A token is only ever sent where it belongs: flyctl's
        variables hold one for Fly.io, and that of the selfhost platform goes to no other URL.
        """
        url, origin = url_flag, "--api-url"
        if not url:
            url, origin = self.first("FLY_BUILD_API_URL", "FLY_API_BASE_URL")
        token, token_origin = self._token()
        embedded = PlatformFile.read(self.state_folder())
        if not url and not token:
            return None if embedded is None else _embedded(embedded)
        if not url:
            url, origin = FLY_API, token_origin
        url = _graphql(url)
        if token_origin in FLY_TOKENS and url != FLY_API and origin != "FLY_API_BASE_URL":
            token = ""
        if embedded is not None and url == embedded.api_url and token in ("", embedded.token):
            return _embedded(embedded)
        if not token:
            raise NotLoggedIn(
                f"there is no token for {url}",
                hint="Set FLY_BUILD_TOKEN, or FLY_BUILD_TOKEN_FILE to a file that holds it.",
            )
        return PlatformSettings(url, token, self._registry(url, embedded), origin)

    def _token(self) -> tuple[str, str]:
        token, origin = self.first("FLY_BUILD_TOKEN")
        if token:
            return token, origin
        file, origin = self.first("FLY_BUILD_TOKEN_FILE")
        if not file:
            return self.first(*FLY_TOKENS)
        try:
            token = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageFailure(
                f"{origin}: {file} cannot be read: {error}",
                hint="Check the path and its permissions.",
            ) from None
        if not token:
            raise UsageFailure(f"{origin}: {file} is empty", hint="Write the token into it.")
        return token, origin

    def _registry(self, url: str, embedded: PlatformFile | None) -> str:
        registry, _ = self.first("FLY_BUILD_REGISTRY", "FLY_REGISTRY_HOST")
        if registry:
            return registry
        if embedded is not None and url == embedded.api_url:
            return embedded.registry
        if url == FLY_API:
            return FLY_REGISTRY
        raise UsageFailure(
            f"the registry that belongs to {url} is not known",
            hint="Set FLY_BUILD_REGISTRY to its host, with its port if it has one.",
        )


def find_project(start: Path, named: Path | None = None) -> Project:
    """The project file that was named, else the first fly.toml from `start` upward, else none.

    The search ends at the top of a repository. UsageFailure names what is wrong in the file.
    """
    if named is not None:
        if not named.is_file():
            raise UsageFailure(f"there is no file {named}", hint="Check --config.")
        return _project(named)
    folder = start.resolve()
    for candidate in (folder, *folder.parents):
        if (candidate / PROJECT_FILE).exists():
            return _project(candidate / PROJECT_FILE)
        if (candidate / ".git").exists():
            break
    return Project()


def _embedded(file: PlatformFile) -> PlatformSettings:
    return PlatformSettings(
        file.api_url,
        file.token,
        file.registry,
        "selfhost",
        selfhost=True,
        websocket_port=file.websocket_port,
        websocket_pin=file.websocket_pin,
    )


def _graphql(url: str) -> str:
    """A base URL, as flyctl's variable holds it, stands for the GraphQL endpoint below it."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise UsageFailure(f"{url!r} is not a URL", hint="Write it as https://host/graphql.")
    return url.rstrip("/") + "/graphql" if parts.path in {"", "/"} else url


def _data() -> Path:
    """The user's data directory for this program."""
    import platformdirs

    return platformdirs.user_data_path("fly-build")


def _is_own(folder: Path) -> bool:
    """After sudo or su a variable may still name a directory of the user before."""
    try:
        return folder.stat().st_uid == os.geteuid()
    except OSError:
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _project(path: Path) -> Project:
    import tomllib

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageFailure(
            f"{path} cannot be read: {error.strerror}",
            hint="It has to be a file that you may read.",
        ) from None
    except UnicodeDecodeError:
        raise UsageFailure(f"{path} is not UTF-8 text", hint="Save it as UTF-8.") from None
    except tomllib.TOMLDecodeError as error:
        raise _broken(path, str(error)) from None
    table = _Table(path, content, "")
    build = table.table("build")
    for key in _UNSUPPORTED:
        if key in build.content:
            raise UsageFailure(
                f"{path}: [build] {key} is not supported: only Dockerfiles are built",
                hint=f"Take {key} out of [build].",
            )
    arguments = build.table("args")
    return Project(
        path=path,
        app=table.text("app"),
        dockerfile=build.path("dockerfile"),
        ignorefile=build.path("ignorefile"),
        target=build.text("build-target"),
        build_args={name: arguments.scalar(name) for name in arguments.content},
        port=_port(table),
        definition=json.loads(json.dumps(content, default=str)),
    )


def _broken(path: Path, said: str) -> UsageFailure:
    found = _LINE.search(said)
    what = _LINE.sub("", said).strip()
    if found and found[1]:
        return UsageFailure(f"{path}:{found[1]}: {what}", hint="Correct the TOML in that line.")
    return UsageFailure(
        f"{path}: it ends too early: {what}", hint="Correct the TOML at the end of the file."
    )


def _port(table: "_Table") -> int | None:
    """Where the app listens, if the file says so."""
    service = table.table("http_service")
    if "internal_port" in service.content:
        return service.port("internal_port")
    services = table.content.get("services")
    if isinstance(services, list) and services and isinstance(services[0], dict):
        first = _Table(table.path_of_file, services[0], "services")
        if "internal_port" in first.content:
            return first.port("internal_port")
    wished = table.table("env").content.get("PORT")
    return int(wished) if isinstance(wished, str) and _PORT.match(wished) else None


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of a file, whose values are checked as they are taken."""

    path_of_file: Path
    content: Mapping[str, object]
    name: str

    def table(self, key: str) -> "_Table":
        value = self.content.get(key, {})
        name = f"{self.name}.{key}" if self.name else key
        if not isinstance(value, dict):
            raise self._wrong(key, "a table")
        return _Table(self.path_of_file, value, name)

    def text(self, key: str) -> str:
        value = self.content.get(key, "")
        if not isinstance(value, str):
            raise self._wrong(key, "a string")
        return value

    def scalar(self, key: str) -> str:
        value = self.content[key]
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, str | int | float):
            return str(value)
        raise self._wrong(key, "a string, a number, true or false")

    def path(self, key: str) -> Path | None:
        text = self.text(key)
        if "://" in text:
            raise UsageFailure(
                f"{self.path_of_file}: {self._full(key)} is a URL, which is not supported",
                hint="Name a file.",
            )
        return self.path_of_file.parent / text if text else None

    def port(self, key: str) -> int:
        value = self.content[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65535:
            raise self._wrong(key, "a port from 1 to 65535")
        return value

    def _wrong(self, key: str, wanted: str) -> UsageFailure:
        return UsageFailure(
            f"{self.path_of_file}: {self._full(key)} has to be {wanted}",
            hint="Correct that value.",
        )

    def _full(self, key: str) -> str:
        return f"[{self.name}] {key}" if self.name else key
