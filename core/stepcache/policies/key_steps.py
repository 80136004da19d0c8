"""Key steps: a published list of steps to compute, stretched to the steps of the run.

    compute  <=>  a key step has been reached since the last computed step

Faster Diffusion (arXiv 2312.09608) lists those of Stable Diffusion 1.5 with 50 DDIM steps. The last gap is 15 steps, so
max_consecutive_skips must be 13 or more for the list to be followed as it is; the last step is computed besides.
"""
from dataclasses import dataclass

# The authors' code, mod "50ls" of github.com/hutaiHang/Faster-Diffusion, utils_sd.py; section 4 of the paper.
KEY_STEPS, OF = (0, 1, 2, 3, 5, 10, 15, 25, 35), 50


@dataclass(frozen=True)
class KeySteps:
    name = "key steps"
    needs_forward = False

    def skip(self, view) -> bool:
        return not reached(tuple((2 * key * view.step.steps + OF) // (2 * OF) for key in KEY_STEPS), view)


def reached(keys: tuple[int, ...], view) -> bool:
    """Whether one of the key steps lies between the last computed step and this one."""
    return any(view.computed[-1].place + 1e-3 < key <= view.step.place + 1e-3 for key in keys)
