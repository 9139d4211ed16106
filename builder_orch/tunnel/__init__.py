"""User-mode WireGuard with a TCP/IPv6 stack, usable alone."""
