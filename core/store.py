"""The tensors of a run that outlive an evaluation: snapshots in rings, one ring per row, all of them counted."""
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from .step import Step

SAME_PLACE = 1e-3  # steps; a second evaluation at the same sigma replaces the first


class Snapshot(NamedTuple):
    step: Step
    value: Tensor


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


@dataclass
class Store:
    """Rings of at most `depth` snapshots. What is put in must be the store's own: a clone or a new tensor."""

    depth: int
    rings: dict[Row, deque[Snapshot]] = field(default_factory=dict)
    peak: int = 0  # bytes

    def put(self, row: Row, step: Step, value: Tensor) -> None:
        ring = self.rings.setdefault(row, deque(maxlen=self.depth))
        if ring and (ring[-1].value.shape != value.shape or ring[-1].value.device != value.device):
            ring.clear()
        if ring and abs(ring[-1].step.place - step.place) < SAME_PLACE:
            ring.pop()
        ring.append(Snapshot(step, value))
        self.peak = max(self.peak, self.bytes)

    def get(self, row: Row) -> tuple[Snapshot, ...]:
        """Snapshots of a row, newest last."""
        return tuple(self.rings.get(row, ()))

    @property
    def bytes(self) -> int:
        return sum(s.value.numel() * s.value.element_size() for ring in self.rings.values() for s in ring)

    def clear(self) -> None:
        self.rings.clear()
