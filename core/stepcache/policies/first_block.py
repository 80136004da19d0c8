"""First block: skip the step when the first block's residual barely moved.

    skip  <=>  mean|r_t - r_c|  <  threshold * mean|r_c|

r_t is what the first blocks add to their input now, r_c what they added at the last computed step.
From ParaAttention's first-block cache (C. Zeyi, 2024); published thresholds: FLUX 0.12 at 28 steps, 0.08 in DBCache.
"""
from dataclasses import dataclass

from ...knob import knob
from ..signal import FIRST_BLOCK


@dataclass(frozen=True)
class FirstBlock:
    name = "first block"
    needs_forward = True
    signal = FIRST_BLOCK
    threshold: float = knob(0.12, "Higher skips more steps and follows the full model less closely; 0 skips nothing.", 0.0, 1.0, 0.005)

    def skip(self, view) -> bool:
        drift = view.signal.drift
        return drift is not None and drift < self.threshold
