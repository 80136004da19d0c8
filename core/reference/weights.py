"""Weights that a reference system brings along, read from safetensors alone. A file may come from a stranger."""
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..knob import shown

PIECE = 1 << 24     # bytes read at a time
ELEMENTS = 1 << 24  # looked at at a time


class Weights(NamedTuple):
    """digest: SHA-256 of the file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    digest: str
    name: str


def read_weights(path: Path | str, what: str) -> Weights:
    """All tensors of a file, in host memory; `what` the user was to choose, for an error. safetensors checks the header against the file's size."""
    path = Path(path)
    if path.suffix.lower() not in (".safetensors", ".sft"):
        raise ValueError(f"{path.name} is no safetensors file and no other kind is opened; choose {what} as .safetensors")
    if not path.is_file():
        raise ValueError(f"{path.name} is not there or no file; choose {what}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}    # noqa: SIM118 - no mapping
            metadata = dict(file.metadata() or {})
        return Weights(tensors, metadata, digest_of(path), path.name)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is damaged or cut off ({str(error)[:80]}); download it again") from error
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror or error}); choose {what}") from error


def check_weights(tensors: Mapping[str, Tensor], name: str) -> None:
    """Raise unless all of a file's tensors are of floating point, and of numbers."""
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has {shown(key)} of type {kind(tensor.dtype)} where weights are of floating point; download it again")
        if not finite(tensor):
            raise ValueError(f"{name} has values in {shown(key)} that are no numbers, which would make the whole picture so; download it again")


def finite(tensor: Tensor) -> bool:
    """Whether every value is a number; of whole numbers all are."""
    if not tensor.is_floating_point():
        return True
    pieces = tensor.flatten().split(ELEMENTS)      # a type of 8 bits has no test of its own, and a copy of a whole weight is large
    return all(bool((piece.float() if tensor.element_size() == 1 else piece).isfinite().all()) for piece in pieces)


def kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
