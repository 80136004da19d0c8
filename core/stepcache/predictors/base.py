"""What stands in for a skipped computation: scalar weights over a few past snapshots, out = sum_k w_k H_k."""
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

from ...step import Step
from ...store import SAME_PLACE, Snapshot

NEAR = 1e-6    # two positions this near are one, and no slope can be told from them

Gram = Sequence[Sequence[float]]


class Predictor:
    """Subclasses are immutable dataclasses with knobs.

    history:    fewest snapshots it needs; with fewer it is not asked.
    depth:      most it uses.
    needs_gram: its weights depend on what is in the snapshots; it is told their dot products, gram[i][j] = <H_i, H_j>.
    weights:    one per snapshot of `past`, which has `history` to `depth` entries, newest last.
    reach:      how far `at` lies from what is known; its error is taken to grow in proportion.
    candidates: the predictors that compete by hindcast; most enter alone.
    """

    name: ClassVar[str]
    needs_gram: ClassVar[bool] = False
    history = 1

    @property
    def depth(self) -> int:
        return self.history

    def weights(self, past: Sequence[Step], at: Step, gram: Gram | None = None) -> list[float]:
        raise NotImplementedError

    def reach(self, past: Sequence[Step], at: Step) -> float:
        raise NotImplementedError

    def candidates(self) -> tuple["Predictor", ...]:
        return (self,)


def ahead(past: Sequence[Step], at: Step) -> float:
    """Steps from the newest snapshot to `at`."""
    return abs(at.place - past[-1].place)


EVEN = 0.25     # the share of noise below which a model changes what it says at an even pace


def distance(past: Sequence[Step], at: Step) -> float:
    """How far it is from the newest snapshot to `at` for what a model says: the integral of 2 max(t, EVEN) dt, t the share of noise in x."""
    return abs(travelled(past[-1].noise) - travelled(at.noise))


def travelled(noise: float) -> float:
    return noise ** 2 if noise > EVEN else EVEN * (2 * noise - EVEN)


def distinct(positions: Sequence[float]) -> bool:
    """Whether no two neighbours meet, so that one may divide by what lies between them."""
    return all(abs(b - a) > NEAR for a, b in pairwise(positions))


def newest(count: int) -> list[float]:
    """The weights of hold: what remains where nothing better can be told."""
    return [0.0] * (count - 1) + [1.0]


def weighed(predictor: Predictor, past: Sequence[Snapshot], at: Step, gram: Gram | None = None) -> tuple[Sequence[Snapshot], list[float]]:
    """The snapshots of `past` that a predictor uses, and their weights at `at`. `gram` is that of all of `past`.

    At the place of the newest one all of them say the newest one.
    """
    used = past[-predictor.depth:]
    if ahead([used[-1].step], at) < SAME_PLACE:
        return used, newest(len(used))
    among = [line[-len(used):] for line in gram[-len(used):]] if predictor.needs_gram and gram else None
    return used, predictor.weights([snapshot.step for snapshot in used], at, among)
