"""What references come to on a model, in words, and which entries a run left of them."""
from collections.abc import Iterator

from .bank import MIB
from .entry import Entry
from .handle import Handle
from .injector import last_run


def entries_of(model, handle: Handle) -> Iterator[tuple[object, Entry]]:
    """(recipe, entry) for all that is there of the handle's references: ready ones, saved ones, and what the last run on the model encoded."""
    found = last_run(model)
    if found is None:
        raise ValueError("the model has no reference injector on it; connect the model that comes out of Apply Reference Cache")
    record, bank = found
    for reference in handle.references:
        recipe = reference.recipe
        if (entry := getattr(recipe, "entry", None)) is not None:
            yield recipe, entry
        elif hasattr(recipe, "entries"):
            yield from ((recipe, entry) for entry in recipe.entries)
        elif record is not None:
            for key in record.keys.get(id(recipe), ()):
                if (entry := bank.peek(key)) is not None:
                    yield recipe, entry


def described(model, handle: Handle) -> str:
    """A line per reference, and one per entry of it below."""
    record, bank = last_run(model) or (None, None)
    entries, lines = list(entries_of(model, handle)), []
    for number, reference in enumerate(handle.references, 1):
        recipe = reference.recipe
        span = "" if (reference.start, reference.end) == (0.0, 1.0) else f", from {reference.start:g} to {reference.end:g} of the schedule"
        lines.append(f"{number}. {recipe.source}: {recipe.exactness}, weight {reference.weight:g}{span}")
        own = [entry for other, entry in entries if other is recipe]
        if not own:
            size = recipe.bytes(model.model.diffusion_model, model.model.get_dtype_inference()) / MIB
            lines.append(f"   not encoded yet; an entry will take {size:.1f} MiB")
        for entry in own:
            hits = bank.hits.get(entry.key.digest)
            where = "with its node or file" if hits is None else f"in host memory, used {hits} times since it was encoded"
            tokens = f"of {entry.tokens} tokens" if isinstance(entry.tokens, int) else "of several sizes"
            lines.append(f"   {entry.bytes / MIB:.1f} MiB, {len(entry.blocks)} blocks {tokens}, {where}")
            lines += [f"      {field}: {text[:64]}" for field, text in sorted(entry.key.fields.items()) if text]
    if record is not None:
        lines.append(f"last run: {record.line()}")
    return "\n".join([*lines, f"the bank holds {len(bank)} entries, {bank.bytes / MIB:.1f} of {bank.limit / MIB:.0f} MiB"])
