"""What a run is told apart by. What was measured in one holds in another when all of this is the same."""
import math
from dataclasses import dataclass

NEAR = 1e-3     # two sigmas this near, relatively, are the same
WITH = " with "     # between a sampler's name and its options


@dataclass(frozen=True)
class Facts:
    """Of the run that was calibrated, or of the one that is about to begin."""

    family: str
    model: str                      # the diffusion model's class
    sampler: str                    # the host's sampler function, less its "sample_", and its options behind WITH
    sigmas: tuple[float, ...]
    shape: tuple[int, ...]          # of one latent: channels, frames where there are any, height, width
    cfg: float                      # not a number where guidance is another than CFG
    precision: str                  # of the weights

    @property
    def sampler_function(self) -> str:
        """Less the options."""
        return self.sampler.partition(WITH)[0]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def resolution(self) -> str:
        """The bucket: channels, frames, and the area to the nearest half power of two, so that its aspect ratio is free."""
        channels, *frames, height, width = self.shape
        return " x ".join(str(n) for n in (channels, *frames, round(2 ** (round(2 * math.log2(height * width)) / 2))))

    def differs(self, run: "Facts") -> str:
        """Why what was measured here does not hold in `run`, in one sentence that names the field; empty when it does."""
        for field in ("family", "model", "precision", "sampler", "steps"):
            own, its = getattr(self, field), getattr(run, field)
            if own != its:
                return f"{field}: it was made for {own} and the run has {its}"
        for n, (own, its) in enumerate(zip(self.sigmas, run.sigmas, strict=True)):
            if not math.isclose(own, its, rel_tol=NEAR, abs_tol=1e-6):
                return f"sigmas: it was made for another schedule, where sigma {n} is {own:.4g} and not {its:.4g}"
        if self.resolution != run.resolution:
            return f"resolution: it was made for latents of {sized(self.shape)} and the run has {sized(run.shape)}"
        if not math.isclose(self.cfg, run.cfg, rel_tol=1e-6):
            return f"cfg: it was made for {self.cfg:g} and the run has {run.cfg:g}" if run.cfg == run.cfg else "cfg: the run has a guidance of its own"
        return ""


def sized(shape: tuple[int, ...]) -> str:
    return " x ".join(str(n) for n in shape)
