"""Remote Docker builds over user-mode WireGuard."""

from os import environ

from builder_orch.processor import choose_instructions

__version__ = "0.1.0"

choose_instructions(environ)
