"""Centred interval: one step in N is computed, more densely around a centre.

    l_k = evenly spaced from (-c)^(1/p) to (T - c)^(1/p), k = 0..K,  K = ceil(T / N)
    compute step 0 and steps c + trunc(Re l_k^p), 0 < k < K                        the negative base by its principal root

Where two of them meet, p is lowered by 0.02 until none do; at p = 1 they are even. The non-uniform 1:N schedule of
DeepCache (arXiv 2312.00858), for N of 5 and more; Stable Diffusion 1.5: N 5, p 1.4, c 15 of 50 steps.
"""
from dataclasses import dataclass
from math import ceil

from ...knob import knob
from .key_steps import reached


@dataclass(frozen=True)
class CentredInterval:
    name = "centred interval"
    needs_forward = False
    interval: int = knob(5, "One step in N is computed. Up to N and more skips in a row, so max_consecutive_skips must allow them.", 1, 20, 1)
    centre: float = knob(0.3, "Share of the steps around which more are computed.", 0.0, 1.0, 0.01)
    power: float = knob(1.4, "How much more: 1 is even.", 1.0, 3.0, 0.05)

    def skip(self, view) -> bool:
        return self.interval > 1 and not reached(centred(view.step.steps, self.interval, round(self.centre * view.step.steps), self.power), view)


def centred(steps: int, interval: int, centre: int, power: float) -> tuple[int, ...]:
    """The computed steps."""
    wanted = ceil(steps / interval)
    while power > 1:
        begin, end = complex(-centre) ** (1 / power), complex(steps - centre) ** (1 / power)
        spaced = {int(((begin + (end - begin) * k / wanted) ** power).real) + centre for k in range(wanted + 1)}
        inner = sorted(spaced)[1:-1]
        if len(inner) == wanted - 1:
            return 0, *inner
        power -= 0.02
    return tuple(steps * k // wanted for k in range(wanted))
