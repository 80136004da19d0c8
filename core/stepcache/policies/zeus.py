"""ZEUS: a fixed schedule that skips two steps of three in the middle of a run, and more of them late.

    start <= n < lagrange step:     skip  <=>  n mod denominator  in  modular
    lagrange step <= n < end:       skip  <=>  n mod lagrange interval  /=  0

n is the step. Places are told for 50 steps and scaled to the run's; denominator and interval are not, as they are
shares. "ZEUS: Zero-shot Efficient Unified Sparsity" (arXiv 2604.01552) with the settings of its demos. It extrapolates
the guided output, every second skip in a row anew: choose level guided output and predictor ZEUS, and let
max_consecutive_skips be at least its max_interval (FLUX and SDXL 4, the others 6). Not below 12 steps.
"""
from dataclasses import dataclass

from ...knob import knob, whole_numbers

PUBLISHED_STEPS = 50
FEWEST_STEPS = 12
FIRST = 3   # its extrapolation wants three computed steps

# model: (start, end, denominator, modular, lagrange step, lagrange interval), from the demo of each in the paper's code
PRESETS = {
    "FLUX": (10, 45, 3, "0,1", 24, 6),
    "SDXL": (10, 45, 3, "0,1", 24, 4),
    "SD": (10, 45, 3, "0,1", 24, 4),
    "Wan 2.1": (8, 47, 3, "0,1", 24, 4),
    "CogVideoX": (8, 47, 3, "0,1", 24, 6),
}
CUSTOM = "custom"


def no_remainders(text: str) -> str:
    return "" if whole_numbers(text) else "expected whole numbers with commas between them, such as 0,1"


@dataclass(frozen=True)
class Zeus:
    name = "ZEUS"
    needs_forward = False
    preset: str = knob("FLUX", "The published settings of a model. custom uses the settings below.", choices=(*PRESETS, CUSTOM))
    start: int = knob(10, "First step that may be skipped, of 50. Used by the preset 'custom'.", 0, 50, 1)
    end: int = knob(45, "From this step on everything is computed, of 50. Used by the preset 'custom'.", 0, 50, 1)
    denominator: int = knob(3, "Steps are counted in groups of so many. Used by the preset 'custom'.", 1, 20, 1)
    modular: str = knob("0,1", "Which of a group's steps are skipped, from 0 on. Used by the preset 'custom'.", wrong=no_remainders)
    lagrange_step: int = knob(24, "From this step on, of 50, only every lagrange_interval-th is computed. Used by the preset 'custom'.", 0, 50, 1)
    lagrange_interval: int = knob(6, "Every so many late steps one is computed. Used by the preset 'custom'.", 1, 20, 1)

    def skip(self, view) -> bool:
        n, scale = view.step.index, view.step.steps / PUBLISHED_STEPS
        start, end, denominator, modular, late, interval = self.settings
        late = interval * round(late * scale / interval)        # a step that is computed, as published
        if view.step.steps < FEWEST_STEPS or not max(FIRST, round(start * scale)) <= n < round(end * scale):
            return False
        return n % denominator in whole_numbers(modular) if n < late else n % interval != 0

    @property
    def settings(self) -> tuple:
        own = (self.start, self.end, self.denominator, self.modular, self.lagrange_step, self.lagrange_interval)
        return PRESETS.get(self.preset, own)

    def refuses(self, family: str, steps: int, sampler: str) -> str:
        return f"ZEUS wants {FEWEST_STEPS} steps or more and the run has {steps}" if steps < FEWEST_STEPS else ""
