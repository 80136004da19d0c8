"""CG-Taylor: skip while a forecast of what the first blocks do comes true.

    r' = forecast of r from computed steps, a polynomial of `order` in the step index
    skip  <=>  mean|r' - r|  <  gate * mean|r|

r is what the first blocks add to their input, known on every step. From "Confidence-Gated Taylor" (arXiv 2508.02240),
written from the paper: the public script has a condition that never holds, so that its forecast is never renewed.
The paper forecasts the stream after the first block rather than what is added to it, and Taylor's terms rather than
divided differences, which are the same for order 1. Published: FLUX gate 0.13 (fast) or 0.03 with order 1, Wan 2.1
0.36 with order 3, DiT 0.008 with order 3, at 50 steps. Its predictor for the last block is divided differences, order 1.
"""
from dataclasses import dataclass

from ...knob import knob
from ..signal import FIRST_BLOCK


@dataclass(frozen=True)
class CGTaylor:
    name = "CG-Taylor"
    needs_forward = True
    signal = FIRST_BLOCK
    gate: float = knob(0.13, "Allowed relative error of the forecast. Higher skips more steps; 0 skips nothing. Published: FLUX 0.13 or 0.03, Wan 2.1 0.36.",
                       0.0, 3.0, 0.005)
    order: int = knob(1, "Order of the forecast of the first blocks. Published: FLUX 1, Wan 2.1 3.", 1, 3, 1)
    warm_up: int = knob(5, "So many first steps are always computed; the paper's code computes 5.", 1, 50, 1)

    def skip(self, view) -> bool:
        error = view.signal.forecast_error(self.order) if view.step.index >= self.warm_up else None
        return error is not None and error < self.gate
