"""Block range: F first and B last blocks always run; what those between would have added is predicted.

    computed step:   h_F = blocks 1..F (x)      H = blocks F+1..L-B (h_F) - h_F     kept, per condition
    skipped step:    h_F = blocks 1..F (x)      out = blocks L-B+1..L (h_F + H')

F and B are DBCache's (cache-dit). Embeddings, the blocks that run and the output layer see the present step, so this
injects new information where the other levels only extrapolate; it costs F + B blocks per skip and a snapshot of
every image token, of the text too when blocks after the range read it. ControlNet's residuals up to the first block
of the range are those of the present step. Blocks are reached by setting `block.forward` for the length of one call.

A share counts every block as one, and so each side module that is of a block's size (families/base.py).
"""
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ...families import Unfamiliar
from ...knob import knob
from ..signal import FIRST_BLOCK, MODULATED_INPUT, signal_of
from .base import Seam

ABSENT = object()


@dataclass(frozen=True)
class BlockRange:
    name = "block range"
    seam = Seam.NETWORK
    gates = True
    serves = "transformer"
    first_blocks: int = knob(
        1, "So many first blocks run on every step, at most all but one. More follow the model more closely and save less; 0 decides before any block.",
        0, 64, 1)
    last_blocks: int = knob(0, "So many last blocks run on every step, after what is predicted. With 1 or more the text tokens are kept too.", 0, 64, 1)

    def resolve(self, policy):
        if signal_of(policy) == FIRST_BLOCK and not self.first_blocks:
            raise ValueError(f"policy '{policy.name}' must see the first blocks run, and first_blocks is 0; set it to 1 or more")
        return self

    def evaluate(self, cache, call, compute):
        if cache.broken:
            cache.ran(len(call.rows), 1.0)
            return compute()
        passage = Passage(cache, call, *self.bounds(cache, call.blocks))
        with passage.installed():
            result = compute()
        main = call.rows[0].ordinal == 0
        if not passage.finished and main and call.rows[0].patches:
            cache.give_up("a patch goes around the first or the last block, so block range cannot skip; choose guided output")
        elif not passage.finished and main and not cache.broken:
            raise Unfamiliar("the first or the last block was never called")
        share = 1.0
        if passage.skipped and passage.finished:
            share = passage.share
        elif passage.skipped:       # nothing put the prediction in
            result = passage.begun = passage.anchor = None      # memory may be what was lacking
            result = compute()
        cache.ran(len(call.rows), share)
        return result

    def bounds(self, cache, blocks) -> tuple[int, int]:
        """Where the range begins and where it ends; at least one block lies in it."""
        total = len(blocks.every)
        first = min(self.first_blocks, total - 1)
        last = min(self.last_blocks, total - 1 - first)
        if last and (any(side.chained for side, _ in blocks.sides) or not all(stack.joined for stack, _ in blocks.every)):
            cache.report.add_reason(f"{blocks.family.name} cannot run blocks after a skipped range, so last_blocks is 0")
            last = 0
        return first, total - last


class Passage:
    """One call of the diffusion model. Nothing of it survives the call but what the cache has learnt.

    Its streams are the tensors that the range is about, by name: "" is the main one, the image tokens, or all tokens
    when blocks after the range read them.
    """

    def __init__(self, cache, call, first: int, end: int):
        self.cache, self.rows, self.blocks, self.first, self.end = cache, call.rows, call.blocks, first, end
        self.whole = end < len(call.blocks.every)
        self.signal = signal_of(cache.policy)
        self.skipped = self.finished = False
        self.begun = self.anchor = None     # streams before the first block, and before the range
        self.tokens: int | None = None      # of the image
        self.place = -1                     # of the block that was reached last
        self.count, self.sides = 0, set()   # blocks and side modules that ran

    @property
    def share(self) -> float:
        counted = {id(module) for side, module in self.blocks.sides if side.blocks}
        ran = self.count + self.blocks.always + len(counted & self.sides)
        return ran / (len(self.blocks.every) + self.blocks.always + len(counted))

    @contextmanager
    def installed(self):
        """Put a proxy before every block; take away exactly what was put there."""
        before = []
        proxies = [(block, self.proxy(place, stack, block)) for place, (stack, block) in enumerate(self.blocks.every)]
        proxies += [(module, self.side_proxy(side, module)) for side, module in self.blocks.sides]
        try:
            for module, proxy in proxies:
                before.append((module, vars(module).get("forward", ABSENT)))
                module.forward = proxy
            yield
        finally:
            for module, forward in before:
                if forward is ABSENT:
                    del module.forward
                else:
                    module.forward = forward    # a compiled block owns its forward

    def proxy(self, place: int, stack, block):
        original = block.forward

        def forward(*args, **kwargs):
            self.place = place
            if place == 0:
                self.attempt(lambda: self.begin(stack, block, args, kwargs))
            if self.anchor is None and self.first <= place < self.end:
                self.attempt(lambda: self.enter(stack.taken(args, kwargs), stack))
            if not self.skipped or place >= self.end:
                result = original(*args, **kwargs)
                self.count += 1
                if place == self.end - 1 and self.anchor is not None:
                    self.finished = True
                    self.attempt(lambda: self.learn(stack.given(result), stack))
                return result
            values = stack.taken(args, kwargs)
            if place == 0:      # the host may hold on to the first block's input, and adds to what blocks return
                values = {name: None if value is None else value.clone() for name, value in values.items()}
            if place == self.end - 1:
                values = self.attempt(lambda: self.predicted(values, stack)) or values
            return stack.passed(values)
        return forward

    def attempt(self, work):
        """What `work` gives; None when the cache is out of memory or has given up, and then the call is computed in full."""
        return None if self.cache.broken else self.cache.attempt(work, self.rows[0].device)

    def side_proxy(self, side, module):
        original = module.forward

        def forward(*args, **kwargs):
            if self.skipped and self.place < self.end - 1:
                return side.passed(args, kwargs)
            if self.skipped and side.chained:
                raise Unfamiliar(f"{side.path} is called after the last block")
            self.sides.add(id(module))
            return original(*args, **kwargs)
        return forward

    def begin(self, stack, block, args: tuple, kwargs: dict) -> None:
        """The first block is about to run."""
        values, family = stack.taken(args, kwargs), self.blocks.family
        self.count_tokens(values, stack)
        if self.signal == FIRST_BLOCK:
            self.begun = {name: value.clone() for name, value in self.images(values, stack).items()}    # blocks write into their input
        elif self.signal == MODULATED_INPUT and family.modulated is None:
            self.cache.give_up(f"what modulates the first block of {family.name} is not known, and policy '{self.cache.policy.name}' needs it, "
                               "so everything is computed; choose error control")
        elif self.signal == MODULATED_INPUT:
            self.cache.skips(self.own(family.modulated_input(stack, block, args, kwargs)), self.rows[0])

    def enter(self, values: dict, stack) -> None:
        """The range begins: keep what it starts from, and decide."""
        self.count_tokens(values, stack)    # a patch may go around the first block
        self.anchor = {name: value.clone() for name, value in self.streams(values, stack).items()}      # blocks and ControlNet write into it
        signal = None
        if self.begun is not None:
            images = self.images(values, stack)
            signal = alike([self.own(images[name] - begun) for name, begun in self.begun.items()])
        self.skipped = self.cache.skips(signal, self.rows[0]) and all(self.cache.ready(row, part.shape) for row, part in self.parts(self.anchor))

    def predicted(self, values: dict, stack) -> dict:
        """What comes out of the range: its tensors with what is predicted in their place; text that nobody reads stays as it is."""
        said: dict[str, list] = {name: [] for name in self.anchor}
        for row, part in self.parts(self.anchor):
            said[row.stream].append(self.cache.predict(row, part).to(part.dtype))
        streams = {name: torch.cat(parts) for name, parts in said.items()}
        main = streams.pop("")
        self.finished = True
        if self.whole:
            return values | stack.parted(main, values) | streams
        return values | {stack.stream: stack.with_image(values[stack.stream], main)} | streams

    def learn(self, values: dict, stack) -> None:
        after = self.streams(values, stack)
        for row, part in self.parts({name: after[name] - anchor for name, anchor in self.anchor.items()}):
            self.cache.learn(row, part if len(self.rows) == 1 else part.clone())

    def count_tokens(self, values: dict, stack) -> None:
        """The first stack tells how many tokens of the stream are the image's. Where all of it is passed by, the whole stream is taken."""
        if self.tokens is None and stack is self.blocks.every[0][0]:
            self.tokens = values[stack.stream].shape[1]

    # which tensors ---------------------------------------------------------------------------------------------------
    def images(self, values: dict, stack) -> dict:
        """The streams that reach the output, image tokens alone."""
        stream = values[stack.stream]
        main = stack.image(stream, stream.shape[1] if self.tokens is None else self.tokens)
        return {"": main, **{name: values[name] for name in stack.also if values[name].numel()}}

    def streams(self, values: dict, stack) -> dict:
        images = self.images(values, stack)
        return images | {"": stack.whole(values)} if self.whole else images

    def parts(self, streams: dict):
        """The streams cut up: each row of each stream, and what belongs to it."""
        for name, stream in streams.items():
            if stream.shape[0] % len(self.rows):
                raise Unfamiliar(f"a block has {stream.shape[0]} rows for {len(self.rows)} conditions")
            for row, part in zip(self.rows, stream.chunk(len(self.rows)), strict=True):
                yield row._replace(stream=name), part

    def own(self, tensor):
        """The share of the first condition, which is the one that a policy looks at."""
        return tensor.chunk(len(self.rows))[0]


def alike(signals: list):
    """Several streams as one signal, of each as many elements, so that the longest does not drown the others."""
    if len(signals) == 1:
        return signals[0]
    count = min(signal.numel() for signal in signals)
    return torch.cat([signal.reshape(-1)[:: signal.numel() // count][:count].float() for signal in signals])
