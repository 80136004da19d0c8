"""How far a frozen evaluation is off, on what the sampler gets of it.

    D = U + s (C - U),    e = |D(frozen) - D(full)| / |D(full)|  (L2)        s: cfg; C, U: predictions of the two sides

Guidance multiplies what is off on one side, so a measure on C and U alone would tell too little. Whether D was made so is seen
on the D that was made. Where it was not (areas, context windows, several prompts to a side, guidance of another kind),
e is that of all predictions together, before guidance.
"""
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..store import Row

SAME = 1e-4     # relative L2 within which a D is the one that was made


@dataclass(frozen=True)
class Part:
    """One condition's prediction, both ways. given: the one of the two that the host got."""

    frozen: Tensor
    full: Tensor
    given: Tensor


@dataclass
class Comparison:
    """Of one evaluation. sides: of each condition, 0 for C and 1 for U."""

    sides: dict[int, list[Part]] = field(default_factory=dict)

    def add(self, rows: Sequence[Row], given: Tensor, frozen: Tensor | None = None, full: Tensor | None = None) -> None:
        """What a model call gave for these rows, and what it would have given the other way; without that it is the same both ways."""
        made = given.chunk(len(rows))
        ways = [made if output is None else output.chunk(len(rows)) for output in (frozen, full)]
        for row, *parts in zip(rows, *ways, made, strict=True):
            self.sides.setdefault(row.cond, []).append(Part(*parts))

    def guided(self, way: str, scale: float) -> Tensor:
        parts = [getattr(self.sides[side][0], way).double() for side in sorted(self.sides)]
        return parts[0] if len(parts) == 1 else parts[1] + scale * (parts[0] - parts[1])

    def result(self, made: Tensor | None, scale: float) -> tuple[float, bool] | None:
        """e, and whether it is of D = `made`; nothing where nothing was computed both ways."""
        parts = [part for side in self.sides.values() for part in side]
        if all(part.frozen is part.full for part in parts):
            return None
        alone = torch.is_tensor(made) and sorted(self.sides) in ([0], [0, 1]) and all(
            len(side) == 1 and side[0].given.shape == made.shape for side in self.sides.values())
        if alone and relative([self.guided("given", scale)], [made]) < SAME:
            return relative([self.guided("frozen", scale)], [self.guided("full", scale)]), True
        return relative([part.frozen for part in parts], [part.full for part in parts]), False


def relative(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """|some - others| / |others|, over all of them."""
    off, whole = (sum(float(tensor.double().square().sum()) for tensor in tensors)
                  for tensors in ([one.double() - other.double() for one, other in zip(some, others, strict=True)], others))
    return (off / whole) ** 0.5 if whole else 0.0
