"""What a build may use of this machine: secrets, ssh agents, and whose files it sends."""

import os
import secrets
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from builder_orch.buildkit.sshagent import Agent, KeyAgent, SocketAgent, Unusable
from builder_orch.errors import UsageFailure

GetSecret = Callable[[], bytes]


def read_secrets(given: Iterable[str], variables: Mapping[str, str]) -> dict[str, GetSecret]:
    """From `id=NAME,src=FILE` or `id=NAME,env=VARIABLE`, by their ids; UsageFailure for others.

    `id=NAME` alone is the variable NAME or else the file NAME, as for Docker. A file is read when a
    step asks for it, and must be there now.
    """
    return dict(_secret(text, variables) for text in given)


def _secret(text: str, variables: Mapping[str, str]) -> tuple[str, GetSecret]:
    words = dict(word.partition("=")[::2] for word in text.split(","))
    name = words.pop("id", "")
    path = words.pop("src", words.pop("source", ""))
    variable = words.pop("env", "")
    kind = words.pop("type", "")
    if kind == "env" and path and not variable:
        path, variable = "", path
    if not path and not variable:
        path, variable = ("", name) if name in variables else (name, "")
    if not name or words or (path and variable) or kind not in {"", "file", "env"}:
        raise UsageFailure(
            "a --secret is neither id=NAME,src=FILE nor id=NAME,env=VARIABLE nor id=NAME",
            hint="For example: --secret id=npm,src=.npmrc or --secret id=token,env=TOKEN.",
        )
    if variable:
        value = variables.get(variable)
        if value is None:
            raise UsageFailure(
                f"the secret {name}: there is no variable {variable}",
                hint="Set and export it, or take the secret from a file with src=.",
            )
        octets = value.encode("utf-8", "surrogateescape")
        return name, lambda: octets
    file = Path(path)
    if not file.is_file() or not os.access(file, os.R_OK):
        raise UsageFailure(
            f"the secret {name}: {path} is no file that can be read",
            hint="Check the path and its permissions.",
        )
    return name, file.read_bytes


def find_agents(given: Iterable[str], variables: Mapping[str, str]) -> dict[str, Agent]:
    """From `default`, `ID=SOCKET` or `ID=KEYFILE,...`, by their ids; UsageFailure for others."""
    return dict(_agent(text, variables) for text in given)


def _agent(text: str, variables: Mapping[str, str]) -> tuple[str, Agent]:
    name, _, path = text.partition("=")
    path = path or variables.get("SSH_AUTH_SOCK", "")
    if not name or not path:
        raise UsageFailure(
            f"--ssh {text}: SSH_AUTH_SOCK is not set",
            hint="Start an agent (eval $(ssh-agent); ssh-add), or name its socket or a key file: "
            "ID=PATH.",
        )
    paths = [Path(one) for one in path.split(",")]
    if len(paths) == 1 and _is_socket(paths[0]):
        return name, SocketAgent(paths[0])
    try:
        return name, KeyAgent.of(paths)
    except Unusable as error:
        raise UsageFailure(
            f"--ssh {name}: {error}",
            hint="Give the key to an agent (ssh-add) and name that one's socket, or name a private "
            "key without a passphrase.",
        ) from None


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False


def own_node(file: Path) -> str:
    """What tells this user's directories from those of others on a builder; made once and kept.

    Where it cannot be kept it is new every time, and a build sends everything.
    """
    try:
        kept = file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        kept = ""
    if kept:
        return kept
    made = secrets.token_hex(16)
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        written = file.with_name(f"{file.name}.{os.getpid()}")
        written.touch(mode=0o600)
        written.write_text(f"{made}\n", encoding="ascii")
        written.replace(file)
    except OSError:
        return made
    return made
