"""What the errors of skipped steps come to in the final latent.

    a skip moves x by         |sigma_n - sigma_{n+1}| |d| e_n          e_n expected by hindcast, relative to d
    a group of skips by       the sum of these: they err in the same direction
    and the final latent by   A r sum / |D|,     A = f max(K (share of noise in x)^q, L),     D the denoised latent
    the whole run by          the root of the sum of squares over its groups

f is what the sampler makes of it against Euler, handed_on.py. r is what a group turned out to have moved x by, against what
was expected, and follows every group of the run; while every step is computed it goes back to 1, as errors are then
expected from where they were measured, one step ahead.

Measured on tiny_flux_trained128, 20 steps, looking back, one group of one or two skips at every place, the mean of the
logarithm over 16 pictures: at CFG 1 two skips early in the schedule are handed on 1.2 times over and late ones 0.6 times,
at CFG 3.5 it is 3.5 and 0.65 times, one skip alone is handed on about twice as much early on, and all twice as much where
computed steps do not look back, as those after the last step that may be skipped hardly can: there it is 1.2 and 0.9 times
as much without. Of q from 0.5 to 4, schedules that were best by that q came nearest at 1 to 1.5, for both CFGs, on that
model and on tiny_z_image_trained128. K is then such that pictures come out at 0.3 to 0.8 of a tolerance. In 50 steps the
last skips, with a share of noise of 0.06 to 0.3 left, were handed on 0.4 to 0.8 times: it does not go on falling. One second
evaluation of Heun's skipped was handed on 3 to 14 times, on tiny_z_image_trained128, 9 and 12 steps, CFG 1 and 2.
"""
import math

from ..step import Clock, Step
from .handed_on import factors

HANDED_ON, FALLS = 1.4, 1.0             # K and q at CFG 1 with look back
BY_GUIDANCE = (0.4, 0.1)                # what a CFG higher by 1 adds to them
MOST_GUIDANCE = 3.5                     # nothing was measured above
NOT_LOOKED_BACK = 2.0                   # times all of it
SECOND = 6.0                            # times it, for a second evaluation at a sigma: it errs where the model answers most to its input
LEAST = 0.5                             # L: with little noise in it, a model takes an error for a part of the picture
EXPECTED_TOO_LOW = 2.5      # r before anything was measured
KEPT = 0.7                  # of what r is above 1, by a computed step that no skip came before
BOUNDS = (0.2, 20.0)        # one odd group must not decide over the rest


class ErrorBudget:
    """One per run. `share`, `owed` and `total` are relative L2 errors of the final latent."""

    def __init__(self, guidance: float = 1.0, looks_back: bool = False, sampler: str = "euler", clock: Clock | None = None):
        """`sampler` is the host's function, less its "sample_"; without a `clock` it is taken for Euler."""
        over = min(max(guidance, 1.0), MOST_GUIDANCE) - 1
        self.handed_on, self.falls = HANDED_ON + BY_GUIDANCE[0] * over, FALLS + BY_GUIDANCE[1] * over
        self.guided, self.looks_back = over > 0, looks_back
        self.idle = clock.idle if clock else 0
        self.factors = factors(sampler, clock, self.falls, over / (MOST_GUIDANCE - 1)) if clock else ()
        self.ratio = EXPECTED_TOO_LOW
        self.scale: float | None = None     # |d| / |D| at the last computed step, the one that ends a group
        # of the group under way, in |d|: what it comes to, its sum of gap times e, its gaps, and what an e of 1 comes to
        self.due, self.raw, self.way, self.weight = 0.0, 0.0, 0.0, 0.0
        self.beside = 0.0                   # and what the skips of it come to that cannot be measured
        self.untold = False                 # nothing was expected of one of its skips
        self.spent = 0.0                    # squares of the groups before it
        self.lost = False                   # one of them was neither expected nor measured

    def gain(self, step: Step) -> float:
        """A, which says how much of what moved x in this step is handed on to the end.

        Without limit where sigma rises on the way there: a sampler takes an error for a part of the noise then, and nothing
        measures what comes of it. With two rises, dpmpp_2m and three skips before them it was 70 times what was expected.
        """
        if step.rises_later:
            return math.inf
        late = step.index >= step.steps - 2 - self.idle     # nothing comes after the next step, which has no time to make up for it
        factor = self.factors[step.index] if self.factors else 1.0
        return factor * (NOT_LOOKED_BACK if late or not self.looks_back else 1.0) * max(self.handed_on * step.noise ** self.falls, LEAST)

    def reach(self, step: Step, second: bool = False) -> float:
        """What an error of d as large as d itself, in this evaluation alone, comes to in the final latent, in |d|. A step's evaluations share it."""
        return self.gain(step) * (SECOND if second else 1.0) * step.gap / step.often

    def share(self, step: Step, error: float | None, second: bool = False) -> float | None:
        """What a skip at `step` with this relative error of d would add to the group; None where it cannot be told.

        `second`: the last computed step was at this sigma too, as Heun's are.
        """
        return None if error is None or self.scale is None else self.ratio * self.reach(step, second) * error * self.scale

    def skip(self, step: Step, error: float | None, second: bool = False) -> None:
        """A skip. Of one at the sigma of the last computed step no later one can tell the error."""
        self.untold = self.untold or self.share(step, error) is None
        due = self.ratio * self.reach(step, second) * (error or 0.0)
        if second:
            self.beside += due
            return
        self.due += due
        self.raw += step.gap * (error or 0.0)
        self.way += step.gap
        self.weight += self.reach(step)

    def settle(self, missed: float | None) -> None:
        """A computed step ends the group, if there was one. `missed` is its sum of gap times e as measured now, or None."""
        if not self.way and not self.beside and not self.untold:
            self.ratio = 1 + KEPT * (self.ratio - 1)
            return
        measured, scale = missed is not None and math.isfinite(missed), self.scale or 0.0
        if measured and 0 < self.raw < math.inf and not self.untold:
            found = min(max(missed / self.raw, BOUNDS[0]), BOUNDS[1])
            self.spent += ((self.due / self.ratio * found + self.beside) * scale) ** 2
            self.ratio = (self.ratio + found) / 2
        elif measured and self.way and scale:      # nothing that one could go by was expected, as early in a run
            self.spent += ((self.weight / self.way * missed + self.beside) * scale) ** 2
        else:
            self.drop()
        self.clear()

    def drop(self) -> None:
        """The group under way ends, and nothing will tell what it came to."""
        self.spent += ((self.due + self.beside) * (self.scale or 0.0)) ** 2
        self.lost = self.lost or self.untold
        self.clear()

    def clear(self) -> None:
        self.due = self.raw = self.way = self.weight = self.beside = 0.0
        self.untold = False

    @property
    def owed(self) -> float:
        """Of the group under way."""
        return (self.due + self.beside) * (self.scale or 0.0)

    @property
    def total(self) -> float | None:
        """None where it cannot be told."""
        total = math.sqrt(self.spent + self.owed ** 2)
        return total if math.isfinite(total) and not self.lost and not self.untold else None
