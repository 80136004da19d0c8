"""The tensors of a run that outlive an evaluation: snapshots in rings, one ring per row, all of them counted.

A snapshot may be kept narrower than it came and in host memory; whoever asks for its value gets it as it came:

    bf16:   kept = bf16(H)              a type of two bytes or fewer stays as it is
    fp8:    kept = e4m3(H / s)          s = max|H| / 448, one per snapshot
"""
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .step import Step

SAME_PLACE = 1e-3  # steps; a second evaluation at the same sigma replaces the first
ITEMSIZE = {"same": 8, "bf16": 2, "fp8": 1}     # bytes at most per element
STORAGE = tuple(ITEMSIZE)
FP8 = torch.float8_e4m3fn
MIB = 1 << 20
ASIDE = "reprise.aside"     # in transformer_options: this model call measures something beside the run, and no cache takes part in it


class Snapshot(NamedTuple):
    step: Step
    kept: Tensor
    scale: Tensor | None = None     # of fp8, 0-d
    came: tuple[torch.dtype, torch.device] | None = None    # none where it is kept as it came

    @property
    def value(self) -> Tensor:
        """As it was put in, rounding set aside. A new tensor where it is kept in another way; the copy back is queued like any work on the GPU."""
        if self.came is None:
            return self.kept
        value = self.kept.to(self.device, non_blocking=self.kept.is_pinned())
        return value.to(self.dtype) if self.scale is None else (value.float() * self.scale).to(self.dtype)

    @property
    def shape(self) -> torch.Size:
        return self.kept.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.came[0] if self.came else self.kept.dtype

    @property
    def device(self) -> torch.device:
        return self.came[1] if self.came else self.kept.device

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.kept, self.scale) if t is not None)


class Row(NamedTuple):
    """One condition of one batch: what its state is kept under.

    The host may batch or split conditions as memory allows, positive and negative can share a uuid, guidance that
    skips layers evaluates the same condition again (`ordinal`), and context windows call the model once each.
    """

    device: str
    ordinal: int
    uuid: object
    cond: int
    window: tuple | None
    shape: tuple
    patches: frozenset = frozenset()    # keys of replaced blocks: when one such guidance ends, the next takes its ordinal
    stream: str = ""                    # the second of a model with two streams, by name
    blocks: tuple[int, int] | None = None   # the range whose residual this is: its first block, and the one behind its last


def page_locked(value: Tensor) -> Tensor | None:
    """Host memory for a copy of `value`, page-locked so that a GPU copies while it computes; none where `value` lies in host memory."""
    if value.device.type == "cpu":
        return None
    try:
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda")
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
    return torch.empty(value.shape, dtype=value.dtype)      # page-locked memory is the scarcer


def narrowed(value: Tensor, storage: str) -> tuple[Tensor, Tensor | None]:
    """`value` in no more bytes per element than `storage` has, and the scale that undoes it."""
    if value.element_size() <= ITEMSIZE[storage]:
        return value, None
    if storage == "bf16":
        return value.to(torch.bfloat16), None
    largest = torch.finfo(FP8).max
    scale = value.abs().amax().float().clamp_min(1e-12) / largest
    return (value.float() / scale).clamp_(-largest, largest).to(FP8), scale


@dataclass
class Store:
    """Rings of at most `depth` snapshots. What is put in must be the store's own: a clone or a new tensor.

    Where `budget` would be exceeded, rings get shorter, then snapshots narrower, and in the end (`depth` 0) nothing new
    is kept; `gave` says how far that went. A ring is replaced, never changed, and making room for one row leaves every
    other its newest snapshot: another thread may be about to use it.
    """

    depth: int
    storage: str = "same"
    budget: int = 0     # bytes; 0 is no limit
    away: Callable[[Tensor], Tensor | None] | None = None   # gives memory elsewhere to copy a tensor to
    rings: dict[Row, tuple[Snapshot, ...]] = field(default_factory=dict)
    peak: int = 0       # bytes
    gave: str = ""

    def put(self, row: Row, step: Step, value: Tensor) -> None:
        if not self.depth:
            return
        ring = self.get(row)
        if ring and (ring[-1].shape, ring[-1].dtype, ring[-1].device) != (value.shape, value.dtype, value.device):
            ring = ()
        if ring and abs(ring[-1].step.place - step.place) < SAME_PLACE:
            ring = ring[:-1]
        self.rings[row] = (*ring, self.keep(step, value))[-self.depth:]
        self.fit(row)
        self.peak = max(self.peak, self.bytes)

    def keep(self, step: Step, value: Tensor) -> Snapshot:
        kept, scale = narrowed(value, self.storage)
        place = self.away(kept) if self.away else None
        if place is not None:
            kept = place.copy_(kept, non_blocking=place.is_pinned())
        return Snapshot(step, kept, scale, None if kept is value else (value.dtype, value.device))

    def fit(self, newest: Row) -> None:
        limit = f"the cache budget of {self.budget / MIB:.4g} MiB"
        while self.budget and self.bytes > self.budget:
            if self.depth > 1:
                self.depth -= 1
                self.gave = f"{limit} holds {self.depth} result{'s' * (self.depth > 1)} per condition"
                for row, ring in self.rings.items():
                    self.rings[row] = ring[-self.depth:]
            elif any(s.kept.element_size() > ITEMSIZE["bf16"] for ring in self.rings.values() for s in ring):
                self.storage = "bf16"
                self.gave = f"{limit} holds 1 result per condition, in bf16"
                for row, ring in self.rings.items():
                    self.rings[row] = tuple(self.keep(s.step, s.value) for s in ring)
            else:
                self.depth = 0
                self.gave = f"{limit} is too small for one result per condition, so everything is computed"
                del self.rings[newest]
                break

    def get(self, row: Row) -> tuple[Snapshot, ...]:
        """Snapshots of a row, newest last."""
        return self.rings.get(row, ())

    @property
    def bytes(self) -> int:
        return sum(snapshot.bytes for ring in self.rings.values() for snapshot in ring)

    def drop(self, which: Callable[[Row, Snapshot], bool]) -> list[Row]:
        """Drop the rows for which `which` holds, told the row and its newest snapshot; tells which they were."""
        rows = [row for row, ring in self.rings.items() if which(row, ring[-1])]
        for row in rows:
            del self.rings[row]
        return rows

    def clear(self) -> None:
        self.rings.clear()
