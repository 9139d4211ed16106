"""A background process that holds tunnels for all commands of one user; PROTOCOL.md beside it."""

PROTOCOLS = (1, 1)
"""The first and the last version of the protocol that this release speaks."""
