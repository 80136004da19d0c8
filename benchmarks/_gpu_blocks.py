"""A section of `bench gpu`: milliseconds of one block of FLUX.1 and of Z-Image, in every format.

    ms of a block = (an evaluation with many blocks - one with few) / how many more

So the embedders, the last layer and the sampler fall out, and the host's own code runs the blocks, from one to the next.
"""
from contextlib import contextmanager
from statistics import median

from torch import nn

from benchmarks import _gpu_nodes as nodes
from benchmarks._gpu_record import reason
from benchmarks._gpu_sampling import sampled
from benchmarks._gpu_subjects import FORMATS, load

LOADING = 6.0       # seconds that loading a few blocks takes, until one was loaded


def run(bench) -> None:
    few, many = bench.sizes.blocks
    for subject in bench.sizes.subjects:
        small = subject.with_blocks(many)
        for form in FORMATS:
            heading = {"model": subject.name, "format": form}
            patcher = bench.tried(heading, lambda small=small, form=form: load(small, form, bench.meter.device), LOADING)
            if patcher is not None:
                of_model(bench, heading, patcher, small, few)
            del patcher
            bench.release()


def of_model(bench, heading: dict, patcher, subject, few: int) -> None:
    for tokens in bench.sizes.text_tokens:
        for names in ((), (nodes.FUSED,)):
            for stack, spoken in subject.spoken.items():
                row = {**heading, "block": spoken, "nodes": nodes.spoken(names), "text_tokens": tokens}
                bench.row(row, lambda names=names, stack=stack, tokens=tokens: of_block(bench, patcher, subject, names, stack, few, tokens), line)


def of_block(bench, patcher, subject, names: tuple[str, ...], stack: str, few: int, tokens: int) -> dict:
    told: list[str] = []
    model, network = nodes.put_on(patcher, names, told), patcher.model.diffusion_model
    more = len(getattr(network, stack)) - few
    steps = bench.sizes.block_steps
    sampled(bench, model, subject, tokens, 2)      # loads, compiles, warms up
    told.clear()
    whole = sampled(bench, model, subject, tokens, steps)
    with shortened(network, stack, few):
        rest = sampled(bench, model, subject, tokens, steps)
    row = {"ms": round((median(whole.steps[1:]) - median(rest.steps[1:])) / more, 4), "finite": whole.finite, "told": told[:1]}
    if tokens == bench.sizes.text_tokens[0]:
        try:
            row["share"] = shares(bench, model, subject, network, stack, few, tokens)
        except RuntimeError as error:       # times are there, whatever hinders the profiler
            row |= {"share": None, "no_share": reason(error)}
    if not row["ms"] > 0:
        row["doubt"] = "more blocks took no longer; something else held the GPU"
    return row


def shares(bench, model, subject, network, stack: str, few: int, tokens: int) -> dict[str, float] | None:
    """Of the GPU's time in the blocks, by what it is spent on."""
    call = lambda: sampled(bench, model, subject, tokens, 2)
    whole = bench.meter.shares(call)
    with shortened(network, stack, few):
        rest = bench.meter.shares(call)
    parts = {kind: max(0.0, whole[kind] - rest[kind]) for kind in whole}
    total = sum(parts.values())
    return {kind: round(part / total, 4) for kind, part in parts.items()} if total else None


@contextmanager
def shortened(network: nn.Module, stack: str, count: int):
    """The network with the first blocks of a stack alone."""
    blocks = getattr(network, stack)
    setattr(network, stack, nn.ModuleList(list(blocks)[:count]))
    try:
        yield
    finally:
        setattr(network, stack, blocks)


def line(row: dict) -> str:
    share = row.get("share")
    return f"{row['ms']:.3f} ms" + (f", {100 * share['elementwise']:.0f} % of it neither products nor attention" if share else "")
