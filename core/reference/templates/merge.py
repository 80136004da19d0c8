"""Several templates on one picture: their keys and values stand one behind the other, and what cannot go together is named."""
from ..entry import Entry
from ..handle import Handle, Reference
from ..ready import Ready


def referred(entry: Entry, null: Entry | None = None, weight: float = 1.0, start: float = 0.0, end: float = 1.0, before: Handle | None = None) -> Handle:
    """An entry as a reference, behind those that are there. null: what the negative gets of it."""
    for reference in (before or Handle()).references:
        if why := conflict(reference.recipe, entry):
            raise ValueError(why)
    return (before or Handle()) + Handle((Reference(Ready(entry, null=null), weight, start, end),))


def conflict(recipe, entry: Entry) -> str:
    """Why a model cannot have both, in a sentence."""
    both = f"{recipe.source} and {entry.source} cannot act together"
    if recipe.family != entry.family:
        return f"{both}: the first is for {recipe.family} and the second for {entry.family}; use references of one base model"
    other = getattr(recipe, "entry", None)
    if other is None or layout(other) == layout(entry):
        return ""
    said = [f"{blocks} blocks of {heads} heads" for blocks, heads in ((len(e.blocks), layout(e)[1]) for e in (other, entry))]
    return f"{both}: the first is for a model of {said[0]} and the second for one of {said[1]}; use references of one base model"


def layout(entry: Entry) -> tuple:
    return frozenset(entry.blocks), next(iter(entry.blocks.values()))[0].shape[1]
