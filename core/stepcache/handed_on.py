"""What a sampler makes of one wrong D by the end of the run, against what Euler's steps make of it.

        P_n = a_n P_{n+1} + (b_n P_{n+1} + Q_{n+1}) kappa_n,     Q_n = e_n P_{n+1},     W_n = b_n P_{n+1} + Q_{n+1}

a, b, e are the sampler's (solvers.py). W_n is what an error of D_n comes to in the final latent, P_n what one of x_n does,
and Q_n one of the D before, backwards from the end; kappa = dD/dx is what Euler's steps need to hand an error on as
(share of noise)^falls, as error_budget.py has it. A multistep sampler goes too far with a wrong D and takes it back in the
next step, but for the last one. Measured on tiny_flux_trained128, 20 steps of dpmpp_2m against Euler, one skip, not
looking back: 1.0 to 1.2 times as much nearly all the way, 1.3 and 1.5 (CFG 1, 3.5) for the second but last step and 2.0
for the last one but one, where this says 1.64 and 1.93.
"""
from collections.abc import Callable
from itertools import pairwise

from ..step import Clock
from .solvers import SOLVERS, dpmpp_2m, euler

MOST = 4.0
LIKE_EULER = frozenset({"ddim", "euler_cfg_pp", "heun", "heunpp2", "exp_heun_2_x0", "dpm_2"})     # in what they make of one wrong D

# What two samplers make of an error besides at CFG 3.5: there errors over tolerances had medians above 2 (unipc) and single ones of 6; at CFG 1 of 0.5.
BESIDES = {"unipc": 3.0, "unipc_bh2": 3.0, "ipndm": 2.0, "ipndm_v": 2.0}


def factors(sampler: str, clock: Clock, falls: float, guided: float = 0.0) -> tuple[float, ...]:
    """What a sampler makes of one wrong D_n over what Euler's steps make of it, for every step. `guided` is 0 at CFG 1 and 1 at 3.5.

    Multistep ones of which no more is known are taken for dpmpp_2m, and so is any other.
    """
    solver = SOLVERS.get(sampler) or (euler if sampler in LIKE_EULER else dpmpp_2m)
    besides = BESIDES.get(sampler, 1.0) ** guided
    return tuple(besides * factor for factor in against_euler(solver, clock, falls))


def against_euler(solver: Callable, clock: Clock, falls: float) -> tuple[float, ...]:
    """W_n over that of Euler's steps, for every step; 1 at least, as what cancels cannot be relied on."""
    sigmas, own = clock.sigmas, Clock(clock.sigmas, clock.flow)
    steps = [own.tick(sigma) for sigma in sigmas[:-1]]
    covered = [above - below for above, below in pairwise(sigmas)]
    kept_on = [step.noise ** falls * (step.gap / way if way > 0 else 1.0) for step, way in zip(steps, covered, strict=True)]
    found, p, q = [1.0] * len(steps), kept_on[-1], 0.0
    for n in range(len(steps) - 1, 0, -1):
        if not 0 <= sigmas[n + 1] < sigmas[n] < sigmas[n - 1]:
            return (1.0,) * len(steps)      # no schedule that such a sampler is made for
        a, b, e = solver(sigmas, n)
        usual, share, _ = euler(sigmas, n)
        kappa = (kept_on[n - 1] / kept_on[n] - usual) / share
        weight = b * p + q
        found[n] = min(max(weight / (share * kept_on[n]), 1.0), MOST)
        p, q = a * p + weight * kappa, e * p
    return tuple(found)
