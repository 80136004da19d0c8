"""Diffusion models from GGUF files: they draw the picture of the full model, LoRAs act on them, and what is saved opens without the pack."""
import os

import comfy.sd
import numpy as np
import pytest
import quantized
import torch
from comfy.quant_ops import QuantizedTensor
from comfy.sd import load_bypass_lora_for_models, load_lora_for_models
from quantized import linear, nearness
from safetensors import safe_open

from benchmarks import _pictures as bench
from pack.core.quant.blocks import values
from pack.core.quant.files import BadFile, WeightFile, open_file
from pack.core.quant.formats import layers_of
from pack.core.quant.loader import load, load_file
from pack.core.quant.packed_ops import is_packed
from pack.core.quant.plan import Settings
from pack.core.quant.save import TRANSCODED, save
from testbed.gguf_files import TYPES, block, write

SUBJECTS = {"flux": bench.SUBJECTS[0], "z_image": bench.SUBJECTS[1]}       # whose layers are whole blocks of 256 wide
NEAR = {"Q8_0": 50, "Q6_K": 46, "Q5_K": 42, "Q5_1": 42, "Q5_0": 41, "Q4_K": 36, "Q4_1": 36, "Q4_0": 36, "Q3_K": 31, "Q2_K": 24}    # dB


@pytest.fixture(autouse=True)
def as_the_host_runs(monkeypatch):
    monkeypatch.setattr(quantized, "SUBJECTS", SUBJECTS)
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def full():
    """The pictures of the models at full precision, by the stock loader."""
    kept = {}

    def of(name):
        if name not in kept:
            kept[name] = quantized.drawn(name, stock(bench.MODELS / SUBJECTS[name].file), 1)
        return kept[name]
    return of


def stock(path):
    return comfy.sd.load_diffusion_model(str(path))


def file(tmp_path, name, type, architecture=None):
    tensors, metadata = quantized.read(name)
    made = {key: (tensor.float().numpy(), type) if linear(key, tensor) else tensor.numpy() for key, tensor in tensors.items()}
    return write(tmp_path / "model.gguf", made, architecture or {"flux": "flux", "z_image": "lumina2"}[name],
                 [("add_string", key, value) for key, value in metadata.items() if key != "format"])


def loaded(path, **settings):
    told = []
    return load(path, Settings(**settings), report=told.append), told[0]


def packed(patcher) -> dict:
    return {name: module for name, module in patcher.model.diffusion_model.named_modules() if is_packed(getattr(module, "weight", None))}


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_file_of_every_type_draws_the_picture_of_the_full_model(name, type, full, tmp_path):
    model, told = loaded(file(tmp_path, name, type), compute="host")
    assert {target for layer, target in told.layers.items() if told.formats[layer] == type} == {"packed"} and packed(model)
    assert nearness(quantized.drawn(name, model, 1), full(name)) >= NEAR[type]


@pytest.mark.parametrize("type", ("Q8_0", "Q4_K"))
@pytest.mark.parametrize("name", SUBJECTS)
def test_with_int8_products_it_does_too(name, type, full, tmp_path):
    model, told = loaded(file(tmp_path, name, type), compute="int8")
    wanted = "int8" if type == "Q8_0" else "packed int8"        # Q8_0 is no smaller than int8, which is computed with as it is
    assert {target for layer, target in told.layers.items() if told.formats[layer] == type} == {wanted}
    assert nearness(quantized.drawn(name, model, 1), full(name)) >= NEAR[type]


def test_sensitive_layers_are_never_computed_as_int8(tmp_path):
    tensors, _ = quantized.read("flux")
    made = {key: (tensor.float().numpy(), "Q8_0") if key.endswith(".weight") and tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else tensor.numpy()
            for key, tensor in tensors.items()}
    _, told = loaded(write(tmp_path / "model.gguf", made), compute="int8")
    kept = {layer: target for layer, target in told.layers.items() if "mod" in layer or "_in." in layer or "final" in layer}
    assert len(kept) > 8 and set(kept.values()) <= {"packed", "stored"}


def test_tensors_at_hand_make_the_same_model_as_their_file(tmp_path):
    path = file(tmp_path, "z_image", "Q4_K")
    at_hand = open_file(path)
    model, _ = load_file(WeightFile(path, "gguf", at_hand.metadata, at_hand.tensors, at_hand.packed), Settings(compute="host"))
    assert torch.equal(quantized.drawn("z_image", model, 1, steps=3)[0], quantized.drawn("z_image", loaded(path, compute="host")[0], 1, steps=3)[0])


def test_the_host_counts_the_file_and_not_the_unpacked_weights(tmp_path):
    path = file(tmp_path, "flux", "Q4_K")
    for compute in ("host", "int8"):
        model, told = loaded(path, compute=compute)
        assert model.model_size() < 1.02 * path.stat().st_size + 20_000


def test_a_reload_without_dynamic_memory_does_the_same_again(tmp_path):
    model, _ = loaded(file(tmp_path, "flux", "Q4_K"), compute="int8")
    again, given = model.cached_patcher_init
    copy = again(*given, disable_dynamic=True)
    assert torch.equal(*(quantized.drawn("flux", patcher, 1, steps=3)[0] for patcher in (model, copy)))


# LoRA ------------------------------------------------------------------------------------------------------------------
def lora(model, strength=1.5) -> dict:
    chance, sd = torch.Generator().manual_seed(3), {}
    for name, module in packed(model).items():
        rows, columns = module.weight.shape
        sd[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(rows, 4, generator=chance) * strength / columns ** 0.5
        sd[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(4, columns, generator=chance) / 2
    return sd


def dense(path):
    """The file's own values at full precision: what is lost beside this is lost by the LoRA's route."""
    found = open_file(path)
    return load_file(WeightFile(path, "gguf", found.metadata, found.tensors | {
        key: values(blocks.bytes, blocks.type).to(torch.float16) for key, blocks in found.packed.items()}), Settings(compute="host"))[0]


ROUTES = {"baked": (load_lora_for_models, 45), "beside": (load_bypass_lora_for_models, 50)}


@pytest.mark.parametrize("compute", ("host", "int8"))
@pytest.mark.parametrize("route", ROUTES)
def test_a_lora_acts_on_a_packed_model_as_on_a_full_one(route, compute, tmp_path):
    path = file(tmp_path, "flux", "Q4_K")
    model, true = loaded(path, compute=compute)[0], dense(path)
    put, least = ROUTES[route]
    sd = lora(model)
    changed = quantized.drawn("flux", load_lora_for_models(true, None, sd, 1.0, 0)[0], 1)
    plain = quantized.drawn("flux", true, 1)
    assert nearness(plain, changed) < 20, "the LoRA does too little to tell"
    before = set(packed(model))
    with_lora = put(model, None, sd, 1.0, 0)[0]
    assert nearness(quantized.drawn("flux", with_lora, 1), changed) >= least
    assert set(packed(with_lora)) == (set() if route == "baked" else before)
    assert nearness(quantized.drawn("flux", model, 1), plain) > 42, "the LoRA stayed on the model without it"


# saved -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("with_lora", (False, True))
def test_a_saved_model_is_the_hosts_int8_and_draws_the_same_bits(with_lora, tmp_path):
    model, told = loaded(file(tmp_path, "flux", "Q4_K"), compute="int8")
    if with_lora:
        model = load_lora_for_models(model, None, lora(model), 1.0, 0)[0]
    expected = quantized.drawn("flux", model, 1, steps=3)[0]
    turned = save(model, tmp_path / "saved.safetensors")
    again = stock(tmp_path / "saved.safetensors")
    assert torch.equal(quantized.drawn("flux", again, 1, steps=3)[0], expected)
    assert turned == {layer: "Q4_K" for layer, target in told.layers.items() if target == "packed int8"}
    assert all(isinstance(dict(again.model.diffusion_model.named_modules())[layer].weight, QuantizedTensor) for layer in turned)
    with safe_open(tmp_path / "saved.safetensors", framework="pt") as saved:
        assert TRANSCODED in saved.metadata()


# refused ---------------------------------------------------------------------------------------------------------------
def test_a_text_model_at_the_loader_of_diffusion_models_is_refused(tmp_path):
    path = write(tmp_path / "model.gguf", {"blk.0.attn_q.weight": np.zeros((4, 32), np.float32)}, "qwen3")
    with pytest.raises(BadFile, match="load it with GGUF Text Encoder Loader"):
        loaded(path)


def test_a_model_without_one_of_its_tensors_is_refused(tmp_path):
    tensors, _ = quantized.read("flux")
    del tensors["double_blocks.0.img_attn.qkv.weight"]
    with pytest.raises(BadFile, match=r"lacks 1 of \d+ tensors .* 'double_blocks.0.img_attn.qkv.weight'"):
        loaded(write(tmp_path / "model.gguf", {key: tensor.numpy() for key, tensor in tensors.items()}))


# real width ------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not os.environ.get("REPRISE_SLOW_TESTS"), reason="half a minute; set REPRISE_SLOW_TESTS=1")
@pytest.mark.parametrize("type", ("Q8_0", "Q4_K"))
def test_a_layer_of_z_image_at_its_real_width(type, tmp_path):
    """Z-Image's feed-forward: 3840 channels to 10240. Needs half a GiB and half a minute."""
    x = (np.random.default_rng(0).standard_t(4, (10240, 3840)) * 0.02).astype(np.float32)
    assert x.shape[1] % block(type) == 0
    found = open_file(write(tmp_path / "model.gguf", {"w1.weight": (x, type)}))
    layer = layers_of(found)[0]["w1"]
    inputs = torch.randn(64, 3840, generator=torch.Generator().manual_seed(1))
    wanted = inputs @ layer.rows(0, 10240).T
    for weight, most in ((layer.packed(torch.float32), 1e-6), (layer.packed_int8(torch.float32), 0.015)):
        assert float((torch.nn.functional.linear(inputs, weight) - wanted).norm() / wanted.norm()) < most


def test_a_file_with_the_name_of_another_model_is_loaded_by_its_tensors_and_told(tmp_path):
    _, told = loaded(file(tmp_path, "flux", "Q8_0", "sd1"))
    assert told.warnings == ("the file says it is 'sd1' and its tensors are those of flux, as which it was loaded",) and told.warnings[0] in told.line()
    assert not loaded(file(tmp_path, "flux", "Q8_0"))[1].warnings


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("key", ["img_in.bias", "double_blocks.0.img_attn.norm.query_norm.weight", "img_in.weight"])
def test_whole_numbers_where_a_model_has_fractions_are_refused(key, dtype, tmp_path):
    tensors, _ = quantized.read("flux")
    path = write(tmp_path / "model.gguf", {name: tensor.numpy().astype(dtype) if name == key else tensor.numpy() for name, tensor in tensors.items()})
    with pytest.raises(BadFile, match=f"'model.gguf': '{key}' holds {dtype.__name__}, and its model has fractions there"):
        loaded(path)


@pytest.mark.parametrize("key", ["img_in.bias", "double_blocks.0.img_attn.norm.query_norm.weight", "img_in.weight"])
def test_doubles_are_read_as_the_floats_they_are(key, tmp_path):
    tensors, _ = quantized.read("flux")
    path = write(tmp_path / "model.gguf", {name: tensor.double().numpy() if name == key else tensor.numpy() for name, tensor in tensors.items()})
    assert torch.equal(loaded(path, compute="host")[0].model.diffusion_model.get_parameter(key).float(), tensors[key].float())
