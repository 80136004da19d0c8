"""Hindcast: at every computed step, score each predictor on what it would have said.

    e = mean|H' - H| / mean|H|          c <- (c + e / reach) / 2          expected(t) = c * reach(t)
"""
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.combine import combine_error
from ...kernels.drift import relative_error, sampled
from ..step import Step
from ..store import SAME_PLACE, Snapshot

AGAIN = "again"   # the name under which a second evaluation at the same sigma is scored


class Hindcast:
    """The errors of the competing predictors over a run."""

    def __init__(self, candidates: Sequence):
        self.candidates = tuple(candidates)
        self.rate: dict = {}         # candidate: c
        self.waiting: list[tuple[object, float, Tensor]] = []
        self.last: float | None = None   # the error of the best one at the last computed step

    def score(self, past: Sequence[Snapshot], step: Step, actual: Tensor) -> None:
        """Compare every candidate that has history enough with `actual`. Nothing is read back from the device yet.

        Heun and its kin come back to the same sigma with another x. Nothing can be learnt there about how errors grow
        with distance, so that is scored by itself: how far off is it to take the first result for the second?
        """
        if abs(step.place - past[-1].step.place) < SAME_PLACE:
            self.waiting.append((AGAIN, 1.0, relative_error(sampled(past[-1].value), sampled(actual))))
            return
        for candidate in self.candidates:
            if len(past) >= candidate.history:
                used = past[-candidate.history:]
                steps = [snapshot.step for snapshot in used]
                error = combine_error(candidate.weights(steps, step), [snapshot.value for snapshot in used], actual)
                self.waiting.append((candidate, candidate.reach(steps, step), error))

    def settle(self, best) -> None:
        """Read the scores back, in one transfer, and remember them. `best` is the candidate that would have been used."""
        if not self.waiting:
            return
        device = self.waiting[0][2].device      # with several GPUs the rows of an evaluation live on several
        errors = torch.stack([error.to(device) for *_, error in self.waiting]).tolist()
        worst: dict = {}
        for (candidate, reach, _), error in zip(self.waiting, errors, strict=True):
            error = error if error == error else float("inf")
            if candidate not in worst or error > worst[candidate][0]:
                worst[candidate] = (error, error / max(reach, 1e-12))
        for candidate, (_, rate) in worst.items():
            before = self.rate.get(candidate, math.inf)
            self.rate[candidate] = (before + rate) / 2 if math.isfinite(before) else rate
        self.last = next((worst[candidate][0] for candidate in (AGAIN, best) if candidate in worst), None)
        self.waiting.clear()

    def choose(self, past: Sequence[Step], at: Step) -> tuple[object, float | None]:
        """The candidate with the least expected error at `at`, and that error; unknown while none was scored."""
        if past and abs(at.place - past[-1].place) < SAME_PLACE:
            return self.candidates[0], self.rate.get(AGAIN)     # all of them say the last result here
        scored = {
            candidate: self.rate[candidate] * candidate.reach(past[-candidate.history:], at)
            for candidate in self.candidates if candidate in self.rate and len(past) >= candidate.history
        }
        if scored:
            best = min(scored, key=scored.get)
            return best, scored[best]
        able = [candidate for candidate in self.candidates if len(past) >= candidate.history]
        return (able[-1], None) if able else (None, None)
