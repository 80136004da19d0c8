"""Temporal delta: skip while what is cached changed little over the last two computed steps.

    c = mean|D_n - D_m| / (mean|D_n| (n - m))              m, n the last two computed steps
    skip  <=>  (t - n) c < threshold,  and at most N skips in a row

D is what the level keeps: for a range of blocks what they add to the stream, which is what the paper means, for the
other levels the output. From the Temporal Delta Cache of "6Bit-Diffusion" (arXiv 2603.18742), which asks every block
for itself: level 'block ranges' does so for each range of its list, whose c, m, n and skips in a row are then its own.
N is 2 in the paper, and its thresholds are not published. The change is taken per step, because computed steps may lie
apart, and it adds up while steps are skipped. The paper computes the steps that fill the cache in the higher precision,
because their rounding is added again on every skip; here a model has one precision, and what is done is to take and
keep the residuals of 'block ranges' in fp32.
"""
from dataclasses import dataclass

from ...knob import knob
from ..signal import OUTPUT


@dataclass(frozen=True)
class TemporalDelta:
    name = "temporal delta"
    needs_forward = False
    signal = OUTPUT
    by_range = True
    threshold: float = knob(0.1, "Allowed relative change of what is cached. Higher skips more steps and follows the full model less closely; 0 skips nothing.",
                            0.0, 3.0, 0.005)
    max_skips: int = knob(2, "So many skips in a row at most, if max_consecutive_skips allows it; 2 in the paper.", 1, 50, 1)

    def skip(self, view) -> bool:
        change, last = view.signal.output_change, view.computed[-1]
        if change is None or view.step.evaluation - last.evaluation > self.max_skips:
            return False
        return (view.step.place - last.place) * change < self.threshold
