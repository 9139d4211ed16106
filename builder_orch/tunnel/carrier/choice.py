"""What the user and the platform said of how a gateway is to be reached.

It is no more than that: whoever only hands it on to the process of a tunnel loads no carrier.
"""

from dataclasses import dataclass, field
from pathlib import Path

from builder_orch.tunnel.carrier.proxy import Outside

AUTO, UDP, WEBSOCKET = KINDS = ("auto", "udp", "websocket")


@dataclass(frozen=True, slots=True)
class Choice:
    """`kind` is auto (both, raced), udp or websocket. `port` is that of the gateway's wgtcpd and
    `pin` the SHA-256 of its key, where they are known better than by the peer's configuration
    (0, None: as that says, or else the usual port and any key). `memory` is a file for what
    answered last time.
    """

    kind: str = UDP
    port: int = 0
    pin: bytes | None = None
    outside: Outside = field(default_factory=Outside)
    memory: Path | None = None

    def dump(self) -> dict[str, object]:
        """In JSON types; the proxy's password is among them."""
        return {
            "kind": self.kind,
            "port": self.port,
            "pin": "" if self.pin is None else self.pin.hex(),
            "proxy": self.outside.proxy,
            "no_proxy": self.outside.no_proxy,
            "ca_files": list(self.outside.ca_files),
            "memory": str(self.memory or ""),
        }

    @classmethod
    def load(cls, dumped: object) -> "Choice":
        """The inverse of `dump`; ValueError for anything else."""
        match dumped:
            case {
                "kind": str(kind),
                "port": int(port),
                "pin": str(pin),
                "proxy": str(proxy),
                "no_proxy": str(no_proxy),
                "ca_files": [*files],
                "memory": str(memory),
            }:
                return cls(
                    kind,
                    port,
                    bytes.fromhex(pin) or None,
                    Outside(proxy, no_proxy, tuple(map(str, files))),
                    Path(memory) if memory else None,
                )
            case _:
                raise ValueError("not a choice of a carrier")
