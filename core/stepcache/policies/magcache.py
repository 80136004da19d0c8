"""MagCache: skip while the size of the residual, by a curve that was measured once, is not far from the cached one.

    g_t = product of gamma over the steps after the last computed one        gamma_n = mean |r_n|_2 / |r_(n-1)|_2
    skip  <=>  sum of |1 - g| over them  <  threshold,  and at most K of them

r is the residual of all blocks. The curve belongs to a model and a number of steps; for another number its nearest
entry is taken. Models that were measured with guidance have a second curve for the negative condition: an evaluation
is skipped when both allow it. The first share of the steps (`retention_ratio`) is computed, and so are the steps that
a curve names: FLUX, 11 of 28. "MagCache: Fast Video Generation with Magnitude-Aware Cache" (arXiv 2506.09045); the
curves with their sources and published settings are in data/magcache.json.
"""
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from ...knob import knob
from .published import AUTOMATIC, Published

CURVES = Published.read("magcache.json", "curve")


def nearest(index: int, steps: int, entries: int) -> int:
    """The entry of a curve of `entries` steps for step `index` of `steps`."""
    return round(index * (entries - 1) / max(steps - 1, 1))


@dataclass(frozen=True)
class MagCache:
    name = "MagCache"
    needs_forward = False
    threshold: float = knob(
        0.06, "Higher skips more steps; 0 skips nothing. Published: FLUX 0.24, Kontext 0.05, Chroma and Qwen-Image 0.1, Wan 2.1 0.12 to 0.24.",
        0.0, 1.0, 0.005)
    retention_ratio: float = knob(
        0.2, "This share of the steps, from the first on, is always computed. Published: FLUX 0.1, most others 0.2.", 0.0, 1.0, 0.01)
    max_skips: int = knob(
        2, "Called K elsewhere: so many skips in a row at most, if max_consecutive_skips allows it. Published: FLUX 5, others 2 to 6.", 0, 50, 1)
    curve: str = knob(
        AUTOMATIC, "The curve that was measured for this model. automatic takes that of the model's family, where there is one.",
        choices=CURVES.choices)

    def skip(self, view) -> bool:
        published, steps, now, last = CURVES.pick(self.curve, view.family), view.step.steps, view.step.index, view.computed[-1].index
        if published is None or now < int(steps * self.retention_ratio) or not 0 < now - last <= self.max_skips:
            return False
        if any(nearest(now, steps, published["steps"]) == step for step in published.get("always_computed", ())):
            return False
        since = [nearest(n, steps, published["steps"]) for n in range(last + 1, now + 1)]
        return all(sum(abs(1 - g) for g in accumulate((ratios[n] for n in since), mul)) < self.threshold for ratios in published["ratios"])

    def refuses(self, family: str, steps: int, sampler: str) -> str:
        return CURVES.missing(self.curve, family)
