"""TeaCache: skip while the estimated change of the output, summed from step to step, stays below a threshold.

    A_t = A_(t-1) + p(mean|m_t - m_(t-1)| / mean|m_(t-1)|)        A = 0 at every computed step
    skip  <=>  A_t < threshold

m is the modulated input of the first block, or what TeaCache takes in its place for a family, and p a polynomial of
degree 4, fitted per model to the change of the output. For FLUX the absolute value of p is taken. "Timestep Embedding
Tells: It's Time to Cache for Video Diffusion Model" (arXiv 2411.19108); the coefficients, their sources, what they were
fitted on and published thresholds are in data/teacache.json.
"""
from dataclasses import dataclass

from ...knob import knob
from ..signal import MODULATED_INPUT
from .published import AUTOMATIC, Published

COEFFICIENTS = Published.read("teacache.json", "coefficients")


def polynomial(coefficients: list[float], x: float) -> float:
    """Highest power first."""
    value = 0.0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value


@dataclass(frozen=True)
class TeaCache:
    name = "TeaCache"
    needs_forward = True
    signal = MODULATED_INPUT
    threshold: float = knob(
        0.4, "Called rel_l1_thresh elsewhere. Higher skips more steps; 0 skips nothing. Published: FLUX 0.4, Kontext 0.22, HunyuanVideo 0.15, "
        "LTX-Video 0.06, Wan 2.1 0.08 to 0.3.", 0.0, 10.0, 0.005)
    coefficients: str = knob(
        AUTOMATIC, "The polynomial that was fitted for this model. automatic takes that of the model's family, where there is one.",
        choices=COEFFICIENTS.choices)

    def skip(self, view) -> bool:
        published, changes = COEFFICIENTS.pick(self.coefficients, view.family), view.signal.changes
        if published is None or not changes or view.step.index < published.get("warm_up", 1):
            return False
        told = [polynomial(published["coefficients"], change) for change in changes]
        # some of the polynomials fall below 0, and a threshold of 0 is to skip nothing all the same
        return 0 < self.threshold > sum(abs(p) if published.get("absolute") else p for p in told)

    def refuses(self, family: str, steps: int, sampler: str) -> str:
        return COEFFICIENTS.missing(self.coefficients, family)
