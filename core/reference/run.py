"""One sampling with references: which entries it needs, how they are found or made, and in how much memory they are lent to it.

The host is asked to free what all references of a run take (demand.py). Where a run needs more entries than that, as under a
LoRA whose strength changes from step to step, the least recently used leave and are made anew when they are needed again.
"""
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import Protocol

import comfy.model_management
import torch
from torch import Tensor

from ..conditions import within
from .bank import Bank
from .entry import EXACT, Entry, Key, in_eight_bits
from .handle import NAME, CONDReferences, Facts, Handle, Handles, Reference, handle_of, is_there, odd, unfit
from .join import Buffers, Segment
from .lend import Loans, Resident, Streamed
from .seams import LAYOUTS
from .told import many, mib

SHARE = 0.25    # of the free GPU memory that entries may take before they are streamed
PLACES = ("automatic", "gpu", "streamed")
STORAGE = ("same", "fp8")


@dataclass(frozen=True)
class Keeping:
    """place: of entries during a run; keep: whether they outlive it; storage: how those are kept that are encoded from now on.

    limit: bytes that the bank may hold from the begin of a run on; none leaves it as it is.
    """

    place: str = "automatic"
    keep: bool = True
    storage: str = "same"
    limit: int | None = None

    def __post_init__(self):
        for name, known in (("place", PLACES), ("storage", STORAGE)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is '{getattr(self, name)}'; choose one of {', '.join(known)}")


@dataclass
class Record:
    """What a run did with its references, as data."""

    found: list[str] = field(default_factory=list)      # sources of entries that the bank had
    given: list[str] = field(default_factory=list)      # of those that came with their node or file
    made: list[str] = field(default_factory=list)
    seconds: float = 0.0        # of encoding
    bytes: int = 0
    place: str = ""
    exactness: str = EXACT
    reasons: list[str] = field(default_factory=list)
    recipes: dict[int, object] = field(default_factory=dict)    # id -> recipe, which keeps the id its own
    keys: dict[int, list[Key]] = field(default_factory=dict)    # id of a recipe -> of its entries
    passing: set[int] = field(default_factory=set)      # ids of recipes that had entries which no key outlives the run for
    patchers: dict[str, weakref.ref] = field(default_factory=dict)      # base of a key -> the ModelPatcher that it names

    def line(self) -> str:
        parts = [f"{len(self.made)} encoded in {self.seconds:.1f} s" if self.made else "", f"{len(self.found)} from the bank" if self.found else "",
                 f"{len(self.given)} ready-made" if self.given else ""]
        told = ", ".join(part for part in parts if part) or "none was used"
        reasons = "".join(f"; {reason}" for reason in self.reasons)
        return f"Reference Cache: {told}, {mib(self.bytes)}, {self.place}, {self.exactness}{reasons}"

    def note(self, recipe, key: Key, facts: Facts) -> None:
        """That a recipe came to an entry of this key."""
        self.recipes[id(recipe)] = recipe
        if not key.lasting:
            self.passing.add(id(recipe))
        elif key not in self.keys.setdefault(id(recipe), []):
            self.keys[id(recipe)].append(key)
            self.patchers[facts.base] = weakref.ref(facts.model.current_patcher)


class Row(Protocol):
    """A row of a model call. tag: equal for rows whose facts are, in one run; facts: worked out when asked for, as that waits for the GPU."""

    tag: tuple

    def facts(self) -> Facts: ...


class Run:
    """One sampling: the entries lent to it, and the buffers they are joined in."""

    def __init__(self, keeping: Keeping, bank: Bank, patcher, alone: bool = False):
        """alone: the positive side is computed without the negative one."""
        self.keeping, self.bank, self.patcher, self.alone = keeping, bank, patcher, alone
        self.record, self.loans, self.buffers = Record(place="not used"), Loans(), Buffers()
        self.used: dict[str, Key] = {}      # by digest, of entries that are in the bank because of this run or an earlier one
        self.counted: set[tuple] = set()    # places whose entries the record has among those that were found
        self.dropped = 0
        self.lock = threading.Lock()    # the host samples on several GPUs in threads
        self.streamed = keeping.place == "streamed"
        self.sigmas: dict[tuple[float, float], tuple[float | None, float | None]] = {}
        self.known: dict[tuple, tuple] = {}     # (recipe, what tells a row) -> its place among the loans
        if keeping.limit is not None:
            bank.limited(keeping.limit)

    def close(self) -> Record:
        if not self.keeping.keep:
            for key in self.used.values():
                self.bank.forget_reference(key)
        if self.dropped:
            left = many(self.dropped, "entry", "entries")
            self.record.reasons.append(f"{left} left before the end, so that no more memory was taken than was reserved")
        self.loans, self.known, self.buffers = Loans(), {}, Buffers()
        return self.record

    def claim(self, conds: dict) -> None:
        """Mark the handles of a run's conditions as read; every reference among them is checked against the model first."""
        network = self.patcher.model.diffusion_model
        for cond in (cond for entries in conds.values() for cond in entries):
            handle = handle_of(cond)
            if handle is None:
                continue
            for reference in handle.references:
                if why := unfit(reference.recipe, network):
                    raise ValueError(why)
            if (why := odd(handle.recipes)) and why not in self.record.reasons:
                self.record.reasons.append(why)
            cond["model_conds"] = {**cond["model_conds"], NAME: CONDReferences(handle, claimed=True)}

    def reserved(self, references: list[Reference]) -> int:
        """Bytes on the GPU that the entries will want: all of them, or two blocks of each where they are streamed."""
        network, recipes = self.patcher.model.diffusion_model, [reference.recipe for reference in references if reference.acts]
        wanted = sum(map(self.size, recipes))
        if self.keeping.place == "automatic":
            self.streamed = wanted > SHARE * comfy.model_management.get_free_memory(self.patcher.load_device)
        self.record.bytes = self.loans.limit = wanted
        blocks = max((len(LAYOUTS[recipe.seam](network)) for recipe in recipes), default=1)
        return wanted * min(2, blocks) // blocks if self.streamed else wanted

    def size(self, recipe) -> int:
        """Bytes of an entry that is to be made, or of all that a recipe carries with it."""
        real = self.patcher.model
        dtype = real.get_dtype_inference()
        narrow = dtype.itemsize if self.keeping.storage == "fp8" and not is_there(recipe) else 1
        return recipe.bytes(real.diffusion_model, dtype) // narrow

    def active(self, handle: Handle, sigma: float) -> list[Reference]:
        return [reference for reference in handle.references if reference.acts and within(sigma, *self.span(reference))]

    def span(self, reference: Reference) -> tuple[float | None, float | None]:
        shares = (reference.start, reference.end)
        if shares not in self.sigmas:
            space = self.patcher.get_model_object("model_sampling")
            self.sigmas[shares] = (None if shares[0] <= 0 else float(space.percent_to_sigma(shares[0])),
                                   None if shares[1] >= 1 else float(space.percent_to_sigma(shares[1])))
        return self.sigmas[shares]

    def segments(self, handles: Handles, rows: list[Row], sigma: float) -> list[Segment]:
        """The references of a call, in order, each with the entry of every row."""
        per_handle, using = len(rows) // len(handles.each), set()
        columns = zip(*(self.active(handle, sigma) for handle in handles.each), strict=True)     # of one layout, or the host had not batched them
        return [Segment([self.entry(column[i // per_handle].recipe, row, using) for i, row in enumerate(rows)], column[0].weight) for column in columns]

    def entry(self, recipe, row: Row, using: set):
        """Lent to this run: found in it, in the bank, or made now. `using` gathers the places of the entries of one call, none of which leaves for another."""
        with self.lock:
            tag = (id(recipe), *row.tag)
            lent = self.loans.get(self.known.get(tag))
            if lent is None:
                self.known[tag], lent = self.lent_for(recipe, row, using)
            using.add(self.known[tag])
            return lent

    def lent_for(self, recipe, row: Row, using: set) -> tuple:
        """A place and what is lent there. What a row's entry hangs on is looked at once in a run, not on every step."""
        facts = row.facts()
        key, ready = recipe.key(facts), recipe.ready(facts)
        if self.keeping.storage != "same" and ready is None:
            key = Key({**key.fields, "storage": self.keeping.storage}, key.lasting)
        place = (key.digest, str(facts.device))
        lent = self.loans.get(place)
        if lent is None:
            size = self.size(recipe) if ready is None else ready.bytes
            self.make_room(size, place, using)
            entry = ready or (self.bank.get(key) if key.lasting else None)
            if entry is not None and place not in self.counted:     # one that left and came back is found once
                (self.record.found if ready is None else self.record.given).append(entry.source)
            self.counted.add(place)
            lent = self.make(recipe, key, facts) if entry is None else self.lend(entry, facts.device)
            self.loans.put(place, lent, size)
            if lent.entry.exactness != EXACT:
                self.record.exactness = lent.entry.exactness
            if ready is None and key.lasting:
                self.used[key.digest] = key
        self.record.note(recipe, key, facts)
        return place, lent

    def make_room(self, size: int, place: tuple, using: set) -> None:
        gone = self.loans.make_room(size, place[1], using)
        for lent in gone.values():
            self.buffers.forget(lent)
        if gone:
            self.dropped += len(gone)
            self.known = {tag: where for tag, where in self.known.items() if where not in gone}

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
        if key.lasting and not self.bank.put(entry):
            reason = f"an entry of {mib(entry.bytes)} is above the bank's limit of {mib(self.bank.limit)} and is not kept"
            if reason not in self.record.reasons:
                self.record.reasons.append(reason)
        return self.lend((self.bank.peek(key) if key.lasting else None) or entry if self.streamed else entry, facts.device)

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


def relative_l2(tensor: Tensor, reference: Tensor) -> Tensor:
    return (tensor - reference.float()).norm() / reference.float().norm().clamp_min(1e-12)


def fetcher(device: torch.device):
    """How a streamed block comes to the device: on a stream of its own where there is one."""
    def fetch(tensor: Tensor):
        stream = comfy.model_management.get_offload_stream(device)
        copy = comfy.model_management.cast_to(tensor, device=device, non_blocking=tensor.is_pinned(), stream=stream)
        return copy, lambda: comfy.model_management.sync_stream(device, stream)

    return fetch
