"""What references come to on a model, in words, and which entries a run left of them."""
from .bank import Bank
from .entry import Entry, Key
from .handle import Handle, is_there
from .injector import last_run
from .run import Record
from .stored import NONE, NULL, SAME, Stored, lasting
from .told import many, mib


def last_of(model) -> tuple[Record | None, Bank]:
    found = last_run(model)
    if found is None:
        raise ValueError("the model has no reference injector on it; connect the model that comes out of Apply Reference Cache")
    return found


def entries_of(model, recipe) -> list[Entry]:
    """All that is there of a recipe: what it carries with it, or what is kept of those that the last run on the model used for it."""
    record, bank = last_of(model)
    if is_there(recipe):
        return [recipe.entry] if hasattr(recipe, "entry") else list(recipe.entries)
    keys = () if record is None else record.keys.get(id(recipe), ())
    return [entry for key in keys if (entry := bank.peek(key)) is not None]


def to_save(model, recipe) -> list[Entry]:
    """The same with keys that hold in another process: each names the weights it was made under, not those of `model`. All or a ValueError."""
    entries = entries_of(model, recipe)
    record, bank = last_of(model)
    if is_there(recipe) or record is None:
        return entries
    if id(recipe) in record.passing:
        raise ValueError(f"{recipe.source} was encoded while hooks, a bypass LoRA or replaced layers changed the model, which a file cannot be compared with; "
                         "take these away and sample again")
    wanted = len(record.keys.get(id(recipe), ()))
    if entries and len(entries) < wanted:
        raise ValueError(f"{wanted - len(entries)} of the {wanted} entries of {recipe.source} are no longer kept: the limit of {mib(bank.limit)} "
                         "had no room for them, another run left with 'keep' off, or they were cleared; sample again, with a limit_mib in Apply Reference "
                         "Cache that all of them fit in")
    return [lasting(entry, patcher_of(model, record, bank, entry.key, recipe.source)) for entry in entries]


def patcher_of(model, record: Record, bank: Bank, key: Key, source: str):
    """The ModelPatcher that an entry was made under: `model`, or the one that the run had."""
    base, held = key.fields.get("base"), record.patchers.get(key.fields.get("base"))
    for patcher in (model, None if held is None else held()):
        if patcher is not None and base in (None, bank.base(patcher)):
            return patcher
    raise ValueError(f"{source} was encoded on a model with other LoRAs than the one that came, and that is gone; connect the model that goes into the sampler "
                     "and sample again")


def stored(model, handle: Handle) -> list[Stored]:
    """The handle's references as they are saved, those of which nothing is there left out."""
    found = []
    for reference in handle.references:
        recipe, other = reference.recipe, reference.recipe.other_side()
        entries = to_save(model, recipe)
        nulls = to_save(model, other) if other not in (None, recipe) else []
        if entries and other not in (None, recipe) and not nulls:
            raise ValueError(f"what the negative gets of {recipe.source} was not encoded or is not kept; sample with cfg above 1 before you save it")
        side = SAME if other is recipe else NULL if nulls else NONE
        if entries:
            found.append(Stored("", recipe.seam, entries, side, nulls))
    return found


def described(model, handle: Handle) -> str:
    """A line per reference, and one per entry of it below."""
    (record, bank), lines = last_of(model), []
    for number, reference in enumerate(handle.references, 1):
        recipe = reference.recipe
        span = "" if (reference.start, reference.end) == (0.0, 1.0) else f", from {reference.start:g} to {reference.end:g} of the schedule"
        lines.append(f"{number}. {recipe.source}: {recipe.exactness}, weight {reference.weight:g}{span}")
        own = entries_of(model, recipe)
        if not own:
            size = recipe.bytes(model.model.diffusion_model, model.model.get_dtype_inference())
            lines.append(f"   not encoded yet; an entry will take {mib(size)}")
        for entry in own:
            hits = bank.hits.get(entry.key.digest)
            where = "with its node or file" if hits is None else f"in host memory, used {many(hits, 'time', 'times')} since it was encoded"
            tokens = f"of {entry.tokens} tokens" if isinstance(entry.tokens, int) else "of several sizes"
            lines.append(f"   {mib(entry.bytes)}, {len(entry.blocks)} blocks {tokens}, {where}")
            lines += [f"      {field}: {text[:64]}" for field, text in sorted(entry.key.fields.items()) if text]
    if record is not None:
        lines.append(f"last run: {record.line()}")
    return "\n".join([*lines, f"the bank holds {many(len(bank), 'entry', 'entries')}, {mib(bank.bytes)} of {mib(bank.limit)}"])
