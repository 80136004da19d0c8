"""What FastFit cannot work with is told in one sentence: what came, what was expected, what to do. And which checkpoints it reads."""
import comfy.ops
import comfy.sample
import comfy.utils
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy_extras.nodes_hypertile import HyperTile
from harness import model
from safetensors.torch import save_file
from tryon import TENSORS, by_pack, drawn, fastfit, garment, handle

from pack.core.reference.fastfit import FastFitReference
from pack.core.reference.fastfit_checkpoint import OWN, WrongFile, load_fastfit, renamed, unet_config
from pack.core.reference.handle import with_references
from pack.core.reference.injector import attach_references
from pack.core.reference.join import Mismatch
from testbed import tiny, tiny_fastfit


@pytest.fixture(scope="module")
def patcher():
    return fastfit()


def test_hypertile_is_refused_with_one_sentence(patcher):
    tiled = HyperTile.execute(patcher, 32, 2, 0, False)[0]
    with pytest.raises(Mismatch, match=r"^block input.1.0 attends in \d+ tiles, as HyperTile makes them, and references are seen as a whole; take HyperTile"):
        by_pack(tiled, handle(garment()), size=(16, 16))


def test_a_wrong_class_is_refused_with_one_sentence():
    with pytest.raises(ValueError, match=r"^the class of a garment is 'hat'; choose one of upper, lower, overall, shoe, bag$"):
        garment(label="hat")
    few = fastfit(**{"class_embedding.weight": TENSORS["class_embedding.weight"][:3]})
    with pytest.raises(ValueError, match=r"^the FastFit checkpoint knows the classes upper, lower, overall and a reference is of class bag; choose one that"):
        by_pack(few, handle(garment(label="bag")))


def test_a_wrong_base_model_is_refused_with_one_sentence():
    for name, kind in (("sd15_like", "UNetModel"), ("flux", "Flux")):
        with pytest.raises(ValueError, match=rf"^a FastFit reference \(upper\) came to a {kind}, which is no FastFit model; load one with the FastFit Loader$"):
            positive = with_references(tiny.conditioning(name, 11), handle(garment()))
            noise = tiny.noise(name)
            comfy.sample.sample(attach_references(model(name)), noise, 2, 1.0, "euler", "simple", positive, positive, noise * 0, seed=1, disable_pbar=True)


def test_a_latent_of_another_vae_is_refused_with_one_sentence(patcher):
    with pytest.raises(ValueError, match=r"^the FastFit model takes latents of 4 channels and a reference has 16; encode it with the VAE of SD 1.5$"):
        by_pack(patcher, handle(FastFitReference(drawn(1, 1, 16, 8, 6), "upper")))
    with pytest.raises(ValueError, match=r"^a FastFit reference has one latent of 4 channels and a tensor of shape \[2, 4, 8, 6\] came; give one image"):
        FastFitReference(drawn(1, 2, 4, 8, 6), "upper")


def without(*keys):
    return {key: tensor for key, tensor in TENSORS.items() if key not in keys}


SD15 = {**TENSORS, "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.zeros(32, 768)}
LAST = "up_blocks.2.resnets.2.conv2.bias"
WRONG = {
    "SD 1.5": (SD15, "^x.safetensors is a UNet with cross-attention, as SD 1.5 has it, and FastFit's has none; choose unet/"),
    "another model": ({"img_in.weight": torch.zeros(4, 4)}, "^x.safetensors has no conv_in.weight, .* but keys such as img_in.weight; choose unet/"),
    "nothing": ({}, "^x.safetensors has no conv_in.weight, which a UNet of a diffusers folder has, but keys such as none; choose unet/"),
    "no second convolution": (without("condition_conv_in.weight"), "^x.safetensors has no condition_conv_in.weight, which FastFit's UNet has; choose unet/"),
    "no classes": (without("class_embedding.weight"), "^x.safetensors has no class_embedding.weight, which FastFit's UNet has; choose unet/"),
    "four channels": ({**TENSORS, "conv_in.weight": torch.zeros(32, 4, 3, 3)}, "^x.safetensors takes 4 channels and FastFit 9: noise, mask and masked"),
    "one more": ({**TENSORS, "lora.up": torch.zeros(1)}, "^x.safetensors has the key lora.up, which FastFit's UNet does not have; choose unet/"),
    "one less": (without(LAST), f"^x.safetensors has no {LAST}; the file is not whole, download it again$"),
    "no middle": ({k: v for k, v in TENSORS.items() if not k.startswith("mid_block")}, "^x.safetensors has no mid_block.attentions.0.proj_in.weight; the"),
    "another shape": ({**TENSORS, LAST: torch.zeros(33)}, rf"^x.safetensors has {LAST} of shape \[33\] where its other layers ask for \[32\]; choose unet/"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_with_one_sentence(name, tmp_path):
    tensors, sentence = WRONG[name]
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(WrongFile, match=sentence) as raised:
        load_fastfit(tmp_path / "x.safetensors")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused_with_one_sentence(kept, tmp_path):
    path = tmp_path / "x.safetensors"
    tiny_fastfit.write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:int(kept * len(whole)) if isinstance(kept, float) else kept])
    with pytest.raises(WrongFile, match=r"^x.safetensors is not a whole safetensors file \(.*\); download it again$"):
        load_fastfit(path)


def test_a_pickle_is_never_opened(tmp_path):
    torch.save(TENSORS, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(WrongFile, match=r"^diffusion_pytorch_model.bin is no safetensors file, and others may run code when they are opened; choose unet/"):
        load_fastfit(tmp_path / "diffusion_pytorch_model.bin")


def test_a_unet_of_another_depth_is_loaded_too():
    """Two levels of one block: sizes come from the tensors, not from a table."""
    config = {**tiny_fastfit.CONFIG, "channel_mult": (1, 3), "num_res_blocks": [1, 1], "transformer_depth": [2, 0], "transformer_depth_output": [2, 1, 0, 1]}
    own = UNetModel(**config, device="cpu", operations=comfy.ops.disable_weight_init).state_dict()
    tensors = {theirs: own[ours] for theirs, ours in comfy.utils.unet_to_diffusers(config).items()
               if ours in own and ".attn2." not in theirs and ".norm2." not in theirs.partition("transformer_blocks")[2]}
    tensors |= {key: TENSORS[key] for key in OWN}
    read = unet_config(tensors, "x")
    assert renamed(tensors, read, "x").keys() == {key for key in own if ".attn2." not in key and ".norm2." not in key} | set(OWN)
    for name in ("channel_mult", "num_res_blocks", "transformer_depth", "transformer_depth_output", "transformer_depth_middle", "model_channels"):
        assert list(read[name]) == list(config[name]) if isinstance(config[name], list | tuple) else read[name] == config[name]
