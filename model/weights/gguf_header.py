"""Check the header of a .gguf file against the file's size, before anything is built from it.

The reader of the gguf package trusts the header: a count of 2**60 there would loop for years. The layout is that of
ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

import math
import struct
from pathlib import Path

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type -> bytes
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4


class Header:
    """A cursor in the file. Its methods raise ValueError where the file is shorter than the header says."""

    def __init__(self, path: Path):
        self.size = path.stat().st_size
        self.file = open(path, "rb")  # noqa: SIM115 - closed by check_header

    def number(self, kind: str) -> int:
        width = struct.calcsize(kind)
        content = self.file.read(width)
        if len(content) < width:
            raise ValueError("it ends within its header")
        return struct.unpack("<" + kind, content)[0]

    def skip(self, count: int, width: int, what: str) -> None:
        if count * width > self.size - self.file.tell():
            raise ValueError(f"{what} announces {count} values, more than the file holds")
        self.file.seek(count * width, 1)

    def text(self, what: str) -> str:
        length = self.number("Q")
        if length > min(self.size - self.file.tell(), 1 << 26):
            raise ValueError(f"{what} announces a text of {length} bytes, more than the file holds")
        return self.file.read(length).decode("utf-8", errors="replace")


def check_header(path: Path) -> None:
    """Raise ValueError unless every count, length and size in the header fits into the file."""
    header = Header(path)
    with header.file:
        if header.file.read(4) != b"GGUF" or header.number("I") not in (2, 3):
            raise ValueError("it does not begin as GGUF 2 or 3")
        num_tensors, num_fields = header.number("Q"), header.number("Q")
        for what, count, least in (("fields", num_fields, 13), ("tensors", num_tensors, 32)):
            if count * least > header.size:
                raise ValueError(f"it announces {count} {what}, more than the file holds")
        for _ in range(num_fields):
            name = header.text("a field's name")
            _check_value(header, header.number("I"), name)
        for _ in range(num_tensors):
            name, dimensions = header.text("a tensor's name"), header.number("I")
            if dimensions > MAX_DIMENSIONS:
                raise ValueError(f"the tensor {name} has {dimensions} dimensions")
            elements = math.prod(header.number("Q") for _ in range(dimensions))
            if elements > 8 * header.size:  # every format has at least one bit per weight
                raise ValueError(f"the tensor {name} has {elements} elements, more than the file holds")
            header.number("I"), header.number("Q")


def _check_value(header: Header, kind: int, name: str) -> None:
    if kind == ARRAY:
        kind, count = header.number("I"), header.number("Q")
        if kind == STRING:
            if count * 8 > header.size:
                raise ValueError(f"{name} announces {count} texts, more than the file holds")
            for _ in range(count):
                header.skip(header.number("Q"), 1, name)
            return
        if kind not in SIZES:
            raise ValueError(f"{name} is an array of {'arrays' if kind == ARRAY else f'values of kind {kind}'}")
        header.skip(count, SIZES[kind], name)
    elif kind == STRING:
        header.skip(header.number("Q"), 1, name)
    elif kind in SIZES:
        header.skip(1, SIZES[kind], name)
    else:
        raise ValueError(f"{name} is of the unknown kind {kind}")
