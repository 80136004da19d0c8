"""The loader of quantized models: every format draws the picture, and what comes out is an ordinary model of the host."""
import re

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from quantized import WRITERS, drawn, nearness, read, write
from safetensors.torch import save_file

from pack.core.quant import folders
from pack.core.quant.files import BadFile
from pack.core.quant.formats import known_formats
from pack.core.quant.loader import Loaded, load
from pack.core.quant.plan import COMPUTE, TARGETS, Settings, read_plan, write_plan
from pack.core.quant.sensitive import SENSITIVE
from pack.nodes._api import io
from pack.nodes.attention_backend import AttentionBackend
from pack.nodes.fused_kernels import FusedKernels
from pack.nodes.gguf import GGUFTextEncoderLoader
from pack.nodes.quantization_report import QuantizationReport
from pack.nodes.quantized import QuantizedModelLoader

NAMES = ("flux", "z_image")
NEAR = {"fp": 60, "bf": 60, "float8_e4m3fn": 35, "float8_e5m2": 30, "int8": 40, "nvfp4": 28, "mxfp8": 35}    # dB


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> dict[str, list]:
    """The pictures of the models at full precision, by the stock loader."""
    return {name: drawn(name, stock(write(name, "fp16", tmp_path_factory.mktemp(name) / "full.safetensors")), 1) for name in NAMES}


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder of diffusion models and text encoders with one file in it."""
    for kind in ("diffusion_models", "text_encoders"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path)], {".safetensors"}))
    write("flux", "fp16", tmp_path / "model.safetensors")
    return tmp_path


def stock(path):
    with torch.inference_mode():
        return comfy.sd.load_diffusion_model(str(path))


def loaded(path, **settings):
    """(model, what was done)"""
    told = []
    with torch.inference_mode():     # as the server runs nodes
        return load(path, Settings(**settings), report=told.append), told[0]


def network(patcher):
    return patcher.model.diffusion_model


def weights(patcher) -> dict[str, torch.Tensor]:
    return {name: module.weight for name, module in network(patcher).named_modules() if isinstance(getattr(module, "weight", None), torch.Tensor)}


def closeness(form: str) -> int:
    return next(db for start, db in NEAR.items() if form.startswith(start))


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_every_format_draws_the_picture_of_the_full_one(name, form, full, tmp_path):
    path = write(name, form, tmp_path / "model.safetensors")
    model, told = loaded(path)
    assert form.partition(",")[0] in set(told.formats.values())
    assert nearness(drawn(name, model, 1), full[name]) >= closeness(form)


@pytest.mark.parametrize(("compute", "least"), [("int8", 40), ("fp8", 35)])
@pytest.mark.parametrize("name", NAMES)
def test_a_full_model_turned_into_8_bits_on_load_draws_its_picture(name, compute, least, full, tmp_path):
    model, told = loaded(write(name, "bf16", tmp_path / "model.safetensors"), compute=compute)
    turned = [layer for layer, target in told.layers.items() if target == compute]
    assert turned and all(isinstance(weights(model)[layer], QuantizedTensor) for layer in turned)
    assert nearness(drawn(name, model, 1), full[name]) >= least


@pytest.mark.parametrize("form", ["float8_e4m3fn", "float8_e4m3fn scaled, old spelling", "int8_tensorwise, rotated", "nvfp4"])
@pytest.mark.parametrize("name", NAMES)
def test_what_the_host_reads_itself_comes_out_as_from_its_own_loader_bit_for_bit(name, form, tmp_path):
    path = write(name, form, tmp_path / "model.safetensors")
    ours, theirs = loaded(path, compute="host")[0], stock(path)
    assert torch.equal(*(drawn(name, model, 1, steps=4)[0] for model in (ours, theirs)))


@pytest.mark.parametrize("form", ["int8_tensorwise, rotated", "float8_e4m3fn scaled", "mxfp8"])
def test_marks_in_the_header_count_as_marks_beside_the_layers(form, tmp_path):
    beside, header = write("flux", form, tmp_path / "a.safetensors"), write("flux", form, tmp_path / "b.safetensors", in_header=True)
    assert torch.equal(*(drawn("flux", loaded(path)[0], 1, steps=4)[0] for path in (beside, header)))


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("name", NAMES)
def test_sensitive_layers_keep_their_precision(name, compute, tmp_path):
    _, told = loaded(write(name, "fp16", tmp_path / "model.safetensors"), compute=compute)
    kept = [layer for layer in told.layers if re.search(r"mod|embed|_in|final|adaLN", layer)]
    assert len(kept) > 5
    assert {told.layers[layer] for layer in kept} == {"stored"}
    assert told.family in SENSITIVE


def test_an_excluded_layer_stays_as_the_file_has_it(tmp_path):
    model, told = loaded(write("flux", "fp16", tmp_path / "model.safetensors"), compute="int8", exclude=("double_blocks.0.*", "*linear2"))
    stored = {layer for layer, target in told.layers.items() if target == "stored"}
    assert {"double_blocks.0.img_mlp.0", "single_blocks.0.linear2"} <= stored
    assert {"double_blocks.1.img_mlp.0", "single_blocks.0.linear1"}.isdisjoint(stored)
    assert not isinstance(weights(model)["single_blocks.0.linear2"], QuantizedTensor)


def test_a_plan_stands_above_everything_and_one_for_another_model_is_refused(tmp_path):
    path = write("flux", "fp16", tmp_path / "model.safetensors")
    write_plan(tmp_path / "plan.json", {"single_blocks.0.linear1": "fp8", "img_in": "int8"})
    plan = read_plan(tmp_path / "plan.json")
    _, told = loaded(path, compute="int8", exclude=("single_blocks.*",), layers=plan)
    assert told.layers["single_blocks.0.linear1"] == "fp8" and told.layers["img_in"] == "int8" and told.layers["single_blocks.1.linear1"] == "stored"
    with pytest.raises(ValueError, match=r"the plan is for another model: it has 1 layers that this file lacks, the first is 'nope'"):
        loaded(path, layers={"nope": "int8"})


KIND = '{"kind": "reprise quantization plan", "layers": '


@pytest.mark.parametrize("text", ["", "[]", "{}", KIND + "[]}", KIND + "{}}", KIND + '{"a": "x"}}'])
def test_a_plan_that_is_none_is_one_sentence(text, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadFile, match="plan.json"):
        read_plan(path)


def lora(model, strength: float = 0.5, seed: int = 3) -> dict:
    """A LoRA of rank 4 on every attention and feed-forward layer of FLUX."""
    generator, sd = torch.Generator().manual_seed(seed), {}
    for name, weight in weights(model).items():
        if re.search(r"attn\.qkv|mlp\.0|linear1|linear2", name):
            rows, columns = weight.shape
            sd[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * strength / columns ** 0.5
            sd[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator) / 2
    return sd


@pytest.mark.parametrize("compute", ["int8", "fp8"])
def test_a_lora_acts_on_a_quantized_model_as_on_a_full_one(compute, tmp_path):
    path = write("flux", "fp16", tmp_path / "model.safetensors")
    model, _ = loaded(path, compute=compute)
    base = stock(path)
    patch = lora(base)
    with torch.inference_mode():
        with_lora, true = (comfy.sd.load_lora_for_models(patcher, None, patch, 1.0, 0)[0] for patcher in (model, base))
    plain, changed = drawn("flux", base, 1), drawn("flux", true, 1)
    moved = nearness(plain, changed)
    assert moved < 30, "the LoRA does too little to tell"
    assert nearness(drawn("flux", with_lora, 1), changed) > moved + (10 if compute == "int8" else 6)
    assert nearness(drawn("flux", model, 1), plain) > 35, "the LoRA stayed on the model without it"


def test_a_pattern_that_excludes_nothing_is_told(tmp_path):
    _, told = loaded(write("flux", "fp16", tmp_path / "model.safetensors"), compute="int8", exclude=("double_blocks.0.*", "nothing_like*"))
    assert told.line().endswith("; 'nothing_like*' excludes no layer") and "double_blocks" not in told.line()


@pytest.mark.parametrize("layer", ["img_in", "txt_in", "final_layer.linear"])
def test_a_plan_cannot_make_a_model_that_does_not_run(layer, tmp_path):
    with pytest.raises(ValueError, match=f"the plan makes '{layer}' nvfp4, and a layer that is sensitive cannot be"):
        loaded(write("flux", "fp16", tmp_path / "model.safetensors"), layers={layer: "nvfp4"})


@pytest.mark.parametrize("settings", [{"device": "tpu"}, {"compute": "int5"}])
def test_settings_that_do_not_exist_are_named(settings, tmp_path):
    with pytest.raises(ValueError, match=r"unknown (device|compute) '.*'; known: "):
        loaded(tmp_path / "model.safetensors", **settings)


MENUS = [(node, entry.id) for node in (QuantizedModelLoader, GGUFTextEncoderLoader, QuantizationReport, AttentionBackend, FusedKernels)
         for entry in node.GET_SCHEMA().inputs if isinstance(entry, io.Combo.Input)]


@pytest.mark.parametrize("value", [None, "x", []], ids=str)
@pytest.mark.parametrize(("node", "menu"), MENUS, ids=lambda value: getattr(value, "__name__", value))
def test_what_is_in_no_menu_is_a_sentence_from_a_script_too(node, menu, value, shelf):
    needed = {QuantizedModelLoader: {"model_name": "model.safetensors"}, GGUFTextEncoderLoader: {"text_encoder": "model.safetensors", "type": "flux"},
              QuantizationReport: dict.fromkeys(("model", "positive", "negative", "sampler", "sigmas", "latent_image"))}
    with torch.inference_mode(), pytest.raises(ValueError) as caught:
        node.execute(**{**needed.get(node, {"model": None}), menu: value})
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 400
    assert str(value) in sentence and re.search("choose|known: ", sentence)


@pytest.mark.parametrize("value", [None, 5, ["a"]], ids=str)
def test_patterns_that_are_no_text_are_a_sentence(value, shelf):
    with pytest.raises(ValueError, match=r"exclude is '.*'; a text of patterns was expected"):
        QuantizedModelLoader.execute("model.safetensors", exclude=value)


@pytest.mark.parametrize(("settings", "sentence"), [
    ({"exclude": None}, "exclude is 'None'; patterns"), ({"exclude": "img_in"}, "exclude is 'img_in'; patterns"),
    ({"exclude": (1,)}, r"exclude is '\(1,\)'; patterns"),
    ({"layers": None}, "layers is 'None'; a plan"), ({"layers": ["img_in"]}, r"layers is '.*img_in.*'; a plan")])
def test_settings_of_another_kind_are_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        Settings(**settings)


@pytest.mark.parametrize("kind", ["diffusion_models", "text_encoders"])
def test_a_link_that_leads_nowhere_is_told_as_such(kind, shelf):
    (shelf / "gone.safetensors").symlink_to(shelf / "nothing.safetensors")
    assert "gone.safetensors" in folders.model_files(kind)
    with pytest.raises(ValueError, match=f"'gone.safetensors' is a link in the folder {kind} that leads to no file; put the file back"):
        if kind == "diffusion_models":
            QuantizedModelLoader.execute("gone.safetensors")
        else:
            GGUFTextEncoderLoader.execute("gone.safetensors", "flux")


def test_a_reload_without_dynamic_memory_does_the_same_again(tmp_path):
    model, told = loaded(write("flux", "fp16", tmp_path / "model.safetensors"), compute="int8", exclude=("*linear2",))
    again, arguments = model.cached_patcher_init
    with torch.inference_mode():
        copy = again(*arguments, disable_dynamic=True)
    assert torch.equal(*(drawn("flux", patcher, 1, steps=4)[0] for patcher in (model, copy)))
    assert {name: type(weight) for name, weight in weights(model).items()} == {name: type(weight) for name, weight in weights(copy).items()}


def test_unloading_and_loading_leaves_the_weights_as_they_were(tmp_path):
    model, _ = loaded(write("flux", "fp16", tmp_path / "model.safetensors"), compute="int8")
    before = drawn("flux", model, 1, steps=4)[0]
    with torch.inference_mode():
        comfy.model_management.unload_all_models()
    assert torch.equal(before, drawn("flux", model.clone(), 1, steps=4)[0])


def test_the_line_under_the_node_tells_what_became_of_the_layers(tmp_path):
    _, told = loaded(write("flux", "bf16", tmp_path / "model.safetensors"), compute="int8")
    assert isinstance(told, Loaded)
    assert re.fullmatch(r"model\.safetensors: \d+ layers bf16 to int8, \d+ layers fp16 as stored; [\d.]+ s", told.line())


def test_a_whole_checkpoint_is_read_for_its_diffusion_model(tmp_path):
    tensors, _ = read("flux")
    save_file({f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()} | {"vae.x": torch.zeros(3)}, tmp_path / "whole.safetensors")
    whole, part = loaded(tmp_path / "whole.safetensors")[0], loaded(write("flux", "fp16", tmp_path / "model.safetensors"))[0]
    assert torch.equal(*(drawn("flux", patcher, 1, steps=4)[0] for patcher in (whole, part)))


def test_an_interrupt_in_the_middle_leaves_nothing_and_the_next_load_works(tmp_path, monkeypatch):
    path = write("flux", "fp16", tmp_path / "model.safetensors")
    calls = []

    def interrupted():
        calls.append(1)
        if len(calls) == 5:
            raise comfy.model_management.InterruptProcessingException
    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupted)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        loaded(path, compute="int8")
    assert loaded(path, compute="int8")[0] is not None


def test_the_format_asked_for_must_be_in_the_file(tmp_path):
    path = write("flux", "bf16", tmp_path / "model.safetensors")
    loaded(path, format="bf16")
    with pytest.raises(BadFile, match=r"'model.safetensors' has bf16, fp16, and nvfp4 was asked for; choose format auto"):
        loaded(path, format="nvfp4")


def test_every_format_of_the_menu_has_a_file_that_was_tried():
    untried = {"convrot_w4a4"}      # no reference but the host writes it
    safetensors = {name for name in known_formats() if not re.match(r"Q\d|SVDQuant|AWQ", name)}
    assert safetensors - untried == {form.partition(",")[0] for form in WRITERS}
    assert set(TARGETS) == {"stored", "int8", "fp8", "nvfp4", "full", "packed", "packed int8"}
