"""The one clock that the tunnel runs by."""

import time


def boot_time() -> float:
    """Seconds on a clock that counts suspended time, as WireGuard's timers need it."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()
