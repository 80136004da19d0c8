"""Error control: skip as long as the error that the picture is expected to take from it fits a tolerance.

    measured at every computed step n:   e_n = mean|H'_n - H_n| / mean|H_n|        H' is what a skip would have used
    expected for a skip at t:            e(t) ~ distance(t_0, t)^(order + 1)       scaled by the e_n, hindcast.py
    in the final latent:                 E = sum over the group of skips           error_budget.py
    skip  <=>  E^2  <=  tolerance^2 (h + 1) / N

t_0 is the last computed step, and the distance what the square of the share of noise differs by (predictors/base.py).
h skips in this group, N evaluations in the run, of which most samplers have one per step: a group may use up as much of
the tolerance as its share of the run, and as the groups' errors have nothing to do with each other, their squares add up
to the tolerance. It has one unit for every model, the relative L2 error of the final latent against the full run.
With guidance errors grow faster than any order says, so there no group is longer by two than the longest that was
measured; the first may have two skips. At CFG 3.5, 20 steps and 9 or 10 evaluations that is up to 7 dB.
Reprise's own; the hindcast idea is that of step-size control in ODE solvers, and so is that of steps that grow by degrees.
"""
import math
from dataclasses import dataclass

from ...knob import knob

FIRST = 1       # with guidance, skips after which the first group may have one more


@dataclass(frozen=True)
class ErrorControl:
    name = "error control"
    needs_forward = False
    by_error = True
    tolerance: float = knob(
        0.02, "Allowed relative error of the final latent. Higher skips more and follows the full model less closely; 0 skips nothing.",
        0.0, 1.0, 0.005)

    def skip(self, view) -> bool:
        if view.predicted is None or not self.tolerance or (view.guided and view.skipped > max(view.longest, FIRST)):
            return False
        evaluations = view.step.steps * view.step.often
        return view.owed + view.predicted <= self.tolerance * math.sqrt((view.skipped + 2) / evaluations)
