"""Files of nunchaku as a whole: FLUX.1 and Z-Image in the host's names, pictures, LoRAs, saving, and files that are not whole.

The bar: int4 draws a picture at least 25 dB from that of full precision, and the branch is worth at least 2 dB where weights have outliers.
"""
import json
from pathlib import Path

import comfy.lora
import comfy.sd
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter.bypass import BypassInjectionManager
from quantized import drawn, nearness, read
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pack.core.quant import loader
from pack.core.quant.files import BadFile, WeightFile, open_file
from pack.core.quant.formats import layers_of
from pack.core.quant.formats.svdquant import AWQ, INT4, NVFP4
from pack.core.quant.loader import load, load_file
from pack.core.quant.machine import Capabilities, Machine
from pack.core.quant.plan import Settings, plan
from pack.core.quant.save import TRANSCODED, save
from pack.core.quant.svdquant.served import Served, served
from testbed import nunchaku_files as nunchaku
from testbed.arch import Z_IMAGE_DECOY

FORMATS = {"int4": INT4, "nvfp4": NVFP4}
real = loader.state_dict
SPREAD = 16.0       # how far outliers stand out
STRENGTH = 2.0      # of the LoRA, which changes the picture by far more than 4 bits do


@pytest.fixture(autouse=True)
def as_the_host_runs():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def trained() -> dict[str, tuple]:
    """{name: (state dict, metadata)}; FLUX with outliers in its weights that change nothing of what it computes."""
    flux, z_image = read("flux"), read("z_image")
    return {"flux": (with_outliers(flux[0]), flux[1]), "z_image": ({key: tensor.float() for key, tensor in z_image[0].items()}, z_image[1])}


def with_outliers(sd: dict) -> dict:
    """Some inputs of each layer behind a modulated norm made small by the modulation, and the weights on them as much larger."""
    sd, generator = {key: tensor.float() for key, tensor in sd.items()}, torch.Generator().manual_seed(5)
    hidden = sd["img_in.weight"].shape[0]

    def spread(layer: str, mod: str, at: int) -> None:
        inputs = torch.randperm(hidden, generator=generator)[:4]
        sd[f"{layer}.weight"][:, inputs] *= SPREAD
        shift, scale = at * hidden + inputs, (at + 1) * hidden + inputs
        for rows in (shift, scale):
            sd[f"{mod}.weight"][rows] /= SPREAD
        sd[f"{mod}.bias"][shift] /= SPREAD
        sd[f"{mod}.bias"][scale] = (sd[f"{mod}.bias"][scale] + 1) / SPREAD - 1

    for block in sorted({".".join(key.split(".")[:2]) for key in sd if "_blocks." in key}):
        if block.startswith("single"):
            spread(f"{block}.linear1", f"{block}.modulation.lin", 0)
        else:
            for side in ("img", "txt"):
                spread(f"{block}.{side}_attn.qkv", f"{block}.{side}_mod.lin", 0)
                spread(f"{block}.{side}_mlp.0", f"{block}.{side}_mod.lin", 3)
    return sd


@pytest.fixture(scope="module")
def full(trained) -> dict[str, tuple]:
    """{name: (its picture at full precision, the largest of each layer's inputs on the way)}"""
    made = {}
    with torch.inference_mode():
        for name, (sd, metadata) in trained.items():
            model = comfy.sd.load_diffusion_model_state_dict(dict(sd), metadata=metadata)
            most = watched(model.model.diffusion_model)
            made[name] = drawn(name, model, 1), most
    return made


def watched(network: nn.Module) -> dict[str, torch.Tensor]:
    """Fills with the largest of each input that a linear layer gets."""
    most = {}

    def watch(layer: str, module: nn.Module) -> None:
        def see(_, args):
            now = args[0].float().abs().flatten(0, -2).amax(0)
            most[layer] = torch.maximum(most[layer], now) if layer in most else now
        module.register_forward_pre_hook(see)

    for layer, module in network.named_modules():
        if isinstance(module, nn.Linear):
            watch(layer, module)
    return most


@pytest.fixture(scope="module")
def written(trained, full):
    """(name, **options) -> nunchaku_files.File, each made once."""
    made = {}

    def write(name: str, **options) -> nunchaku.File:
        key = name, *sorted(options.items())
        if key not in made:
            sd, metadata = trained[name]
            pack = nunchaku.flux if name == "flux" else lambda *args, **more: nunchaku.z_image(*args, metadata["config"], **more)
            made[key] = pack({layer: tensor for layer, tensor in sd.items() if layer not in Z_IMAGE_DECOY}, full[name][1], **options)
        return made[key]

    return write


def on_disk(file: nunchaku.File, path: Path) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in file.tensors.items()}, path, metadata=file.metadata)
    return path


def at_hand(file: nunchaku.File) -> WeightFile:
    """Tiny Z-Image is told by its metadata and by two tensors of another model, so it is handed over as it is."""
    decoy = {key: torch.zeros(shape) for key, shape in Z_IMAGE_DECOY.items()}
    return WeightFile(Path("svdq-z-image.safetensors"), "safetensors", file.metadata, file.tensors | decoy)


def loaded(name: str, file: nunchaku.File, tmp_path: Path, compute="host"):
    """(model, what was done)"""
    if name == "z_image":
        return load_file(at_hand(file), Settings(compute=compute))
    told = []
    return load(on_disk(file, tmp_path / "svdq.safetensors"), Settings(compute=compute), report=told.append), told[0]


def packed(model) -> dict[str, QuantizedTensor]:
    return {name: module.weight for name, module in model.model.diffusion_model.named_modules()
            if isinstance(getattr(module, "weight", None), QuantizedTensor) and module.weight._layout_cls.startswith("Reprise")}


# what the file says --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ("flux", "z_image"))
@pytest.mark.parametrize("kind", FORMATS)
def test_every_layer_stands_under_the_hosts_name_with_the_weight_that_was_packed(name, kind, written, trained, tmp_path):
    file = written(name, kind=kind)
    layers, rest = layers_of(open_file(on_disk(file, tmp_path / "svdq.safetensors")))
    for key, wanted in file.dense.items():
        if key.endswith(".weight"):
            layer = layers[key.removesuffix(".weight")]
            torch.testing.assert_close(layer.rows(0, layer.shape[0]), wanted, rtol=0, atol=2e-5 * SPREAD)
            assert layer.format == (AWQ if layer.name.endswith("mod.lin") or layer.name.endswith("modulation.lin") else FORMATS[kind])
        else:
            torch.testing.assert_close(rest[key].float(), wanted, rtol=2 ** -8, atol=1e-3)
    there = {f"{layer}.weight" for layer in layers} | set(rest)
    assert there == {key for key in trained[name][0] if key not in Z_IMAGE_DECOY}
    for key, tensor in trained[name][0].items():
        if key in rest and key not in file.dense:
            torch.testing.assert_close(rest[key].float(), tensor.bfloat16().float(), rtol=0, atol=0)


def test_the_newer_names_of_flux_are_read_as_the_older(written):
    file = written("flux", kind="int4")
    newer = {"qkv_proj_context": "attn.add_qkv_proj", "qkv_proj": "attn.to_qkv", "out_proj_context": "attn.to_add_out", "norm_q": "attn.norm_q",
             "norm_k": "attn.norm_k", "norm_added_q": "attn.norm_added_q", "norm_added_k": "attn.norm_added_k",
             "mlp_context_fc1": "ff_context.net.0.proj", "mlp_context_fc2": "ff_context.net.2"}

    def renamed(key: str) -> str:
        single, parts = key.startswith("single_"), key.split(".")
        if len(parts) < 4 or "transformer_blocks" not in parts[0]:
            return key
        short = {**newer, "out_proj": "attn.to_out" if single else "attn.to_out.0", **({} if single else {"mlp_fc1": "ff.net.0.proj", "mlp_fc2": "ff.net.2"})}
        part = {"smooth": "smooth_factor", "smooth_orig": "smooth_factor_orig", "lora_down": "proj_down", "lora_up": "proj_up"}.get(parts[-1], parts[-1])
        return ".".join([*parts[:2], *[short.get(one, one) for one in parts[2:-1]], part])

    tensors = {renamed(key): tensor for key, tensor in file.tensors.items()}
    assert tensors.keys() != file.tensors.keys() and len(tensors) == len(file.tensors)
    found = [layers_of(WeightFile(Path("a"), "safetensors", file.metadata, one)) for one in (file.tensors, tensors)]
    assert found[0][0].keys() == found[1][0].keys() and found[0][1].keys() == found[1][1].keys()
    layer = "single_blocks.1.linear2"
    assert torch.equal(found[0][0][layer].rows(0, 128), found[1][0][layer].rows(0, 128))


def test_refiners_of_z_image_that_are_not_quantized_are_put_together(written, trained):
    layers, _ = layers_of(at_hand(written("z_image", kind="int4", refiners=False)))
    for layer in ("noise_refiner.0.attention.qkv", "context_refiner.0.feed_forward.w1", "context_refiner.0.feed_forward.w3", "noise_refiner.0.feed_forward.w2"):
        assert layers[layer].format == "bf16"
        assert torch.equal(layers[layer].rows(0, layers[layer].shape[0]), trained["z_image"][0][f"{layer}.weight"].bfloat16().float())
    assert layers["layers.0.attention.qkv"].format == INT4


# pictures ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "kind", "least"), [("flux", "int4", 25), ("z_image", "int4", 25), ("flux", "nvfp4", 28), ("z_image", "nvfp4", 28)])
def test_a_packed_file_draws_the_picture_of_full_precision(name, kind, least, written, full, tmp_path):
    model, told = loaded(name, written(name, kind=kind), tmp_path)
    assert FORMATS[kind] in told.formats.values()
    assert packed(model).keys() == {layer for layer, form in told.formats.items() if form in (INT4, NVFP4, AWQ)}
    assert nearness(drawn(name, model, 1), full[name][0]) >= least


def test_the_branch_is_worth_2_db_and_more_where_weights_have_outliers(written, full, tmp_path):
    found = [nearness(drawn("flux", loaded("flux", written("flux", kind="int4", branch=branch), tmp_path)[0], 1), full["flux"][0]) for branch in (True, False)]
    assert found[0] >= found[1] + 2, found


@pytest.mark.parametrize("name", ("flux", "z_image"))
def test_a_file_turned_into_int8_draws_the_picture(name, written, full, tmp_path):
    model, told = loaded(name, written(name, kind="int4"), tmp_path, compute="int8")
    turned = {layer for layer, target in told.layers.items() if target == "int8"}
    assert turned == {layer for layer, form in told.formats.items() if form == INT4}
    assert nearness(drawn(name, model, 1), full[name][0]) >= 25


@pytest.mark.parametrize("compute", ("host", "int8"))
def test_it_is_saved_as_int8_that_the_stock_loader_opens(compute, written, full, tmp_path):
    model, _ = loaded("flux", written("flux", kind="int4"), tmp_path, compute)
    again = comfy.sd.load_diffusion_model(str(saved(model, tmp_path)))
    assert not packed(again) and len(packed(model)) > (10 if compute == "host" else 0)      # modulation stays packed
    with safe_open(tmp_path / "saved.safetensors", "pt") as file:
        assert "quantization_config" not in file.metadata() and set(json.loads(file.metadata()[TRANSCODED]).values()) <= {INT4, AWQ}
    assert nearness(drawn("flux", again, 1), full["flux"][0]) >= 25


def saved(model, tmp_path: Path) -> Path:
    save(model, tmp_path / "saved.safetensors")
    return tmp_path / "saved.safetensors"


def lora(model) -> dict:
    """A LoRA of rank 4 on layers of one piece and of two."""
    generator, sd = torch.Generator().manual_seed(3), {}
    for name in ("double_blocks.0.img_attn.qkv", "double_blocks.1.img_mlp.2", "single_blocks.0.linear1", "single_blocks.1.linear2"):
        rows, columns = model.model.diffusion_model.get_submodule(name).weight.shape
        sd[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) / columns ** 0.5
        sd[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / 2
    return sd


@pytest.mark.parametrize("how", ("baked", "bypass"))
def test_a_lora_acts_on_a_packed_model_as_on_one_of_the_same_weights(how, written, trained, full, tmp_path):
    file = written("flux", kind="int4")
    model, _ = loaded("flux", file, tmp_path)
    sd = trained["flux"][0] | file.dense
    base = comfy.sd.load_diffusion_model_state_dict(dict(sd))
    patch = lora(base)
    wanted = drawn("flux", comfy.sd.load_lora_for_models(base, None, dict(patch), STRENGTH, 0)[0], 1)
    plain = drawn("flux", model, 1)
    if how == "baked":
        changed = comfy.sd.load_lora_for_models(model, None, dict(patch), STRENGTH, 0)[0]
    else:
        changed = model.clone()
        manager = BypassInjectionManager()
        for key, adapter in comfy.lora.load_lora(dict(patch), comfy.lora.model_lora_keys_unet(model.model, {})).items():
            manager.add_adapter(key, adapter, strength=STRENGTH)
        changed.set_injections("bypass_lora", manager.create_injections(changed.model))
    got = drawn("flux", changed, 1)
    without, found = nearness(plain, wanted), nearness(got, wanted)
    assert found >= 25 and found >= without + 6, (without, found)
    assert torch.equal(drawn("flux", model, 1)[0], plain[0]), "the model without the LoRA is as it was"


# devices -------------------------------------------------------------------------------------------------------------------------
def test_a_device_that_only_emulates_is_told_before_anything_is_packed(written, tmp_path, monkeypatch, caplog):
    told = []
    monkeypatch.setattr(loader, "state_dict", lambda *args: told.append(caplog.text) or real(*args))
    _, done = loaded("flux", written("flux", kind="int4"), tmp_path)
    sentence = served(torch.device("cpu"), "int4").sentence
    assert sentence and sentence in told[0] and done.warnings == (sentence,) and sentence in done.line()
    assert not loaded("flux", written("flux", kind="int4"), tmp_path, compute="int8")[1].warnings


@pytest.mark.parametrize(("how", "target"), [("native", "packed"), ("emulated", "int8")])
def test_left_to_itself_a_file_stays_packed_where_that_is_fast_and_becomes_int8_elsewhere(how, target, written, monkeypatch):
    monkeypatch.setattr(loader, "served", lambda device, kind: Served(how, "" if how == "native" else "slow"))
    monkeypatch.setattr(loader, "capabilities", lambda device: Capabilities.of(Machine()))
    _, native = loader.abilities(torch.device("cuda", 0))
    layers, _ = layers_of(at_hand(written("z_image", kind="int4")))
    targets = plan(layers, frozenset(layers), "lumina2", Settings(), True, native)
    assert {targets[name] for name, layer in layers.items() if layer.format == INT4} == {target}


# files that are not what they say ------------------------------------------------------------------------------------------------
def one_sentence(told) -> str:
    text = str(told.value)
    assert "\n" not in text and len(text) < 500 and "svdq" in text
    return text


def broken(file: nunchaku.File, change) -> WeightFile:
    tensors, metadata = dict(file.tensors), dict(file.metadata)
    change(tensors, metadata)
    return WeightFile(Path("svdq.safetensors"), "safetensors", metadata, tensors)


FC2, QKV = "single_transformer_blocks.1.mlp_fc2", "transformer_blocks.0.qkv_proj"
CHANGES = {
    "a missing scale": (lambda tensors, meta: tensors.pop(f"{QKV}.wscales"), f"'{QKV}' is SVDQuant, and it has no wscales"),
    "a missing weight": (lambda tensors, meta: tensors.pop(f"{FC2}.qweight"), f"'{FC2}' is SVDQuant, and it has no qweight"),
    "a missing bias": (lambda tensors, meta: tensors.pop(f"{FC2}.bias"), f"'{FC2}' lacks its bias"),
    "a missing half of a branch": (lambda tensors, meta: tensors.pop(f"{QKV}.lora_up"), "has no lora_up"),
    "another rank": (lambda tensors, meta: meta.update(quantization_config='{"rank": 128}'), "rank of 32 where the header says 128"),
    "another kind": (lambda tensors, meta: meta.update(quantization_config='{"weight": {"dtype": "fp4_e2m1_all"}}'), "the header says nvfp4"),
    "a header that is no JSON": (lambda tensors, meta: meta.update(quantization_config="{"), "is not JSON"),
    "a header of another shape": (lambda tensors, meta: meta.update(quantization_config="[]"), "a JSON object was expected"),
    "a missing layer": (lambda tensors, meta: [tensors.pop(key) for key in list(tensors) if key.startswith(QKV + ".")], "double_blocks.0.img_attn.qkv"),
    "a missing half of a layer": (lambda tensors, meta: [tensors.pop(key) for key in list(tensors) if key.startswith(FC2 + ".")], f"'{FC2}'"),
    "a missing block": (lambda tensors, meta: [tensors.pop(key) for key in list(tensors) if key.startswith("transformer_blocks.0.")], "transformer_blocks.0"),
    "a layer of another size": (lambda tensors, meta: tensors.update(half(tensors, "transformer_blocks.0.mlp_fc1")), "double_blocks.0.img_mlp.0"),
    "two halves that do not meet": (lambda tensors, meta: tensors.update(half(tensors, FC2)), "do not make one layer"),
    "a layer that nobody knows": (lambda tensors, meta: tensors.update({"transformer_blocks.0.more.wscales": torch.zeros(2, 128)}), "more.wscales"),
    "a missing norm": (lambda tensors, meta: tensors.pop("transformer_blocks.1.norm_q.weight"), "query_norm"),
    "a missing embedder": (lambda tensors, meta: tensors.pop("x_embedder.weight"), ""),
}


def half(tensors: dict, name: str) -> dict:
    """The first of a layer's row tiles."""
    n = tensors[f"{name}.qweight"].shape[0] // 2 if name != FC2 else 0
    if name == FC2:
        return {f"{name}.{part}": tensor for part, tensor in nunchaku.svdquant(torch.randn(256, 512), None, None, 32, gelu=True).parts.items()}
    return {f"{name}.{part}": tensor for part, tensor in nunchaku.svdquant(torch.randn(n, 128), None, None, 32).parts.items()}


@pytest.mark.parametrize("what", CHANGES)
def test_a_file_that_is_not_whole_is_told_in_a_sentence(what, written):
    change, told = CHANGES[what]
    with pytest.raises(BadFile) as error:
        load_file(broken(written("flux", kind="int4"), change), Settings(compute="host"))
    assert told in one_sentence(error)


def test_a_truncated_file_is_told_in_a_sentence(written, tmp_path):
    path = on_disk(written("flux", kind="int4"), tmp_path / "svdq.safetensors")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BadFile, match="not a whole safetensors file") as error:
        load(path, Settings())
    one_sentence(error)


@pytest.mark.parametrize(("tensors", "model", "told"), [
    ({"transformer_blocks.0.img_mod.1.wscales": (2, 128), "transformer_blocks.0.attn.to_qkv.wscales": (2, 384)}, "NunchakuQwenImageTransformer2DModel", "Qwen"),
    ({"encoder.block.0.layer.0.SelfAttention.q.wscales": (2, 128)}, "", "encoder.block.0"),
])
def test_a_model_that_is_not_read_is_told_with_what_is(tensors, model, told):
    file = WeightFile(Path("svdq.safetensors"), "safetensors", {"model_class": model}, {key: torch.zeros(shape) for key, shape in tensors.items()})
    with pytest.raises(BadFile, match="FLUX.1 and Z-Image are read here") as error:
        layers_of(file)
    assert told in one_sentence(error)


def test_a_bias_that_z_image_cannot_have_is_told(written):
    file = written("z_image", kind="int4")
    name = "layers.0.attention.to_qkv"
    rows = file.tensors[f"{name}.qweight"].shape[0]
    for value in (0.0, 1.0):
        told = WeightFile(Path("svdq.safetensors"), "safetensors", {}, file.tensors | {f"{name}.bias": torch.full((rows,), value, dtype=torch.bfloat16)})
        if value:
            with pytest.raises(BadFile, match="has a bias"):
                layers_of(told)
        else:
            assert "layers.0.attention.qkv.bias" not in layers_of(told)[1]
