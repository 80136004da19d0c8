"""A model file, opened without reading its weights: what its header says, checked before anything is allocated.

The container is told by the first bytes, never by the name. Tensors are views of the mapped file.
"""
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import comfy.utils
import safetensors
from torch import Tensor

GGUF_MAGIC = b"GGUF"
LONGEST = 500               # characters of an error
MOST_METADATA = 1 << 20     # characters of one JSON text that we read out of a header


@dataclass
class WeightFile:
    """What a file holds. `tensors` are views of the mapped file; `packed` are GGUF blocks, as bytes with their shape and type."""

    path: Path
    container: str                      # "safetensors" or "gguf"
    metadata: dict[str, str]
    tensors: dict[str, Tensor]
    packed: dict[str, "Blocks"] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Blocks:
    """One GGUF tensor: its rows as blocks of bytes, a view of the file."""

    type: str                           # "Q4_K"
    shape: tuple[int, ...]              # as torch has it: [N, K]
    bytes: Tensor                       # uint8 [N, bytes of a row]


class BadFile(ValueError):
    """A file that cannot be what it says it is; one sentence for the user, whatever names the file has in it."""

    def __init__(self, sentence: str):
        told = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in sentence)
        super().__init__(told if len(told) <= LONGEST else f"{told[:LONGEST // 2]} ... {told[-LONGEST // 2:]}")


def open_file(path: Path | str) -> WeightFile:
    """Reads and checks the header. BadFile where it is not whole, or not a container that is read here."""
    path = Path(path)
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            first = file.read(9)
    except OSError as error:
        raise BadFile(f"'{path.name}' cannot be read: {error.strerror or error}") from error
    if len(first) < 9:
        raise BadFile(f"'{path.name}' has {size} bytes, which is no model file; download it again")
    for fits, reader in CONTAINERS:
        if fits(first, size):
            return reader(path)
    raise BadFile(f"'{path.name}' is neither a safetensors nor a GGUF file; other kinds of files can run code and are not opened")


def safetensors_header(first: bytes, size: int) -> bool:
    """A length that a header can have, and JSON. A truncated header is let through, to be told as such."""
    (length,) = struct.unpack("<Q", first[:8])
    return 2 <= length <= 100_000_000 and first[8:] == b"{"


def open_safetensors(path: Path) -> WeightFile:
    try:
        with safetensors.safe_open(path, framework="pt") as file:     # checks that every tensor lies in the file and fills its shape
            metadata = file.metadata() or {}
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise BadFile(f"'{path.name}' is not a whole safetensors file ({error}); download it again") from error
    # The host's own reader, as its dynamic memory streams weights from the files that it opened itself.
    named = str(path) if path.suffix.lower() in (".safetensors", ".sft") else None
    if named is not None:
        tensors = comfy.utils.load_torch_file(named)
    else:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}    # noqa: SIM118 - it is no dict
    return WeightFile(path, "safetensors", metadata, tensors)


def open_gguf(path: Path) -> WeightFile:
    from .gguf_file import read_gguf  # needs a package that may be missing

    return read_gguf(path)


CONTAINERS: tuple[tuple[Callable[[bytes, int], bool], Callable[[Path], WeightFile]], ...] = (
    (lambda first, size: first.startswith(GGUF_MAGIC), open_gguf),
    (safetensors_header, open_safetensors),
)


def whole_numbers(name: str, key: str, tensor: Tensor) -> BadFile:
    """The error where a tensor of the file `name` has whole numbers, and the model's has none."""
    kind = str(tensor.dtype).removeprefix("torch.")
    return BadFile(f"'{name}': '{key}' holds {kind}, and its model has fractions there; the file is damaged or of a format that is not read")


def json_of(text: str | bytes, whose: str) -> dict:
    """A JSON object out of a header; BadFile names `whose` it is."""
    if len(text) > MOST_METADATA * 16:
        raise BadFile(f"{whose} is {len(text)} characters of JSON, more than any model needs")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{whose} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise BadFile(f"{whose} is JSON of {type(value).__name__}, and a JSON object was expected")
    return value
