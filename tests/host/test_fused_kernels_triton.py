"""Fused Kernels with the Triton kernels themselves, interpreted: they take the host's tensors as they come, and give what their references give."""
import inspect

import pytest
import torch
from fusing import NAMES, fused, made
from harness import relative, sample

from pack.kernels import activate, gated_residual, int8_linear, modulate, qkv_rope, sandwich_residual

KERNELS = {     # of every operator: its file, and the names of operator and kernel in it
    "modulate": (modulate, "OP", "fused"), "modulate_int8": (modulate, "OP_INT8", "fused_int8"), "activate_int8": (activate, "OP", "fused"),
    "gated_residual_int8": (gated_residual, "OP", "fused"), "sandwich_residual_int8": (sandwich_residual, "OP", "fused"),
    "qkv_rope": (qkv_rope, "OP", "fused"), "int8_linear": (int8_linear, "OP", "fused"),
}
OF = {"z_image": {"sandwich_residual_int8"}, "flux2": {"gated_residual_int8", "qkv_rope"}, "flux_13m": {"gated_residual_int8", "qkv_rope"}}
EVERYWHERE = {"modulate_int8", "activate_int8", "int8_linear"}


def watched(monkeypatch, what):
    """Every operator calls `what(name, kernel, fits, arguments)` for its result."""
    for name, (file, operator, kernel) in KERNELS.items():
        parameters = inspect.signature(getattr(file, kernel if kernel != "fused" else "reference"))

        def call(*args, name=name, file=file, kernel=kernel, parameters=parameters):
            return what(name, getattr(file, kernel), file.fits, parameters.bind(*args).arguments)
        monkeypatch.setattr(file, operator, call)


def predicted(name: str, dtype: torch.dtype):
    return sample(fused(made(name, dtype)), name, steps=1, cfg=1.0, size=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_take_what_comes_from_the_host_s_blocks(name, dtype, monkeypatch):
    true, seen = predicted(name, dtype), set()

    def interpreted(operator, kernel, fits, given):
        assert fits(**given), f"{operator} would be left to plain torch"
        seen.add(operator)
        return kernel(**given) if name != "flux2" else true_of[operator](*given.values())      # whose blocks take the interpreter minutes
    true_of = {operator: getattr(file, attribute) for operator, (file, attribute, _) in KERNELS.items()}
    watched(monkeypatch, interpreted)
    assert relative(predicted(name, dtype), true) < (0.05 if dtype is torch.bfloat16 else 0.02)
    assert seen == EVERYWHERE | OF[name]
