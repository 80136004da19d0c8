"""Z-Image at its real width, with one layer: the stock detection, real sizes of layers and groups of 256. 900 M weights; opt in."""
import os

import comfy.ops
import comfy.sd
import pytest
import torch
from comfy.ldm.lumina.model import NextDiT
from comfy.quant_ops import QuantizedTensor
from safetensors.torch import save_file

from pack.core.quant.loader import load
from pack.core.quant.plan import Settings

pytestmark = pytest.mark.skipif(not os.environ.get("REPRISE_SLOW_TESTS"), reason="needs 12 GB of memory and some minutes; set REPRISE_SLOW_TESTS=1")
SIZES = {"patch_size": 2, "in_channels": 16, "dim": 3840, "n_layers": 1, "n_refiner_layers": 2, "cap_feat_dim": 2560, "n_heads": 30, "n_kv_heads": 30,
         "qk_norm": True, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "ffn_dim_multiplier": 8.0 / 3.0, "z_image_modulation": True,
         "time_scale": 1000.0, "rope_theta": 256.0, "pad_tokens_multiple": 32}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    generator = torch.Generator().manual_seed(1)
    network = NextDiT(**SIZES, device="meta", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)
    tensors = {key: torch.ones(tensor.shape, dtype=torch.bfloat16) if "norm" in key and tensor.ndim == 1 else (
        torch.randn(tensor.shape, generator=generator) / max(1, tensor.shape[-1]) ** 0.5).bfloat16() for key, tensor in network.state_dict().items()}
    save_file(tensors, file := tmp_path_factory.mktemp("wide") / "z_image.safetensors")
    return file


def evaluated(patcher):
    generator = torch.Generator().manual_seed(2)
    x, context = torch.randn(1, 16, 16, 16, generator=generator), torch.randn(1, 32, 2560, generator=generator)
    network = patcher.model.diffusion_model
    return network(x, torch.tensor([0.6]), context=context, num_tokens=32, attention_mask=torch.ones(1, 32, dtype=torch.long), transformer_options={}).float()


@pytest.mark.parametrize(("compute", "most"), [("int8", 0.03), ("fp8", 0.06)])
def test_one_layer_of_real_width_is_as_near_as_narrow_ones(path, compute, most):
    with torch.inference_mode():
        full = evaluated(comfy.sd.load_diffusion_model(str(path)))
        told = []
        model = load(path, Settings(compute=compute), report=told.append)
        turned = [name for name, target in told[0].layers.items() if target == compute]
        assert told[0].family == "lumina2" and "layers.0.feed_forward.w1" in turned
        weight = model.model.diffusion_model.layers[0].feed_forward.w1.weight
        assert isinstance(weight, QuantizedTensor) and weight.shape == (10240, 3840)
        near = evaluated(model)
    assert ((near - full).norm() / full.norm()).item() < most
