"""Modulation cache: shifts, scales and gates are computed once for the whole schedule, and their weights stay off the GPU.

A quarter to a third of all weights of FLUX.1, Qwen-Image and SD3.5 make them of one vector (time, guidance, pooled text), and
every step asks for the same few hundred of them again. Each modulation is an object patch on the clone: the host takes it
for a module without weights, and its size is taken off the model's. Exact: see modulation_table.py.
"""
import logging
import math
import threading
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ..conditions import conditions
from ..families import family_of
from ..memory import enlarged
from .modulation_table import Table
from .stand_in import Seat, StandIn, layers, original, width

log = logging.getLogger("reprise")

KEY = "reprise.modulation"
RUN = "reprise.modulation.run"
NETWORK = "diffusion_model"
LEAST_SHARE = 0.05      # of a model's weights; below it, little is saved
TABLE_SHARE = 1 / 8     # of the weights kept off the GPU, which the table may take at most, or LEAST_TABLE if that is more
LEAST_TABLE = 64 << 20
PATIENCE = 2.0          # seconds after which computing ahead shows a progress bar
GIB, MIB = 1 << 30, 1 << 20


@dataclass(frozen=True)
class Saving:
    """What the cache keeps off the GPU on a model, in bytes, or why it leaves the model alone."""

    total: int = 0
    aside: int = 0
    why: str = ""

    def line(self) -> str:
        if self.why:
            return f"Modulation Cache: off; {self.why}"
        return f"Modulation Cache: {size(self.aside)} of {size(self.total)} stay off the GPU"


@dataclass
class Record:
    """What a run did, as data."""

    aside: int = 0
    table: int = 0          # bytes at most
    seconds: float = 0.0    # of computing ahead
    found: int = 0
    streamed: int = 0       # model calls whose modulations were computed for themselves alone
    reasons: list[str] = field(default_factory=list)

    def line(self) -> str:
        if not self.aside:
            return "Modulation Cache: off; " + "; ".join(self.reasons)
        streamed = f"; in {self.streamed} model calls weights were streamed" if self.streamed else ""
        reasons = "".join(f"; {reason}" for reason in self.reasons)
        return f"Modulation Cache: {size(self.aside)} stayed off the GPU, table {size(self.table)}, computed in {self.seconds:.1f} s{streamed}{reasons}"


def size(bytes: int) -> str:
    return f"{bytes / GIB:.2f} GiB" if bytes >= GIB / 10 else f"{bytes / MIB:.1f} MiB"


def attach_modulation_cache(model, notify: Callable[[Record], None] = lambda record: None):
    """A clone of `model` without the weights of its modulations, and what that saves; the very model where it saves too little."""
    there = model.get_attachment(KEY)
    if there is not None:
        clone, saving = model.clone(), Saving(model.model_size() + there.bytes, there.bytes)
    else:
        names, saving = worth_it(model)
        if saving.why:
            return model, saving
        clone = model.clone()
        fit(clone, names, saving.aside)
        clone.size = saving.total - saving.aside
        clone.patches_uuid = uuid.uuid5(model.patches_uuid, KEY)    # so the host loads anew on the way from one to the other
    clone.model_options.setdefault("transformer_options", {})[KEY] = notify
    for kind, wrapper in WRAPPERS.items():      # the outermost: what others do to the network must not see the model being heard
        others = {key: entries for key, entries in clone.wrappers.get(kind, {}).items() if key != KEY}
        clone.wrappers[kind] = {KEY: [wrapper], **others}
    for kind, callback in CALLBACKS.items():
        clone.remove_callbacks_with_key(kind, KEY)
        clone.add_callback_with_key(kind, KEY, callback)
    return clone, saving


def worth_it(model) -> tuple[list[str], Saving]:
    """Paths of the modulations that can be kept off the GPU, and what that saves."""
    network = model.model.diffusion_model
    network = getattr(network, "_orig_mod", network)
    family, kind = family_of(network), type(network).__name__
    if NETWORK in model.object_patches:
        return [], Saving(why="another node has put its own network into the model")
    if type(model).patch_weight_to_device is not comfy.model_patcher.ModelPatcher.patch_weight_to_device:
        return [], Saving(why=f"{type(model).__name__}, of another node, patches weights in a way of its own")
    if family is None or not family.modulation:
        return [], Saving(why=f"{kind} is of no model family whose modulation is known")
    if model.load_device == model.offload_device and model.load_device.type != "cpu":
        return [], Saving(why="ComfyUI keeps all weights on the GPU, as it was told to at its start")
    names = [f"{NETWORK}.{path}" for path in family.modulations(network)]
    names = [name for name in names if not any(name.startswith(f"{patch}.") or f"{patch}.".startswith(f"{name}.") for patch in model.object_patches)]
    total = model.model_size()
    aside = sum(comfy.model_management.module_size(original(model, name)) for name in names)
    if aside < LEAST_SHARE * total:
        return [], Saving(total, aside, f"{aside / total:.1%} of the weights of this {family.name} model make its modulation, too few to gain by it")
    return names, Saving(total, aside)


def fit(patcher, names: list[str], bytes: int) -> None:
    """Stand-ins for the modulations of the patcher's own model."""
    seat = Seat(patcher.model, names, bytes)
    for name in names:
        patcher.add_object_patch(name, StandIn(name, original(patcher, name), seat))
    patcher.set_attachments(KEY, seat)


def on_clone(patcher, clone) -> None:
    """A clone with a model of its own, as for a second GPU, has stand-ins of its own."""
    seat = clone.get_attachment(KEY)
    if seat is not None and clone.model is not seat.model():
        fit(clone, seat.names, seat.bytes)


def on_load(patcher, *args) -> None:
    seat = patcher.get_attachment(KEY)
    if seat is not None:
        seat.loaded = weakref.ref(patcher)


def without(patcher):
    """A clone as it was before the cache."""
    seat, clone = patcher.get_attachment(KEY), patcher.clone()
    clone.object_patches = {name: value for name, value in clone.object_patches.items() if not isinstance(value, StandIn)}
    clone.remove_attachments(KEY)
    clone.size += seat.bytes
    clone.patches_uuid = uuid.uuid4()
    return clone


class Run:
    """One sampling: a table for each model that takes part in it."""

    def __init__(self, patcher, sigmas: torch.Tensor):
        self.seat = patcher.get_attachment(KEY)
        self.sigmas = [sigma for sigma in sigmas.tolist() if sigma > 0]
        self.limit = max(int(self.seat.bytes * TABLE_SHARE), LEAST_TABLE)
        self.record = Record(aside=self.seat.bytes)
        self.tables: dict[int, Table] = {}
        self.lock = threading.Lock()    # the host samples on several GPUs in threads
        self.bar = None
        modules = [original(patcher, name) for name in self.seat.names]
        self.largest = max(map(comfy.model_management.module_size, modules))
        self.outputs = sum(width(layer) for module in modules for _, layer in layers(module, ""))     # of all modulations, for one vector

    def table(self, seat: Seat) -> Table:
        with self.lock:
            return self.tables.setdefault(id(seat), Table(self.limit, self.passed))

    def passed(self, done: int, seconds: float) -> None:
        if seconds > PATIENCE and done <= len(self.seat.names):
            self.bar = self.bar or comfy.utils.ProgressBar(len(self.seat.names))
            self.bar.update_absolute(done)

    def row(self, vector: torch.Tensor) -> int:
        return self.outputs * math.prod(vector.shape[:-1]) * vector.element_size()

    def reserved(self, rows: int, itemsize: int) -> int:
        """Bytes on the GPU that the table will want, and the modulation whose weights are there for a moment."""
        return min(self.limit, self.outputs * rows * itemsize * len(set(self.sigmas))) + 2 * self.largest

    def close(self) -> Record:
        for table in self.tables.values():
            self.record.table += table.most
            self.record.seconds += table.seconds
            self.record.found += table.found
            self.record.streamed += table.streamed
            table.close()
        return self.record


def outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    guider = executor.class_obj
    notify, patcher = guider.model_options.get("transformer_options", {}).get(KEY), guider.model_patcher
    if notify is None or patcher.get_attachment(KEY) is None:
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    options, record = guider.model_options, None
    own, run = comfy.model_patcher.create_model_options_clone(options), None
    if hooked(patcher):
        record = Record(reasons=["a hook changes the weights of the modulation from step to step, so all of them are loaded"])
    else:
        own["transformer_options"][RUN] = run = Run(patcher, sigmas)
    try:
        guider.model_options, guider.model_patcher = own, without(patcher) if run is None else patcher
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:    # an interrupt is a BaseException
        guider.model_options, guider.model_patcher = options, patcher
        record = record or run.close()
        log.info(record.line())
        notify(record)


def hooked(patcher) -> bool:
    """Whether conditions bring patches of their own for a modulation."""
    names = tuple(f"{name}." for name in patcher.get_attachment(KEY).names)
    keys = (key if isinstance(key, str) else key[0] for patches in patcher.hook_patches.values() for key in patches)
    return any(key.startswith(names) for key in keys)


def prepare_sampling(executor, model, noise_shape, conds, model_options=None, **kwargs):
    run = (model_options or {}).get("transformer_options", {}).get(RUN)
    if run is not None:
        give_pages_back(model)
        real, handler = model.model, model_options.get("context_handler")
        rows = noise_shape[0] * max(len(conditions(conds)), 1)
        cut = {} if handler is None else {handler.dim: handler.context_length}
        extra = run.reserved(rows, comfy.model_management.dtype_size(real.get_dtype_inference()))
        noise_shape = torch.Size(enlarged(noise_shape, extra, real.memory_required, cut))
    return executor(model, noise_shape, conds, model_options=model_options, **kwargs)


def give_pages_back(patcher) -> None:
    """Where the host loads weights as they are needed: what a clone without the cache has left on the GPU, which no one would ask for."""
    if not patcher.is_dynamic() or patcher.model.current_weight_patches_uuid in (None, patcher.patches_uuid):
        return
    names = patcher.get_attachment(KEY).names
    if any(hasattr(layer, "_v") for name in names for _, layer in layers(original(patcher, name), name)):
        patcher.partially_unload(patcher.offload_device, 1e32)


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    options = transformer_options or {}
    run, patcher = options.get(RUN), getattr(executor.class_obj, "current_patcher", None)
    seat = None if patcher is None else patcher.get_attachment(KEY)
    if run is None or seat is None:
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    table = run.table(seat)
    layout = (tuple(options.get("uuids") or ()), tuple(options.get("cond_or_uncond") or ()), x.shape[0], x.dtype)
    before, seat.table = seat.table, table
    try:
        if needs_hearing(run, table, layout, t):
            def call(sigma: float):
                bare = {**options, "wrappers": {}, "patches": {}, "patches_replace": {}, "sigmas": torch.full_like(options.get("sigmas", t), sigma)}
                return executor.original(x, torch.full_like(t, sigma), c_concat, c_crossattn, None, bare, **kwargs)

            listen(run, table, layout, t, call)
        with table.call(layout, trusting="dit" not in options.get("patches_replace", {})):
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    finally:
        seat.table = before


def needs_hearing(run: Run, table: Table, layout: tuple, t: torch.Tensor) -> bool:
    """Whether the layout is new, or this sigma of the schedule is beyond those heard."""
    ahead = table.ahead.get(layout)
    if ahead is None:
        return True
    return not ahead.whole and (now := float(t.flatten()[0])) not in ahead.sigmas and now in run.sigmas


def listen(run: Run, table: Table, layout: tuple, t: torch.Tensor, call: Callable[[float], object]) -> None:
    now = float(t.flatten()[0])
    place = next((i for i, sigma in enumerate(run.sigmas) if sigma <= now), len(run.sigmas))
    sigmas = list(dict.fromkeys([now, *run.sigmas[place:]]))    # some samplers begin a little off the schedule
    try:
        table.hear(layout, sigmas, call, run.row)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:     # what only a whole call of the model can take
        if isinstance(error, torch.OutOfMemoryError):
            comfy.model_management.soft_empty_cache()
        reason = f"the model could not be heard ahead of its calls ({error})"
        if reason not in run.record.reasons:
            run.record.reasons.append(reason)


WRAPPERS = {WrappersMP.OUTER_SAMPLE: outer_sample, WrappersMP.PREPARE_SAMPLING: prepare_sampling, WrappersMP.APPLY_MODEL: apply_model}
CALLBACKS = {CallbacksMP.ON_CLONE: on_clone, CallbacksMP.ON_LOAD: on_load}
