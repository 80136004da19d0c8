"""What the engine itself costs: its time in a computed evaluation, and what a skip takes at each level.

The engine's time is told by a profiler (_meter.py) while error control computes every step and scores its predictors; a
skip is timed whole, without the profiler, beside a full evaluation of the host alone. Medians. On a CPU evaluations are timed
by the clock of the one thread, which stands still while other programs have the core.
"""
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.model_patcher
import comfy.supported_models
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ._meter import ENGINE, Meter
from ._methods import Mask
from ._pictures import conditions, sample_under
from pack.core.attach import attach_step_cache
from pack.core.run import Settings
from pack.core.stepcache.levels import LEVELS
from pack.core.stepcache.policies import POLICIES
from pack.core.stepcache.predictors import PREDICTORS
from testbed import tiny

FLUX_DEV = {"hidden_size": 3072, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "context_in_dim": 4096, "vec_in_dim": 768}
UNET = "sdxl_like"


@dataclass(frozen=True)
class Scene:
    """What is sampled, and where."""

    name: str
    patcher: object
    conds: tuple[list, list]
    noise: Tensor
    steps: int
    evaluations: int        # of each kind, for the medians
    clock: Callable[[], float]
    wait: Callable[[], None] = lambda: None
    serves: tuple[str | None, ...] = (None, "transformer")     # the kinds of levels that are measured on it

    @property
    def px(self) -> int:
        return 8 * self.noise.shape[-1]

    def sample(self, patcher) -> None:
        sample_under(patcher, self.conds, self.noise, self.steps, 1.0, "euler")

    def timed(self, attach: Callable, read: Callable[[], float]) -> tuple[list[float], list]:
        """What `read` grew by in every evaluation, over as many runs as it takes, and the reports. The first run warms up."""
        grown, reports = [], []

        def spy(executor, *args, **kwargs):
            self.wait()
            before = read()
            result = executor(*args, **kwargs)
            self.wait()
            grown.append(read() - before)
            return result

        watched = self.patcher.clone()
        watched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "reprise.benchmark", spy)    # before ours, so around it
        patcher = attach(watched, reports.append)
        for _ in range(1 + math.ceil(self.evaluations / self.steps)):
            self.sample(patcher)
        return grown[self.steps:], reports[1:]


def rows(scene: Scene) -> list[dict]:
    """One per level that skips on this model."""
    found = []
    for name, level in LEVELS.items():
        if not hasattr(level, "seam") or level.serves not in scene.serves:
            continue
        row = measure(scene, level())
        if row is None:
            print(f"level '{name}' skips nothing on {scene.name}")
            continue
        print(f"{name}: an evaluation {row['evaluation_ms']:.2f} ms, engine {row['engine_ms']:.3f} ms ({row['engine_share']:.2%}); "
              f"a skip {row['skip_ms']:.2f} ms ({row['skip_time_share']:.2%}) with {row['skip_block_share']:.2%} of the blocks", flush=True)
        found.append(row)
    return found


def measure(scene: Scene, level) -> dict | None:
    every_second = Mask((*range(0, scene.steps, 2), scene.steps - 1))
    skipping = Settings(every_second, PREDICTORS["automatic"](), level)
    computing = Settings(POLICIES["error control"](tolerance=0.0), PREDICTORS["automatic"](), level)
    full, _ = scene.timed(lambda patcher, notify: patcher, scene.clock)
    times, reports = scene.timed(lambda patcher, notify: attach_step_cache(patcher, skipping, notify), scene.clock)
    each = [evaluation for report in reports for evaluation in report.each]
    skips = [(seconds, evaluation.share) for seconds, evaluation in zip(times, each, strict=True) if not evaluation.computed]
    if not skips:
        return None
    if others := {report.level for report in reports} - {level.name}:
        raise ValueError(f"level '{level.name}' fell back to '{others.pop()}' on {scene.name}; measure it on a model that it serves ({reports[0].reason})")
    with Meter(Path(os.environ["COMFYUI_DIR"]), scene.wait) as meter:
        engine, _ = scene.timed(lambda patcher, notify: attach_step_cache(patcher, computing, notify), lambda: meter.spent[ENGINE])
        of_skips, _ = scene.timed(lambda patcher, notify: attach_step_cache(patcher, skipping, notify), lambda: meter.spent[ENGINE])
    evaluation, skip = statistics.median(full), statistics.median(seconds for seconds, _ in skips)
    engine_skip = statistics.median(seconds for seconds, told in zip(of_skips, each, strict=True) if not told.computed)
    return {
        "model": scene.name, "parameters": sum(p.numel() for p in scene.patcher.model.diffusion_model.parameters()), "px": scene.px,
        "level": reports[0].level, "evaluation_ms": ms(evaluation), "engine_ms": ms(statistics.median(engine)),
        "engine_share": round(statistics.median(engine) / evaluation, 5), "skip_ms": ms(skip), "skip_engine_ms": ms(engine_skip),
        "skip_time_share": round(skip / evaluation, 5), "skip_block_share": round(statistics.median(share for _, share in skips), 5),
        "cache_mib": round(max(report.cache_bytes for report in reports) / 2 ** 20, 3), "computed_evaluations": len(engine),
        "skipped_evaluations": len(skips), "device": where(), "threads": torch.get_num_threads(),
    }


def ms(seconds: float) -> float:
    return round(1000 * seconds, 4)


def where() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def on_cpu(evaluations: int = 200) -> list[dict]:
    """A FLUX of 13 M parameters, and for the levels of UNets a small SDXL, both at 256 px."""
    torch.set_num_threads(1)
    noise = torch.randn((1, 16, 32, 32), generator=torch.Generator().manual_seed(0))
    flux = Scene("seeded FLUX", tiny.patcher("flux_13m"), conditions(["red heart"]), noise, 50, evaluations, time.thread_time)
    return rows(flux) + rows(unet_scene(evaluations))


def unet_scene(evaluations: int, steps: int = 50, size: int = 32) -> Scene:
    conds = tiny.conditioning(UNET, 11), tiny.conditioning(UNET, 12)
    return Scene("seeded SDXL", tiny.patcher(UNET), conds, tiny.noise(UNET, size=size), steps, evaluations, time.thread_time, serves=("unet",))


def on_gpu(evaluations: int = 60) -> list[dict]:
    """FLUX.1-dev's size in bf16 at 1024 px, with random weights."""
    if not torch.cuda.is_available():
        raise SystemExit("--gpu measures a 12 B model and finds no CUDA device; run it on a machine with an NVIDIA GPU of 32 GB or more")
    device = torch.device("cuda")
    patcher = flux_of(FLUX_DEV, device, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1, 16, 128, 128), generator=generator)
    text, pooled = torch.randn((1, 512, 4096), generator=generator), torch.randn((1, 768), generator=generator)
    entry = [[text, {"pooled_output": pooled, "guidance": 3.5}]]
    found = rows(Scene("FLUX.1-dev's size, random", patcher, (entry, entry), noise, 20, evaluations, time.perf_counter, torch.cuda.synchronize))
    return [row | {"peak_gib": round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)} for row in found]


def flux_of(sizes: dict, device: torch.device, dtype: torch.dtype):
    """A FLUX of any size with random weights, made where it will run."""
    config = comfy.supported_models.Flux({
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "mlp_ratio": 4.0, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
        "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [], **sizes,
    })
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device=device)
    tiny.fill_(model.diffusion_model)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))
