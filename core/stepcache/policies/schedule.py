"""Schedule: a list says which steps are computed.

    skip  <=>  the list has 0 at this step

The step masks of cache-dit (its steps computation mask, presets slow to ultra) and the reusable-step set of ERTACache
(arXiv 2508.21091) are such lists. The presets are bins for 28 steps, so many computed, so many skipped, in turn; for
another number of steps the nearest entry is taken, where cache-dit lengthens or cuts the bins.
"""
from collections.abc import Iterable
from dataclasses import dataclass

from ...knob import knob, whole_numbers

# cache-dit, cache_interface.py, predefined policies for 28 steps
PRESETS = {
    "slow": "8,1,3,2,3,2,2,2,1,3,1",
    "medium": "6,1,2,3,2,3,2,3,2,3,1",
    "fast": "6,1,1,3,1,4,1,5,1,4,1",
    "ultra": "4,2,1,5,1,6,1,7,1",
}
CUSTOM = "custom"
MOST_STEPS = 10_000


def steps_of(text: str) -> tuple[bool, ...]:
    """True for each computed step. Ones and zeros alone are the steps; other numbers are runs, computed ones first."""
    numbers = whole_numbers(text)
    if max(numbers) <= 1:
        return tuple(bool(number) for number in numbers)
    return tuple(place % 2 == 0 for place, length in enumerate(numbers) for _ in range(length))


def no_mask(text: str) -> str:
    numbers = whole_numbers(text)
    if len(numbers) < 2:
        return "expected whole numbers with commas between them: 1,1,0,1 with one per step, or runs such as 8,1,3,2 in turn"
    return "" if sum(numbers) <= MOST_STEPS else f"expected {MOST_STEPS} steps in all at most, and these are {sum(numbers)}"


@dataclass(frozen=True)
class Schedule:
    name = "schedule"
    needs_forward = False
    preset: str = knob(
        "medium", "At 28 steps slow computes 18 of them, medium 15, fast 11, ultra 8, if max_consecutive_skips allows it. "
        "custom uses the list below.", choices=(*PRESETS, CUSTOM))
    steps: str = knob(
        PRESETS["medium"], "1 for a computed and 0 for a skipped step, or the lengths of runs of computed and skipped steps in turn. "
        "Together as many as the run has steps. Used by the preset 'custom'.", wrong=no_mask)

    @classmethod
    def of(cls, computed: Iterable[int], steps: int) -> "Schedule":
        """The one that computes these of a run's `steps`."""
        wanted = set(computed)
        if not wanted <= set(range(steps)):
            raise ValueError(f"schedule: step {max(wanted)} is to be computed and the run has steps 0 to {steps - 1}; leave it out")
        return cls(CUSTOM, ",".join(str(int(n in wanted)) for n in range(steps)))

    @property
    def mask(self) -> tuple[bool, ...]:
        return steps_of(PRESETS.get(self.preset, self.steps))

    def skip(self, view) -> bool:
        told, steps = self.mask, view.step.steps
        if self.preset == CUSTOM and len(told) != steps:
            return False
        return not told[round(view.step.index * (len(told) - 1) / max(steps - 1, 1))]

    def refuses(self, family: str, steps: int, sampler: str) -> str:
        told = len(self.mask)
        return f"the schedule is one of {told} steps and the run has {steps}" if self.preset == CUSTOM and told != steps else ""
