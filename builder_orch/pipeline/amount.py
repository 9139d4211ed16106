"""Octets in words; nothing else, since every command says some."""


def readable(octets: int) -> str:
    """`1.4 MB`: decimal, three digits or fewer."""
    amount = float(octets)
    for unit in ("bytes", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"
