"""Calibrate: full runs that are listened to, check runs with schedules made from them, and a profile on disk.

The one module of the step cache that knows the host: its samplers, its wrappers and the user's folder.
"""
import datetime
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from statistics import median

import comfy.model_sampling
import comfy.sample
import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..families import Family, family_of
from ..knob import shown
from ..report import Report
from ..step import CLOSE, Clock
from ..store import Row
from ..wrappers import options_of
from .governor import DETERMINISTIC, adds_noise, most_skips, stand_down
from .policies.profile import FromProfile
from .profiles import Check, Facts, Plan, Profile, no_name, write
from .profiles.facts import WITH
from .profiles.files import MOST_STEPS
from .profiles.fits import fitted
from .profiles.plan import error_of, group_costs, neighbours
from .profiles.recording import NAMES, Recording, averaged, magnitude_ratios
from .signal import FIRST_BLOCK, MODULATED_INPUT
from .solvers import SOLVERS

log = logging.getLogger("reprise")

KEY = "reprise.calibrate"
CHECKED = (1.0, 1.5)        # times the speed-up that is asked for: whose error is measured
PACK = Path(__file__).resolve().parents[2]

# A model with these steps computed and all others skipped; the report of its runs goes to the last argument.
Cached = Callable[[object, Sequence[int], int, Callable[[Report], None]], object]


def profiles_folder() -> Path:
    return Path(folder_paths.get_user_directory()) / "reprise" / "profiles"


def pack_version() -> str:
    found = re.search(r'^version = "([^"]+)"', (PACK / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else ""


def model_facts(model) -> dict[str, str]:
    """What is known of a run before its sampler is."""
    network = model.model.diffusion_model
    family = family_of(network)
    precision = str(model.model_dtype()).removeprefix("torch.")
    if getattr(model.model.model_config, "quant_config", None):
        precision += ", quantized"
    return {"family": family.name if family else type(network).__name__, "model": type(network).__name__, "precision": precision}


def sampler_name(sampler) -> str:
    """The host's function, less its "sample_"."""
    return getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__).removeprefix("sample_")


def facts_of(model, sampler, sigmas: Sequence[float], shape: Sequence[int], cfg: float) -> Facts:
    """`shape` is that of one latent. Options of the sampler belong to its name."""
    options = ", ".join(f"{key} {value}" for key, value in sorted(getattr(sampler, "extra_options", {}).items()))
    return Facts(sampler=f"{sampler_name(sampler)}{options and WITH + options}"[:200], sigmas=tuple(float(sigma) for sigma in sigmas),
                 shape=tuple(shape), cfg=float(cfg), **model_facts(model))


class Calibration:
    """The runs of one calibration: the same model, sampler, schedule and guidance, several prompts and noises."""

    def __init__(self, model, negative, sampler, sigmas: Tensor, cfg: float, latent: dict):
        self.model, self.negative, self.sampler, self.sigmas, self.cfg = model, negative, sampler, sigmas, cfg
        samples = latent["samples"]
        if samples.is_nested or samples.ndim not in (4, 5):
            raise ValueError("Step Cache Calibrate takes one latent of an image or a video; connect that of an empty latent node")
        self.image = comfy.sample.fix_empty_latent_channels(
            model, samples, latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal"))
        self.mask, self.batch_index = latent.get("noise_mask"), latent.get("batch_index")
        self.facts = facts_of(model, sampler, sigmas.tolist(), self.image.shape[1:], cfg)
        self.family: Family | None = family_of(model.model.diffusion_model)
        self.flow = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.CONST)
        if why := self.refused():
            raise ValueError(f"Step Cache Calibrate has nothing to measure: {why}")

    def refused(self) -> str:
        """Why a profile of these runs could not be used."""
        options = self.model.model_options.get("transformer_options", {})
        sources = self.model.wrappers, options.get("wrappers", {})
        wrappers = {key for source in sources for kind in source.values() for key, entries in kind.items() if entries}
        sigmas = self.facts.sigmas
        if len(sigmas) < 2:
            return f"the schedule has {len(sigmas)} sigma{'s' * (len(sigmas) != 1)} and no step; connect that of a scheduler, with 9 steps or more"
        if strange := [f"sigma {n} is {sigma}" for n, sigma in enumerate(sigmas) if not math.isfinite(sigma)]:
            return f"{strange[0]}, and a schedule has numbers alone; look at the node that makes the sigmas"
        if any(later >= sooner for sooner, later in zip(sigmas, sigmas[1:], strict=False)):
            return "the sigmas do not fall from each to the next"
        if self.facts.steps > MOST_STEPS:
            return f"the schedule has {self.facts.steps} steps, and a profile has {MOST_STEPS} at most"
        return stand_down(self.facts.sigmas, wrappers, set(options), self.facts.model, sampler=sampler_name(self.sampler))

    def sample(self, model, positive, seed: int, tick: Callable[[], None]) -> Tensor:
        """The latent that the host's sampler makes of one prompt and one noise."""
        noise = comfy.sample.prepare_noise(self.image, seed, self.batch_index)
        return comfy.sample.sample_custom(
            model, noise, self.cfg, self.sampler, self.sigmas, positive, self.negative, self.image, noise_mask=self.mask,
            callback=lambda *step: tick(), disable_pbar=True, seed=seed).cpu()

    def recorded(self, positive, seed: int, tick: Callable[[], None]) -> tuple[Tensor, Recording]:
        recording = Recording(self.family)
        latent = self.sample(listened(self.model, recording, Clock(list(self.facts.sigmas), self.flow)), positive, seed, tick)
        if len(recording.derivatives) != self.facts.steps:
            raise ValueError(f"sampler {self.facts.sampler} evaluated {len(recording.derivatives)} of {self.facts.steps} steps; choose one that "
                             "evaluates each step once, such as euler or dpmpp_2m")
        strange = next((n for n, derivative in enumerate(recording.derivatives) if not derivative.isfinite().all()), None)
        if strange is not None:
            raise ValueError(f"the model's output at step {strange} has values that are no numbers, so there is nothing to measure; "
                             "see that the model samples well without Step Cache Calibrate, in another precision if need be")
        return latent, recording

    def profile(self, recordings: Sequence[Recording]) -> Profile:
        return Profile(
            self.facts, self.flow, torch.stack([recording.overlaps() for recording in recordings]).mean(0), len(recordings),
            self.looks_back, each={name: averaged(recordings, name) for name in NAMES}, teacache=fitted(recordings, (MODULATED_INPUT, FIRST_BLOCK)),
            magcache=magnitude_ratios(recordings), date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(), pack=pack_version())

    @property
    def limits(self) -> tuple[int, list[bool]]:
        """Most skips in a row, and for each step whether it may be skipped, as in a run with Step Cache's defaults."""
        warm_up, end = self.family.warm_up if self.family else 1, self.facts.steps - 1 - Clock(list(self.facts.sigmas), self.flow).idle
        steady = self.plain and sampler_name(self.sampler) in DETERMINISTIC
        return min(most_skips(self.facts.steps), FromProfile.max_group) if steady else 1, [warm_up <= n < end for n in range(self.facts.steps)]

    @property
    def plain(self) -> bool:
        return not adds_noise(getattr(self.sampler, "extra_options", {}))

    @property
    def looks_back(self) -> bool:
        return self.plain and sampler_name(self.sampler) in SOLVERS


class Trials:
    """Runs with schedules, against the full runs of the same pictures."""

    def __init__(self, calibration: Calibration, pictures: Sequence[tuple], full: Sequence[Tensor], cached: Cached, tick: Callable[[], None]):
        self.calibration, self.pictures, self.full, self.cached, self.tick = calibration, pictures, full, cached, tick
        self.failed = ""        # why a run did not follow its schedule

    def error(self, computed: Sequence[int]) -> float | None:
        """The median of the relative L2 error of the final latent; None where a run did not follow the schedule."""
        reports: list[Report] = []
        model = self.cached(self.calibration.model, computed, self.calibration.facts.steps, reports.append)
        errors = [relative_error(self.calibration.sample(model, *picture, self.tick), full) for picture, full in zip(self.pictures, self.full, strict=True)]
        if all(report.state == "ran" and tuple(n for n, e in enumerate(report.each) if e.computed) == tuple(computed) for report in reports):
            return max(median(errors), 1e-9)
        self.failed = next((report.reason for report in reports if report.reason), "conditions start or end on the way")
        return None

    def bettered(self, profile: Profile, plan: Plan, measured: float, count: int) -> Plan:
        """The best schedule that `count` trials find: one computed step is moved at a time, what measures better is kept."""
        longest, may_skip = self.calibration.limits
        costs = group_costs(profile.overlaps, *profile.steps(profile.looks_back), longest + 1, profile.looks_back)
        best, tried = Plan(plan.computed, plan.error, measured), {plan.computed}
        for _ in range(count):
            others = [Plan(other, error_of(costs, other)) for other in neighbours(best.computed, longest, may_skip) if other not in tried]
            if not others:
                break
            other = min(others, key=attrgetter("error"))
            tried.add(other.computed)
            error = self.error(other.computed)
            if error is not None and error < best.measured:
                best = Plan(other.computed, other.error, error)
        return best


def calibrate(calibration: Calibration, positives: Sequence, noises: int, name: str, speed_up: float, refine: int, cached: Cached,
              tick: Callable[[], None] = lambda: None) -> tuple[Profile, list[str]]:
    """The profile, written under its name when every run has come to its end, and what else is to be said.

    The plans for `speed_up` and for one step of CHECKED more are run, to tell what errors come to; `refine` further trials seek better
    schedules for each. `tick` is called once per step of the runs; there are at most `evaluations(...)` of them.
    """
    if fault := no_name(name):
        raise ValueError(f"name is '{shown(name)}'; {fault}")
    pictures = [(positive, seed) for positive in positives for seed in range(noises)]
    full, recordings = zip(*(calibration.recorded(*picture, tick) for picture in pictures), strict=True)
    profile, trials = calibration.profile(recordings), Trials(calibration, pictures, full, cached, tick)
    plans, remarks = profile.plans(*calibration.limits, profile.looks_back), sorted({recording.deaf for recording in recordings if recording.deaf})
    checks, refined = [], []
    for count in sorted({max(round(calibration.facts.steps / speed_up / more), min(plans)) for more in CHECKED}):
        plan = plans[count]
        measured = trials.error(plan.computed)
        if measured is None:
            remarks.append(f"no check run with {count} computed step{'s' * (count != 1)}, so what a tolerance comes to is not known ({trials.failed})")
            continue
        checks.append(Check(count, plan.error, measured))
        better = trials.bettered(profile, plan, measured, refine)
        if better.computed != plan.computed:
            refined.append(better)
    profile = replace(profile, checks=tuple(checks), refined=tuple(refined))
    path = write(profiles_folder(), name, profile)
    log.info("Step Cache Calibrate: profile '%s' of %d full runs written to %s", name, len(pictures), path)
    return profile, remarks


def evaluations(calibration: Calibration, positives: Sequence, noises: int, refine: int) -> int:
    return len(positives) * noises * calibration.facts.steps * (1 + len(CHECKED) * (1 + refine))


def relative_error(latent: Tensor, full: Tensor) -> float:
    """Relative L2."""
    return ((latent.float() - full.float()).norm() / full.float().norm().clamp_min(1e-12)).item()


def listened(model, recording: Recording, clock: Clock):
    """A clone of the model on which a recording hears every step. The model itself stays as it is."""
    def predict_noise(executor, x, timestep, model_options=None, seed=None):
        sigma = float(timestep.flatten()[0])
        step = clock.tick(sigma)
        if step.evaluation >= clock.steps or abs(step.place - step.evaluation) > CLOSE:
            raise ValueError("this sampler does not evaluate each step once, and a profile would tell nothing of its runs; choose another, such as euler")
        recording.begin()
        denoised = executor(x, timestep, model_options or {}, seed)
        recording.end(x, denoised, sigma)
        return denoised

    def diffusion_model(executor, *args, **kwargs):
        options = options_of(args, kwargs)
        rows = rows_of(options, args[0] if args else kwargs.get("x")) if recording.family is not None and recording.family.wrapped else ()
        return recording.inside(rows, executor.class_obj, lambda: executor(*args, **kwargs))

    def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
        options = transformer_options or {}
        rows = rows_of(options, x) if recording.family is not None and not recording.family.wrapped else ()
        return recording.inside(rows, getattr(executor.class_obj, "diffusion_model", None),
                                lambda: executor(x, t, c_concat, c_crossattn, control, options, **kwargs))

    clone = model.clone()
    for kind, wrapper in ((WrappersMP.PREDICT_NOISE, predict_noise), (WrappersMP.DIFFUSION_MODEL, diffusion_model), (WrappersMP.APPLY_MODEL, apply_model)):
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


def rows_of(options: dict, x) -> tuple[Row, ...]:
    """The conditions in a call of the model; none where the call is not understood."""
    uuids, conds = options.get("uuids"), options.get("cond_or_uncond")
    first = x[0] if isinstance(x, (list, tuple)) and x else x
    if not torch.is_tensor(first) or not uuids or not conds or len(uuids) != len(conds) or first.shape[0] % len(uuids) or torch.compiler.is_compiling():
        return ()
    return tuple(Row(str(first.device), 0, uuid, cond, None, tuple(first.shape[1:])) for uuid, cond in zip(uuids, conds, strict=True))
