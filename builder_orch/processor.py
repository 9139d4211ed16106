"""What OpenSSL may use of the processor in this process.

512-bit instructions cost an Intel core more than they give to packets of 1420 octets: the cipher
itself takes 1.6 us for one instead of 1.2, and for a while afterwards the core runs slower whatever
it does. Measured on a server core of 2023: upload 205 MB/s with them, 290 without.

OpenSSL reads the variable once, when it is loaded, so this is asked for before anything else. The
copy that `cryptography` brings is meant; Python's own, for TLS, takes it too.
"""

from collections.abc import MutableMapping
from pathlib import Path

VARIABLE = "OPENSSL_ia32cap"
"""OPENSSL_ia32cap(3); the second word, after the colon, is what leaf 7 of CPUID says in EBX."""
WITHOUT_AVX512 = ":~0x10000"
"""Bit 16, AVX512F. The 256-bit forms of the same instructions (AVX512VL) stay."""
CPUINFO = Path("/proc/cpuinfo")
VENDOR = b"GenuineIntel"
HEAD = 128
"""Octets; the vendor is in the second line, and the rest takes long with many cores."""


def choose_instructions(environ: MutableMapping[str, str], cpuinfo: Path = CPUINFO) -> None:
    """Ask OpenSSL for no 512-bit instructions where they cost; what the user says holds.

    Other makers' processors are left as they are: nothing is known of them. So is one of which the
    system does not tell (no `/proc`).
    """
    if VARIABLE in environ:
        return
    try:
        with cpuinfo.open("rb") as lines:
            head = lines.read(HEAD)
    except OSError:
        return
    if VENDOR in head:
        environ[VARIABLE] = WITHOUT_AVX512
