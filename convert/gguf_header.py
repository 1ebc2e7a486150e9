"""Whether a GGUF header stays inside its file, before the ``gguf`` package follows its counts and lengths.

The package reads an array item by item without looking for the end of the file: a false length keeps it busy, and takes
memory, for as long as the length says.
"""

import math
import mmap
import struct
from pathlib import Path

# Bytes of a value, by GGUF's number of its type: u8, i8, u16, i16, u32, i32, f32, bool, and u64, i64, f64.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MAX_AXES = 4


class _Cursor:
    """A place in a file that cannot leave it."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def skip(self, count: int) -> None:
        if count > len(self._data) - self._at:
            raise ValueError(f"{count} bytes are claimed at byte {self._at} of {len(self._data)}")
        self._at += count

    def number(self, form: str) -> int:
        start = self._at
        self.skip(struct.calcsize(form))
        value: int = struct.unpack_from(form, self._data, start)[0]
        return value

    def string(self) -> None:
        self.skip(self.number("<Q"))

    def value(self, kind: int) -> None:
        if kind == _ARRAY:
            item, count = self.number("<I"), self.number("<Q")
            if item == _STRING:
                # Every string takes eight bytes at least, so a false count soon leaves the file.
                for _ in range(count):
                    self.string()
            else:
                self.skip(count * self._size(item))
        elif kind == _STRING:
            self.string()
        else:
            self.skip(self._size(kind))

    def _size(self, kind: int) -> int:
        if kind not in _SIZES:
            raise ValueError(f"type {kind} at byte {self._at} is unknown")
        return _SIZES[kind]


def check_header(path: Path) -> None:
    """Walks through metadata and tensor descriptions.

    Raises:
      ValueError: the file is no little-endian GGUF of version 2 or 3, or its header claims more than the file holds.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        cursor = _Cursor(data)
        cursor.skip(4)
        if (version := cursor.number("<I")) not in (2, 3):
            raise ValueError(f"version {version} is not 2 or 3")
        tensors, fields = cursor.number("<Q"), cursor.number("<Q")
        for _ in range(fields):
            cursor.string()
            cursor.value(cursor.number("<I"))
        for _ in range(tensors):
            cursor.string()
            if (axes := cursor.number("<I")) > _MAX_AXES:
                raise ValueError(f"a tensor has {axes} axes")
            elements = math.prod([cursor.number("<Q") for _ in range(axes)])
            cursor.skip(4)
            # No type takes less than a bit per element.
            if elements > 8 * len(data) or cursor.number("<Q") > len(data):
                raise ValueError("a tensor lies outside the file")
