"""The WireGuard protocol (whitepaper revision of 2020) without I/O, clock or dice.

From the outside in: `interface` (one key, many peers) → `peer` (timers, key slots, roaming) →
`handshake` and `session` → `noise`, `cookie`, `replay`, `message`, `routes`, `timers`, `tai64n`.
"""
