"""A section of `bench gpu`: FLUX.1 dev at its size, random weights, 20 steps at 1024 x 1024 by the host's sampler.

What does not fit on the GPU is left out and told. How many steps Step Cache skips on random weights says nothing about real ones.
"""
from statistics import median

from benchmarks import _gpu_nodes as nodes
from benchmarks._gpu_sampling import sampled
from benchmarks._gpu_subjects import BF16, INT8, Q4_K, load

GIB = 1 << 30
SPARE = 4 * GIB         # for what is computed with beside the weights, and for the desktop
BYTES = {INT8: 14.2, Q4_K: 6.4, BF16: 22.2}     # GiB of the GPU that FLUX.1 dev takes
HELD = {INT8: 1.5, Q4_K: 1.5, BF16: 24.0}       # GiB of the host's memory that loading it takes: the host copies bf16 for itself
LOADING = 25.0          # seconds
WARM = 3                # steps: Attention Backend leaves the first and the last alone
GROUPS = (              # nodes on the model: those of a group follow each other on one loaded model
    ((), (nodes.FUSED,), (nodes.FUSED, nodes.ATTENTION), (nodes.STEP,), (nodes.ATTENTION,)),
    ((nodes.MODULATION,), (nodes.MODULATION, nodes.FUSED, nodes.ATTENTION, nodes.STEP)),     # the host loads anew for these
)


def run(bench) -> None:
    for form in BYTES:
        for group in GROUPS:
            heading = {"model": bench.sizes.whole.name, "format": form}
            if why := lacking(bench, form):
                bench.leave(heading, why)
                break
            patcher = bench.tried({**heading, "nodes": nodes.spoken(group[0])}, lambda form=form: load(bench.sizes.whole, form, bench.meter.device), LOADING)
            if patcher is not None:
                of_group(bench, heading, patcher, group)
            del patcher
            bench.release()


def lacking(bench, form: str) -> str:
    """Why a format is not tried."""
    bench.release()
    share = bench.sizes.memory_share
    needed, room = BYTES[form] * GIB * share + SPARE * share, bench.meter.room()
    if needed > room:
        return f"it needs {needed / GIB:.1f} GiB of the GPU, and {room / GIB:.1f} are free"
    needed, room = HELD[form] * GIB * share, bench.meter.host_room()
    return f"loading it needs {needed / GIB:.1f} GiB of memory, and {room / GIB:.1f} are free" if needed > room else ""


def of_group(bench, heading: dict, patcher, group: tuple[tuple[str, ...], ...]) -> None:
    for names in group:
        row = {**heading, "nodes": nodes.spoken(names), "text_tokens": bench.sizes.text_tokens[0]}
        bench.row(row, lambda names=names: whole_run(bench, patcher, names), line)
        bench.release()


def whole_run(bench, patcher, names: tuple[str, ...]) -> dict:
    told: list[str] = []
    model = nodes.put_on(patcher, names, told)
    once = len(told)        # said when the node was put on
    tokens, subject = bench.sizes.text_tokens[0], bench.sizes.whole
    skips = nodes.STEP in names     # few steps are too few for it, so it warms up with all
    sampled(bench, model, subject, tokens, bench.sizes.steps if skips else WARM)      # loads, compiles, warms up
    del told[once:]
    bench.meter.restart_peak()
    found = sampled(bench, model, subject, tokens, bench.sizes.steps)
    return {
        "steps": len(found.steps), "ms_per_step": round(sum(found.steps) / len(found.steps), 3),
        "median_ms": None if skips else round(median(found.steps[1:]), 3),
        "first_ms": round(found.steps[0], 3), "peak_gib": round(bench.meter.peak() / GIB, 3), "model_gib": round(model.model_size() / GIB, 3),
        "finite": found.finite, "told": told,
    }


def line(row: dict) -> str:
    middle = "" if row["median_ms"] is None else f", median {row['median_ms']:.1f}"
    return f"{row['ms_per_step']:.1f} ms per step{middle}; {row['peak_gib']:.2f} GiB at most, the model {row['model_gib']:.2f}"
