"""References on CONDITIONING: what is wanted, not yet what it comes to.

A handle is a tuple of references. It rides in `model_conds` as a condition type of its own, so that positive and negative
are sampled in one batch where their references have as many tokens. Only the injector of core/reference/injector.py can
read it; on a model without one a handle is an error, as a picture without its references would be a wrong one.
"""
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import comfy.conds
import torch
from torch import Tensor

from .entry import Entry, Key
from .foreign import foreign

NAME = "reprise_references"     # of the entry in model_conds


@dataclass(frozen=True)
class Facts:
    """One row of a model call: what an encoding may depend on.

    model: the host's BaseModel, its weights loaded and patched; base: names these weights; lasting: for longer than this call
    shape: of the latent, H and W; pooled: [1, D]; context: [1, N, C]; dtype: in which the network computes.
    """

    model: object
    base: str
    lasting: bool
    shape: tuple[int, ...]
    pooled: Tensor | None
    guidance: float | None
    context: Tensor | None
    dtype: torch.dtype
    device: torch.device
    options: dict

    @property
    def network(self):
        return self.model.diffusion_model


class Recipe(Protocol):
    """How to make an entry: content and adapter. Immutable, and cheap to carry."""

    seam: str       # where it goes in: a name of join.SEAMS
    source: str     # for the user
    exactness: str
    rope: str
    hangs_on: Collection[str] = ()      # of "pooled", "guidance" and "size": what of a condition is in its key

    def unfit(self, network) -> str:
        """Why this network cannot be served, in a sentence; nothing where it can."""

    def bytes(self, network, dtype: torch.dtype) -> int:
        """What the entry will take, known before it is made."""

    @property
    def tokens(self) -> object:
        """What must be equal for two to be sampled in one batch: the number of tokens, or one for every block."""

    def key(self, facts: Facts) -> Key: ...

    def ready(self, facts: Facts) -> Entry | None:
        """The entry where it is there already; None where it is to be made."""

    def fill(self, facts: Facts, put: Callable[[str, Tensor, Tensor], None]) -> Tensor | None:
        """Encode: `put` block, K and V, each [1, H, T, D], for every block. Returns ids [T, axes] where rope is "pre"."""

    def other_side(self) -> "Recipe | None":
        """What the negative gets where the user gives it nothing of its own."""


def unfit(recipe: Recipe, network) -> str:
    """Why this network cannot be served with a recipe, in a sentence; nothing where it can."""
    return foreign(recipe.source, network) or recipe.unfit(network)


def is_there(recipe) -> bool:
    """Whether it carries its entries with it."""
    return hasattr(recipe, "entry") or hasattr(recipe, "entries")


def odd(recipes: Sequence[Recipe]) -> str:
    """What is unusual about recipes that act together, in a sentence; nothing where all is as their system was made for."""
    return next((why for recipe in recipes if (why := getattr(recipe, "odd", lambda recipes: "")(recipes))), "")


@dataclass(frozen=True)
class Reference:
    """A recipe in use. weight multiplies the attention that its tokens get: 1 is as trained, 0 is none; start and end are shares of the schedule."""

    recipe: Recipe
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if not self.start <= self.end:
            raise ValueError(f"start_percent is {self.start:g} and end_percent {self.end:g}; the start must not lie behind the end")

    @property
    def acts(self) -> bool:
        """At some sigma. A span that ends where it begins is none."""
        return self.weight > 0 and self.start < self.end

    def other_side(self) -> "Reference | None":
        recipe = self.recipe.other_side()
        return None if recipe is None else replace(self, recipe=recipe)

    @property
    def layout(self) -> tuple:
        return (self.recipe.seam, self.recipe.tokens, self.weight, self.start, self.end)


@dataclass(frozen=True)
class Handle:
    references: tuple[Reference, ...] = ()

    def __add__(self, other: "Handle") -> "Handle":
        return Handle(self.references + other.references)

    def other_side(self) -> "Handle":
        return Handle(tuple(other for reference in self.references if (other := reference.other_side()) is not None))

    @property
    def recipes(self) -> list[Recipe]:
        return [reference.recipe for reference in self.references]

    @property
    def layout(self) -> tuple:
        return tuple(reference.layout for reference in self.references)


@dataclass(frozen=True)
class Handles:
    """Of the conditions of one model call, in the order of their rows. No list and without a dtype: the host would convert it."""

    each: tuple[Handle, ...]


@dataclass
class CONDReferences(comfy.conds.CONDRegular):
    """A handle as the host carries it. `claimed` by an injector, which alone can read it."""

    cond: Handle = field(default_factory=Handle)
    claimed: bool = False

    def process_cond(self, batch_size, **kwargs):
        if not self.claimed and self.cond.references:
            raise ValueError(f"the conditioning carries a reference ({self.cond.references[0].recipe.source}) and the model has no injector for it; "
                             "sample with the model that comes out of Apply Reference Cache")
        return replace(self)

    def can_concat(self, other) -> bool:
        return self.cond.layout == other.cond.layout

    def concat(self, others) -> Handles:
        return Handles((self.cond, *(other.cond for other in others)))

    def size(self) -> list[int]:
        return [1]


def handle_in(value, what: str) -> Handle:
    """The references of an input, or a ValueError."""
    if not isinstance(value, Handle):
        raise ValueError(f"{what} is a {type(value).__name__} and references were expected; connect EasyControl Condition, FastFit Reference, a Template node "
                         "or Load Reference Cache")
    return value


def with_references(conditioning: list, handle: Handle) -> list:
    """A CONDITIONING with the handle's references behind those that are there."""
    def joined(more: dict) -> dict:
        held = more.get("model_conds", {})
        before = held[NAME].cond if NAME in held else Handle()
        return {**more, "model_conds": {**held, NAME: CONDReferences(before + handle)}}

    return [[text, joined(more)] for text, more in conditioning]


def handle_of(cond: dict) -> Handle | None:
    """Of one of the host's conditions."""
    held = cond.get("model_conds", {}).get(NAME)
    return None if held is None else held.cond
