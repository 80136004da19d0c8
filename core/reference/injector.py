"""The one injector on a model: reads the handles of a call, has their entries made or found, and puts them into attention.

OUTER_SAMPLE opens and closes a run; PREPARE_SAMPLING claims the handles and has the host free memory; APPLY_MODEL, outside
of everything that may be compiled, resolves the handles of a call. Without a handle it does nothing at all.
"""
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..conditions import within
from ..memory import enlarged
from .bank import MIB, Bank
from .entry import EXACT, Entry, Key, in_eight_bits
from .handle import NAME, CONDReferences, Facts, Handle, Handles, Reference, handle_of
from .join import Buffers, Segment
from .lend import Resident, Streamed
from .seams import LAYOUTS, SEAMS

log = logging.getLogger("reprise")

KEY = "reprise.references"
RUN = "reprise.references.run"
SHARE = 0.25    # of the free GPU memory that entries may take before they are streamed
PLACES = ("automatic", "gpu", "streamed")
STORAGE = ("same", "fp8")
BANK = Bank(pin=comfy.model_management.pin_memory, unpin=comfy.model_management.unpin_memory)


@dataclass(frozen=True)
class Keeping:
    """place: of entries during a run; keep: whether they outlive it; storage: how those are kept that are encoded from now on."""

    place: str = "automatic"
    keep: bool = True
    storage: str = "same"

    def __post_init__(self):
        for name, known in (("place", PLACES), ("storage", STORAGE)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is '{getattr(self, name)}'; choose one of {', '.join(known)}")


@dataclass
class Record:
    """What a run did with its references, as data."""

    found: list[str] = field(default_factory=list)      # sources of entries that were there
    made: list[str] = field(default_factory=list)
    seconds: float = 0.0        # of encoding
    bytes: int = 0
    place: str = ""
    exactness: str = EXACT
    reasons: list[str] = field(default_factory=list)
    keys: dict[int, list[Key]] = field(default_factory=dict)    # id of a recipe -> of the entries that were its
    recipes: list = field(default_factory=list)     # those recipes, so that no other one gets their ids

    def line(self) -> str:
        parts = [f"{len(self.made)} encoded in {self.seconds:.1f} s" if self.made else "", f"{len(self.found)} from the bank" if self.found else ""]
        told = ", ".join(part for part in parts if part) or "none was used"
        reasons = "".join(f"; {reason}" for reason in self.reasons)
        return f"Reference Cache: {told}, {self.bytes / MIB:.1f} MiB, {self.place}, {self.exactness}{reasons}"


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
    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})[KEY] = Attachment(keeping or Keeping(), bank, notify)
    for kind, wrapper in WRAPPERS.items():
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


class Run:
    """One sampling: the entries lent to it, and the buffers they are joined in."""

    def __init__(self, attachment: Attachment, patcher):
        self.keeping, self.bank, self.patcher = attachment.keeping, attachment.bank, patcher
        self.record, self.lent, self.buffers = Record(place="not used"), {}, Buffers()
        self.made: list[Key] = []
        self.lock = threading.Lock()    # the host samples on several GPUs in threads
        self.streamed = attachment.keeping.place == "streamed"
        self.sigmas: dict[tuple[float, float], tuple[float | None, float | None]] = {}
        self.known: dict[tuple, tuple] = {}     # (recipe, what tells a row) -> where it is in `lent`

    def close(self) -> Record:
        if not self.keeping.keep:
            for key in self.made:
                self.bank.forget(key)
        self.lent, self.known, self.buffers = {}, {}, Buffers()
        return self.record

    def claim(self, conds: dict) -> list[Reference]:
        """Mark the handles of a run's conditions as read; every reference among them is checked against the model first.

        A reference comes back as often as it may be encoded: once for each condition, or once if it is there already.
        """
        network, found = self.patcher.model.diffusion_model, []
        for cond in (cond for entries in conds.values() for cond in entries):
            handle = handle_of(cond)
            if handle is None:
                continue
            for reference in handle.references:
                if why := reference.recipe.unfit(network):
                    raise ValueError(why)
            found += [reference for reference in handle.references if reference not in found or not is_there(reference.recipe)]
            cond["model_conds"] = {**cond["model_conds"], NAME: CONDReferences(handle, claimed=True)}
        return found

    def reserved(self, references: list[Reference]) -> int:
        """Bytes on the GPU that the entries will want: all of them, or two blocks of each where they are streamed."""
        real = self.patcher.model
        network, dtype = real.diffusion_model, real.get_dtype_inference()
        sizes = [(reference.recipe.bytes(network, dtype), reference.recipe) for reference in references if reference.weight > 0]
        narrow = dtype.itemsize if self.keeping.storage == "fp8" else 1
        wanted = sum(size // (1 if is_there(recipe) else narrow) for size, recipe in sizes)
        if self.keeping.place == "automatic":
            self.streamed = wanted > SHARE * comfy.model_management.get_free_memory(self.patcher.load_device)
        self.record.bytes = wanted
        blocks = max((len(LAYOUTS[recipe.seam](network)) for _, recipe in sizes), default=1)
        return wanted * min(2, blocks) // blocks if self.streamed else wanted

    def active(self, handle: Handle, sigma: float) -> list[Reference]:
        return [reference for reference in handle.references if reference.weight > 0 and within(sigma, *self.span(reference))]

    def span(self, reference: Reference) -> tuple[float | None, float | None]:
        shares = (reference.start, reference.end)
        if shares not in self.sigmas:
            space = self.patcher.get_model_object("model_sampling")
            self.sigmas[shares] = (None if shares[0] <= 0 else float(space.percent_to_sigma(shares[0])),
                                   None if shares[1] >= 1 else float(space.percent_to_sigma(shares[1])))
        return self.sigmas[shares]

    def segments(self, handles: Handles, rows: list["CallRow"], sigma: float) -> list[Segment]:
        """The references of a call, in order, each with the entry of every row."""
        per_handle = len(rows) // len(handles.each)
        columns = zip(*(self.active(handle, sigma) for handle in handles.each), strict=True)     # of one layout, or the host had not batched them
        return [Segment([self.entry(column[i // per_handle].recipe, row) for i, row in enumerate(rows)], column[0].weight) for column in columns]

    def entry(self, recipe, row: "CallRow"):
        """Lent to this run: found in it, in the bank, or made now. What a row's entry hangs on is looked at once in a run, not on every step."""
        with self.lock:
            return self.lent_for(recipe, row)

    def lent_for(self, recipe, row: "CallRow"):
        tag = (id(recipe), *row.tag)
        if tag not in self.known:
            facts = row.facts()
            key, ready = recipe.key(facts), recipe.ready(facts)
            if self.keeping.storage != "same" and ready is None:
                key = Key({**key.fields, "storage": self.keeping.storage}, key.lasting)
            place = (key.digest, str(facts.device))
            if place not in self.lent:
                entry = ready or (self.bank.get(key) if key.lasting else None)
                if entry is not None:
                    self.record.found.append(entry.source)
                self.lent[place] = self.make(recipe, key, facts) if entry is None else self.lend(entry, facts.device)
                if (exactness := self.lent[place].entry.exactness) != EXACT:
                    self.record.exactness = exactness
            if id(recipe) not in self.record.keys:
                self.record.recipes.append(recipe)
            if key not in self.record.keys.setdefault(id(recipe), []):
                self.record.keys[id(recipe)].append(key)
            self.known[tag] = place
        return self.lent[self.known[tag]]

    def lend(self, entry: Entry, device: torch.device):
        if not self.streamed:
            try:
                self.record.place = "on the GPU" if device.type != "cpu" else "in host memory"
                return Resident(entry, device)
            except torch.OutOfMemoryError:
                comfy.model_management.soft_empty_cache()
                self.streamed = True
                self.record.reasons.append("the GPU had no room for it, so it is streamed")
        self.record.place = "streamed from host memory"
        return Streamed(entry, fetcher(device))

    def make(self, recipe, key: Key, facts: Facts):
        """Encode. Nothing of an entry is seen by anybody before the whole of it is there."""
        begun = time.perf_counter()
        try:
            entry = self.filled(recipe, key, facts, facts.device if not self.streamed else torch.device("cpu"))
        except torch.OutOfMemoryError:
            comfy.model_management.soft_empty_cache()
            self.streamed = True
            self.record.reasons.append("the GPU had no room to encode it there, so it went to host memory block by block")
            entry = self.filled(recipe, key, facts, torch.device("cpu"))
        self.record.made.append(recipe.source)
        self.record.seconds += time.perf_counter() - begun
        if key.lasting:
            if self.bank.put(entry):
                self.made.append(key)
            else:
                sizes = f"{entry.bytes / MIB:.0f} MiB is above the bank's limit of {self.bank.limit / MIB:.0f} MiB"
                self.record.reasons.append(f"an entry of {sizes} and is not kept")
        return self.lend(self.bank.get(key) or entry if self.streamed else entry, facts.device)

    def filled(self, recipe, key: Key, facts: Facts, home: torch.device) -> Entry:
        blocks, scales, errors = {}, {}, []

        def put(name: str, *pair: Tensor) -> None:
            if self.keeping.storage == "fp8":
                packed = [in_eight_bits(tensor.detach()) for tensor in pair]
                errors.extend(relative_l2(values.float() * scale, tensor) for (values, scale), tensor in zip(packed, pair, strict=True))
                pair, scales[name] = (values for values, _ in packed), tuple(scale.to(home) for _, scale in packed)
            blocks[name] = tuple(tensor.detach().to(home, copy=True, memory_format=torch.contiguous_format) for tensor in pair)

        ids = recipe.fill(facts, put)
        exactness = recipe.exactness
        if errors:
            off = f"keys and values in 8 bits, {torch.stack(errors).mean().item():.1%} off"
            exactness = f"approximate: {off}" if exactness == EXACT else f"{exactness}; {off}"
        return Entry(recipe.family, blocks, key, recipe.source, recipe.rope, ids, exactness, scales=scales)


def is_there(recipe) -> bool:
    """Whether it carries its entries with it."""
    return hasattr(recipe, "entry") or hasattr(recipe, "entries")


def relative_l2(tensor: Tensor, reference: Tensor) -> Tensor:
    return (tensor - reference.float()).norm() / reference.float().norm().clamp_min(1e-12)


def fetcher(device: torch.device):
    """How a streamed block comes to the device: on a stream of its own where there is one."""
    def fetch(tensor: Tensor):
        stream = comfy.model_management.get_offload_stream(device)
        copy = comfy.model_management.cast_to(tensor, device=device, non_blocking=tensor.is_pinned(), stream=stream)
        return copy, lambda: comfy.model_management.sync_stream(device, stream)

    return fetch


def outer_sample(executor, *args, **kwargs):
    guider = executor.class_obj
    attachment = guider.model_options.get("transformer_options", {}).get(KEY)
    if attachment is None:
        return executor(*args, **kwargs)
    run, options = Run(attachment, guider.model_patcher), guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(options)
    guider.model_options["transformer_options"][RUN] = run
    try:
        return executor(*args, **kwargs)
    finally:    # an interrupt is a BaseException
        guider.model_options = options
        record = run.close()
        if record.made or record.found:
            log.info(record.line())
            attachment.last = record
            attachment.notify(record)


def prepare_sampling(executor, model, noise_shape, conds, model_options=None, **kwargs):
    run = (model_options or {}).get("transformer_options", {}).get(RUN)
    if run is not None:
        references = run.claim(conds)
        if references:
            handler = model_options.get("context_handler")
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
    """A row of a model call. tag: equal for rows whose facts are, in one run; facts: worked out when they are asked for, as that waits for the GPU."""

    tag: tuple
    facts: Callable[[], Facts]


def rows_of(run: Run, model, x: Tensor, context: Tensor | None, options: dict, extra: dict) -> list[CallRow]:
    """Of every row of a call."""
    patcher = model.current_patcher
    hooks = getattr(patcher, "current_hooks", None)
    weights = f"{run.bank.token(model)}/{patcher.patches_uuid}"
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
