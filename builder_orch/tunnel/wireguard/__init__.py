"""The WireGuard protocol (whitepaper revision of 2020) without I/O, clock or dice."""
