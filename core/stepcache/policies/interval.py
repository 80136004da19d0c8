"""Interval: compute the first steps, then every N-th.

    compute  <=>  n < warm-up  or  n - n_computed >= N

The schedule of TaylorSeer (arXiv 2503.06923): warm-up 3, N 3 to 7 at 50 steps.
"""
from dataclasses import dataclass

from ...knob import knob


@dataclass(frozen=True)
class Interval:
    name = "interval"
    needs_forward = False
    interval: int = knob(2, "Every N-th step is computed: N - 1 skips in a row, if max_consecutive_skips allows it. At 20 steps 2 or 3.", 1, 20, 1)
    warm_up: int = knob(3, "So many first steps are always computed.", 1, 50, 1)

    def skip(self, view) -> bool:
        since = view.step.place - view.computed[-1].place
        return self.interval > 1 and view.step.index >= self.warm_up and since < self.interval - 1e-3
