"""Protocol Buffers as octets: just the encoding, for messages that are written down by hand."""

from collections.abc import Iterator, Mapping

from builder_orch.tunnel.machine import Malformed

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types (encoding guide, "message structure"); groups are obsolete and refused."""
LONGEST_VARINT = 10
_WORD = 1 << 64

Value = int | bytes


def varint(number: int) -> bytes:
    """A whole number in base 128, least significant group first; negative ones as 64 bits."""
    number %= _WORD
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    made.append(number)
    return bytes(made)


def number_field(field: int, number: int) -> bytes:
    """An integer or bool; nothing for zero, which is what an absent field means."""
    return varint(field << 3 | VARINT) + varint(number) if number else b""


def bytes_field(field: int, octets: bytes) -> bytes:
    """A string, bytes or a message; nothing for an empty one."""
    return message_field(field, octets) if octets else b""


def message_field(field: int, octets: bytes) -> bytes:
    """A message inside another, which counts even if it is empty."""
    return varint(field << 3 | BYTES) + varint(len(octets)) + octets


def text_field(field: int, text: str) -> bytes:
    """A string; names of files that are no UTF-8 keep their octets."""
    return bytes_field(field, text.encode("utf-8", "surrogateescape"))


def map_field(field: int, entries: Mapping[str, str | bytes]) -> bytes:
    """A map with string keys, in the order of its keys."""
    made = bytearray()
    for key in sorted(entries):
        value = entries[key]
        octets = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
        made += message_field(field, text_field(1, key) + bytes_field(2, octets))
    return bytes(made)


def fields(octets: bytes) -> Iterator[tuple[int, Value]]:
    """The fields of a message in their order, with their numbers.

    Malformed for what is no message. Fixed-size fields come as their octets.
    """
    at = 0
    while at < len(octets):
        key, at = _varint(octets, at)
        field, kind = key >> 3, key & 7
        if not field:
            raise Malformed("a field has the number 0")
        match kind:
            case 0:  # VARINT
                number, at = _varint(octets, at)
                yield field, number
                continue
            case 1 | 5:  # FIXED64, FIXED32
                size = 8 if kind == FIXED64 else 4
            case 2:  # BYTES
                size, at = _varint(octets, at)
            case _:
                raise Malformed(f"a field has the wire type {kind}")
        if size > len(octets) - at:
            raise Malformed(f"a field of {size} octets in a message that ends before")
        yield field, octets[at : at + size]
        at += size


def signed(number: Value | None) -> int:
    """The value of an int64 field; 0 where it is absent."""
    number = whole(number)
    return number - _WORD if number >= _WORD // 2 else number


def whole(number: Value | None) -> int:
    """The value of an unsigned field; 0 where it is absent. Malformed if it was something else."""
    if number is None:
        return 0
    if not isinstance(number, int):
        raise Malformed("octets where a number belongs")
    return number


def raw(value: Value | None) -> bytes:
    """The octets of a bytes or message field; none where it is absent."""
    if value is None:
        return b""
    if not isinstance(value, bytes):
        raise Malformed("a number where octets belong")
    return value


def text(value: Value | None) -> str:
    """The value of a string field, in whose octets nothing is lost."""
    return raw(value).decode("utf-8", "surrogateescape")


def entry(octets: bytes) -> tuple[str, str]:
    """A key and a value of a map from string to string."""
    key, value = entry_of_octets(octets)
    return key, text(value)


def entry_of_octets(octets: bytes) -> tuple[str, bytes]:
    """A key and a value of a map from string to bytes."""
    found = dict(fields(octets))
    return text(found.get(1)), raw(found.get(2))


def _varint(octets: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    for place in range(at, min(at + LONGEST_VARINT, len(octets))):
        octet = octets[place]
        number |= (octet & 0x7F) << shift
        if octet < 0x80:
            return number % _WORD, place + 1
        shift += 7
    raise Malformed("a number without an end")
