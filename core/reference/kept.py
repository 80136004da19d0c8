"""Keys and values of reference tokens as they were in one evaluation, kept for those after it.

A run's own, unlike an entry: they hang on the noise and the text of that evaluation and on the row of the batch.
"""
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..store import Snapshot, narrowed


@dataclass(frozen=True)
class Kept:
    """One row's, to be lent like an entry: blocks as {name: (K, V)}, each [1, H, T, D]; ids [T, axes] where K is not rotated yet."""

    blocks: Mapping[str, tuple[Snapshot, Snapshot]]
    ids: Tensor | None = None

    @property
    def entry(self) -> "Kept":
        return self

    @property
    def rope(self) -> str:
        return "post" if self.ids is None else "pre"

    @property
    def tokens(self) -> int:
        return next(iter(self.blocks.values()))[0].shape[2]

    @property
    def bytes(self) -> int:
        own = 0 if self.ids is None else self.ids.numel() * self.ids.element_size()
        return own + sum(snapshot.bytes for pair in self.blocks.values() for snapshot in pair)

    def block(self, name: str) -> tuple[Tensor, Tensor]:
        k, v = self.blocks[name]
        return k.value, v.value


def stored(value: Tensor, storage: str) -> Snapshot:
    """A copy of its own, in 8 bits where that is asked for."""
    kept, scale = narrowed(value, storage)
    if kept is value:
        return Snapshot(None, value.clone(memory_format=torch.contiguous_format))
    return Snapshot(None, kept.contiguous(), scale, (value.dtype, value.device))


@dataclass
class Taking:
    """What one model call gives of its reference tokens. It counts only when every block has given them."""

    rows: int
    names: Iterable[str]
    storage: str = "same"
    ids: Tensor | None = None       # [R, T, axes]
    each: list[dict] = field(default_factory=list)
    short: bool = False             # of memory
    empty: bool = False             # there are no reference tokens

    def __post_init__(self):
        self.each = [{} for _ in range(self.rows)]

    def put(self, name: str, k: Tensor, v: Tensor) -> None:
        """[R, H, T, D] of a block."""
        self.empty = self.empty or not k.shape[2]
        if self.short or self.empty or k.shape[0] != self.rows:
            return
        try:
            for row, blocks in enumerate(self.each):
                blocks[name] = (stored(k[row:row + 1], self.storage), stored(v[row:row + 1], self.storage))
        except torch.OutOfMemoryError:
            self.short, self.each = True, [{} for _ in range(self.rows)]

    def result(self) -> list[Kept] | None:
        """Of each row; none where a block was left out, as guidance that skips blocks or a step cache does."""
        if any(set(blocks) != set(self.names) for blocks in self.each):
            return None
        return [Kept(blocks, None if self.ids is None else self.ids[row]) for row, blocks in enumerate(self.each)]
