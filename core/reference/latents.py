"""Reference Latent Cache: the references of the host's edit models, which ride on CONDITIONING as `reference_latents`.

exact: they are taken off the conditioning before the run and become a reference of the injector (joint_latents.py).
freeze: they stay, and APPLY_MODEL decides for each call whether their tokens take part (freezing.py).
Whatever cannot be served is computed as the host does it, and the record says why.
"""
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.model_base
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP

from ..conditions import conditions, window_of
from ..families import family_of
from ..memory import enlarged, image_tokens
from . import injector
from .demand import evaluated, one_sided
from .foreign import foreign
from .freezing import Call, Freezing
from .handle import NAME, CONDReferences, Handle, Reference, handle_of
from .joint_latents import JointLatents, not_joint, unplaced
from .leaving import LATENTS, leaving
from .told import many, mib, share

log = logging.getLogger("reprise")

KEY = "reprise.reference_latents"
RUN = "reprise.reference_latents.run"
CARRIED = "reference_latents"       # the host's name on a condition
MODES = ("off", "exact", "freeze")
STORAGE = ("same", "fp8")
COMPILE = "torch.compile"           # the key of the host's wrapper that swaps compiled modules in


@dataclass(frozen=True)
class Settings:
    """first: evaluations in full before references freeze; refresh: how often they are computed anew after that; 0 is never."""

    mode: str = "freeze"
    first: int = 2
    refresh: int = 0
    measure: bool = False
    storage: str = "same"

    def __post_init__(self):
        for name, known in (("mode", MODES), ("storage", STORAGE)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is '{getattr(self, name)}'; choose one of {', '.join(known)}")
        if self.first < 1 or self.refresh < 0:
            raise ValueError(f"{self.first} first evaluations and a refresh every {self.refresh} were asked for; expected at least 1, and 0 or more")
        if self.mode == "exact" and self.storage != "same":
            raise ValueError(f"storage '{self.storage}' rounds what mode 'exact' promises to keep; choose storage 'same', or mode 'freeze'")


@dataclass
class Record:
    """What a run did with its reference latents, as data."""

    mode: str
    references: int = 0     # of the condition that has most
    served: bool = False    # otherwise the run was the host's own
    full: int = 0           # evaluations with the references in the sequence
    frozen: int = 0
    mixed: int = 0          # of some conditions in it and of others frozen
    bytes: int = 0
    errors: dict[int, float] = field(default_factory=dict)      # relative L2, by evaluation
    unguided: set[int] = field(default_factory=set)     # evaluations whose error is that of the predictions before guidance
    reasons: list[str] = field(default_factory=list)
    entries: injector.Record | None = None      # of mode exact

    def line(self) -> str:
        text = f"Reference Latent Cache, {self.mode}: "
        if not self.references:
            return text + "no condition carries a reference latent, so nothing was changed"
        reasons = "".join(f"; {reason}" for reason in [*self.reasons, *(self.entries.reasons if self.entries else ())])
        if not self.served:
            return text + reasons[2:]
        if self.entries is not None:
            done = [f"{many(self.references, 'reference', 'references')} out of the sequence from the first step on",
                    f"{len(self.entries.made)} encoded in {self.entries.seconds:.1f} s" if self.entries.made else "",
                    f"{len(self.entries.found)} from the bank" if self.entries.found else "",
                    f"{mib(self.entries.bytes)}, {self.entries.place}; {self.entries.exactness} for a checkpoint that was trained so, "
                    "another picture with any other"]
            return text + ", ".join(part for part in done if part) + reasons
        mixed = f", {self.mixed} with some of each" if self.mixed else ""
        done = f"{many(self.full, 'evaluation', 'evaluations')} in full, {self.frozen} with frozen references (approximate){mixed}, {mib(self.bytes)}"
        if self.errors:
            worst = max(self.errors, key=self.errors.get)
            last = next(reversed(self.errors))
            what = "predictions before guidance" if last in self.unguided else "denoised latent"
            done += f", measured error {share(self.errors[last])} of the {what} at evaluation {last}"
            done += f", at worst {share(self.errors[worst])} at evaluation {worst}" if len(self.errors) > 1 else ""
        elif self.frozen or self.mixed:
            done += ", error not measured"
        return text + done + reasons


@dataclass(frozen=True)
class Attachment:
    settings: Settings
    notify: Callable[[Record], None]


def attach_reference_latents(model, settings: Settings, notify: Callable[[Record], None] = lambda record: None):
    """A clone of `model` with the cache on it; a second one takes the place of the first."""
    refuse_another(model.model_options)
    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})[KEY] = Attachment(settings, notify)
    for kind, wrapper in WRAPPERS.items():      # before all others: a step cache and the injector are to see the call that it makes of theirs
        clone.wrappers[kind] = {KEY: [wrapper], **{key: held for key, held in clone.wrappers.get(kind, {}).items() if key != KEY}}
    if settings.mode == "exact" and injector.KEY not in clone.model_options["transformer_options"]:
        clone = injector.attach_references(clone)
    return clone


def misfit(carrying: list[dict], real) -> str:
    """Why a reference latent is none of this model's, in a sentence; nothing where all are."""
    wanted = getattr(getattr(real, "latent_format", None), "latent_channels", None)
    for latent in (latent for cond in carrying for latent in cond[CARRIED]):
        if wanted is not None and latent.ndim > 1 and latent.shape[1] != wanted:
            return (f"a reference latent has {latent.shape[1]} channels and {type(real).__name__} takes {wanted}; encode the picture with the VAE of the "
                    "model that you sample with")
    return ""


def refuse_another(options: dict) -> None:
    """The host's Flux KV Cache keeps K and V of one condition for all and cuts tokens off by itself."""
    patches = options.get("transformer_options", {}).get("patches", {}).get("attn1_patch", ())
    if any(type(patch).__name__ == "KV_Attn_Input" for patch in patches):
        raise ValueError("the model has ComfyUI's Flux KV Cache on it, which takes the references out of the same sequence; take one of the two nodes away")


class Run:
    """One sampling."""

    def __init__(self, settings: Settings, patcher, alone: bool = False):
        """alone: the positive side is computed without the negative one."""
        self.settings, self.patcher, self.alone = settings, patcher, alone
        self.record, self.freezing = Record(settings.mode), None

    @property
    def network(self):
        return self.patcher.model.diffusion_model

    def prepare(self, conds: dict, options: dict, shape) -> int:
        """Look at the run's conditions and settle what is done with them. Bytes to reserve with the host for it."""
        carrying = [cond for cond in conditions(conds) if cond.get(CARRIED)]
        self.record.references = max((len(cond[CARRIED]) for cond in carrying), default=0)
        if not carrying:
            return 0
        if why := misfit(carrying, self.patcher.model):
            self.record.reasons.append(why)
            raise ValueError(why)
        return (self.exact(carrying, options, shape) if self.settings.mode == "exact" else
                self.freeze(carrying, [cond for cond in conditions(evaluated(conds, self.alone)) if cond.get(CARRIED)], options, shape))

    def in_full(self, why: str) -> int:
        self.record.reasons.append(f"{why}, so all is computed in full")
        return 0

    def exact(self, carrying: list[dict], options: dict, shape) -> int:
        """The latents off the conditions, a reference for the injector on them. All or none, so that both sides of guidance are of one kind."""
        network, real = self.network, self.patcher.model
        why = foreign("a reference latent", network) or not_joint(network)
        if not why and type(real)._apply_model is not comfy.model_base.BaseModel._apply_model:
            why = f"{type(real).__name__} places its tokens in a way of its own"
        for cond in () if why else carrying:
            why = why or unplaced(cond[CARRIED], cond.get("reference_latents_method"), network.params.default_ref_method)
        run = options.get(injector.RUN)
        if why or run is None:
            return self.in_full(why or "the model lost the injector on its way to the sampler")
        recipes: dict[tuple, JointLatents] = {}
        for cond in carrying:
            latents = tuple(cond.pop(CARRIED))
            recipe = JointLatents(latents, sum(image_tokens(latent.shape, network.patch_size) for latent in latents))
            recipe = recipes.setdefault((recipe.content, len(latents)), recipe)
            handle = (handle_of(cond) or Handle()) + Handle((Reference(recipe),))
            cond["model_conds"] = {**cond.get("model_conds", {}), NAME: CONDReferences(handle)}
        self.record.entries, self.record.served = run.record, True
        # encoding works on the references alone, sampling on the picture: the host counts with the latter
        most = max(sum(real.memory_required([1, *latent.shape[1:]]) for latent in recipe.latents) for recipe in recipes.values())
        return max(0, int(most - real.memory_required(list(shape))))

    def freeze(self, carrying: list[dict], computed: list[dict], options: dict, shape) -> int:
        """computed: those of the conditions that the run evaluates."""
        network, settings = self.network, self.settings
        if why := foreign("a reference latent", network):
            return self.in_full(why)
        found = leaving(family_of(network))
        if found is None:
            return self.in_full(f"mode 'freeze' knows FLUX, Qwen-Image, Krea 2 and Z-Image Omni, and the model is {type(network).__name__}")
        if why := found.unfit(network, options):
            return self.in_full(why)
        if options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).get(COMPILE):
            return self.in_full("torch.compile has the attention that K and V are taken from")
        self.record.served = True
        self.freezing = Freezing(found, settings.first, settings.refresh, settings.measure, settings.storage)
        return self.freezing.needed(network, self.patcher.model.get_dtype_inference(), computed, shape[0])

    def close(self) -> Record:
        record, freezing, self.freezing = self.record, self.freezing, None
        if freezing is not None:
            full, frozen = freezing.full_in, freezing.frozen_in
            record.full, record.frozen, record.mixed = len(full - frozen), len(frozen - full), len(full & frozen)
            record.bytes, record.errors, record.unguided = freezing.peak, freezing.errors, freezing.unguided
            if freezing.broken:
                record.reasons.append(f"{freezing.broken}, so the rest was computed in full")
            elif not frozen and self.settings.refresh == 1 and len(full) > self.settings.first:
                record.reasons.append("refresh_every 1 computes every evaluation in full, so nothing was frozen; choose 2 or more, or 0 for never")
            elif not frozen:
                record.reasons.append("no evaluation came after those that are computed in full")
        return record


def outer_sample(executor, *args, **kwargs):
    guider = executor.class_obj
    attachment = guider.model_options.get("transformer_options", {}).get(KEY)
    if attachment is None or attachment.settings.mode == "off":
        return executor(*args, **kwargs)
    refuse_another(guider.model_options)
    run, options = Run(attachment.settings, guider.model_patcher, one_sided(guider)), guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(options)
    guider.model_options["transformer_options"][RUN] = run
    try:
        return executor(*args, **kwargs)
    finally:    # an interrupt is a BaseException
        guider.model_options = options
        record = run.close()
        log.info(record.line())
        attachment.notify(record)


def prepare_sampling(executor, model, noise_shape, conds, model_options=None, **kwargs):
    options = (model_options or {}).get("transformer_options", {})
    run = options.get(RUN)
    if run is not None:
        extra, handler = run.prepare(conds, options, noise_shape), model_options.get("context_handler")
        cut = {} if handler is None else {handler.dim: handler.context_length}
        noise_shape = torch.Size(enlarged(noise_shape, extra, model.model.memory_required, cut))
    return executor(model, noise_shape, conds, model_options=model_options, **kwargs)


def freezing_of(options: dict | None) -> Freezing | None:
    run = (options or {}).get(RUN)
    return None if run is None else run.freezing


def predict_noise(executor, x, timestep, model_options=None, seed=None):
    freezing = freezing_of((model_options or {}).get("transformer_options"))
    if freezing is None:
        return executor(x, timestep, model_options or {}, seed)
    freezing.begin()
    denoised = None
    try:
        denoised = executor(x, timestep, model_options, seed)
        return denoised
    finally:
        freezing.finish(denoised, getattr(executor.class_obj, "cfg", 1.0))


def calc_cond_batch(executor, model, conds, x_in, timestep, model_options):
    options = model_options.get("transformer_options", {})
    freezing = freezing_of(options)
    if freezing is not None:
        freezing.batched(window_of(options))
    return executor(model, conds, x_in, timestep, model_options)


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    options, freezing = transformer_options or {}, freezing_of(transformer_options)
    if freezing is None:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    rows = freezing.rows(x, options, window_of(options))
    if not kwargs.get(LATENTS):
        return freezing.untouched(rows, executor(x, t, c_concat, c_crossattn, control, options, **kwargs))
    network = executor.class_obj.diffusion_model
    return freezing.evaluate(Call(rows, network, options, kwargs, lambda options, extra: executor(x, t, c_concat, c_crossattn, control, options, **extra)))


WRAPPERS = {
    WrappersMP.OUTER_SAMPLE: outer_sample,
    WrappersMP.PREPARE_SAMPLING: prepare_sampling,
    WrappersMP.PREDICT_NOISE: predict_noise,
    WrappersMP.CALC_COND_BATCH: calc_cond_batch,
    WrappersMP.APPLY_MODEL: apply_model,
}
