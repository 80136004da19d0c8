"""EasyCache: skip while the change of the output, which the change of the input foretells, stays below a threshold.

    k = mean|v_c - v_b| / mean|x_c - x_b|                          b, c the last two computed steps
    A_t = A_(t-1) + k mean|x_t - x_(t-1)| / mean|v_c|              A = 0 at every computed step
    skip  <=>  A_t < threshold

x is what goes into the model, compared with that of the evaluation before, skipped or not; v is its output in
velocity form, (x - denoised) / sigma. "Less is Enough: Training-Free Video Diffusion Acceleration via Runtime-Adaptive
Caching" (arXiv 2507.02860); published: Wan 2.1 threshold 0.05 and warm-up 10, HunyuanVideo 0.025 and 5, at 50 steps.
It adds v_c - x_c to x on a skipped step; here the predictor says what stands in.
"""
from dataclasses import dataclass

from ...knob import knob
from ..signal import MODEL_INPUT


@dataclass(frozen=True)
class EasyCache:
    name = "EasyCache"
    needs_forward = False
    signal = MODEL_INPUT
    threshold: float = knob(
        0.05, "Allowed change of the output between two computed steps. Higher skips more steps; 0 skips nothing. Published: Wan 2.1 0.05, "
        "HunyuanVideo 0.025; the host's own EasyCache has 0.2 and another sum.", 0.0, 3.0, 0.005)
    warm_up: int = knob(5, "So many first steps are always computed. Published: 5 and 10 at 50 steps.", 1, 50, 1)

    def skip(self, view) -> bool:
        flow = view.signal.flow if view.step.index >= self.warm_up else None
        return flow is not None and flow.rate is not None and flow.rate * flow.travel < self.threshold * flow.output_norm
