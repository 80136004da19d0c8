"""Where a run is: told from the sigmas of the schedule, never from counting calls."""
import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

TINY = 0.005  # a share of noise with which a step has nothing left to do; kl_optimal ends with one such
CLOSE = 1e-4  # two sigmas this near, relatively, are the same place


@dataclass(frozen=True)
class Step:
    """One solver evaluation. Heun and its kin evaluate more than once per step of the schedule."""

    evaluation: int   # its number in the run, from 0
    place: float      # position in the schedule in steps; between two sigmas it is a fraction
    steps: int        # steps of the schedule
    sigma: float
    log_snr: float
    gap: float        # how far a derivative of 1 moves x in this step, if it is that of this evaluation; for a flow the sigma that it covers
    noise: float      # the share of noise in x, 0 to 1
    rises: bool = False   # sigma is above that of the evaluation before: a restart
    turns: bool = False   # it will be at the next step
    rises_later: bool = False   # it will be at a later one

    @property
    def index(self) -> int:
        """The step of the schedule that this evaluation belongs to."""
        return min(int(self.place + CLOSE), self.steps - 1)

    @property
    def often(self) -> float:
        """Evaluations per step, as far as the run has come. Between them they move x."""
        return max(1.0, self.evaluation / max(self.place, 1.0))

    @property
    def last(self) -> bool:
        return self.index >= self.steps - 1


def share_of_noise(sigma: float, flow: bool) -> float:
    """None below 0, where the host's samplers may go, and where it could not be raised to a power."""
    sigma = max(sigma, 0.0)
    return sigma if flow else sigma / (1 + sigma)


class Clock:
    """Turns the sigma of an evaluation into a Step.

    sigmas: the schedule, falling, last one usually 0. `flow` tells rectified flow (x = (1 - sigma) x0 + sigma eps)
    from the variance-exploding form (x = x0 + sigma eps), the host's for SD 1.5 and SDXL whatever they predict. The
    second is the first at t = sigma / (1 + sigma), with latents 1 + sigma times as large, so an error e of its derivative
    is one of (1 + sigma) e there and moves x by (1 + sigma) e dt = e dsigma / (1 + sigma) = e dlog(1 + sigma).
    """

    def __init__(self, sigmas: list[float], flow: bool):
        self.sigmas, self.flow = [float(s) for s in sigmas], flow
        self.steps = len(self.sigmas) - 1
        self.evaluations, self.before = 0, None
        begins = [share_of_noise(sigma, flow) for sigma in self.sigmas[:-1]]
        self.idle = next((n for n, share in enumerate(reversed(begins)) if share > TINY), 0)      # steps at the end that do nothing
        self.turns = [below for below, above in pairwise(self.sigmas) if above > below]
        self.falls = all(above > below for above, below in pairwise(self.sigmas))
        self.descends = any(above > below for above, below in pairwise(self.sigmas))
        self.ahead = [below for below, above in pairwise(self.sigmas) if above > below * (1 + CLOSE)]     # where it rises from, still to come

    def tick(self, sigma: float) -> Step:
        rises = self.before is not None and sigma > self.before * (1 + CLOSE)
        if rises and self.ahead and self.close(self.before, self.ahead[0]):     # not with churn, nor within a step of a sampler that goes up in two
            self.ahead.pop(0)
        place = self.place(sigma)
        index = min(int(place + CLOSE), self.steps - 1)
        step = Step(
            evaluation=self.evaluations, place=place, steps=self.steps, sigma=sigma, log_snr=self.log_snr(sigma),
            gap=self.way(self.sigmas[index], self.sigmas[index + 1]), noise=share_of_noise(sigma, self.flow),
            rises=rises, turns=any(self.close(sigma, turn) for turn in self.turns), rises_later=bool(self.ahead),
        )
        self.evaluations, self.before = self.evaluations + 1, sigma
        return step

    def way(self, above: float, below: float) -> float:
        """How far a derivative of 1 moves x from one sigma to the other, x / (1 + sigma) where it is not a flow's."""
        return abs(above - below if self.flow else math.log1p(above) - math.log1p(below))

    def place(self, sigma: float) -> float:
        falling = [-s for s in self.sigmas]
        after = bisect_left(falling, -sigma * (1 + CLOSE))
        if after < len(self.sigmas) and self.close(self.sigmas[after], sigma):
            while after + 1 < len(self.sigmas) and self.close(self.sigmas[after + 1], sigma):
                after += 1      # a sigma that repeats: the last of them, so that the last step is known as such
            return float(after)
        if after == 0:
            return 0.0
        if after == len(self.sigmas):
            return float(self.steps)
        above, below = self.sigmas[after - 1], self.sigmas[after]
        return after - 1 + (above - sigma) / max(above - below, 1e-12)

    @staticmethod
    def close(a: float, b: float) -> bool:
        return math.isclose(a, b, rel_tol=CLOSE, abs_tol=1e-8)

    def log_snr(self, sigma: float) -> float:
        if self.flow:
            bounded = min(max(sigma, 1e-3), 1 - 1e-3)
            return math.log((1 - bounded) / bounded)
        return -math.log(max(sigma, 1e-3))
