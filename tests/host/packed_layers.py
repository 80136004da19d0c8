"""Small networks whose layers are packed, for the tests of what they compute and of the LoRAs on them."""
import comfy.model_patcher
import comfy.weight_adapter
import numpy as np
import torch

from pack.core.quant import blocks
from pack.core.quant.files import Blocks
from pack.core.quant.packed import pack
from pack.core.quant.packed_ops import packed_ops
from testbed.gguf_files import encoded

N, K = 48, 512
COMPUTE = ("int8", "decode")


def found(type="Q4_K", rows=N, columns=K, seed=0, tails=True):
    """A layer with a few weights far from the rest, as trained ones have."""
    x = np.random.default_rng(seed).standard_normal((rows, columns), np.float32) * 0.05
    if tails:
        x[:, ::61] *= 6
    return Blocks(type, (rows, columns), torch.from_numpy(encoded(x, type)))


def values(blocks_):
    return blocks.values(blocks_.bytes, blocks_.type)


def off(got, wanted) -> float:
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm() / wanted.norm())


def inputs(*shape, seed=5, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Net(torch.nn.Module):
    def __init__(self, ops, names=("a", "b"), columns=K):
        super().__init__()
        self.diffusion_model = torch.nn.ModuleDict({name: ops.Linear(columns, N, bias=name == "a", dtype=torch.float32, device="cpu") for name in names})

    def forward(self, x):
        return sum(layer(x) for layer in self.diffusion_model.values())


def net(compute, type="Q4_K", dtype=torch.float32):
    ops = packed_ops(dtype)
    model = Net(ops)
    weights = {f"diffusion_model.{name}.weight": pack(found(type, seed=seed), dtype, compute) for seed, name in enumerate("ab")}
    missing, unexpected = model.load_state_dict(weights | {"diffusion_model.a.bias": inputs(N)}, strict=False)
    assert not missing and not unexpected
    return model.requires_grad_(False).eval()


def patcher(model):
    return comfy.model_patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def lora(rows=N, columns=K, rank=4, seed=9, alpha=2.0, strength=0.05, dora=None):
    up, down = inputs(rows, rank, seed=seed) * strength, inputs(rank, columns, seed=seed + 1) * strength
    return comfy.weight_adapter.LoRAAdapter(set(), (up, down, alpha, None, dora, None))


def change(adapter, strength=1.0):
    up, down, alpha, *_ = adapter.weights
    return up @ down * (alpha / down.shape[0]) * strength
