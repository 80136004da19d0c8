"""What the errors of skipped steps come to in the final latent.

    a skip moves x by         |sigma_n - sigma_{n+1}| |d| e_n          e_n expected by hindcast, relative to d
    a group of skips by       the sum of these: they err in the same direction
    and the final latent by   A r sum / |D|,     A = K (share of noise in x)^q,     D the denoised latent
    the whole run by          the root of the sum of squares over its groups

r is what a group turned out to have moved x by, against what was expected, and follows every group of the run. K and q
were measured on tiny_flux_trained128 (28 steps, one group of two skips at eight places): at CFG 1 the first half of
the schedule hands an error on 2 to 3 times over and the end 0.9 times, at CFG 3.5 it is 4.5 to 5.7 and 0.6 times, and
half as much where computed steps look back. q is kept below what that says, which gave the nearer pictures.
"""
import math

from ..step import Step

HANDED_ON, FALLS = 1.25, 0.5            # K and q at CFG 1 with look back
BY_GUIDANCE = (0.14, 0.2)               # what a CFG higher by 1 adds to them
MOST_GUIDANCE = 3.5                     # nothing was measured above
NOT_LOOKED_BACK = 2.0                   # times K
EXPECTED_TOO_LOW = 2.5      # r before anything was measured
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
        self.spent = 0.0                    # squares of the groups that were measured

    def share(self, step: Step, error: float | None) -> float | None:
        """What a skip at `step` with this relative error of d would add to the group; None where it cannot be told."""
        if error is None or self.scale is None:
            return None
        return self.handed_on * step.noise ** self.falls * self.ratio * step.gap * self.scale * error

    def skip(self, step: Step, error: float | None) -> None:
        self.owed += self.share(step, error) or 0.0
        self.raw += step.gap * (error or 0.0)

    def settle(self, missed: float | None) -> None:
        """A computed step ends the group. `missed` is its sum of gap times e as measured now, or None."""
        if missed is not None and self.raw > 0 and math.isfinite(missed):
            found = min(max(missed / self.raw, BOUNDS[0]), BOUNDS[1])
            self.spent += (self.owed / self.ratio * found) ** 2
            self.ratio = (self.ratio + found) / 2
        else:
            self.spent += self.owed ** 2
        self.owed, self.raw = 0.0, 0.0

    @property
    def total(self) -> float:
        return math.sqrt(self.spent + self.owed ** 2)
