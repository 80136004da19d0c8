"""The one injector on a model: reads the handles of a call, has their entries made or found, and puts them into attention.

OUTER_SAMPLE opens and closes a run; PREPARE_SAMPLING claims the handles and has the host free memory; APPLY_MODEL, outside
of everything that may be compiled, resolves the handles of a call. Without a handle it does nothing at all.
"""
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..memory import enlarged
from ..wrappers import attached
from .bank import Bank
from .demand import one_sided, wanted
from .handle import NAME, Facts
from .run import Keeping, Record, Run
from .seams import SEAMS

log = logging.getLogger("reprise")

KEY = "reprise.references"
RUN = "reprise.references.run"
BANK = Bank(pin=comfy.model_management.pin_memory, unpin=comfy.model_management.unpin_memory)


@dataclass
class Attachment:
    """What rides on the model, and how the last run on it or a clone of it went."""

    keeping: Keeping
    bank: Bank
    notify: Callable[[Record], None]
    last: Record | None = None


def last_run(model) -> tuple[Record | None, Bank] | None:
    """How the last run on this model and its clones went, and the bank it used; None where no injector is on it."""
    attachment = model.model_options.get("transformer_options", {}).get(KEY)
    return None if attachment is None else (attachment.last, attachment.bank)


def attach_references(model, keeping: Keeping | None = None, notify: Callable[[Record], None] = lambda record: None, bank: Bank = BANK):
    """A clone of `model` that can read handles; a second injector takes the place of the first."""
    return attached(model, KEY, Attachment(keeping or Keeping(), bank, notify), WRAPPERS)


def outer_sample(executor, *args, **kwargs):
    guider = executor.class_obj
    attachment = guider.model_options.get("transformer_options", {}).get(KEY)
    if attachment is None:
        return executor(*args, **kwargs)
    run, options = Run(attachment.keeping, attachment.bank, guider.model_patcher, one_sided(guider)), guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(options)
    guider.model_options["transformer_options"][RUN] = run
    try:
        return executor(*args, **kwargs)
    finally:    # an interrupt is a BaseException
        guider.model_options = options
        record = run.close()
        if record.made or record.found or record.given:
            log.info(record.line())
            attachment.last = record
            attachment.notify(record)


def prepare_sampling(executor, model, noise_shape, conds, model_options=None, **kwargs):
    run = (model_options or {}).get("transformer_options", {}).get(RUN)
    if run is not None:
        run.claim(conds)
        handler = model_options.get("context_handler")
        references = wanted(conds, noise_shape, handler, run.alone)
        if references:
            cut = {} if handler is None else {handler.dim: handler.context_length}
            noise_shape = torch.Size(enlarged(noise_shape, run.reserved(references), model.model.memory_required, cut))
    return executor(model, noise_shape, conds, model_options=model_options, **kwargs)


def apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    options = transformer_options or {}
    handles, run = kwargs.pop(NAME, None), options.get(RUN)
    if run is not None and handles is not None and any(handle.references for handle in handles.each):
        rows = rows_of(run, executor.class_obj, x, c_crossattn, options, kwargs)
        segments = run.segments(handles, rows, float(t.flatten()[0]))
        if segments:
            options = SEAMS[handles.each[0].references[0].recipe.seam](options, executor.class_obj.diffusion_model, segments, run.buffers)
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


class CallRow(NamedTuple):
    """A row of a model call, as a run asks for it."""

    tag: tuple
    facts: Callable[[], Facts]


def rows_of(run: Run, model, x: Tensor, context: Tensor | None, options: dict, extra: dict) -> list[CallRow]:
    """Of every row of a call."""
    patcher = model.current_patcher
    hooks = getattr(patcher, "current_hooks", None)
    weights = run.bank.base(patcher)
    if hooks is not None:   # keyframes may give them another strength on every step
        weights += "".join(f"/{id(hook)} {hook.strength}" for hook in hooks.hooks)
    # these change what layers compute and leave the token of the weights as it is
    replaced = any(name.startswith("diffusion_model.") and not getattr(value, "computes_the_same", False)
                   for name, value in getattr(patcher, "object_patches", {}).items())
    lasting = hooks is None and not replaced and not getattr(patcher, "injections", None)
    pooled, guidance, shape = extra.get("y"), extra.get("guidance"), tuple(x.shape[-2:])
    uuids, conds = options.get("uuids") or [None], options.get("cond_or_uncond") or [0]

    def row(value, i: int):
        return None if value is None else value[i % value.shape[0]][None]

    def facts(i: int) -> Facts:
        guided = None if guidance is None else float(row(guidance, i))
        return Facts(model, weights, lasting, shape, row(pooled, i), guided, row(context, i), model.get_dtype_inference(), x.device, options)

    each = x.shape[0] // len(uuids)
    return [CallRow((uuids[i // each], conds[i // each], i % each, shape, weights, str(x.device)), partial(facts, i)) for i in range(x.shape[0])]


WRAPPERS = {
    WrappersMP.OUTER_SAMPLE: outer_sample,
    WrappersMP.PREPARE_SAMPLING: prepare_sampling,
    WrappersMP.APPLY_MODEL: apply_model,
}
