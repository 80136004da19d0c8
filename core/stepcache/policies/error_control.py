"""Error control: skip as long as the predicted error of what stands in stays within a tolerance.

    measured at every computed step n:   e_n = mean|H'_n - H_n| / mean|H_n|        H' is what a skip would have used
    expected for a skip at t:            e(t) = c (t - t_0)^(order + 1) w(t)       c from the e_n, hindcast.py
    skip  <=>  sum of e over the skips since the last computed step  <  tolerance

w is the sigma that a step covers over the mean of the schedule: an error in a wide step moves the picture more.
The tolerance has one unit for every model, the relative error of the output. Reprise's own; the hindcast idea is
that of step-size control in ODE solvers.
"""
from dataclasses import dataclass

from ...knob import knob


@dataclass(frozen=True)
class ErrorControl:
    name = "error control"
    needs_forward = False
    tolerance: float = knob(
        0.03, "Allowed relative error between two computed steps. Higher skips more and follows the full model less closely; 0 skips nothing.",
        0.0, 1.0, 0.005)

    def skip(self, view) -> bool:
        return view.predicted is not None and view.owed + view.predicted < self.tolerance
