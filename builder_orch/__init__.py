"""Remote Docker builds over user-mode WireGuard."""

__version__ = "0.1.0"
