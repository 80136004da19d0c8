"""What the tests of Fused Kernels share: tiny int8 models, and runs with the kernels' torch references."""
from functools import cache

import comfy.model_management
import comfy.ops
import comfy.sd
import pytest
import torch
from harness import network, sample
from quantized import linear

from pack.core.quant.fusion.attach import Settings, attach_fused_kernels
from testbed import tiny
from testbed.quantized import int8

NAMES = ["flux_13m", "flux2", "z_image"]
FEW = 4


def turned(name: str, group: int | None = 256, dtype: torch.dtype = torch.float32):
    """The tiny seeded model in the host's int8, rotated where a layer is as wide as a group, to compute in `dtype`, as on a GPU that has it."""
    kind = tiny.KINDS[name]
    tensors, metadata = tiny.weights(name) if kind.stock else (network(tiny.patcher(name)).state_dict(), None)
    made = {key: tensor for key, tensor in tensors.items() if not linear(key, tensor)}
    for key in tensors.keys() - made.keys():
        made |= {key.removesuffix(".weight") + end: part for end, part in int8(tensors[key], group).items()}
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_management, "unet_manual_cast", lambda *args: dtype)
        if kind.stock:
            return comfy.sd.load_diffusion_model_state_dict(made, metadata=metadata)
        patch.setattr(comfy.ops, "pick_operations", lambda *args, **options: comfy.ops.mixed_precision_ops({}, dtype))     # the loader's, for quantized files
        patcher = tiny.patcher(name, dtype=dtype)
        network(patcher).load_state_dict(made)
        return patcher


@cache
def made(name: str, dtype: torch.dtype = torch.float32):
    """One model for all tests, which must leave it as it was; rotated where layers are as wide as a group."""
    return turned(name, None if name == "flux2" else 256, dtype)


def fused(patcher, records: list | None = None, **more):
    return attach_fused_kernels(patcher, Settings(**{"forced": True, "kitchen": False, **more}), (records if records is not None else []).append)


def ran(patcher, name, sampling=None, **more):
    """The latent with the kernels, and what the record says."""
    records: list = []
    latent = sample(fused(patcher, records, **more), name, **{"steps": FEW, **(sampling or {})})
    (record,) = records
    return latent, record


def counts(record) -> dict[str, int]:
    """In each evaluation."""
    assert all(count % record.evaluations == 0 for count in record.fused.values())
    return {what: count // record.evaluations for what, count in record.fused.items()}
