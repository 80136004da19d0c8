"""Another backend for a model's attention, the first and last steps left in full precision.

OUTER_SAMPLE opens a run and puts the override into the model options of that run alone; PREDICT_NOISE tells it which step
it is. The host has one slot for an override: the one that was there is called with ours as the attention to call.
"""
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps

import comfy.model_patcher
import comfy.model_sampling
import torch
from comfy.ldm.modules.attention import get_attention_function
from comfy.patcher_extension import WrappersMP

from ...kernels._triton import FAILURES
from ..knob import shown
from ..step import Clock
from ..wrappers import COMPILE, any_compiled, attached
from .attention_backends import BACKENDS, Backend, Call, told
from .machine import EIGHT_BIT_ATTENTION

log = logging.getLogger("reprise")

KEY = "reprise.attention"
RUN = "reprise.attention.run"
OVERRIDE = "optimized_attention_override"
AUTOMATIC, OFF = "automatic", "off"
CHOICES = (AUTOMATIC, OFF, *BACKENDS)
LOW_OF_THE_HOST = ("sage", "sage3")     # names of the host's attention functions that are not of full precision


@dataclass(frozen=True)
class Settings:
    """first, last: steps of the schedule that a backend of few bits leaves in full precision; measure: compute the first served evaluation both ways."""

    backend: str = AUTOMATIC
    first: int = 1
    last: int = 1
    measure: bool = False

    def __post_init__(self):
        if self.backend not in CHOICES:
            raise ValueError(f"unknown attention backend '{shown(self.backend)}'; known: {', '.join(CHOICES)}")
        if self.backend not in (AUTOMATIC, OFF):
            missing = BACKENDS[self.backend].missing()
            if missing:
                raise ValueError(f"{self.backend} was chosen: {missing}; {BACKENDS[self.backend].get}, or choose 'automatic'")


@dataclass
class Record:
    """What a run did with its attention, as data."""

    backend: str = ""
    approximate: bool = False
    reason: str = ""                                    # why it was left to the host
    served: int = 0                                     # calls
    full: int = 0                                       # calls of first and last steps, in full precision
    fell_back: Counter = field(default_factory=Counter)     # why -> calls
    error: float | None = None                          # relative L2 of what attention gives, mean over the calls of one evaluation

    def line(self) -> str:
        if self.reason:
            return f"Attention Backend is off: {self.reason}"
        calls = self.served + self.full + self.fell_back.total()
        if not calls:
            return "Attention Backend: this model's attention does not pass through ComfyUI's switch, so nothing was changed"
        text = f"Attention Backend: {self.backend} served {self.served} of {calls} calls"
        if self.full:
            text += f", {self.full} in full precision in the first and last steps"
        if self.fell_back:
            reasons = "; ".join(f"{why}: {calls}" for why, calls in self.fell_back.most_common())
            text += f", {self.fell_back.total()} fell back to ComfyUI's own ({reasons})"
        if not self.served:
            return text
        if not self.approximate:
            return f"{text}; full precision"
        return text + ("; approximate, error not measured" if self.error is None else f"; approximate, what attention gives is {self.error:.2%} off")


@dataclass(frozen=True)
class Attachment:
    """What rides on the model."""

    settings: Settings
    notify: Callable[[Record], None]


def attach_attention(model, settings: Settings, notify: Callable[[Record], None] = lambda record: None):
    """A clone of `model` whose attention is served by the settings' backend; a second one takes the place of the first."""
    return attached(model, KEY, Attachment(settings, notify), WRAPPERS)


class Run:
    """One sampling: where it is, and what was served."""

    def __init__(self, backend: Backend, settings: Settings, clock: Clock):
        self.backend, self.clock = backend, clock
        self.first, self.last = (settings.first, settings.last) if backend.low else (0, 0)
        self.record = Record(backend.name, backend.low)
        self.active = False             # inside an evaluation that may be served
        self.measuring = settings.measure and backend.low
        self.errors: list[torch.Tensor] = []
        self.failed: set[tuple] = set()     # kinds of calls that the backend broke off
        self.lock = threading.Lock()        # the host samples on several GPUs in threads

    def __deepcopy__(self, memo):
        return self     # a node may copy all options of a model

    def begin(self, timestep: torch.Tensor) -> None:
        """An evaluation begins. The sigma is fetched from the GPU only where it matters."""
        if not self.first and not self.last:
            self.active = True
            return
        sigma = timestep.flatten()[0].item()
        index = self.clock.tick(sigma).index if math.isfinite(sigma) else -1
        self.active = self.first <= index < self.clock.steps - self.last

    def end(self) -> None:
        self.active = False
        if self.errors:
            self.measuring = False

    def close(self) -> Record:
        if self.errors:
            self.record.error = torch.stack([error.cpu() for error in self.errors]).mean().item()
            self.errors = []
        return self.record

    def override(self, previous: Callable | None) -> Callable:
        def attention(func, *args, **kwargs):
            if torch.compiler.is_compiling():   # a graph would keep what it saw first
                return attend(previous, func, *args, **kwargs)
            if previous is None:
                return self.attend(func, *args, **kwargs)

            @wraps(func)
            def ours(*args, **kwargs):
                return self.attend(func, *args, **kwargs)
            return previous(ours, *args, **kwargs)
        return attention

    def attend(self, func: Callable, *args, **kwargs) -> torch.Tensor:
        """One call of attention. `func` is the host's function for it."""
        if not self.active:
            with self.lock:
                self.record.full += 1
            return full_precision(func)(*args, **kwargs)
        call = Call.of(*args, **kwargs)
        kind = (str(call.q.device), call.q.dtype, call.width, call.mask is not None)
        why = "the backend failed on such calls before" if kind in self.failed else self.backend.unfit(call)
        if not why:
            try:
                out = self.backend.attend(call)
                with self.lock:
                    self.record.served += 1
            except torch.OutOfMemoryError:
                raise
            except FAILURES as error:       # such as a GPU that the backend was not built for
                why = f"the backend failed on {told(call.q.dtype)}, {call.width} channels a head"
                log.warning("Attention Backend: %s failed (%s); ComfyUI's own attention takes such calls", self.backend.name, error)
                self.failed.add(kind)
        if why:
            with self.lock:
                self.record.fell_back[why] += 1
            return func(*args, **kwargs)
        if self.measuring:
            self.errors.append(relative_l2(out, full_precision(func)(*args, **kwargs)))
        return out


def attend(previous: Callable | None, func: Callable, *args, **kwargs) -> torch.Tensor:
    """As if we were not there."""
    return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)


def relative_l2(out: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    return (out.float() - exact.float()).norm() / exact.float().norm().clamp_min(1e-12)


def full_precision(func: Callable) -> Callable:
    """`func`, or SDPA where the host's own attention is one of few bits."""
    low = (getattr(get_attention_function(name, None), "__wrapped__", None) for name in LOW_OF_THE_HOST)
    return get_attention_function("pytorch").__wrapped__ if func in [one for one in low if one is not None] else func


def chosen(settings: Settings, device: torch.device) -> tuple[Backend | None, str]:
    """The backend for a device, or None and why."""
    if settings.backend == OFF:
        return None, "it is switched off"
    if settings.backend != AUTOMATIC:
        backend = BACKENDS[settings.backend]
        why = backend.unable(device)
        return (None, f"{backend.name}: {why}") if why else (backend, "")
    reasons = {}
    for name in EIGHT_BIT_ATTENTION:
        reasons[name] = BACKENDS[name].missing() or BACKENDS[name].unable(device)
        if not reasons[name]:
            return BACKENDS[name], ""
    return None, "nothing faster than ComfyUI's own attention is there (" + "; ".join(f"{name}: {why}" for name, why in reasons.items()) + ")"


def compiled(patcher, options: dict) -> bool:
    """Whether the model, or any block of it, lies in a compiled graph."""
    if options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}).get(COMPILE):
        return True
    network = patcher.get_model_object("diffusion_model")
    return any_compiled((*network.modules(), *patcher.object_patches.values()))


def open_run(settings: Settings, guider, sigmas: torch.Tensor) -> tuple[Run | None, Record]:
    """The run, or None and a record that says why there is none."""
    patcher, schedule = guider.model_patcher, sigmas.tolist()
    options = guider.model_options["transformer_options"]
    backend, why = chosen(settings, torch.device(patcher.load_device))
    if compiled(patcher, options):
        why = "torch.compile keeps the attention that it saw first; start ComfyUI with the backend instead (--use-sage-attention)"
    elif len(schedule) < 2 or not all(math.isfinite(sigma) and sigma >= 0 for sigma in schedule):
        why = why or "the schedule has too few sigmas, or some that are no numbers"
    elif backend is not None and backend.low and settings.first + settings.last >= len(schedule) - 1:
        why = why or f"all {len(schedule) - 1} steps are first or last ones, in full precision"
    if why:
        return None, Record(settings.backend, reason=why)
    flow = isinstance(patcher.get_model_object("model_sampling"), comfy.model_sampling.CONST)
    run = Run(backend, settings, Clock(schedule, flow))
    return run, run.record


def outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    guider = executor.class_obj
    attachment = guider.model_options.get("transformer_options", {}).get(KEY)
    if attachment is None:      # a guider that took the wrappers along but not the options
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    run, record = open_run(attachment.settings, guider, sigmas)
    options = guider.model_options
    if run is not None:
        guider.model_options = comfy.model_patcher.create_model_options_clone(options)
        own = guider.model_options["transformer_options"]
        own[RUN], own[OVERRIDE] = run, run.override(own.get(OVERRIDE))
    try:
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:    # an interrupt is a BaseException
        guider.model_options = options
        if run is not None:
            record = run.close()
        log.info(record.line())
        attachment.notify(record)


def predict_noise(executor, x, timestep, model_options=None, seed=None):
    options = model_options or {}
    run = options.get("transformer_options", {}).get(RUN)
    if run is None:
        return executor(x, timestep, options, seed)
    run.begin(timestep)
    try:
        return executor(x, timestep, options, seed)
    finally:
        run.end()


WRAPPERS = {WrappersMP.OUTER_SAMPLE: outer_sample, WrappersMP.PREDICT_NOISE: predict_noise}
