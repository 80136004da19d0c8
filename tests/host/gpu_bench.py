"""What the tests of `bench gpu` share: tiny models, and a GPU, its clock and its memory that are made up."""
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import _gpu_kernels, _gpu_machine, gpu
from benchmarks._gpu_record import Bench, Record
from benchmarks._gpu_subjects import flux, z_image
from benchmarks._gpu_verdict import verdicts
from pack.kernels import KERNELS

CPU = torch.device("cpu")
FLUX, Z_IMAGE = flux(hidden=256, text=16, pooled=16, double=2, single=2), z_image(dim=256, text=16, layers=2, refiners=1)
TINY = gpu.Sizes(
    small_kernels=True, products=((48, 64, 256),), subjects=(FLUX, Z_IMAGE), whole=FLUX, blocks=(1, 2), block_steps=2, steps=3, latent=8,
    text_tokens=(7,), memory_share=1e-6)
GIB = 1 << 30


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


COSTS = {"DoubleStreamBlock": 2.0, "SingleStreamBlock": 1.0, "JointTransformerBlock": 4.0, "Flux": 7.0, "NextDiT": 9.0}     # ms on the made-up GPU


class FakeMeter:
    """Runs what it is given, on a GPU whose clock goes on by COSTS whenever such a module was called, and half a second of ours with each stamp."""

    device = CPU

    def __init__(self, clock: Clock):
        self.clock, self.calls, self.released, self.gpu, self.free = clock, 0, 0, 0.0, 40 * GIB

    def called(self, module, inputs, output):
        self.gpu += COSTS.get(type(module).__name__, 0.0)

    def microseconds(self, call):
        call()
        self.calls += 1
        return 10.0

    def copy_speed(self):
        return 2e6

    def stamp(self):
        self.clock.seconds += 0.5
        return self.gpu

    def milliseconds(self, stamps):
        return [after - before for before, after in zip(stamps, stamps[1:], strict=False)]

    def shares(self, call):
        call()
        return {"products": 6.0, "attention": 3.0, "elementwise": 1.0}

    def restart_peak(self):
        self.peaked = 0

    def peak(self):
        return 3 * GIB

    def room(self):
        return self.free

    host_room = room

    def release(self):
        self.released += 1


@contextmanager
def tiny_bench(folder: Path) -> Iterator[Bench]:
    """All that the sections need, at TINY sizes; its file is in `folder`."""
    clock = Clock()
    made = Bench(Record(folder / "gpu.json", _gpu_machine.program(), verdicts), FakeMeter(clock), TINY, clock, lambda text: None)
    hook = torch.nn.modules.module.register_module_forward_hook(made.meter.called)
    try:
        yield made
    finally:
        hook.remove()


def written(bench) -> dict:
    return json.loads(bench.record.file.read_text(encoding="utf-8"))


def begun(bench, section: str, until: float = math.inf):
    bench.begin(section, until)
    return bench


def quick_kernels(monkeypatch, *more):
    """Two kernels of few cases, and `more`."""
    few = tuple(replace(kernel, cases=kernel.cases[:2]) for kernel in KERNELS if kernel.name in ("quantize rows", "combine"))
    monkeypatch.setattr(_gpu_kernels, "KERNELS", (*few, *more))
    return few
