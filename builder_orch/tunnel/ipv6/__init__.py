"""One IPv6 host with TCP, UDP and ICMPv6, without I/O, clock or dice."""
