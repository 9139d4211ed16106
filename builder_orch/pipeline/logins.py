"""The user's logins to registries, as `docker login` keeps them: asked for one by one, when needed.

In `config.json` a login stands in plain text (`auths`) or with a program of its own, for one
registry (`credHelpers`) or for all (`credsStore`). Which of them a builder may have is decided by
the build: see `Named`.
"""

import asyncio
import base64
import binascii
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from builder_orch.api.models import Secret
from builder_orch.errors import UsageFailure
from builder_orch.pipeline.dockerfile import Dockerfile
from builder_orch.pipeline.engine import Login

HUB = "docker.io"
HUB_HOSTS = frozenset({"docker.io", "index.docker.io", "registry-1.docker.io"})
HUB_KEY = "https://index.docker.io/v1/"
"""What Docker Hub is called in config.json since its first version."""
HELPER_S = 30.0
"""How long a credential helper may take; it may ask its user for a touch or a password."""
ANSWER_LIMIT = 256 * 1024

_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_NOT_THERE = re.compile(r"credentials not found|no credentials|not found in native", re.IGNORECASE)
_FROM_FLAG = re.compile(r"--from=(\S+)|(?:^|,)from=([^,\s]+)")


@dataclass(frozen=True, slots=True)
class DockerConfig:
    """A config.json, read anew for every question; `variables` are those of the helpers."""

    file: Path
    variables: Mapping[str, str] = field(repr=False)

    async def login(self, host: str) -> Login | None:
        """For a registry's host; None without one. UsageFailure names what does not work."""
        config = self._read()
        names = [HUB_KEY, *sorted(HUB_HOSTS)] if host in HUB_HOSTS else [host]
        helpers = _mapping(config.get("credHelpers"))
        for name in names:
            if isinstance(helper := helpers.get(name), str):
                return await self._ask(helper, name)
        if isinstance(store := config.get("credsStore"), str) and store:
            for name in names:
                if (login := await self._ask(store, name)) is not None:
                    return login
        for key, entry in _mapping(config.get("auths")).items():
            if key in names or _host(key) in names:
                login = self._plain(key, _mapping(entry))
                if login is not None:
                    return login
        return None

    def _read(self) -> Mapping[str, object]:
        try:
            found = json.loads(self.file.read_bytes())
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise self._wrong(f"cannot be read: {error.strerror}") from None
        except ValueError:
            raise self._wrong("is not JSON") from None
        return _mapping(found)

    def _plain(self, key: str, entry: Mapping[str, object]) -> Login | None:
        match entry:
            case {"identitytoken": str(token)} if token:
                return Login("", Secret(token))
            case {"auth": str(coded)} if coded:
                try:
                    text = base64.b64decode(coded, validate=True).decode()
                except (binascii.Error, ValueError):
                    raise self._wrong(f"has a login for {key} that is not Base64") from None
                name, _, password = text.partition(":")
                return Login(name, Secret(password.strip("\0")))
            case {"username": str(name), "password": str(password)} if name:
                return Login(name, Secret(password))
            case _:
                return None

    async def _ask(self, helper: str, server: str) -> Login | None:
        """The protocol of docker-credential-helpers: a name on stdin, JSON on stdout."""
        program = f"docker-credential-{helper}"
        path = shutil.which(program, path=self.variables.get("PATH"))
        if not _HELPER.match(helper) or path is None:
            raise self._wrong(f"names the credential helper {program}, which is not in PATH")
        process = await asyncio.create_subprocess_exec(
            path,
            "get",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=dict(self.variables),
        )
        try:
            async with asyncio.timeout(HELPER_S):
                said, complaint = await process.communicate(server.encode())
        except TimeoutError:
            raise _failed(program, server, f"gave no answer within {HELPER_S:g} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            if _NOT_THERE.search(said.decode("utf-8", "replace")):
                return None
            # Its stdout may hold a secret even then; what it writes to stderr is for people.
            why = complaint.decode("utf-8", "replace").strip().partition("\n")[0][:200]
            code = f"ended with code {process.returncode}"
            raise _failed(program, server, f"{code}: {why}" if why else code)
        return _helped(program, server, said)

    def _wrong(self, what: str) -> UsageFailure:
        return UsageFailure(
            f"{self.file} {what}",
            hint="Correct the file, or name another folder in DOCKER_CONFIG; `docker login` "
            "writes one.",
        )


def _helped(program: str, server: str, said: bytes) -> Login | None:
    try:
        answer = _mapping(json.loads(said[:ANSWER_LIMIT]))
    except ValueError:
        answer = {}
    match answer:
        case {"Username": "<token>", "Secret": str(secret)}:
            return Login("", Secret(secret))
        case {"Username": str(name), "Secret": str(secret)}:
            return Login(name, Secret(secret)) if name or secret else None
        case _:
            raise _failed(program, server, "answered with something else than a login")


def _failed(program: str, server: str, how: str) -> UsageFailure:
    return UsageFailure(
        f"the credential helper {program} {how} (asked for {server})",
        hint=f"Try it by hand: echo {server} | {program} get; or log in again with `docker login`.",
    )


def _mapping(found: object) -> Mapping[str, object]:
    return found if isinstance(found, dict) else {}


def _host(key: str) -> str:
    """Of a key, which may be a URL."""
    return urlsplit(key if "://" in key else f"//{key}").netloc


@dataclass(frozen=True, slots=True)
class Named:
    """The registries that a build names: a builder that asks for another login gets none.

    `loose` is text that a name may be put together from, as in `FROM ${REGISTRY}/base`.
    """

    hosts: frozenset[str]
    loose: str = field(default="", repr=False)

    @classmethod
    def by(
        cls, dockerfile: Dockerfile, build_args: Mapping[str, str], images: Iterable[str]
    ) -> "Named":
        """From FROM, --from= and the images that stand on the command line."""
        stages = {stage.name.lower() for stage in dockerfile.stages if stage.name}
        found = [*images, *(stage.base for stage in dockerfile.stages)]
        texts = list(build_args.values())
        for stage in dockerfile.stages:
            for step in stage.steps:
                texts.append(step.rest)
                for flag in step.flags:
                    found += [one or two for one, two in _FROM_FLAG.findall(flag)]
        plain = [name for name in found if "$" not in name and name.lower() not in stages]
        hosts = {registry_of(name) for name in plain if name != "scratch" and not name.isdecimal()}
        composed = len(plain) < len([name for name in found if name.lower() not in stages])
        loose = "\n".join([*found, *texts]) if composed else ""
        return cls(frozenset(hosts), loose)

    def __contains__(self, host: str) -> bool:
        if host in HUB_HOSTS:
            return HUB in self.hosts or bool(self.loose)
        return host in self.hosts or host in self.loose


def registry_of(image: str) -> str:
    """The host in an image's name, by Docker's rule; Docker Hub where there is none."""
    first, slash, _ = image.partition("/")
    if slash and (set(".:") & set(first) or first == "localhost"):
        return HUB if first in HUB_HOSTS else first
    return HUB
