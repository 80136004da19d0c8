"""What the rest of the pack may know about a model family: names and layout, as data."""
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor


class Unfamiliar(Exception):
    """A fact of a family does not hold for the model at hand, as after an update of the host."""


def argument(inputs: tuple[str, ...], name: str, args: tuple, kwargs: dict):
    """An argument of a call by name, `inputs` being the begin of the signature."""
    if name in kwargs:
        return kwargs[name]
    if name in inputs and inputs.index(name) < len(args):
        return args[inputs.index(name)]
    raise Unfamiliar(f"a block was called without '{name}'")


def module_at(network, path: str):
    """The module at a dotted path, or None."""
    for name in path.split("."):
        network = getattr(network, name, None)
    return network


@dataclass(frozen=True)
class Stack:
    """A run of like blocks.

    inputs: the begin of a block's signature, as far as anything here asks for it.
    stream: what carries the image tokens [B, N, ...]. In a later stack other tokens may be joined to them.
    returns: the names of what a block returns, in order; a single name means a bare tensor.
    joined: what the host hands on to the next block, in the order in which a later stack joins it into one stream.
        Blocks after a skipped range read all of it. Empty: not stated, so no block may run after a skipped range.
    image_first: the image tokens stand before those that are joined to them, not after.
    packed: the names of the tensors in the first input, where that is a tuple.
    also: further streams of the same blocks that reach the output, of another width.
    """

    attribute: str
    inputs: tuple[str, ...]
    stream: str
    returns: tuple[str, ...]
    joined: tuple[str, ...] = ()
    image_first: bool = False
    packed: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    def argument(self, args: tuple, kwargs: dict, name: str):
        if name not in self.packed:
            return argument(self.inputs, name, args, kwargs)
        whole = argument(self.inputs, self.inputs[0], args, kwargs)
        if not isinstance(whole, (tuple, list)) or len(whole) != len(self.packed):
            raise Unfamiliar(f"a block of {self.attribute} was called with {type(whole).__name__}, not with ({', '.join(self.packed)})")
        return whole[self.packed.index(name)]

    def taken(self, args: tuple, kwargs: dict) -> dict[str, Tensor]:
        """What goes into a block and comes out again, by name."""
        return self.checked({name: self.argument(args, kwargs, name) for name in self.returns})

    def untouched(self, args: tuple, kwargs: dict):
        """What a block returns that does no more than hand on what it is given."""
        result = [self.argument(args, kwargs, name) for name in self.returns]
        return result[0] if len(result) == 1 else tuple(result)

    def given(self, result) -> dict[str, Tensor]:
        """What comes out of a block, by name."""
        values = (result,) if len(self.returns) == 1 else result
        if not isinstance(values, (tuple, list)) or len(values) != len(self.returns):
            raise Unfamiliar(f"a block of {self.attribute} returned {type(result).__name__}, not ({', '.join(self.returns)})")
        return self.checked(dict(zip(self.returns, values, strict=True)))

    def checked(self, values: dict) -> dict:
        for name in (self.stream, *self.also):
            if not torch.is_tensor(values[name]) or values[name].ndim < 3:
                raise Unfamiliar(f"'{name}' of a block of {self.attribute} is not a tensor of tokens")
        return values

    def passed(self, values: dict):
        """What a block returns that does no more than hand on `values`."""
        result = tuple(values[name] for name in self.returns)
        return result[0] if len(result) == 1 else result

    def image(self, stream: Tensor, tokens: int) -> Tensor:
        """The image tokens of a stream, `tokens` in number."""
        if stream.shape[1] < tokens:
            raise Unfamiliar(f"a block of {self.attribute} has {stream.shape[1]} tokens, and the image alone has {tokens}")
        if stream.shape[1] == tokens:
            return stream
        return stream[:, :tokens] if self.image_first else stream[:, stream.shape[1] - tokens:]

    def with_image(self, stream: Tensor, image: Tensor) -> Tensor:
        """The stream with its image tokens replaced."""
        others = stream.shape[1] - image.shape[1]
        if not others:
            return image
        return torch.cat([image, stream[:, image.shape[1]:]] if self.image_first else [stream[:, :others], image], 1)

    def whole(self, values: dict) -> Tensor:
        """All that the host hands on, as one stream; a new tensor if there is more than one."""
        tensors = [values[name] for name in self.joined]
        if not all(torch.is_tensor(tensor) for tensor in tensors):
            raise Unfamiliar(f"a block of {self.attribute} lacks one of {', '.join(self.joined)}")
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)

    def parted(self, stream: Tensor, values: dict) -> dict[str, Tensor]:
        """The opposite of `whole`: the stream as named tensors, of the lengths that `values` have."""
        sizes = [values[name].shape[1] for name in self.joined]
        if sum(sizes) != stream.shape[1]:
            raise Unfamiliar(f"a block of {self.attribute} has {sum(sizes)} tokens where {stream.shape[1]} were skipped")
        return dict(zip(self.joined, stream.split(sizes, 1), strict=True))


@dataclass(frozen=True)
class Side:
    """Modules that the host calls between blocks, whose work is thrown away on a skip: then they do nothing.

    path: a container of modules or a single one; only some models of a family have it.
    returns: what the module returns, named by its inputs; None stands for something that is added, so for zero.
    blocks: whether each module is of a block's size, and so counts as one.
    chained: each call continues the one before, so none after a skipped range could be right.
    """

    path: str
    inputs: tuple[str, ...]
    returns: tuple[str | None, ...]
    blocks: bool = False
    chained: bool = False

    def passed(self, args: tuple, kwargs: dict):
        first = argument(self.inputs, self.inputs[0], args, kwargs)
        result = tuple(first.new_zeros(()) if name is None else argument(self.inputs, name, args, kwargs) for name in self.returns)
        return result[0] if len(result) == 1 else result

    def modules(self, network) -> list:
        found = module_at(network, self.path)
        if found is None:
            return []
        return list(found) if isinstance(found, Iterable) else [found]


@dataclass(frozen=True)
class Family:
    """A family without stacks is one whose blocks are not known; everything that needs no blocks still serves it."""

    name: str
    models: tuple[str, ...] = ()        # the host's classes, as module:qualname; subclasses differ too much to be trusted
    stacks: tuple[Stack, ...] = ()      # in the order in which they are called
    sides: tuple[Side, ...] = ()
    always: tuple[str, ...] = ()        # containers of blocks of the same size that run on every step, skipped or not
    wrapped: bool = True                # the class calls the host's DIFFUSION_MODEL wrappers
    warm_up: int = 1                    # so many first evaluations of a run are computed
    # TeaCache's modulated input of the first block, from the block and a function that gives its arguments by name
    modulated: Callable[[object, Callable[[str], Tensor]], Tensor] | None = None
    kind: str = "transformer"           # or "unet", which has no stacks; a level that reaches into the network is for one of them
    # Paths of the modules that make shifts, scales and gates of one vector, * being a number; not every model has all of them.
    # No network of the family writes into that vector or into what they return.
    modulation: tuple[str, ...] = ()

    def matches(self, diffusion_model) -> bool:
        kind = type(diffusion_model)
        return f"{kind.__module__}:{kind.__qualname__}" in self.models

    def blocks(self, network) -> list[tuple[Stack, object]]:
        return [(stack, block) for stack in self.stacks for block in self.container(network, stack)]

    def container(self, network, stack: Stack):
        found = module_at(network, stack.attribute)
        if not isinstance(found, Iterable):
            raise Unfamiliar(f"{type(network).__name__} has no {stack.attribute}")
        return found

    def side_modules(self, network) -> list[tuple[Side, object]]:
        return [(side, module) for side in self.sides for module in side.modules(network)]

    def always_run(self, network) -> int:
        """Number of blocks that no level of this family skips."""
        return sum(len(module_at(network, name) or ()) for name in self.always)

    def modulations(self, network) -> list[str]:
        """Paths of the modules of a network that make shifts, scales and gates."""
        paths = re.compile("|".join(re.escape(path).replace(r"\*", r"\d+") for path in self.modulation))
        return [path for path, _ in network.named_modules() if self.modulation and paths.fullmatch(path)]

    def modulated_input(self, stack: Stack, block, args: tuple, kwargs: dict) -> Tensor:
        try:
            return self.modulated(block, partial(stack.argument, args, kwargs))
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise Unfamiliar(f"what modulates the first block of {self.name} was not found ({error})") from error
