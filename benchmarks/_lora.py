"""What a LoRA costs on each route, on one double and one single block of FLUX.1 at their real width.

Baked: ComfyUI adds it and rounds again, once; a packed layer is int8 while it is on. Beside: Load LoRA (Bypass) computes it
at every call, which takes rank (in + out) / (in out) of the layer's operations. `time` is of the same model without the LoRA,
medians of calls before and after it, on this machine; `once` is what the first call waits for, ComfyUI's loading included.
"""
import json
import time
from pathlib import Path
from statistics import median

import comfy.model_management
import comfy.sd
import torch
from comfy.quant_ops import QuantizedTensor
from safetensors import safe_open
from torch import Tensor

from . import _large_file
from pack.core.quant.loader import load
from pack.core.quant.plan import Settings

RESULTS = Path(__file__).resolve().parent / "results" / "quant-lora.json"
RANK, PIXELS, WORDS, CALLS = 32, 16, 64, 3      # PIXELS of a side, in tokens
KINDS = {"bf16": ("bf16", "bf16"), "fp8 scaled": ("bf16", "fp8"), "int8": ("bf16", "int8"), "Q4_0": ("Q4_0", "host")}
ROUTES = {"baked": comfy.sd.load_lora_for_models, "beside": comfy.sd.load_bypass_lora_for_models}
MIB = 2 ** 20


def written(folder: Path) -> dict[str, Path]:
    from testbed import gguf_files  # of a package that ComfyUI does not bring

    files = {"bf16": folder / "wide.safetensors", "Q4_0": folder / "wide.gguf"}
    _large_file.write(files["bf16"], singles=1)
    with safe_open(files["bf16"], framework="pt") as file:
        tensors = {key: file.get_tensor(key).float() for key in file.keys()}     # noqa: SIM118
    gguf_files.write(files["Q4_0"], {key: (tensor.numpy(), "Q4_0") if wide(key, tensor) else tensor.numpy() for key, tensor in tensors.items()})
    return files


def wide(key: str, tensor: Tensor) -> bool:
    return "blocks." in key and "mod" not in key and tensor.ndim == 2


def lora_of(tensors: dict[str, torch.Size]) -> dict[str, Tensor]:
    """On every product of the blocks, as most FLUX LoRAs have it."""
    chance, made = torch.Generator().manual_seed(3), {}
    for name, (rows, columns) in tensors.items():
        made[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(rows, RANK, generator=chance) * 0.01
        made[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(RANK, columns, generator=chance) / columns ** 0.5
    return made


def evaluated(patcher) -> Tensor:
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    chance = torch.Generator().manual_seed(4)
    x, context, y = (torch.randn(shape, generator=chance) for shape in ((1, 16, 2 * PIXELS, 2 * PIXELS), (1, WORDS, 4096), (1, 768)))
    network, step = patcher.model.diffusion_model, torch.tensor([0.5])
    return network(x, step, context, y, torch.tensor([3.5]), transformer_options={})


def seconds(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def products(patcher) -> dict[str, Tensor]:
    """{layer: its weight} of the products in the blocks."""
    layers = {name: getattr(layer, "weight", None) for name, layer in patcher.model.diffusion_model.named_modules()}
    return {name: weight for name, weight in layers.items() if isinstance(weight, Tensor) and wide(f"{name}.weight", weight)}


def weighing(patcher) -> float:
    """MiB of the products' weights, as they lie in memory."""
    parts = [weight._qdata if isinstance(weight, QuantizedTensor) else weight for weight in products(patcher).values()]
    return sum(part.numel() * part.element_size() for part in parts) / MIB


def timed(patcher) -> list[float]:
    evaluated(patcher)
    return [seconds(lambda: evaluated(patcher)) for _ in range(CALLS)]


def rows(folder: Path):
    files = written(folder)
    for name, (file, compute) in KINDS.items():
        base = load(files[file], Settings(compute=compute))
        plain, without = evaluated(base), weighing(base)
        shapes = {layer: weight.shape for layer, weight in products(base).items()}
        share = sum(RANK * sum(shape) for shape in shapes.values()) / sum(shape.numel() for shape in shapes.values())
        lora = lora_of(shapes)
        for route, put in ROUTES.items():
            before = timed(base)
            patched = put(base, None, dict(lora), 1.0, 0)[0]
            once = seconds(lambda patched=patched: evaluated(patched))
            assert not torch.equal(evaluated(patched), plain), "the LoRA does nothing"
            times, weights = timed(patched), weighing(patched)
            comfy.model_management.unload_all_models()
            after = timed(base)
            yield {"format": name, "route": route, "rank": RANK, "operations": round(share, 4) if route == "beside" else 0.0,
                   "time": round(median(times) / median(before + after), 3), "once_seconds": round(once, 2),
                   "weights_mib": round(weights), "weights_mib_without": round(without)}


def main(folder: Path) -> int:
    found = []
    for row in rows(folder):
        found.append(row)
        print(f"{row['format']:14} {row['route']:6}   {100 * row['operations']:4.1f} % more operations   {row['time']:5.2f} of the time   "
              f"{row['once_seconds']:6.1f} s once   weights {row['weights_mib_without']} -> {row['weights_mib']} MiB", flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written to {RESULTS}")
    return 0
