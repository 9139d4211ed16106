"""Measurements: us against wireguard-go with gVisor's netstack, and against kernel TCP."""
