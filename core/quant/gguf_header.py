"""What a GGUF header says, read with every length checked against the file before anything is made of it.

    header:  magic, version, number of tensors, number of settings
    setting: name, type, value                          a value is a number, a text, or a list of one kind of these
    tensor:  name, dimensions (fastest first), type, offset into the data
    data:    starts at the next multiple of the alignment, as does each tensor

All numbers are little-endian. From the GGUF specification (ggml, docs/gguf.md), versions 2 and 3.
"""
from __future__ import annotations

import math
import struct
from dataclasses import dataclass, field

from .files import GGUF_MAGIC, BadFile

VERSIONS = (2, 3)
MOST_SETTINGS = MOST_TENSORS = 1 << 14      # a model has hundreds of either
MOST_TEXTS = 1 << 20                        # in all lists together: the largest vocabularies have half of that, with their merges
LONGEST_TEXT, LONGEST_NAME = 1 << 20, 1 << 10
MOST_DIMENSIONS = 4
LARGEST = 1 << 48                           # elements of a tensor
ALIGNMENT, SETTING = 32, "general.alignment"
NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
UINT32, TEXT, LIST = 4, 8, 9
SHAPE = "comfy.gguf.orig_shape."            # the shape of a tensor that had more dimensions than its blocks allow


@dataclass(frozen=True)
class Info:
    """A tensor of the file. shape: as torch has it, the fastest dimension last."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int         # from the start of the file
    nbytes: int


@dataclass
class Header:
    settings: dict[str, str] = field(default_factory=dict)              # numbers and texts; lists are passed over
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)    # told by SHAPE settings
    lists: dict[int, int] = field(default_factory=dict)                 # where a list starts -> its bytes
    infos: list[Info] = field(default_factory=list)


class Cursor:
    """Reads forward through `data`; BadFile where a length points beyond its end."""

    def __init__(self, data, name: str):
        self.data, self.name, self.at, self.size = data, name, 0, len(data)
        self.texts = 0      # in lists so far

    def skip(self, count: int, what: str) -> int:
        """Passes over `count` bytes. Returns where they start."""
        start = self.at
        if count > self.size - start:
            raise BadFile(f"'{self.name}' ends within {what}, where its header asks for {count} bytes more than byte {start}; download it again")
        self.at = start + count
        return start

    def number(self, form: str, what: str):
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form), what))[0]

    def text(self, longest: int, what: str) -> str:
        length = self.number("<Q", what)
        if length > longest:
            raise BadFile(f"'{self.name}': {what} is {length} bytes long, and at most {longest} were expected; the file is damaged")
        start = self.skip(length, what)
        try:
            return bytes(self.data[start:self.at]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadFile(f"'{self.name}': {what} is no UTF-8 text; the file is damaged") from error

    def pass_list(self, what: str) -> tuple[int, int]:
        """Passes over a list. Returns the type of its entries and how many there are."""
        kind, count = self.number("<I", what), self.number("<Q", what)
        if kind in NUMBERS:
            self.skip(count * struct.calcsize(NUMBERS[kind]), what)
        elif kind == TEXT:
            self.texts += count
            if self.texts > MOST_TEXTS:
                raise BadFile(f"'{self.name}': {what} brings the texts of its header to {self.texts}, and at most {MOST_TEXTS} were expected; it is damaged")
            for _ in range(count):
                self.skip(self.number("<Q", what), what)
        else:
            raise BadFile(f"'{self.name}': {what} is a list of entries of type {kind}, which no model file has; the file is damaged")
        return kind, count


def read_header(data, name: str, sizes: dict[int, tuple[int, int]]) -> Header:
    """data: the whole file as bytes, mapped. sizes: type -> (elements of a block, bytes of a block). BadFile names what is wrong."""
    cursor = Cursor(data, name)
    if bytes(data[:4]) != GGUF_MAGIC:
        raise BadFile(f"'{name}' is no GGUF file; choose another")
    cursor.skip(4, "its header")
    version = cursor.number("<I", "its header")
    if version not in VERSIONS:
        order = version & 0xffff == 0 and version != 0
        raise BadFile(f"'{name}' is " + ("a big-endian GGUF file, and little-endian ones are read" if order else
                      f"GGUF version {version}, and versions 2 and 3 are read") + "; download another conversion of the model")
    tensors, settings = cursor.number("<Q", "its header"), cursor.number("<Q", "its header")
    for count, most, what in ((tensors, MOST_TENSORS, "tensors"), (settings, MOST_SETTINGS, "settings")):
        if count > most:
            raise BadFile(f"'{name}' says it has {count} {what}, and at most {most} were expected; the file is damaged")
    header = Header()
    names: set[str] = set()
    alignment = ALIGNMENT
    for index in range(settings):
        key, value = read_setting(cursor, header, f"setting {index}")
        if key in names or key in ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"):       # the reader's own names for the header's numbers
            raise BadFile(f"'{name}' has the setting '{key[:100]}' twice; the file is damaged")
        names.add(key)
        if key == SETTING:
            alignment = value
    if not isinstance(alignment, int) or isinstance(alignment, bool) or not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
        raise BadFile(f"'{name}' aligns its tensors to {alignment!r} bytes, and a power of two was expected; the file is damaged")
    told = [read_info(cursor, f"tensor {index}") for index in range(tensors)]
    start = -(-cursor.at // alignment) * alignment
    header.infos = [placed(*info, start, alignment, len(data), name, sizes) for info in told]
    check_overlap(header.infos, name)
    return header


def read_setting(cursor: Cursor, header: Header, what: str) -> tuple[str, object]:
    key = cursor.text(LONGEST_NAME, f"the name of {what}")
    what, kind = f"setting '{key[:100]}'", cursor.number("<I", what)
    value: object = None
    if kind in NUMBERS:
        value = cursor.number(NUMBERS[kind], what)
        if kind != UINT32 and key == SETTING:
            value = f"entries of type {kind}"
    elif kind == TEXT:
        value = cursor.text(LONGEST_TEXT, what)
    elif kind == LIST:
        start = cursor.at
        of, count = cursor.pass_list(what)
        header.lists[start] = cursor.at - start
        if key.startswith(SHAPE):
            if of not in NUMBERS or NUMBERS[of] in ("<f", "<d", "<?") or count > 8:
                raise BadFile(f"'{cursor.name}': {what} is no shape; the file is damaged")
            form = NUMBERS[of]
            shape = struct.unpack_from(f"<{count}{form[1]}", cursor.data, start + 12)
            if any(not 0 < length < LARGEST for length in shape):
                raise BadFile(f"'{cursor.name}': {what} is {list(shape)}, which is no shape; the file is damaged")
            header.shapes[key.removeprefix(SHAPE)] = shape
    else:
        raise BadFile(f"'{cursor.name}': {what} is of type {kind}, which no GGUF file has; the file is damaged")
    if value is not None:
        header.settings[key] = str(value)
    return key, value


def read_info(cursor: Cursor, what: str) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.text(LONGEST_NAME, f"the name of {what}")
    what = f"tensor '{name[:100]}'"
    dimensions = cursor.number("<I", what)
    if dimensions > MOST_DIMENSIONS:
        raise BadFile(f"'{cursor.name}': {what} has {dimensions} dimensions, and GGUF has at most {MOST_DIMENSIONS}; the file is damaged")
    shape = tuple(cursor.number("<Q", what) for _ in range(dimensions))[::-1]
    return name, shape, cursor.number("<I", what), cursor.number("<Q", what)


def placed(tensor: str, shape: tuple[int, ...], kind: int, offset: int, start: int, alignment: int, size: int, name: str,
           sizes: dict[int, tuple[int, int]]) -> Info:
    """The tensor's place in the file; BadFile where it does not fit its type or the file."""
    what = f"'{name}': tensor '{tensor[:100]}'"
    if kind not in sizes:
        raise BadFile(f"{what} is of type {kind}, which the installed gguf package does not know; update the package or download another conversion")
    if any(not 0 < length < LARGEST for length in shape) or math.prod(shape) >= LARGEST:
        raise BadFile(f"{what} has the shape {list(shape)}, which is no shape; the file is damaged")
    block, nbytes = sizes[kind]
    row = shape[-1] if shape else 1
    if row % block:
        raise BadFile(f"{what} has rows of {row}, which are no whole blocks of {block}; the file was written by something that does not follow the format")
    nbytes = math.prod(shape) // block * nbytes
    if offset % alignment:
        raise BadFile(f"{what} starts at byte {offset} of the data, which is no multiple of {alignment}; the file is damaged")
    if start + offset + nbytes > size:
        raise BadFile(f"{what} ends at byte {start + offset + nbytes} and the file has {size}; it is not whole, download it again")
    return Info(tensor, shape, kind, start + offset, nbytes)


def check_overlap(infos: list[Info], name: str) -> None:
    ordered = sorted(infos, key=lambda info: info.offset)
    for before, after in zip(ordered, ordered[1:], strict=False):
        if before.offset + before.nbytes > after.offset:
            raise BadFile(f"'{name}': tensors '{before.name[:100]}' and '{after.name[:100]}' lie over each other; the file is damaged")
    if len({info.name for info in infos}) < len(infos):
        raise BadFile(f"'{name}' has two tensors of one name; the file is damaged")
