"""Saved models: the stock loader opens them without this pack, and they are what was in memory."""
import json

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from quantized import drawn, read, write
from safetensors import safe_open
from test_quantized_loader import loaded, lora, stock

from pack.core.quant import folders
from pack.core.quant.files import open_file
from pack.core.quant.formats import layers_of
from pack.core.quant.save import TRANSCODED, save
from pack.nodes.quantized import SaveQuantizedModel


def saved(model, path):
    with torch.inference_mode():
        save(model, path)
    return path


@pytest.mark.parametrize("compute", ["int8", "fp8", "host"])
@pytest.mark.parametrize("form", ["bf16", "float8_e4m3fn scaled", "int8_tensorwise, rotated"])
def test_the_stock_loader_opens_what_was_saved_and_draws_the_same_bits(form, compute, tmp_path):
    model, told = loaded(write("flux", form, tmp_path / "model.safetensors"), compute=compute)
    path = saved(model, tmp_path / "saved" / "out.safetensors")
    assert torch.equal(*(drawn("flux", patcher, 1, steps=4)[0] for patcher in (model, stock(path))))
    assert {layer: found.format for layer, found in layers_of(open_file(path))[0].items() if told.layers[layer] == "int8"} == {
        layer: "int8_tensorwise" for layer, target in told.layers.items() if target == "int8"}


def test_a_saved_z_image_keeps_the_metadata_that_tells_what_it_is(tmp_path):
    model, _ = loaded(write("z_image", "fp16", tmp_path / "model.safetensors"), compute="int8")
    path = saved(model, tmp_path / "out.safetensors")
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["config"] == read("z_image")[1]["config"]
        assert TRANSCODED not in file.metadata()


@pytest.mark.parametrize("compute", ["int8", "host"])
def test_a_lora_is_saved_with_the_model_once(compute, tmp_path):
    path = write("flux", "fp16", tmp_path / "model.safetensors")
    model, _ = loaded(path, compute=compute)
    with torch.inference_mode():
        changed = comfy.sd.load_lora_for_models(model, None, lora(stock(path)), 1.0, 0)[0]
    expected = drawn("flux", changed, 1, steps=4)[0]     # leaves the model loaded with the LoRA on it
    for count in range(2):
        again = stock(saved(changed, tmp_path / f"{count}.safetensors"))
        found = drawn("flux", again, 1, steps=4)[0]
        assert torch.equal(found, expected) if compute == "int8" else torch.allclose(found, expected, atol=0.02)


def test_nothing_half_written_stays_where_saving_fails(tmp_path, monkeypatch):
    model, _ = loaded(write("flux", "fp16", tmp_path / "model.safetensors"), compute="int8")

    def full(sd, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("pack.core.quant.save.save_file", full)
    with pytest.raises(ValueError, match=r"'out.safetensors' could not be written .*No space left.*; see that the disk has room"):
        saved(model, tmp_path / "out.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_model_that_is_not_on_its_device_is_saved_as_one_that_is(tmp_path, monkeypatch):
    path = write("flux", "bf16", tmp_path / "model.safetensors")
    files = []
    for count, load in enumerate((comfy.model_management.load_models_gpu, lambda models, **more: None)):
        monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
        model, _ = loaded(path, compute="int8")
        with torch.inference_mode():
            changed = comfy.sd.load_lora_for_models(model, None, lora(stock(path)), 1.0, 0)[0]
        files.append(saved(changed, tmp_path / f"{count}.safetensors").read_bytes())
    assert files[0] == files[1]


def test_the_tensors_are_those_that_the_host_saves_itself(tmp_path):
    model, told = loaded(write("flux", "bf16", tmp_path / "model.safetensors"), compute="int8")
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
        theirs = model.model_state_dict_for_saving(model.model.diffusion_model, "diffusion_model.")
    with safe_open(saved(model, tmp_path / "out.safetensors"), framework="pt") as file:
        assert set(file.keys()) == set(theirs)
        layer = next(name for name, target in told.layers.items() if target == "int8")
        assert json.loads(bytes(file.get_tensor(f"{layer}.comfy_quant").numpy()))["format"] == "int8_tensorwise"


@pytest.mark.parametrize("compute", ["int8", "host"])
@pytest.mark.parametrize("form", ["fp16", "bf16", "float8_e4m3fn", "float8_e4m3fn scaled"])
def test_what_was_not_changed_is_saved_in_the_type_and_with_the_bits_of_the_file(form, compute, tmp_path):
    path = write("flux", form, tmp_path / "model.safetensors")
    model, told = loaded(path, compute=compute)
    before, after = open_file(path).tensors, open_file(saved(model, tmp_path / "out.safetensors")).tensors
    turned = {layer for layer, target in told.layers.items() if target != "stored"}
    kept = [key for key in before if key.rpartition(".")[0] not in turned and before[key].is_floating_point()]
    assert len(kept) > 40
    for key in kept:
        assert after[key].dtype == before[key].dtype and torch.equal(after[key].float(), before[key].float()), key
    if compute == "host":
        assert (tmp_path / "out.safetensors").stat().st_size < 1.02 * path.stat().st_size


def test_what_a_lora_changed_is_saved_with_all_its_digits(tmp_path):
    path = write("flux", "fp16", tmp_path / "model.safetensors")
    model, _ = loaded(path, compute="host")
    with torch.inference_mode():
        patch = lora(stock(path))
        changed = comfy.sd.load_lora_for_models(model, None, patch, 1.0, 0)[0]
    after = open_file(saved(changed, tmp_path / "out.safetensors")).tensors
    layers = {key.removeprefix("diffusion_model.").replace(".lora_up", "") for key in patch if "lora_up" in key}
    assert {after[key].dtype for key in layers} == {model.model.diffusion_model.img_in.weight.dtype}
    assert {after[key].dtype for key in after if key not in layers} == {torch.float16}


@pytest.mark.parametrize("prefix", ["", ".", "..", "/", " ", "a/..", "./", None, 5])
def test_a_prefix_without_a_name_is_refused_and_nothing_is_written(prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="filename_prefix is '.*', which names no file; end it with a name, such as diffusion_models/reprise"):
        SaveQuantizedModel.execute(None, prefix)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prefix", ["a" * 300, "é" * 130, "a\0b", "file/x", "../x", "/tmp/x", "a/" * 5 + "b" * 250], ids=lambda prefix: prefix[:8])
def test_a_prefix_that_the_disk_cannot_have_is_one_sentence(prefix, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="the output folder cannot have such a file; choose another") as caught:
        SaveQuantizedModel.execute(None, prefix)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["file"]


def test_a_prefix_that_ends_in_a_slash_names_the_file_as_at_the_hosts_nodes(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    assert folders.output_path("a/b/") == tmp_path / "a" / "b_00001_.safetensors"
