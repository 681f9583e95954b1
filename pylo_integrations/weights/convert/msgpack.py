"""A strict reader of the part of msgpack that array checkpoints use.

Written here and not taken from the ``msgpack`` package: that one would be a dependency of everybody for one command,
and its limits are per object, while a file from strangers needs a limit on their sum. Strict means: maps have unique
string keys, nesting and the number of values are bounded, no length is believed before its bytes are there, and no
extension type is interpreted.

Format: https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from pylo_integrations.weights.convert.errors import ConversionError

DEEPEST = 32
MOST_VALUES = 100_000
LONGEST_KEY = 256


class Extension(NamedTuple):
    """An extension value, not interpreted."""

    code: int
    payload: memoryview


_NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
_NUMBERS |= {0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_LENGTHS = {code: kind for first, kinds in ((0xC4, "BHI"), (0xC7, "BHI"), (0xD9, "BHI"), (0xDC, "HI"), (0xDE, "HI"))
            for code, kind in enumerate(kinds, first)}  # fmt: skip


def unpack(data: bytes | memoryview, most: int = MOST_VALUES) -> Any:
    """The one value that ``data`` holds.

    Args:
        data: All of it is used; bytes and extensions are returned as views into it.
        most: How many values it may have, counting those inside others.

    Raises:
        ConversionError: Not msgpack, cut off, beyond the bounds above, or followed by something else.
    """
    reader = _Reader(memoryview(data), most)
    value = reader.value(0)
    if reader.rest:
        raise ConversionError(f"{len(reader.rest)} bytes follow the end of the msgpack data")
    return value


class _Reader:
    def __init__(self, data: memoryview, most: int) -> None:
        self.rest = data
        self.left = most

    def take(self, size: int) -> memoryview:
        if size > len(self.rest):
            raise ConversionError(f"msgpack data is cut off: {size} bytes announced, {len(self.rest)} left")
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self, depth: int) -> Any:
        self.left -= 1
        if depth > DEEPEST or self.left < 0:
            raise ConversionError(f"msgpack data is nested deeper than {DEEPEST} or has too many values")
        code = self.number(">B")
        if code <= 0x7F or code >= 0xE0:
            return code if code <= 0x7F else code - 0x100
        if code <= 0x8F:
            return self.map(code & 0x0F, depth)
        if code <= 0x9F:
            return self.array(code & 0x0F, depth)
        if code <= 0xBF:
            return self.text(code & 0x1F)
        if code in _NUMBERS:
            return self.number(_NUMBERS[code])
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code]
        if 0xD4 <= code <= 0xD8:
            return self.extension(1 << (code - 0xD4))
        if code not in _LENGTHS:
            raise ConversionError(f"is not msgpack: byte {code:#04x} starts no value")
        length = self.number(f">{_LENGTHS[code]}")
        if code >= 0xDC:
            return (self.map if code >= 0xDE else self.array)(length, depth)
        read: Callable[[int], Any] = self.text if code >= 0xD9 else self.extension if code >= 0xC7 else self.take
        return read(length)

    def array(self, length: int, depth: int) -> list[Any]:
        self.expect(length)
        return [self.value(depth + 1) for _ in range(length)]

    def map(self, length: int, depth: int) -> dict[str, Any]:
        self.expect(2 * length)
        entries: dict[str, Any] = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if not isinstance(key, str) or len(key) > LONGEST_KEY or key in entries:
                raise ConversionError(f"a msgpack map has the key {repr(key)[:60]}: not a string, too long or double")
            entries[key] = self.value(depth + 1)
        return entries

    def expect(self, values: int) -> None:
        if values > len(self.rest):  # a value has at least one byte
            raise ConversionError(f"msgpack data is cut off: {values} values announced, {len(self.rest)} bytes left")

    def text(self, length: int) -> str:
        try:
            return str(self.take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise ConversionError(f"a msgpack string is not UTF-8: {error.reason}") from None

    def extension(self, length: int) -> Extension:
        return Extension(self.number(">b"), self.take(length))
