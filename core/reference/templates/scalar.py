"""Templates of numbers: Brightness, Sharpness, Age with one, SoftRGB with three.

    e = sincos_256(1000 value_1), sincos_256(1000 value_2), ...
    k_t = W2 silu(W1 e + b1) + b2 + p_t        t = 1 ... T, for each block, v alike with weights of its own

p is learnt, [T, C]. K is never rotated: its tokens have no place in the picture.
"""
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from comfy.ldm.flux.layers import timestep_embedding
from torch import Tensor
from torch.nn import functional as F

from ..entry import Entry
from .base import BLOCK, Shapes, WrongTemplate, by_head, check_shapes, check_width, entry_of, in_order, kept_as, key_of
from .file import File

WAVES = 256     # of the sine and cosine code of one value
MOST_VALUES = 3
KEY = re.compile(rf"proj_[kv]\.({BLOCK})\.prefer_value_embedder\.0\.weight")


@dataclass(frozen=True, eq=False)
class Scalar:
    """blocks: as the file names them, in the network's order; values: how many numbers it takes."""

    file: File
    blocks: tuple[str, ...]
    tokens: int
    width: int
    values: int

    name, options = "scalar", ()

    @classmethod
    def recognises(cls, shapes: Shapes) -> bool:
        return any(KEY.fullmatch(key) for key in shapes)

    @classmethod
    def read(cls, file: File) -> "Scalar":
        blocks = in_order((match[1] for key in file.shapes if (match := KEY.fullmatch(key))), file.name)
        first = f"proj_k.{blocks[0]}"
        tokens, width = two(file.shapes.get(f"{first}.positional_embedding"), file.name, "positional_embedding")
        _, columns = two(file.shapes.get(f"{first}.prefer_value_embedder.0.weight"), file.name, "prefer_value_embedder.0.weight")
        check_width(file, width)
        values = columns // WAVES
        if columns % WAVES or not 1 <= values <= MOST_VALUES:
            raise WrongTemplate(f"{file.name} reads {columns} numbers where a template of 1 to {MOST_VALUES} values reads {WAVES} for each; "
                                "load Brightness, Sharpness, Age or SoftRGB")
        wanted = {"prefer_value_embedder.0.weight": (width, columns), "prefer_value_embedder.0.bias": (width,),
                  "prefer_value_embedder.2.weight": (width, width), "prefer_value_embedder.2.bias": (width,), "positional_embedding": (tokens, width)}
        check_shapes(file, {f"proj_{part}.{block}.{key}": shape for part in "kv" for block in blocks for key, shape in wanted.items()})
        return cls(file, blocks, tokens, width, values)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return self.file.tensors()

    def entry(self, values: Sequence[float]) -> Entry:
        """Its keys and values; computed in single precision and kept in the file's."""
        if len(values) != self.values:
            raise ValueError(f"{self.file.name} takes {self.values} values and {len(values)} came; give it as many as it takes")
        code = torch.cat([timestep_embedding(torch.tensor([float(value)]), WAVES)[0] for value in values])
        dtype = kept_as(self.tensors[f"proj_k.{self.blocks[0]}.positional_embedding"].dtype)
        blocks = {block: tuple(by_head(self.projected(f"proj_{part}.{block}", code).to(dtype)) for part in "kv") for block in self.blocks}
        key = key_of(self.file, repr([float(value) for value in values]), f"float32 kept as {dtype}")
        return entry_of(blocks, key, f"template {self.file.name}, {', '.join(f'{value:g}' for value in values)}", "none")

    def projected(self, name: str, code: Tensor) -> Tensor:
        """[T, C]"""
        def part(end: str) -> Tensor:
            return self.tensors[f"{name}.{end}"].float()

        hidden = F.silu(F.linear(code, part("prefer_value_embedder.0.weight"), part("prefer_value_embedder.0.bias")))
        return F.linear(hidden, part("prefer_value_embedder.2.weight"), part("prefer_value_embedder.2.bias")) + part("positional_embedding")


def two(shape: tuple[int, ...] | None, file: str, key: str) -> tuple[int, int]:
    if shape is None or len(shape) != 2:
        raise WrongTemplate(f"{file} has no matrix {key}; it is not whole, download it again")
    return shape
