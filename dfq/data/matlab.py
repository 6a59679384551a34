"""The numeric arrays of a MATLAB level 5 file, as SVHN's are stored. Source: "MAT-File Format", MathWorks, chapter 1.

A file is a header of 128 bytes and a run of elements `type, size, data`; an array is an element of type 14 that holds
flags, dimensions, a name and the values in column-major order, and may be wrapped in a zlib stream (type 15).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

_NUMERIC = {1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8", 13: "<u8"}
_MATRIX, _COMPRESSED = 14, 15


def read_mat(data: bytes) -> dict[str, np.ndarray]:
    """All numeric arrays of the file, by name.

    Raises:
        ValueError: not a little-endian level 5 file, truncated, or an array that is not numeric.
    """
    if len(data) < 128 or data[126:128] != b"IM":
        raise ValueError("a little-endian MATLAB level 5 file must start with a header of 128 bytes ending in IM")
    arrays = {}
    for kind, body in _elements(data[128:]):
        if kind == _COMPRESSED:
            kind, body = next(_elements(zlib.decompress(body)), (0, b""))
        if kind == _MATRIX:
            name, array = _matrix(body)
            arrays[name] = array
    return arrays


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, position)
        if kind >> 16:  # small element: size and type share a word, the data sits in the next one
            kind, size, start, end = kind & 0xFFFF, kind >> 16, position + 4, position + 8
        else:
            start = position + 8
            end = start + size if kind == _COMPRESSED else start + (size + 7) // 8 * 8
        if start + size > len(data):
            raise ValueError(
                f"an element of {size} bytes must fit the file, got {len(data) - start} bytes (truncated?)"
            )
        yield kind, data[start : start + size]
        position = end


def _matrix(body: bytes) -> tuple[str, np.ndarray]:
    parts = list(_elements(body))
    if len(parts) < 4 or parts[3][0] not in _NUMERIC:
        raise ValueError("an array must hold flags, dimensions, a name and numeric values")
    shape = np.frombuffer(parts[1][1], "<i4")
    values = np.frombuffer(parts[3][1], _NUMERIC[parts[3][0]])
    if values.size != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(f"an array of shape {tuple(shape)} must hold {np.prod(shape)} values, got {values.size}")
    return parts[2][1].decode("ascii"), values.reshape(shape, order="F")
