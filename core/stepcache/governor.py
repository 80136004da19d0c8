"""Hard rules that no policy can overrule, and reasons not to run at all."""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..step import Step

FEWEST_STEPS = 9
MOST_SKIPS = 4, 1 / 6     # in a row: so many, or this share of the steps if that is more

# The host's sampler functions, less their "sample_", that add no noise on the way and forgive an error. Any other
# gets short skips and low orders, the multistep CFG++ samplers among them, which build every error up.
DETERMINISTIC = frozenset({
    "euler", "heun", "heunpp2", "exp_heun_2_x0", "dpm_2", "dpmpp_2m", "ipndm", "ipndm_v", "deis", "res_multistep", "gradient_estimation",
    "unipc", "unipc_bh2", "euler_cfg_pp", "ddim",
})

# Settings of a sampler with which it adds noise all the same.
NOISY_OPTIONS = ("s_churn", "eta")

# Step skippers that would act on the same model, by the keys of their wrappers, then by what they leave in
# transformer_options. LazyCache leaves the key of EasyCache there, so wrappers are asked first.
SKIPPER_WRAPPERS = {"lazycache": "LazyCache", "easycache": "EasyCache"}
SKIPPER_OPTIONS = {"easycache": "EasyCache", "rel_l1_thresh": "TeaCache", "magcache_thresh": "MagCache"}
# Samplers that count on every evaluation, by why.
STATEFUL_SAMPLERS = {"ar_video": "moves on in the keys and values that each evaluation of the model writes",
                     "lms": "hands every error on many times over"}
SKIPPER_MODELS = {"ComfyFluxWrapper": "nunchaku's loader, which has a step cache of its own (cache_threshold),"}


@dataclass(frozen=True)
class Governor:
    start_sigma: float      # skips are allowed from here
    end_sigma: float        # to here
    max_skips: int          # in a row
    warm_up: int = 1        # evaluations at the start that are computed
    last_steps: int = 1     # steps at the end that are

    def must_compute(self, step: Step, computed: tuple[Step, ...], skips: int) -> str:
        """Why this evaluation may not be skipped; empty when the policy may decide."""
        if not computed:
            return "first step"
        if step.evaluation < self.warm_up:
            return "warm-up"
        if step.index >= step.steps - self.last_steps:
            return "last step" if step.last else "last steps"
        if step.turns:
            return "sigma rises next"
        if not self.end_sigma <= step.sigma <= self.start_sigma:
            return "outside start and end"
        if skips >= self.max_skips:
            return "most skips in a row"
        return ""


def adds_noise(options: Mapping[str, object]) -> bool:
    """Whether a sampler is set to add noise, whatever its name."""
    return any(options.get(name) for name in NOISY_OPTIONS)


def most_skips(steps: int) -> int:
    """In a row, where nobody said how many."""
    least, share = MOST_SKIPS
    return max(least, int(steps * share))


def stand_down(sigmas: Sequence[float], wrapper_keys: set[str], option_keys: set[str], model: str = "", sampler: str = "", few_steps: bool = False) -> str:
    """Why the step cache must not act on this run; empty when it may. `model` is the diffusion model's class, `few_steps` lets short runs pass."""
    steps = len(sigmas) - 1
    strange = next((n for n, sigma in enumerate(sigmas) if not math.isfinite(sigma)), None)
    if strange is not None:
        return f"sigma {strange} is {sigmas[strange]}, so where the run is cannot be told; look at the node that makes the sigmas"
    below = next((n for n, sigma in enumerate(sigmas) if sigma < 0), None)
    if below is not None:
        return f"sigma {below} is {sigmas[below]:.4g}, and below 0 there is no noise to take away; look at the node that makes the sigmas"
    if sampler in STATEFUL_SAMPLERS:
        return f"sampler {sampler} {STATEFUL_SAMPLERS[sampler]}, so none may be skipped"
    if steps < FEWEST_STEPS and not few_steps:
        return f"the run has {steps} step{'s' * (steps != 1)}, and below {FEWEST_STEPS} a skipped one costs the picture more than it saves"
    if model in SKIPPER_MODELS:
        return f"the model comes from {SKIPPER_MODELS[model]} and Reprise leaves it alone"
    others = [name for key, name in SKIPPER_WRAPPERS.items() if key in wrapper_keys]
    others += [name for key, name in SKIPPER_OPTIONS.items() if key in option_keys]
    return f"{others[0]} is on the same model, and two step caches multiply their errors; remove one of them" if others else ""
