"""What a test shows a policy: a step of a run, and what there is to see of it."""
import math
from dataclasses import dataclass, replace

from pack.core.step import Clock
from pack.core.stepcache.policies import View
from pack.core.stepcache.signal import Flow


def steps_of(count: int):
    clock = Clock([1 - n / count for n in range(count + 1)], flow=True)
    return [clock.tick(1 - n / count) for n in range(count)]


STEPS = steps_of(20)


@dataclass(frozen=True)
class Signal:
    """What a test lets a policy see."""

    drift: float | None = 0.05
    changes: tuple = (0.05, 0.05)
    flow: Flow | None = Flow(1.0, 0.1, 1.0, 1.0)
    output_change: float | None = 0.05
    error: float | None = 0.05

    def forecast_error(self, order):
        return self.error


NOT_A_NUMBER = Signal(math.nan, (0.1, math.nan), Flow(1.0, math.nan, math.nan, math.nan), math.nan, math.nan)


def view(at: int = 8, computed=(0, 4, 7), steps=STEPS, signal=None, **more) -> View:
    family = more.pop("family", "flux")
    signal = signal or Signal()
    return replace(View(steps[at], tuple(steps[n] for n in computed), predicted=0.01, owed=0.0, family=family, signal=signal), **more)


def walk(policy, steps, told=lambda n, computed: Signal(), forced=()) -> list[bool]:
    """Computed or not, over a run: the first, the last and `forced` steps are computed whatever the policy says."""
    computed = [0]
    for n in range(1, len(steps)):
        skips = policy.skip(view(n, tuple(computed), steps, signal=told(n, computed)))
        if not skips or n == len(steps) - 1 or n in forced:
            computed.append(n)
    return [n in computed for n in range(len(steps))]
