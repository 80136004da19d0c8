"""A file of 2 GB at the width of FLUX.1, turned into int8: the memory that takes beyond the result, and the time beyond the work.

Its largest layer has 66 million weights. Memory is measured up to the hand-over to the host, which on a CPU then makes single
precision of the layers that stay; in a process that has done nothing else, as what others left in the heap would be used again unseen.
The work alone is reading each tensor, and the quantization op on those that are turned.
"""
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    from testbed import inprocess

    inprocess.start(cpu=True, threads=1)

import comfy.ops
import torch
from comfy.ldm.flux.model import Flux
from comfy.quant_ops import get_layout_class
from safetensors import safe_open
from safetensors.torch import save_file

from ._peak import Peak
from pack.core.quant.blocks import rotation_group
from pack.core.quant.files import open_file
from pack.core.quant.formats import layers_of
from pack.core.quant.loader import load, state_dict
from pack.core.quant.plan import Settings
from pack.core.quant.sensitive import is_sensitive

MOST_EXTRA, MOST_TIME = 300, 1.25   # MiB; of the work alone
MIB = 2 ** 20


def write(path: Path, singles: int = 4) -> None:
    network = Flux(
        image_model="flux", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0, num_heads=24, depth=1,
        depth_single_blocks=singles, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[],
        dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init)
    save_file({key: torch.randn(tensor.shape, dtype=torch.bfloat16) * 0.02 for key, tensor in network.state_dict().items()}, path)


def alone(path: Path) -> float:
    """Seconds of reading the file and of the op on whole layers."""
    layout, began = get_layout_class("TensorWiseINT8Layout"), time.perf_counter()
    with safe_open(path, framework="pt") as file:
        for key in file.keys():     # noqa: SIM118 - it is no dict
            tensor = file.get_tensor(key)
            if tensor.ndim == 2 and key.endswith(".weight") and not is_sensitive(key.removesuffix(".weight"), "flux"):
                layout.quantize(tensor.float(), is_weight=True, per_channel=True, convrot=True, convrot_groupsize=rotation_group(tensor.shape[1]))
            else:
                tensor.clone()
    return time.perf_counter() - began


def converted(path: Path) -> float:
    """MiB of anonymous memory above the result, at most, while the file becomes the host's state dict."""
    layers, rest = layers_of(open_file(path))
    targets = {name: "stored" if is_sensitive(name, "flux") else "int8" for name in layers}
    with Peak() as peak:
        made = state_dict(layers, rest, targets, torch.bfloat16, torch.device("cpu"))
    result = sum(made[name + end].nbytes for name, target in targets.items() if target == "int8" for end in (".weight", ".weight_scale"))
    return peak.most - peak.before - result / MIB


def extra_of(path: Path) -> float:
    """`converted`, in a new process."""
    told = subprocess.run([sys.executable, "-m", __name__, str(path)], stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(told.split()[-1])


def main(folder: Path) -> int:
    path = folder / "large.safetensors"
    write(path)
    times, extra = [], max(extra_of(path) for _ in range(3))
    for _ in range(3):      # in turn, as a busy machine's clock goes up and down
        began = time.perf_counter()
        model = load(path, Settings(compute="int8"))
        loading = time.perf_counter() - began
        del model
        times.append((loading, alone(path)))
    loading, work = min(one for one, _ in times), min(one for _, one in times)
    print(f"file {path.stat().st_size / MIB:.0f} MiB; extra memory {extra:.0f} MiB (allowed {MOST_EXTRA}); {loading:.1f} s, "
          f"the work alone {work:.1f} s, {loading / work:.2f} of it (allowed {MOST_TIME})")
    return 0 if extra <= MOST_EXTRA and loading / work <= MOST_TIME else 1


if __name__ == "__main__":
    with torch.inference_mode():
        print(converted(Path(sys.argv[1])))
