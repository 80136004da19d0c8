"""A format: how a file stores the weight of a linear layer."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from ..files import WeightFile
from ..layer import Layer


class Format(Protocol):
    """Takes the layers that it knows out of what is left of a file.

    `claim` removes from `left` every tensor that it makes a layer of, and nothing else; it raises BadFile, naming the layer,
    where a tensor that must be there is missing or has a shape that cannot be. `left` has tensors and GGUF blocks by key. A format
    whose files have names of their own gives what it leaves the host's.
    """

    names: tuple[str, ...]      # Layer.format of the layers it finds
    note: str                   # one line for the help page

    def claim(self, file: WeightFile, left: dict) -> Iterable[Layer]: ...
