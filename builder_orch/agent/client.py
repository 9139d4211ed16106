"""A tunnel of the agent's, used as if it were of this process."""

from pathlib import Path

from builder_orch.agent.call import Call
from builder_orch.errors import UsageFailure
from builder_orch.tunnel.carrier.choice import Choice
from builder_orch.tunnel.hosted import HostedTunnel


class KeyBusy(Exception):
    """Another tunnel has this key now."""


class Leaving(Exception):
    """The agent ends with what it has open; another one is to be asked."""


class AgentTunnel(HostedTunnel):
    """The abilities of `Tunnel`, carried out by the agent; what was dialled outlives this object.

    Made on the loop that uses it, from a call that has greeted the agent.
    """

    def __init__(self, call: Call) -> None:
        super().__init__(call.detach(), call.greeting.pid)
        self.version = call.greeting.version

    async def open_file(self, path: Path, choice: Choice) -> None:
        """Use the tunnel that this file describes; only its path is told, not its private key.

        KeyBusy, Leaving; UsageFailure for a file that the agent cannot use; else as `open_tunnel`.
        """
        answer = await self.ask({"do": "open", "path": str(path), "carrier": choice.dump()})
        match answer:
            case {"state": "open"}:
                return
            case {"state": "busy", "why": str(why)}:
                raise KeyBusy(why)
            case {"state": "leaving"}:
                raise Leaving
            case {"state": "unusable", "why": str(why)}:
                raise UsageFailure(why, hint="Correct the file, or name another one.")
            case _:
                raise OSError("the agent's answer is none that is known")
