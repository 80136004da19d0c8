"""One call of the diffusion model in which ranges of its blocks may be skipped, each with a residual of its own.

    computed:   H = blocks first..end-1 (h) - h          kept, per condition and range
    skipped:    h + H', the blocks of the range not run

Blocks are reached by setting `block.forward` for the length of the call. What the host adds between two blocks of a
skipped range, a ControlNet's residuals say, was added when H was computed, so it is in H and falls away with the range;
what it adds after the last one is that of the present step.
"""
from collections.abc import Iterable

import torch

from ...families import Unfamiliar
from ..signal import FIRST_BLOCK, MODULATED_INPUT, signal_of

ABSENT = object()


class Span:
    """A range of blocks, in one call.

    whole: blocks after it read all tokens, so text is kept too; after the last block the image tokens alone are.
    """

    def __init__(self, first: int, end: int, whole: bool):
        self.first, self.end, self.whole = first, end, whole
        self.anchor: dict | None = None     # streams before it
        self.skipped = self.finished = False

    @property
    def blocks(self) -> tuple[int, int]:
        return self.first, self.end


class Passage:
    """Nothing of it survives the call but what the cache has learnt.

    Its streams are the tensors that a range is about, by name: "" is the main one, the image tokens, or all tokens
    when blocks after the range read them.
    """

    def __init__(self, cache, call, borders: Iterable[tuple[int, int]], precise: bool = False):
        """`borders` are the first block of each range and the one behind its last, in order and apart from each other.

        precise: residuals are taken and kept in fp32, whatever the blocks work in.
        """
        self.cache, self.each, self.rows, self.blocks = cache, cache.each, call.rows, call.blocks
        self.spans = [Span(first, end, end < len(call.blocks.every)) for first, end in borders]
        self.precise = precise
        self.signal = signal_of(cache.policy)
        self.begun: dict | None = None      # streams before the first block
        self.tokens: int | None = None      # of the image
        self.place = -1                     # of the block that was reached last
        self.count, self.sides = 0, set()   # blocks and side modules that ran
        self.before: list = []              # what modules have of their own, and what they had as `forward` before

    @property
    def skipped(self) -> bool:
        return any(span.skipped for span in self.spans)

    @property
    def finished(self) -> bool:
        return all(span.finished for span in self.spans)

    @property
    def share(self) -> float:
        counted = {id(module) for side, module in self.blocks.sides if side.blocks}
        ran = self.count + self.blocks.always + len(counted & self.sides)
        return ran / (len(self.blocks.every) + self.blocks.always + len(counted))

    def drop(self) -> None:
        """Let go of the tensors."""
        self.begun = None
        for span in self.spans:
            span.anchor = None

    def __enter__(self) -> "Passage":
        """Put a proxy before every block."""
        inside = [None] * len(self.blocks.every)
        for span in self.spans:
            inside[span.first: span.end] = [span] * (span.end - span.first)
        proxies = [(block, self.proxy(place, stack, block, inside[place])) for place, (stack, block) in enumerate(self.blocks.every)]
        proxies += [(module, self.side_proxy(side, module)) for side, module in self.blocks.sides]
        complete = False
        try:
            for module, proxy in proxies:
                own = vars(module)      # and not by way of setattr, in which a module first looks through its parameters
                self.before.append((own, own.get("forward", ABSENT)))
                own["forward"] = proxy
            complete = True
        finally:
            if not complete:    # Ctrl-C
                self.__exit__()
        return self

    def __exit__(self, *exception) -> None:
        """Take away exactly what was put there."""
        for own, forward in reversed(self.before):
            if forward is ABSENT:
                own.pop("forward", None)    # Ctrl-C may have come before it was there
            else:
                own["forward"] = forward    # a compiled block owns its forward
        self.before = []

    def proxy(self, place: int, stack, block, span: Span | None):
        original = block.forward

        def forward(*args, **kwargs):
            self.place = place
            if place == 0:
                self.attempt(lambda: self.begin(stack, block, args, kwargs))
            if span is None:
                self.count += 1
                return original(*args, **kwargs)
            if span.anchor is None:
                self.attempt(lambda: self.enter(span, stack.taken(args, kwargs), stack))
            if not span.skipped:
                result = original(*args, **kwargs)
                self.count += 1
                if place == span.end - 1 and span.anchor is not None:
                    span.finished = True
                    self.attempt(lambda: self.learn(span, stack.given(result), stack))
                return result
            if 0 < place < span.end - 1:
                return stack.untouched(args, kwargs)
            values = stack.taken(args, kwargs)
            if place == 0:      # the host may hold on to the first block's input, and adds to what blocks return
                values = {name: None if value is None else value.clone() for name, value in values.items()}
            if place == span.end - 1:
                values = self.attempt(lambda: self.predicted(span, values, stack)) or values
            return stack.passed(values)
        forward.runs = original     # for whoever asks whose code runs in the block
        return forward

    def attempt(self, work):
        """What `work` gives; None when the cache is out of memory or has given up, and then the call is computed in full."""
        return None if self.cache.broken else self.cache.attempt(work, self.rows[0].device)

    def side_proxy(self, side, module):
        original = module.forward

        def forward(*args, **kwargs):
            if any(span.skipped and span.first <= self.place < span.end - 1 for span in self.spans):
                return side.passed(args, kwargs)
            if side.chained and self.skipped:
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

    def enter(self, span: Span, values: dict, stack) -> None:
        """A range begins: keep what it starts from, and decide. The first one shows the policy what the blocks before it did."""
        self.count_tokens(values, stack)    # a patch may go around the first block
        span.anchor = {name: value.clone() for name, value in self.streams(span, values, stack).items()}    # blocks and ControlNet write into it
        signal = None
        if self.begun is not None and span is self.spans[0]:
            images = self.images(values, stack)
            signal = alike([self.own(images[name] - begun) for name, begun in self.begun.items()])
        decided = self.cache.skips(signal, self.rows[0]) and (self.each is None or self.each.skips(span.blocks))
        span.skipped = decided and all(self.cache.ready(row, part.shape) for row, part in self.parts(span, span.anchor))

    def predicted(self, span: Span, values: dict, stack) -> dict:
        """What comes out of the range: its tensors with what is predicted in their place; text that nobody reads stays as it is."""
        said: dict[str, list] = {name: [] for name in span.anchor}
        for row, part in self.parts(span, span.anchor):
            said[row.stream].append(self.cache.predict(row, part).to(part.dtype))
        streams = {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in said.items()}
        main = streams.pop("")
        span.finished = True
        if span.whole:
            return values | stack.parted(main, values) | streams
        return values | {stack.stream: stack.with_image(values[stack.stream], main)} | streams

    def learn(self, span: Span, values: dict, stack) -> None:
        after = self.streams(span, values, stack)
        for row, part in self.parts(span, {name: self.added(after[name], anchor) for name, anchor in span.anchor.items()}):
            self.cache.learn(row, part if len(self.rows) == 1 else part.clone())

    def added(self, after, before):
        return after.to(torch.float32, copy=True).sub_(before) if self.precise else after - before

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

    def streams(self, span: Span, values: dict, stack) -> dict:
        images = self.images(values, stack)
        return images | {"": stack.whole(values)} if span.whole else images

    def parts(self, span: Span, streams: dict):
        """The streams of a range cut up: each row of each stream, and what belongs to it."""
        conditions = len(self.rows)
        for name, stream in streams.items():
            if stream.shape[0] % conditions:
                raise Unfamiliar(f"a block has {stream.shape[0]} rows for {conditions} conditions")
            for row, part in zip(self.rows, stream.chunk(conditions) if conditions > 1 else (stream,), strict=True):
                yield row._replace(stream=name, blocks=span.blocks), part

    def own(self, tensor):
        """The share of the first condition, which is the one that a policy looks at."""
        return tensor.chunk(len(self.rows))[0]


def alike(signals: list):
    """Several streams as one signal, of each as many elements, so that the longest does not drown the others."""
    if len(signals) == 1:
        return signals[0]
    count = min(signal.numel() for signal in signals)
    return torch.cat([signal.reshape(-1)[:: signal.numel() // count][:count].float() for signal in signals])
