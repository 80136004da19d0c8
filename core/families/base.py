"""What the rest of the pack may know about a model family: names and layout, as data."""
from dataclasses import dataclass


@dataclass(frozen=True)
class Stack:
    """A run of like blocks.

    inputs: names of the tensors a block is called with, in the order of its signature.
    stream: the one that carries the image tokens [B, N, C]; where text is joined to it, the text comes first.
    returns: the names a block returns, in order; a single name means a bare tensor.
    """

    attribute: str
    inputs: tuple[str, ...]
    stream: str
    returns: tuple[str, ...]

    def argument(self, name: str, args: tuple, kwargs: dict):
        return kwargs[name] if name in kwargs else args[self.inputs.index(name)]

    def taken(self, args: tuple, kwargs: dict):
        """The stream as it goes into a block."""
        return self.argument(self.stream, args, kwargs)

    def given(self, result):
        """The stream as it comes out of a block."""
        return result if len(self.returns) == 1 else result[self.returns.index(self.stream)]

    def passed(self, args: tuple, kwargs: dict, stream=None):
        """What a block that does nothing returns; `stream`, when told, in place of its stream."""
        values = tuple(
            stream if stream is not None and name == self.stream else self.argument(name, args, kwargs) for name in self.returns)
        return values[0] if len(values) == 1 else values


@dataclass(frozen=True)
class Family:
    name: str
    model: str                          # the host's class, as module:qualname; subclasses differ too much to be trusted
    stacks: tuple[Stack, ...]           # in the order in which they are called
    always: tuple[str, ...] = ()        # containers of blocks of the same size that run on every step, skipped or not
    kind: str = "transformer"           # or "unet", which has no stacks; a level that reaches into the network is for one of them

    def matches(self, diffusion_model) -> bool:
        kind = type(diffusion_model)
        return f"{kind.__module__}:{kind.__qualname__}" == self.model

    def blocks(self, diffusion_model) -> list[tuple[Stack, object]]:
        return [(stack, block) for stack in self.stacks for block in getattr(diffusion_model, stack.attribute)]

    def always_run(self, diffusion_model) -> int:
        """Number of blocks that no level of this family skips."""
        return sum(len(getattr(diffusion_model, name, None) or ()) for name in self.always)

