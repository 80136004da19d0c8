"""What is skipped: where in a model call the cache steps in. A level sees tensors, rows and blocks, never the host."""
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

from torch import Tensor

from ...families import Family, Side, Stack
from ...store import Row


class Unfit(Exception):
    """The model has not the blocks that a level's knobs name, or cannot do without them; it says so."""


class Seam(Enum):
    """The host's three nested calls that a level may wrap."""

    GUIDED = "guided"      # one solver evaluation: all conditions and guidance
    MODEL = "model"        # one call of the model, one row per condition in the batch; returns denoised
    NETWORK = "network"    # the diffusion model inside it


@dataclass(frozen=True)
class Blocks:
    """The blocks of the diffusion model that is being called."""

    family: Family
    every: list[tuple[Stack, Any]]
    always: int     # further blocks, of the same size, that run on every step
    sides: list[tuple[Side, Any]]

    @classmethod
    def of(cls, family: Family, network) -> "Blocks":
        return cls(family, family.blocks(network), family.always_run(network), family.side_modules(network))

    @property
    def go_on(self) -> bool:
        """Whether blocks can run after a skipped range."""
        return not any(side.chained for side, _ in self.sides) and all(stack.joined for stack, _ in self.every)


@dataclass(frozen=True)
class Call:
    """x [B, ...] and sigma [B, 1, ...] as the seam has them; rows split the batch evenly, in order.

    network, arguments: the diffusion model and what it is called with, by name; for UNets, whose `compute` takes changed ones.
    """

    rows: tuple[Row, ...]
    x: Tensor | None = None
    sigma: Tensor | None = None
    blocks: Blocks | None = None
    network: Any = None
    arguments: dict | None = None


def derivative(x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """d = (x - denoised) / sigma, in fp32: k-diffusion's derivative, whatever the model predicts. A new tensor."""
    return (x.float() - denoised.float()) / sigma


def from_derivative(x: Tensor, d: Tensor, sigma: Tensor) -> Tensor:
    """denoised = x - sigma d, in the type of x."""
    return (x.float() - sigma * d).to(x.dtype)


class Level(Protocol):
    """An immutable dataclass with knobs."""

    name: str
    seam: Seam
    gates: bool    # it can run the first blocks before a decision
    serves: str | None     # the kind of family it is for; None for any

    def resolve(self, policy) -> "Level":
        """The level that a run works at: itself, unless it only picks one."""
        ...

    def evaluate(self, cache, call: Call, compute: Callable[..., Any]) -> Any:
        """The result of the seam: that of `compute()`, untouched, or a prediction."""
        ...
