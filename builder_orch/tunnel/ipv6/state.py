"""The states of a connection (RFC 9293 §3.3.2), how it can end, and what it tells its host."""

from enum import Enum


class State(Enum):
    """RFC 9293 §3.3.2; LISTEN belongs to the stack."""

    SYN_SENT = "SYN-SENT"
    SYN_RECEIVED = "SYN-RECEIVED"
    ESTABLISHED = "ESTABLISHED"
    FIN_WAIT_1 = "FIN-WAIT-1"
    FIN_WAIT_2 = "FIN-WAIT-2"
    CLOSE_WAIT = "CLOSE-WAIT"
    CLOSING = "CLOSING"
    LAST_ACK = "LAST-ACK"
    TIME_WAIT = "TIME-WAIT"
    CLOSED = "CLOSED"


class End(Enum):
    """Why a connection is over."""

    FINISHED = "finished"
    REFUSED = "refused"
    RESET = "reset"
    TIMED_OUT = "timed out"
    UNREACHABLE = "unreachable"
    ABORTED = "aborted"


class Notice(Enum):
    """What a connection tells the stack that holds it."""

    OPENED = "opened"
    READABLE = "readable"
    WRITABLE = "writable"
    CLOSED = "closed"
