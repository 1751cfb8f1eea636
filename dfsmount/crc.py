"""CRC-32C of strings put together from those of their parts. Pure.

The checksum is linear: what the first string adds to that of both is its own times x to the power of the bits that
follow, modulo the polynomial (as zlib's crc32_combine does for the other CRC-32). Polynomials over GF(2) are integers
with the lowest power in the highest bit.
"""

from functools import lru_cache

_POLYNOMIAL = 0x82F63B78
_ONE = 1 << 31
_ALL_ONES = 0xFFFFFFFF


def _times(a: int, b: int) -> int:
    product = 0
    bit = _ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


def _squares() -> tuple[int, ...]:
    """x to the powers 8, 16, 32, ...: as many as a length of 64 bits, in bytes, has."""
    power = 1 << 30
    for _ in range(3):
        power = _times(power, power)
    found = []
    for _ in range(64):
        found.append(power)
        power = _times(power, power)
    return tuple(found)


_SQUARES = _squares()


@lru_cache(maxsize=4096)
def _shift(length: int) -> int:
    """x to the power of the bits in ``length`` bytes. Most blocks of a file are of the same length."""
    power = _ONE
    for at in range(length.bit_length()):
        if length >> at & 1:
            power = _times(_SQUARES[at], power)
    return power


def joined(first: int, second: int, length: int) -> int:
    """The checksum of two strings one after the other, from theirs and the ``length`` of the second in bytes."""
    return _times(_shift(length), first) ^ second


def of_zeros(length: int) -> int:
    """The checksum of so many zero bytes."""
    return _times(_shift(length), _ALL_ONES) ^ _ALL_ONES
