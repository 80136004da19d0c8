"""What the tests of this folder share: sampling in this process, the step cache on a model, and eyes on its blocks."""
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import comfy.context_windows
import comfy.controlnet
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from pack.core.attach import attach_step_cache
from pack.core.families import FAMILIES
from pack.core.report import Report
from pack.core.run import Settings
from pack.core.stepcache.levels import LEVELS
from pack.core.stepcache.policies import POLICIES
from pack.core.stepcache.predictors import PREDICTORS
from testbed import tiny

STEPS = 12
QUICK = ["flux", "z_image", "ltxv"]     # what levels, policies and guidance are tested on; test_families has a model of every class
NAMES = QUICK
CONCRETE = [name for name, level in LEVELS.items() if hasattr(level, "seam") and level.serves != "unet"]     # for UNets see test_unet
OF_BLOCKS = [name for name in CONCRETE if LEVELS[name].serves == "transformer"]
ONE_PHASE = {"front or rear range": {"border": 1.0}}    # knobs for levels that do not do the same over the whole run: with these they do


@cache
def model(name: str):
    """One patcher per kind for all tests; sampling must leave it as it was, which test_off_is_off asserts."""
    return tiny.patcher(name)


def network(patcher):
    return patcher.model.diffusion_model


def family(name: str):
    return next(family for family in FAMILIES.values() if family.matches(network(model(name))))


def blocks(name: str, patcher=None) -> list:
    return [block for _, block in family(name).blocks(network(patcher or model(name)))]


def always(name: str, patcher=None) -> list:
    return [block for attribute in family(name).always for block in getattr(network(patcher or model(name)), attribute, None) or ()]


def sample(patcher, name, *, steps=STEPS, cfg=3.0, sampler="euler", scheduler="simple", size=8, batch=1, noise=None, positive=None,
           negative=None, seed=1, callback=None, latent=None, **more):
    """The latent that the host's KSampler gives, from `latent`, an empty one if none; video and sound packed into one tensor."""
    noise = tiny.noise(name, size=size, batch=batch) if noise is None else noise
    more.setdefault("disable_pbar", True)
    with torch.inference_mode():
        return packed(comfy.sample.sample(
            patcher, noise, steps, cfg, sampler, scheduler, positive or tiny.conditioning(name, 11), negative or tiny.conditioning(name, 12),
            noise * 0 if latent is None else latent, seed=seed, callback=callback, **more))


def packed(latent) -> torch.Tensor:
    return comfy.utils.pack_latents(latent.unbind())[0] if latent.is_nested else latent


@dataclass(frozen=True)
class Never:
    """A test policy: computes every step, with the engine live."""

    name = "never"
    needs_forward = False

    def skip(self, view):
        return False


@dataclass(frozen=True)
class NeverGated(Never):
    needs_forward = True


@dataclass(frozen=True)
class At:
    """A test policy: skips the given evaluations and no other."""

    name = "at"
    needs_forward = False
    evaluations: tuple = ()

    def skip(self, view):
        return view.step.evaluation in self.evaluations


@dataclass(frozen=True)
class Gate(At):
    """A test policy that decides from what the first block is given."""

    needs_forward = True
    signal = "modulated input"


def levelled(first: int, last: int) -> dict:
    """Block range with so many first and last blocks, for `cached`."""
    return {"level": "block range", "level_knobs": {"first_blocks": first, "last_blocks": last}}


def made(registry, choice, **knobs):
    """A registry entry by name, or an instance as it is."""
    return registry[choice](**knobs) if isinstance(choice, str) else choice


def ranges_kept(level: str) -> int:
    return getattr(LEVELS[level](), "kept", 1)


def attached(patcher, policy="interval", predictor="hold", level="automatic", *, reports: list | None = None, policy_knobs=None,
             predictor_knobs=None, level_knobs=None, **more):
    """The model with a step cache on it; reports of its runs go to `reports`."""
    settings = Settings(
        made(POLICIES, policy, **(policy_knobs or {})), made(PREDICTORS, predictor, **(predictor_knobs or {})),
        made(LEVELS, level, **(level_knobs or {})), **more)
    return attach_step_cache(patcher, settings, (reports if reports is not None else []).append)


def run(patcher, name, *, cached: dict | None = None, **sampling) -> tuple[torch.Tensor, Report]:
    """A sampling run with the step cache, and its report."""
    reports: list[Report] = []
    latent = sample(attached(patcher, reports=reports, **(cached or {})), name, **sampling)
    (report,) = reports
    return latent, report


def decisions(report: Report) -> list[bool]:
    return [evaluation.computed for evaluation in report.each]


def whys(report: Report) -> list[str]:
    return [evaluation.why for evaluation in report.each]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().mean() / b.abs().mean()).item()


def windowed(patcher, dim: int, schedule: str = "standard_static"):
    """A clone of the model that works in context windows of 8 along a dimension. They stay, or move and close to a ring with "standard_uniform"."""
    get, clone = comfy.context_windows, patcher.clone()
    clone.model_options["context_handler"] = get.IndexListContextHandler(
        get.get_matching_context_schedule(schedule), get.get_matching_fuse_method("pyramid"),
        context_length=8, context_overlap=2, context_stride=1, closed_loop=schedule == "standard_uniform", dim=dim)
    return clone


def spied(patcher, kind: WrappersMP, before: Callable):
    """A clone of the model on which `before(executor, args, kwargs)` sees every call of a wrapper's kind."""
    def wrapper(executor, *args, **kwargs):
        before(executor, args, kwargs)
        return executor(*args, **kwargs)

    clone = patcher.clone()
    clone.add_wrapper_with_key(kind, "test.spy", wrapper)
    return clone


@contextmanager
def counted(modules: list):
    """Counts the forward calls of modules, by id; sees through forward proxies, as it hooks what lies inside the block."""
    calls, hooks = Counter(), []
    for place, module in enumerate(modules):
        leaf = next(m for m in module.modules() if not list(m.children()) and list(m.parameters()))
        hooks.append(leaf.register_forward_hook(lambda *_, place=place: calls.update([place])))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@cache
def plain(name: str, **sampling) -> torch.Tensor:
    """The host's latent without us, from a model that is known to move. Shared: do not write into it."""
    return assert_moves(name, model(name), **sampling)


def assert_moves(name: str, patcher, **sampling) -> torch.Tensor:
    """A numeric test on a model whose output stands still proves nothing. Gives the host's latent."""
    outputs: list = []
    latent = sample(patcher, name, callback=lambda step, denoised, x, total: outputs.append(packed(denoised).clone()), **sampling)
    steps = [relative(now, before) for before, now in zip(outputs, outputs[1:], strict=False)]
    assert min(steps) > 1e-3, f"the output of {name} does not move from step to step ({min(steps):.1e}); the test would prove nothing"
    return latent


def schedule(name: str, steps: int = STEPS, patcher=None) -> torch.Tensor:
    return comfy.samplers.calculate_sigmas((patcher or model(name)).get_model_object("model_sampling"), "simple", steps)


def sample_by(function: Callable, patcher, name, *, sigmas=None, cfg=3.0, size=8, batch=1, noise=None, positive=None, negative=None, label="euler",
              **more):
    """Sampling by a sampler function of the test's own, which the host and the step cache take for the one called `label`."""
    def sampler(denoise, x, sigmas, extra_args=None, callback=None, disable=None):
        return function(lambda x, sigma: denoise(x, sigma * x.new_ones(len(x)), **extra_args), x, sigmas.tolist())

    sampler.__name__ = f"sample_{label}"
    noise = tiny.noise(name, size=size, batch=batch) if noise is None else noise
    with torch.inference_mode():
        return packed(comfy.sample.sample_custom(
            patcher, noise, cfg, comfy.samplers.KSAMPLER(sampler), schedule(name) if sigmas is None else sigmas,
            positive or tiny.conditioning(name, 11), negative or tiny.conditioning(name, 12), noise * 0,
            disable_pbar=True, seed=1, **more))


def replay_errors(patcher, name, **sampling) -> list[float]:
    """Every place of the schedule is evaluated twice with the same input; relative difference of the two, for each place.

    With a policy that skips the second one, and hold, a cache that keeps the right thing repeats the first exactly.
    """
    errors = []

    def twice(denoise, x, sigmas):
        for now, following in zip(sigmas, sigmas[1:], strict=False):
            first = denoise(x, now).clone()
            errors.append(relative(denoise(x, now), first))
            x = first + (x - first) * following / now
        return x

    latent = sample_by(twice, patcher, name, **sampling)
    assert torch.isfinite(latent).all() and len(errors) == STEPS
    return errors


class Control(comfy.controlnet.ControlBase):
    """Adds fixed random residuals after blocks."""

    def __init__(self, doubles: int, singles: int, tokens=16, width=128):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        made = lambda n: [torch.randn(1, tokens, width, generator=generator) for _ in range(n)]
        self.residuals = {"input": made(doubles), "output": made(singles)}
        self.calls = 0

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.calls += 1
        if not self.timestep_range[0] >= t[0] >= self.timestep_range[1]:
            return None
        return {key: [r.repeat(len(x_noisy), 1, 1) for r in parts] for key, parts in self.residuals.items()}

    def copy(self):
        return self


EVERYTHING = At(tuple(range(100)))
EVERY_SECOND = At(tuple(range(1, 2 * STEPS, 2)))
