"""What reaching an inside host by name can fail with, beside the built-in errors of sockets."""


class NameUnknown(OSError):
    """The inside name server says that there is no such name, or no address for it."""


class ServerFailed(OSError):
    """The inside name server answered that it cannot answer."""
