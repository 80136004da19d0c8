"""Block range: the first F blocks always run; what the others would have added is predicted.

    computed step:   h_F = blocks 1..F (x)      H = blocks F+1..L (h_F) - h_F     kept, per condition
    skipped step:    h_F = blocks 1..F (x)      out = h_F + H'

Embeddings, the first blocks and the output layer see the present step, ControlNet's residuals included, so this
injects new information where the other levels only extrapolate; it costs F blocks per skip and a snapshot of every
image token. Blocks are reached by setting `block.forward` for the length of one call.
"""
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ...knob import knob
from .base import Seam

ABSENT = object()


@dataclass(frozen=True)
class BlockRange:
    name = "block range"
    seam = Seam.NETWORK
    gates = True
    first_blocks: int = knob(1, "So many first blocks run on every step, at most all but one. More follow the model more closely and save less.", 1, 64, 1)

    def resolve(self, policy):
        return self

    def evaluate(self, cache, call, compute):
        if cache.broken:
            cache.ran(len(call.rows), 1.0)
            return compute()
        passage = Passage(cache, call, min(self.first_blocks, len(call.blocks.every) - 1))
        with passage.installed():
            result = compute()
        if not passage.finished and call.rows[0].ordinal == 0:
            cache.give_up("a patch goes around the first or the last block, so block range cannot skip; choose guided output")
        share = 1.0
        if passage.skipped and passage.finished:
            share = passage.share
        elif passage.skipped:       # nothing put the prediction in
            result = passage.begun = passage.anchor = None      # memory may be what was lacking
            result = compute()
        cache.ran(len(call.rows), share)
        return result


class Passage:
    """One call of the diffusion model. Nothing of it survives the call but what the cache has learnt."""

    def __init__(self, cache, call, first: int):
        self.cache, self.rows, self.blocks, self.first = cache, call.rows, call.blocks, first
        self.last = len(call.blocks.every) - 1
        self.skipped = self.finished = False
        self.begun = self.anchor = None     # the stream before the first block, and after block F
        self.count = 0                      # blocks that ran

    @property
    def share(self) -> float:
        return (self.count + self.blocks.always) / (self.last + 1 + self.blocks.always)

    @contextmanager
    def installed(self):
        """Put a proxy before every block; take away exactly what was put there."""
        before = []
        try:
            for place, (stack, block) in enumerate(self.blocks.every):
                before.append((block, vars(block).get("forward", ABSENT)))
                block.forward = self.proxy(place, stack, block.forward)
            yield
        finally:
            for block, forward in before:
                if forward is ABSENT:
                    del block.forward
                else:
                    block.forward = forward     # a compiled block owns its forward

    def proxy(self, place: int, stack, original):
        def forward(*args, **kwargs):
            if place >= self.first and self.skipped:
                if place < self.last:
                    return stack.passed(args, kwargs)
                return stack.passed(args, kwargs, self.attempt(lambda: self.predicted(stack.taken(args, kwargs))))
            if place == 0 and self.cache.policy.needs_forward:
                self.begun = self.attempt(stack.taken(args, kwargs).clone)      # blocks write into their input
            result = original(*args, **kwargs)
            self.count += 1
            if self.cache.broken:
                return result
            if place == self.first - 1:
                self.anchor = self.attempt(stack.given(result).clone)           # so do ControlNet and the next block
                self.skipped = self.anchor is not None and bool(self.attempt(self.decided))
            elif place == self.last and self.anchor is not None:
                self.finished = True
                self.attempt(lambda: self.learn(stack.given(result)))
            return result
        return forward

    def attempt(self, work):
        return self.cache.attempt(work, self.rows[0].device)

    def decided(self) -> bool:
        signal = None
        if self.begun is not None:      # text may have been joined before the image tokens since
            signal = (self.anchor[:, -self.begun.shape[1]:] - self.begun).chunk(len(self.rows))[0]
        parts = self.anchor.chunk(len(self.rows))
        return self.cache.skips(signal, self.rows[0]) and all(self.cache.ready(row, part.shape) for row, part in zip(self.rows, parts, strict=True))

    def predicted(self, stream):
        """The stream with its last tokens, those of the anchor, replaced; text joined before them is not used any more."""
        parts = self.anchor.chunk(len(self.rows))
        out = torch.cat([self.cache.predict(row, part) for row, part in zip(self.rows, parts, strict=True)]).to(self.anchor.dtype)
        joined = stream.shape[1] - out.shape[1]
        out = torch.cat([stream[:, :joined], out], 1) if joined else out
        self.finished = True
        return out

    def learn(self, stream) -> None:
        added = stream[:, -self.anchor.shape[1]:] - self.anchor
        for row, part in zip(self.rows, added.chunk(len(self.rows)), strict=True):
            self.cache.learn(row, part if len(self.rows) == 1 else part.clone())
