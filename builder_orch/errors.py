"""Every failure a user can meet: what failed, whose fault it is, what to do next, the exit code.

A leaf says by its class which layer failed and whether a repetition can help; the message says what
happened and `hint` the next step. Exit codes are frozen: scripts branch on them.
"""

import errno
from enum import Enum, IntEnum
from typing import ClassVar, Final

NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What the system says when a disk, or a user's share of it, is full."""


class Exit(IntEnum):
    """Process exit codes; 125 to 127 are left to shells and to Docker."""

    OK = 0
    UNCLASSIFIED = 1
    USAGE = 2
    NOT_LOGGED_IN = 3
    NOT_ALLOWED = 4
    BUILDER_NOT_PROVISIONED = 10
    TUNNEL_NOT_UP = 11
    BUILDER_LOST = 12
    BUILDER_BUSY = 13
    BUILD_FAILED = 20
    BUILD_TIMEOUT = 21
    CONTEXT_REFUSED = 22
    CONTEXT_CHANGED = 23
    PUSH_TRANSPORT = 30
    PUSH_DENIED = 31
    RELEASE_FAILED = 40
    LOCKED = 41
    TIMEOUT = 124
    INTERRUPTED = 130
    TERMINATED = 143


class Blame(Enum):
    """Whose fault a failure is, as far as the evidence goes."""

    YOU = "you"
    NETWORK = "network"
    PLATFORM = "platform"
    BUILDER = "builder"
    REGISTRY = "registry"
    TOOL = "fly-build"


class BuilderOrchError(Exception):
    """A failure with a hint. Only its leaves are raised.

    `kind` is the stable id of the class of failure, `code` the exit code, `retryable` whether the
    same command may succeed later without the user changing anything.
    """

    kind: ClassVar[str] = "RB-UNCLASSIFIED"
    code: ClassVar[Exit] = Exit.UNCLASSIFIED
    blame: ClassVar[Blame] = Blame.TOOL
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class UsageFailure(BuilderOrchError):
    """The command line, a configuration file or a value in it is wrong."""

    kind = "RB-USAGE"
    code = Exit.USAGE
    blame = Blame.YOU


class PortInUse(BuilderOrchError):
    """A local port that was asked for belongs to another program."""

    kind = "RB-PORT-IN-USE"
    code = Exit.USAGE
    blame = Blame.YOU


class NotLoggedIn(BuilderOrchError):
    """No token, or one the platform no longer accepts."""

    kind = "RB-AUTH-TOKEN"
    code = Exit.NOT_LOGGED_IN
    blame = Blame.YOU


class NotAllowed(BuilderOrchError):
    """The token is good but does not reach this far."""

    kind = "RB-AUTH-DENIED"
    code = Exit.NOT_ALLOWED
    blame = Blame.YOU


class AppUnknown(BuilderOrchError):
    """The platform has no such app, or does not show it to this token."""

    kind = "RB-APP-UNKNOWN"
    code = Exit.NOT_ALLOWED
    blame = Blame.YOU


class PlatformUnavailable(BuilderOrchError):
    """The API cannot be reached or answers with an error of its own."""

    kind = "RB-API-UNAVAILABLE"
    code = Exit.BUILDER_NOT_PROVISIONED
    blame = Blame.PLATFORM
    retryable = True


class PlatformRefused(BuilderOrchError):
    """The API understood the request and refused it."""

    kind = "RB-API-REFUSED"
    code = Exit.UNCLASSIFIED
    blame = Blame.PLATFORM


class BuilderNotProvisioned(BuilderOrchError):
    """No builder machine within the time limit."""

    kind = "RB-PROVISION"
    code = Exit.BUILDER_NOT_PROVISIONED
    blame = Blame.PLATFORM
    retryable = True


class EngineMissing(BuilderOrchError):
    """This machine has no Docker engine or registry program and none may be started here."""

    kind = "RB-ENGINE-MISSING"
    code = Exit.BUILDER_NOT_PROVISIONED
    blame = Blame.YOU


class TunnelNotUp(BuilderOrchError):
    """The WireGuard handshake or the first answer inside the tunnel did not come in time.

    Where the evidence says more, it is one of the classes below.
    """

    kind = "RB-TUNNEL"
    code = Exit.TUNNEL_NOT_UP
    blame = Blame.NETWORK
    retryable = True


class AgentFailed(BuilderOrchError):
    """The agent does not start, does not answer or is of another time than this command."""

    kind = "RB-AGENT"
    code = Exit.TUNNEL_NOT_UP
    blame = Blame.TOOL
    retryable = True


class PeerUnknown(TunnelNotUp):
    """The platform itself says that it does not know our peer (any more)."""

    kind = "RB-PEER-UNKNOWN"
    blame = Blame.PLATFORM


class PeerNotInstalled(TunnelNotUp):
    """The gateway hears us and does not answer: it was not told of our peer in time."""

    kind = "RB-PEER-NOT-INSTALLED"
    blame = Blame.PLATFORM


class UdpBlocked(TunnelNotUp):
    """Nothing that we send gets to the gateway, or nothing comes back."""

    kind = "RB-UDP-BLOCKED"
    retryable = False


class GatewayDown(TunnelNotUp):
    """The gateway's host refuses us, or the platform says that the gateway does not work."""

    kind = "RB-GATEWAY-DOWN"
    blame = Blame.PLATFORM


class ResolverDown(TunnelNotUp):
    """The gateway answers, but names inside are not resolved."""

    kind = "RB-TUNNEL-DNS"
    blame = Blame.PLATFORM


class BuilderLost(BuilderOrchError):
    """The engine went away while it worked for us, or ran out of memory or disk."""

    kind = "RB-BUILDER-LOST"
    code = Exit.BUILDER_LOST
    blame = Blame.BUILDER
    retryable = True


class BuilderFull(BuilderOrchError):
    """The builder's disk is full."""

    kind = "RB-BUILDER-DISK"
    code = Exit.BUILDER_LOST
    blame = Blame.BUILDER


class BuildFailed(BuilderOrchError):
    """A step of the Dockerfile failed."""

    kind = "RB-BUILD-STEP"
    code = Exit.BUILD_FAILED
    blame = Blame.YOU


class DockerfileInvalid(BuilderOrchError):
    """The Dockerfile is missing or cannot be parsed."""

    kind = "RB-DOCKERFILE"
    code = Exit.BUILD_FAILED
    blame = Blame.YOU


class BuildTimedOut(BuilderOrchError):
    """The build or one of its steps took longer than its limit."""

    kind = "RB-BUILD-TIMEOUT"
    code = Exit.BUILD_TIMEOUT
    blame = Blame.YOU


class BuildStalled(BuilderOrchError):
    """The engine answers, but the build came no further for the time that it was given."""

    kind = "RB-BUILD-STALL"
    code = Exit.BUILD_TIMEOUT
    blame = Blame.BUILDER
    retryable = True


class ContextRefused(BuilderOrchError):
    """The build context cannot be sent: a file is unreadable, special or changed meanwhile."""

    kind = "RB-CONTEXT"
    code = Exit.CONTEXT_REFUSED
    blame = Blame.YOU


class ContextChanged(BuilderOrchError):
    """The build context is not what its context.lock says."""

    kind = "RB-CONTEXT-LOCK"
    code = Exit.CONTEXT_CHANGED
    blame = Blame.YOU


class PushFailed(BuilderOrchError):
    """The registry could not be reached or broke off."""

    kind = "RB-PUSH"
    code = Exit.PUSH_TRANSPORT
    blame = Blame.REGISTRY
    retryable = True


class PushDenied(BuilderOrchError):
    """The registry refused the credentials."""

    kind = "RB-PUSH-DENIED"
    code = Exit.PUSH_DENIED
    blame = Blame.YOU


class ReleaseFailed(BuilderOrchError):
    """The release did not become healthy; the one before stays, or there is none."""

    kind = "RB-RELEASE"
    code = Exit.RELEASE_FAILED
    blame = Blame.YOU


class AlreadyRunning(BuilderOrchError):
    """Another process holds what this one needs for itself."""

    kind = "RB-LOCKED"
    code = Exit.LOCKED
    blame = Blame.YOU


class LocalDiskFull(BuilderOrchError):
    """This machine's disk has no room for what has to be written."""

    kind = "RB-LOCAL-DISK"
    code = Exit.BUILDER_LOST
    blame = Blame.YOU


class TimedOut(BuilderOrchError):
    """The limit for the whole run, which the user set, was reached."""

    kind = "RB-TIMEOUT"
    code = Exit.TIMEOUT
    blame = Blame.YOU
    retryable = True


class Interrupted(BuilderOrchError):
    """Ctrl-C: what had begun was ended and recorded as cancelled."""

    kind = "RB-INTERRUPTED"
    code = Exit.INTERRUPTED
    blame = Blame.YOU


class Terminated(BuilderOrchError):
    """SIGTERM or SIGHUP: what had begun was ended and recorded as cancelled."""

    kind = "RB-TERMINATED"
    code = Exit.TERMINATED
    blame = Blame.YOU
