"""Hindcast: at every computed step, score each predictor on what it would have said.

    e = mean|H' - H| / mean|H|              E <- max(e, (expected(t) + e) / 2), at every computed t: a rise is believed at once

    expected(t) = E  s(E) / s(t)  reach(t) / reach(E)               farther from what is known than where E was measured
                  E  s(E) / s(t) (reach(t) / reach(E))^(p / k)      nearer,     p = 1 + trust (k - 1)

s is sigma: what keeps its size over a run is the error of the denoised latent, sigma e. On tiny_flux_trained128, 20 steps,
CFG 1, hold's e from one step to the next rises from 0.036 to 0.20, and sigma e stays between 0.026 and 0.039.

reach is distance^k for a predictor through k snapshots, which is how its error grows on a smooth path; the distance is what
the square of the share of noise differs by (predictors/base.py). By that, what the denoised latent changes by came out even
within a third over that run, and within a factor of two from sigma 700 to 0.8 on a model of SVD's form, where it doubles from
step to step. Whether a path is smooth over such a distance shows in how the predictor did there, against the one that needs
the fewest snapshots (hold): no worse, and it is trusted to get better as its order says; ROUGH times as bad, and its error is
taken to shrink with the distance and no faster. Guidance makes rough paths. Without this, on tiny_flux_trained128 at CFG 3.5 with two of three
steps skipped, the highest order would always seem the best one, and the picture came out 4 to 10 dB farther off.
"""
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ...kernels.combine import combine, combine_errors
from ...kernels.drift import relative_error, sampled
from ..step import Step
from ..store import SAME_PLACE, Snapshot
from .predictors.base import Gram, weighed
from .predictors.divided_differences import lagrange

# names under which other things than candidates are scored: a second evaluation at the same sigma, the group of skips that
# a computed step ends, and the size of d against that of the denoised latent
AGAIN, GROUP, SCALE = "again", "group", "scale"
ROUGH = 1.4
LEAST_AGAIN = 2.0   # kappa where nothing was measured
FEW = 1 << 14     # enough for the dot products of a few snapshots, which travel to the CPU
NOTHING: Mapping[object, Tensor] = MappingProxyType({})


def dot_products(past: Sequence[Snapshot]) -> Gram:
    """<H_i, H_j> of snapshots over the same sample of their elements, in fp64, in one transfer."""
    seen = torch.stack([sampled(snapshot.value, FEW).float() for snapshot in past]).cpu().double()
    return (seen @ seen.T).tolist()


class Known(NamedTuple):
    """What a candidate's scores came to."""

    error: float        # E times the sigma where it was measured last
    reach: float        # there
    trust: float        # 0 to 1

    def at(self, candidate, reach: float, sigma: float) -> float:
        """The error expected there, so far from what is known."""
        farther, error = reach / max(self.reach, 1e-12), self.error / max(sigma, 1e-12)
        if farther >= 1:
            return error * farther
        return error * farther ** ((1 + self.trust * (candidate.history - 1)) / candidate.history)


class Hindcast:
    """The errors of the competing predictors over a run."""

    def __init__(self, candidates: Sequence):
        self.candidates = tuple(candidates)
        self.known: dict[object, Known] = {}        # by candidate
        self.waiting: list[tuple[object, float, Tensor]] = []
        self.stood_in: dict[object, list[tuple[Step, Tensor]]] = {}     # row: a sample of what was handed out since the last computed step
        self.sigma, self.way = 0.0, 0.0     # of the last computed step, and how far below the one before it
        self.plain: float | None = None     # hold's error there, or at the first evaluation of that sigma
        self.kappa: float | None = None     # how much of what a second evaluation's x differs by its D does
        # found at the last computed step: the error of the best one, and the group of skips before it
        self.last: float | None = None
        self.missed: float | None = None

    def score(self, past: Sequence[Snapshot], step: Step, actual: Tensor, gram: Gram | None = None, said: Mapping[object, Tensor] = NOTHING) -> None:
        """Compare every candidate that has history enough with `actual`. Nothing is read back from the device yet.

        `gram` is that of `past`. `said` is what a skip would have put there, for candidates whose weighted sum is not all of it.

        Heun and its kin come back to the same sigma with another x. Nothing can be learnt there about how errors grow
        with distance, so that is scored by itself: how far off is it to take the first result for the second? They went
        there with the mean of two derivatives instead of the one before, so

            e = kappa (sigma_before - sigma) / (2 sigma) e_hold         e_hold at the first evaluation there
        """
        if abs(step.place - past[-1].step.place) < SAME_PLACE:
            self.waiting.append((AGAIN, 1.0, relative_error(sampled(past[-1].value), sampled(actual))))
            return
        self.sigma, self.way = step.sigma, past[-1].step.sigma - step.sigma
        able = [(candidate, *weighed(candidate, past, step, gram)) for candidate in self.candidates if len(past) >= candidate.history]
        errors = iter(combine_errors([(weights, [s.value for s in used]) for candidate, used, weights in able if candidate not in said], actual))
        for candidate, used, _ in able:
            error = relative_error(sampled(said[candidate]), sampled(actual)) if candidate in said else next(errors)
            self.waiting.append((candidate, candidate.reach([s.step for s in used], step), error))

    def measure(self, row, past: Sequence[Snapshot], step: Step, actual: Tensor) -> None:
        """What the skips before this computed step got wrong: |sum of gap (H~ - H')| / |H|.

        H~ is the polynomial through the two snapshots before and the new one, which closes the bracket.
        """
        group = self.stood_in.pop(row, [])
        if not group:
            return
        seen = sampled(actual)
        fits = all(said.shape == seen.shape and said.device == seen.device for _, said in group)
        if fits and abs(step.place - past[-1].step.place) >= SAME_PLACE:
            nodes = [*((s.step.place, sampled(s.value)) for s in past[-2:]), (step.place, seen)]
            off = torch.zeros_like(seen, dtype=torch.float32)
            for at, said in group:
                weights = lagrange([place for place, _ in nodes], at.place)
                off.add_(combine(weights, [value for _, value in nodes], out_dtype=torch.float32) - said, alpha=at.gap)
            self.waiting.append((GROUP, 1.0, off.norm() / seen.float().norm().clamp_min(1e-12)))

    def weigh(self, x: Tensor, denoised: Tensor, sigma: float) -> None:
        """Note |d| / |D|, d = (x - D) / sigma."""
        x, denoised = sampled(x).float(), sampled(denoised).float()
        d = vector_norm(x - denoised) / sigma
        self.waiting.append((SCALE, 1.0, d / vector_norm(denoised).clamp_min(1e-12)))

    def settle(self, best) -> float | None:
        """Read the scores back, in one transfer, and remember them. `best` is the candidate that would have been used.

        Returns |d| / |D| where it was weighed. The group of skips is over, also for rows that were not computed now.
        """
        self.last = self.missed = None
        self.stood_in.clear()
        if not self.waiting:
            return None
        device = self.waiting[0][2].device      # with several GPUs the rows of an evaluation live on several
        errors = torch.stack([error.to(device) for *_, error in self.waiting]).tolist()
        largest: dict = {}
        for (candidate, reach, _), error in zip(self.waiting, errors, strict=True):
            error = error if error == error else float("inf")
            if candidate not in largest or error > largest[candidate][0]:
                largest[candidate] = (error, reach)
        scale, _ = largest.pop(SCALE, (None, None))
        self.missed, _ = largest.pop(GROUP, (None, None))
        if AGAIN in largest and (usual := self.again()):
            kappa = largest[AGAIN][0] / (usual / (self.kappa or LEAST_AGAIN))
            self.kappa = max(mean(self.kappa, kappa), kappa, LEAST_AGAIN) if math.isfinite(kappa) else self.kappa
        scored = {candidate: largest[candidate] for candidate in self.candidates if candidate in largest}
        plain = min(scored, key=lambda candidate: candidate.history, default=None)
        if scored:
            self.plain = scored[plain][0] if plain.history == 1 else None
        for candidate, (error, reach) in scored.items():
            before, trust = self.known.get(candidate), trusted(error, scored[plain][0])
            if before is not None:
                error, trust = max(mean(before.at(candidate, reach, self.sigma), error), error), mean(before.trust, trust)
            self.known[candidate] = Known(error * self.sigma, reach, trust)
        self.last = next((largest[candidate][0] for candidate in (AGAIN, best) if candidate in largest), None)
        self.waiting.clear()
        return scale if scale is not None and math.isfinite(scale) else None

    def forget(self) -> None:
        """The history is gone; what was learnt of the errors is not."""
        self.stood_in.clear()
        self.waiting.clear()
        self.plain = None

    def again(self) -> float | None:
        """The error expected of taking the last result for a second one at the same sigma."""
        if self.plain is None or not self.sigma > 0:
            return None
        return (self.kappa or LEAST_AGAIN) * abs(self.way) / (2 * self.sigma) * self.plain

    def choose(self, past: Sequence[Step], at: Step) -> tuple[object, float | None]:
        """The candidate with the least expected error at `at`, and that error; unknown while none was scored."""
        if past and abs(at.place - past[-1].place) < SAME_PLACE:
            return self.candidates[0], self.again()     # all of them say the last result here
        scored = {
            candidate: self.known[candidate].at(candidate, candidate.reach(past[-candidate.depth:], at), at.sigma)
            for candidate in self.candidates if candidate in self.known and len(past) >= candidate.history
        }
        if scored:
            best = min(scored, key=scored.get)
            return best, scored[best]
        able = [candidate for candidate in self.candidates if len(past) >= candidate.history]
        return (able[-1], None) if able else (None, None)


def mean(before: float | None, now: float) -> float:
    """Of what was known and what is new; what is not finite is forgotten."""
    return now if before is None or not math.isfinite(before) else (before + now) / 2


def trusted(error: float, plain: float) -> float:
    """1 where a candidate is no worse than the plainest, 0 from ROUGH times its error on."""
    if not error > plain:
        return 1.0
    return min(max((ROUGH - error / max(plain, 1e-12)) / (ROUGH - 1), 0.0), 1.0) if math.isfinite(error) else 0.0
