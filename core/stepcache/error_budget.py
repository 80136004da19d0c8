"""What the errors of skipped steps come to in the final latent.

    a skip moves x by         |sigma_n - sigma_{n+1}| |d| e_n          e_n expected by hindcast, relative to d
    a group of skips by       the sum of these: they err in the same direction
    and the final latent by   A r sum / |D|,     A = K (share of noise in x)^q,     D the denoised latent
    the whole run by          the root of the sum of squares over its groups

r is what a group turned out to have moved x by, against what was expected, and follows every group of the run; while
every step is computed it goes back to 1, as errors are then expected from where they were measured, one step ahead.

Measured on tiny_flux_trained128, 20 steps, looking back, one group of one or two skips at every place, the mean of the
logarithm over 16 pictures: at CFG 1 two skips early in the schedule are handed on 1.2 times over and late ones 0.6 times,
at CFG 3.5 it is 3.5 and 0.65 times, one skip alone is handed on about twice as much early on, and all twice as much where
computed steps do not look back. Of q from 0.5 to 4, schedules that were best by that q came nearest at 1 to 1.5, for both
CFGs, on that model and on tiny_z_image_trained128. K is then such that pictures come out at 0.4 to 0.8 of a tolerance.
"""
import math

from ..step import Step

HANDED_ON, FALLS = 1.6, 1.0             # K and q at CFG 1 with look back
BY_GUIDANCE = (0.4, 0.1)                # what a CFG higher by 1 adds to them
MOST_GUIDANCE = 3.5                     # nothing was measured above
NOT_LOOKED_BACK = 2.0                   # times K
EXPECTED_TOO_LOW = 2.5      # r before anything was measured
KEPT = 0.7                  # of what r is above 1, by a computed step that no skip came before
BOUNDS = (0.2, 20.0)        # one odd group must not decide over the rest


class ErrorBudget:
    """One per run. Everything is a relative L2 error of the final latent, but for `raw`."""

    def __init__(self, guidance: float = 1.0, looks_back: bool = False):
        over = min(max(guidance, 1.0), MOST_GUIDANCE) - 1
        self.handed_on = (HANDED_ON + BY_GUIDANCE[0] * over) * (1.0 if looks_back else NOT_LOOKED_BACK)
        self.falls = FALLS + BY_GUIDANCE[1] * over
        self.ratio = EXPECTED_TOO_LOW
        self.scale: float | None = None     # |d| / |D| at the last computed step
        self.owed, self.raw = 0.0, 0.0      # of the group under way: in the final latent; sum of gap times e
        self.way, self.weight = 0.0, 0.0    # and its sums of gap, and of gap times what an e of 1 comes to
        self.untold = False                 # nothing was expected of one of its skips
        self.spent = 0.0                    # squares of the groups before it
        self.lost = False                   # one of them was neither expected nor measured

    def reach(self, step: Step) -> float | None:
        """What an error of d as large as d itself, in this step alone, comes to in the final latent."""
        return None if self.scale is None else self.handed_on * step.noise ** self.falls * step.gap * self.scale

    def share(self, step: Step, error: float | None) -> float | None:
        """What a skip at `step` with this relative error of d would add to the group; None where it cannot be told."""
        reach = self.reach(step)
        return None if error is None or reach is None else self.ratio * reach * error

    def skip(self, step: Step, error: float | None) -> None:
        share = self.share(step, error)
        self.untold = self.untold or share is None
        self.owed += share or 0.0
        self.raw += step.gap * (error or 0.0)
        self.way += step.gap
        self.weight += self.reach(step) or 0.0

    def settle(self, missed: float | None) -> None:
        """A computed step ends the group, if there was one. `missed` is its sum of gap times e as measured now, or None."""
        if not self.way and not self.untold:
            self.ratio = 1 + KEPT * (self.ratio - 1)
            return
        measured = missed is not None and math.isfinite(missed)
        if measured and 0 < self.raw < math.inf and not self.untold:
            found = min(max(missed / self.raw, BOUNDS[0]), BOUNDS[1])
            self.spent += (self.owed / self.ratio * found) ** 2
            self.ratio = (self.ratio + found) / 2
        elif measured and self.weight > 0:      # nothing that one could go by was expected, as early in a run
            self.spent += (self.weight / self.way * missed) ** 2
        else:
            self.spent += self.owed ** 2
            self.lost = self.lost or self.untold
        self.owed = self.raw = self.way = self.weight = 0.0
        self.untold = False

    @property
    def total(self) -> float | None:
        """None where it cannot be told."""
        total = math.sqrt(self.spent + self.owed ** 2)
        return total if math.isfinite(total) and not self.lost and not self.untold else None
