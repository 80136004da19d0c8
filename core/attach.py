"""The one place that touches ModelPatcher: it clones the model, leaves settings on the clone and wraps the host's calls.

OUTER_SAMPLE opens and closes the run; PREPARE_SAMPLING has the host free memory for it; PREDICT_NOISE is one solver
evaluation; CALC_COND_BATCH tells the main pass from guidance that repeats it; APPLY_MODEL and DIFFUSION_MODEL are where
rows and blocks are.
"""
import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from numbers import Real

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from comfy_execution.utils import get_executing_context

from .conditions import acting, conditions, hooks_of, move, window_of
from .families import Family, Unfamiliar, family_of
from .memory import enlarged
from .report import Report
from .reserve import cache_bytes
from .run import Run, Settings
from .runs import Runs
from .stepcache.calibrate import facts_of, model_facts, profiles_folder, sampler_name
from .stepcache.error_budget import MOST_GUIDANCE
from .stepcache.governor import adds_noise, stand_down
from .stepcache.levels import Blocks, Call, GuidedOutput, ModelOutput, Seam, UnetEncoder, Unfit
from .stepcache.profiles import read
from .store import ASIDE, Row
from .wrappers import attached, options_of

log = logging.getLogger("reprise")

KEY = "reprise.step_cache"
RUN = "reprise.run"
# Functions behind guidance may start and end with sigma, keep a state, or be how a CFG++ sampler gets at the negative's
# output; whatever they do, they must be called on every evaluation.
GUIDANCE_HOOKS = ("sampler_pre_cfg_function", "sampler_post_cfg_function")
MASK_HOOK = "denoise_mask_function"     # turns the denoise mask into that of an evaluation, just before PREDICT_NOISE
COMPILE = "torch.compile"               # the key of the host's wrapper that swaps compiled modules in


@dataclass(frozen=True)
class Attachment:
    """What rides on the model: settings, whom to tell how it went, and how it went."""

    settings: Settings
    notify: Callable[[Report], None]
    runs: Runs = field(default_factory=Runs)

    def tell(self, report: Report) -> None:
        log.info(report.line())
        self.runs.add(report, get_executing_context())
        self.notify(report)


def attach_step_cache(model, settings: Settings, notify: Callable[[Report], None] = lambda report: None):
    """A clone of `model` with the step cache on it; a second one takes the place of the first."""
    return attached(model, KEY, Attachment(settings, notify), WRAPPERS)


def check_profile(model, settings: Settings) -> None:
    """Raise where it can be known before a run that the settings' profile cannot serve this model."""
    check = getattr(settings.policy, "check", None)
    if check is not None:
        check(partial(read, profiles_folder()), **model_facts(model))


def runs_on(model) -> Runs | None:
    """The runs that ended on this model and its clones; None where no step cache is on it."""
    attachment = model.model_options.get("transformer_options", {}).get(KEY)
    return None if attachment is None else attachment.runs


def outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    guider = executor.class_obj
    attachment = guider.model_options.get("transformer_options", {}).get(KEY)
    if attachment is None:      # a guider that took the wrappers along but not the options
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    run, report = open_run(attachment.settings, guider, noise.shape, sampler, sigmas, kwargs.get("latent_shapes") or ())
    options = guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(options)
    guider.model_options["transformer_options"][RUN] = run      # none too: a compiled model counts the entries
    if run is None:
        attachment.tell(report)
        try:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            guider.model_options = options
    if MASK_HOOK in options:
        guider.model_options[MASK_HOOK] = watched(options[MASK_HOOK], run)
    ended = False
    try:
        result = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        ended = True
        return result
    finally:    # an interrupt is a BaseException
        guider.model_options = options
        report = run.close()
        if not ended:
            report.add_reason("the run was cut short")
        elif not all_finite(result):
            report.estimated_error = None
            report.add_reason("the latent has values that are no numbers")
        attachment.tell(report)


def all_finite(latent) -> bool:
    return all(bool(part.isfinite().all()) for part in (latent.unbind() if latent.is_nested else (latent,)))


def open_run(settings: Settings, guider, shape, sampler, sigmas, latents=()) -> tuple[Run | None, Report]:
    """The run, or None and a report that says why there is none."""
    options = guider.model_options["transformer_options"]
    name = sampler_name(sampler)
    network = guider.model_patcher.model.diffusion_model
    network = getattr(network, "_orig_mod", network)    # torch.compile, by way of an object patch of the run before
    family = family_of(network) or Family(type(network).__name__)
    wrappers = {key for kind in options.get("wrappers", {}).values() for key, entries in kind.items() if entries}
    reason = stand_down(sigmas.tolist(), wrappers, set(options), type(network).__name__, name, settings.few_steps)
    if reason:
        return None, Report(state="off", reason=reason, model=family.name, sampler=name, steps=len(sigmas) - 1)
    space = guider.model_patcher.get_model_object("model_sampling")
    schedule = sigmas.tolist()
    start, end = (float(space.percent_to_sigma(percent)) for percent in (settings.start_percent, settings.end_percent))
    flow = isinstance(space, comfy.model_sampling.CONST)
    plain, guidance = not adds_noise(getattr(sampler, "extra_options", {})), guidance_of(guider)
    facts = None
    if hasattr(settings.policy, "bound"):
        facts = facts_of(guider.model_patcher, sampler, schedule, shape[1:], math.nan if has_own_guidance(guider) else guidance)
    run = Run(settings, family, schedule, flow, name, math.inf if settings.start_percent <= 0 else start, end if settings.end_percent < 1 else 0.0,
              plain, guidance, shape, facts, partial(read, profiles_folder()), latents)
    if run.level.serves == "transformer" and not family.stacks:
        run.without_blocks(GuidedOutput(), f"{family.name} is of no known model family")
    if run.level.seam is Seam.NETWORK and compiled_whole(guider.model_patcher, options):
        run.without_blocks(ModelOutput(), "torch.compile has the whole model in one piece")
    return run, run.report


def has_own_guidance(guider) -> bool:
    """Such as one with two CFG scales."""
    return type(guider).predict_noise is not comfy.samplers.CFGGuider.predict_noise


def guidance_of(guider) -> float:
    """The largest of the scales that it keeps: cfg, or cfg1 and cfg2 and the like.

    A guider with a guidance of its own and no scale above 1 guides by a strength that is not known, which is taken for the most that was measured.
    """
    others = [float(value) for name, value in vars(guider).items() if name.startswith("cfg") and isinstance(value, Real) and math.isfinite(value)]
    guidance = max([float(getattr(guider, "cfg", 1.0)), *others])
    return MOST_GUIDANCE if guidance <= 1 and has_own_guidance(guider) else guidance


def compiled_whole(patcher, options: dict) -> bool:
    """Whether the blocks lie inside one compiled graph, where nothing can step in between.

    The host's wrapper keeps what it compiled by name; with names it does not show, all of it is taken to be compiled.
    """
    for wrapper in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).get(COMPILE, ()):
        held = inspect.getclosurevars(wrapper).nonlocals if inspect.isfunction(wrapper) else {}
        if "diffusion_model" in held.get("compiled_module_dict", ("diffusion_model",)):
            return True
    return type(patcher.get_model_object("diffusion_model")).__name__ == "OptimizedModule"


def watched(mask_function, run: Run):
    """The function, with the run told of every mask that it gives."""
    def function(*args, **kwargs):
        mask = mask_function(*args, **kwargs)
        run.cache.attempt(lambda: run.masked(mask))
        return mask
    return function


def prepare_sampling(executor, model, noise_shape, conds, model_options=None, **kwargs):
    options = model_options or {}
    run = options.get("transformer_options", {}).get(RUN)
    if run is not None:
        real, handler = model.model, options.get("context_handler")
        itemsize = comfy.model_management.dtype_size(real.get_dtype_inference())
        every = conditions(conds)
        text = max((cond["cross_attn"].shape[1] for cond in every if torch.is_tensor(cond.get("cross_attn"))), default=0)
        references = max(([latent.shape for latent in cond.get("reference_latents", ())] for cond in every), key=len, default=[])
        extra = cache_bytes(run, real.diffusion_model, itemsize, len(every), text, references)
        cut = {} if handler is None else {handler.dim: handler.context_length}      # to one context window
        noise_shape = torch.Size(enlarged(noise_shape, extra, real.memory_required, cut))
    return executor(model, noise_shape, conds, model_options=model_options, **kwargs)


def predict_noise(executor, x, timestep, model_options=None, seed=None):
    model_options = model_options or {}
    run = model_options.get("transformer_options", {}).get(RUN)
    if run is None or x.is_nested:
        return executor(x, timestep, model_options, seed)
    if run.level.seam is Seam.GUIDED and any(model_options.get(hook) for hook in GUIDANCE_HOOKS):
        run.fall_back(ModelOutput(), "the sampler or a node looks into guidance, so model output is skipped instead of guided output")
    sigma = timestep.flatten()[:1].float()
    now = sigma.item()
    conds, schedule = getattr(executor.class_obj, "conds", {}), model_options["transformer_options"].get("sample_sigmas")
    run.begin(now, acting(conds, now, schedule), (x.shape, x.dtype))
    if isinstance(run.level, UnetEncoder):
        x = run.level.with_prior_noise(run.cache, x, run.clock.flow)
    if run.level.seam is Seam.GUIDED and now > 0:
        row = Row(str(x.device), 0, None, 0, None, tuple(x.shape))
        call = Call((row,), x, sigma.to(x.device).view([1] * x.ndim))
        denoised = run.level.evaluate(run.cache, call, lambda: executor(x, timestep, model_options, seed))
        if not any(run.cache.shares):
            for hook in hooks_of(conds):    # the host, which counts the evaluations of a keyframe, was not asked
                move(hook.hook_keyframe, now, schedule)
    else:
        denoised = executor(x, timestep, model_options, seed)
    run.cache.attempt(lambda: run.cache.weigh(x, denoised))
    run.finish()
    return denoised


def calc_cond_batch(executor, model, conds, x_in, timestep, model_options):
    options = model_options.get("transformer_options", {})
    run = options.get(RUN)
    if run is not None:
        run.batch(window_of(options))
    return executor(model, conds, x_in, timestep, model_options)


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    options = transformer_options or {}

    def compute():
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    run = options.get(RUN)
    if run is not None and not run.family.wrapped and run.level.seam is Seam.NETWORK:
        return in_network(run, options, x, getattr(executor.class_obj, "diffusion_model", None), compute)
    rows = rows_of(run, options, x, Seam.MODEL)
    if not rows or run.cache.step.sigma <= 0 or not run.cache.enter(rows):
        return compute()
    sigma = t.float().to(x.device).view([-1] + [1] * (x.ndim - 1))
    return run.level.evaluate(run.cache, Call(rows, x, sigma), compute)


def diffusion_model(executor, *args, **kwargs):
    if torch.compiler.is_compiling():   # asked before anything of the run is looked at, which a graph would be compiled anew for
        return executor(*args, **kwargs)
    options = options_of(args, kwargs)
    run = options.get(RUN)
    if run is None or not run.family.wrapped or run.level.seam is not Seam.NETWORK:
        return executor(*args, **kwargs)

    def bound():
        return inspect.signature(executor.original).bind(*args, **kwargs)

    def compute(**changed):
        if not changed:
            return executor(*args, **kwargs)
        call = bound()
        call.arguments.update(changed)
        return executor(*call.args, **call.kwargs)

    arguments = bound().arguments if run.family.kind == "unet" else None
    return in_network(run, options, args[0] if args else kwargs.get("x"), executor.class_obj, compute, arguments)


def in_network(run: Run, options: dict, x, network, compute, arguments: dict | None = None):
    """A level that reaches into the network. What is not as the family's facts say is computed in full, and blocks left alone from then on."""
    rows = rows_of(run, options, x, Seam.NETWORK)
    if not rows or not run.family.matches(network) or not run.cache.enter(rows):
        return compute()
    try:
        blocks = Blocks.of(run.family, network) if run.family.stacks else None
        return run.level.evaluate(run.cache, Call(rows, x, blocks=blocks, network=network, arguments=arguments), compute)
    except Unfit as fact:
        run.without_blocks(ModelOutput(), str(fact))
    except Unfamiliar as fact:
        run.without_blocks(ModelOutput(), f"{run.family.name} is not built as expected: {fact}")
    run.cache.ran(len(rows), 1.0)
    return compute()


def rows_of(run: Run | None, options: dict, x, seam: Seam) -> tuple[Row, ...]:
    """The rows of a model call, or none where the level is another one or the call is not understood: then it is computed."""
    if run is None or run.level.seam is not seam or run.ordinal is None or options.get(ASIDE):
        return ()
    uuids, conds = options.get("uuids"), options.get("cond_or_uncond")
    first, *others = x if isinstance(x, (list, tuple)) and x else (x,)      # audio beside video
    if not torch.is_tensor(first) or not uuids or not conds or len(uuids) != len(conds) or first.shape[0] % len(uuids):
        run.cache.ran(1, 1.0)
        return ()
    shape = (first.shape[0] // len(uuids), *first.shape[1:], *(tuple(other.shape[1:]) for other in others))
    patches = frozenset((kind, key) for kind, blocks in options.get("patches_replace", {}).items() for key in blocks)
    return run.rows(str(first.device), uuids, conds, window_of(options), shape, patches)


WRAPPERS = {
    WrappersMP.OUTER_SAMPLE: outer_sample,
    WrappersMP.PREPARE_SAMPLING: prepare_sampling,
    WrappersMP.PREDICT_NOISE: predict_noise,
    WrappersMP.CALC_COND_BATCH: calc_cond_batch,
    WrappersMP.APPLY_MODEL: apply_model,
    WrappersMP.DIFFUSION_MODEL: diffusion_model,
}
