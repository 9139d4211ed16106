"""What an app's definition (its fly.toml) asks of the machine that serves it."""

import re
from collections.abc import Iterable, Mapping
from typing import Final

DEFAULT_PORT: Final = 8080
MEMORY_OCTETS: Final = 512 << 20
LONGEST_GRACE_S: Final = 240.0
"""Clients give a release up after five minutes."""
UNITS: Final = {"": 20, "m": 20, "mb": 20, "mib": 20, "g": 30, "gb": 30, "gib": 30, "kb": 10}
"""Powers of two of the units in a definition's memory size; a bare number is megabytes."""
WAIT: Final = re.compile(r"([1-9][0-9]{0,5})(s|m|)")

Json = Mapping[str, object]


def _tables(value: object) -> list[Json]:
    """Return the tables at a place of a definition where one or several may stand."""
    if isinstance(value, Mapping):
        return [value]
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, list) else []


def serving_port(definition: Json, exposed: Iterable[int]) -> int:
    """Return the port an app listens on: by its definition, its image, or custom (8080)."""
    for service in (
        *_tables(definition.get("http_service")),
        *_tables(definition.get("services")),
    ):
        port = service.get("internal_port")
        if isinstance(port, int) and 0 < port < 1 << 16:
            return port
    env = definition.get("env")
    wished = str(env.get("PORT", "")) if isinstance(env, Mapping) else ""
    if wished.isascii() and wished.isdecimal() and 0 < int(wished) < 1 << 16:
        return int(wished)
    return min(exposed, default=DEFAULT_PORT)


def check_path(definition: Json) -> str:
    """Return the path of the definition's first HTTP check, "/" without one."""
    service = _tables(definition.get("http_service"))
    services = _tables(definition.get("services"))
    checks = definition.get("checks")
    listed = [
        *(check for one in service for check in _tables(one.get("checks"))),
        *(check for one in services for check in _tables(one.get("http_checks"))),
        *(_tables(list(checks.values())) if isinstance(checks, Mapping) else []),
    ]
    for check in listed:
        path = check.get("path")
        if isinstance(path, str) and path.startswith("/") and path.isascii() and path.isprintable():
            return path.replace(" ", "%20")
    return "/"


def grace_s(definition: Json, usual_s: float) -> float:
    """Return the seconds that [deploy] wait_timeout gives a new machine to answer ("20s", "2m")."""
    for deploy in _tables(definition.get("deploy")):
        found = WAIT.fullmatch(str(deploy.get("wait_timeout") or ""))
        if found:
            asked_s = int(found[1]) * (60 if found[2] == "m" else 1)
            return min(asked_s, LONGEST_GRACE_S)
    return usual_s


def memory_limit(definition: Json) -> int:
    """Return the octets of memory a definition's [vm] asks for, 512 MiB without one."""
    for machine in _tables(definition.get("vm")):
        asked = str(machine.get("memory") or machine.get("memory_mb") or "").strip().lower()
        found = re.fullmatch(r"(\d{1,9})\s*([a-z]*)", asked)
        if found and found[2] in UNITS:
            return max(int(found[1]) << UNITS[found[2]], 6 << 20)
    return MEMORY_OCTETS
