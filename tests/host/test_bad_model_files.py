"""Model files that are not what they say: one sentence, no hang, nothing allocated beyond the file's size."""
import json
import struct

import comfy.sd
import pytest
import torch
from quantized import read, write
from safetensors.torch import save_file
from test_quantized_loader import loaded

from benchmarks import _flips
from pack.core.quant.files import BadFile

TENSORS = {f"double_blocks.{i}.x.weight": torch.randn(8, 8) for i in range(3)}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write("flux", "float8_e4m3fn scaled", tmp_path_factory.mktemp("good") / "good.safetensors").read_bytes()


def at(tmp_path, content: bytes, name="bad.safetensors"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def changed(tmp_path, change, form="float8_e4m3fn scaled"):
    """A file of the trained FLUX after `change` of its tensors."""
    from safetensors import safe_open

    with safe_open(write("flux", form, tmp_path / "model.safetensors"), framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()     # noqa: SIM118
    change(tensors)
    save_file(tensors, tmp_path / "bad.safetensors", metadata=metadata)
    return tmp_path / "bad.safetensors"


@pytest.mark.parametrize(("content", "sentence"), [
    (b"", "'bad.safetensors' has 0 bytes, which is no model file; download it again"),
    (b"abc", "has 3 bytes"),
    (b"\x80\x02}q\x00(X" + bytes(100), "neither a safetensors nor a GGUF file; other kinds of files can run code and are not opened"),
    (b"PK\x03\x04" + bytes(100), "neither a safetensors nor a GGUF file"),
    (struct.pack("<Q", 1 << 40) + b"{}", "neither a safetensors nor a GGUF file"),
    (struct.pack("<Q", 5000) + b'{"a":1}', "is not a whole safetensors file"),
    (struct.pack("<Q", 7) + b'{"a":1}', "is not a whole safetensors file"),
    (struct.pack("<Q", 2) + b"{}", "is no diffusion model that ComfyUI knows; its first tensors are none"),
])
def test_what_is_no_model_file_is_one_sentence(content, sentence, tmp_path):
    with pytest.raises(BadFile) as told:
        loaded(at(tmp_path, content))
    assert sentence in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_a_truncated_file_is_told_as_such(share, good, tmp_path):
    with pytest.raises(BadFile, match="not a whole safetensors file .*; download it again"):
        loaded(at(tmp_path, good[:int(len(good) * share)]))


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(BadFile, match=r"'nothing\.safetensors' cannot be read: No such file"):
        loaded(tmp_path / "nothing.safetensors")


def test_another_kind_of_model_is_named_by_its_first_tensors(tmp_path):
    save_file({"encoder.layer.0.weight": torch.zeros(4, 4), "embeddings.weight": torch.zeros(9, 4)}, tmp_path / "bert.safetensors")
    with pytest.raises(BadFile, match="'bert.safetensors' is no diffusion model .* first tensors are embeddings.weight, encoder.layer.0.weight"):
        loaded(tmp_path / "bert.safetensors")


LAYER = "single_blocks.0.linear1"
BAD_LAYERS = {
    "a scale that is missing": (
        lambda t: t.pop(f"{LAYER}.weight_scale"), "float8_e4m3fn scaled", f"layer '{LAYER}' is stored as float8_e4m3fn and lacks its weight_scale"),
    "an old scale that is missing": (
        lambda t: t.pop(f"{LAYER}.scale_weight"), "float8_e4m3fn scaled, old spelling", f"says that its fp8 weights have scales, and '{LAYER}' has none"),
    "a scale that is no number": (
        lambda t: t.update({f"{LAYER}.scale_weight": torch.tensor(float("nan"))}), "float8_e4m3fn scaled, old spelling", "is no single finite number"),
    "scales that do not fit": (
        lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(7, 1)}), "int8_tensorwise, rotated", "and 7 scales do not fit"),
    "a scale of int8 that is no number": (
        lambda t: t[f"{LAYER}.weight_scale"].view(-1)[3:4].fill_(float("inf")), "int8_tensorwise, rotated", "weight_scale has values that are no numbers"),
    "a scale of fp8 that is no number": (
        lambda t: t[f"{LAYER}.weight_scale"].fill_(float("nan")), "float8_e4m3fn scaled", "weight_scale has values that are no numbers"),
    "a scale of blocks that is no number": (
        lambda t: t[f"{LAYER}.weight_scale"].view(torch.uint8).view(-1)[5:6].fill_(127), "nvfp4", "weight_scale has values that are no numbers"),
    "a mark that is no text": (
        lambda t: t.update({f"{LAYER}.comfy_quant": torch.frombuffer(bytearray(b'{"format": ["int8"]}'), dtype=torch.uint8)}), "int8_tensorwise",
        "which this ComfyUI does not know"),
    "weights that are whole numbers": (
        lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].long()}), "fp16", "holds int64, and its model has fractions there"),
    "an unknown format": (
        lambda t: t.update({f"{LAYER}.comfy_quant": torch.frombuffer(bytearray(b'{"format": "int5"}'), dtype=torch.uint8)}), "int8_tensorwise",
        f"layer '{LAYER}' is stored as 'int5', which this ComfyUI does not know"),
    "a mark that is no JSON": (
        lambda t: t.update({f"{LAYER}.comfy_quant": torch.zeros(9, dtype=torch.uint8)}), "int8_tensorwise", "is not JSON"),
    "a rotation that cannot be": (
        lambda t: t.update({f"{LAYER}.comfy_quant": torch.frombuffer(bytearray(
            json.dumps({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 100}).encode()), dtype=torch.uint8)}), "int8_tensorwise",
        "says it is rotated in groups of 100"),
    "a layer that is missing": (
        lambda t: [t.pop(key) for key in list(t) if key.startswith(f"{LAYER}.")], "float8_e4m3fn scaled", f"the first is '{LAYER}.weight'; it is not whole"),
    "a layer of another width": (
        lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:, :64].contiguous()}), "fp16",
        f"'{LAYER}.weight' is (896, 64), and its model has (896, 128)"),
}


@pytest.mark.parametrize("fault", BAD_LAYERS)
def test_a_layer_that_cannot_be_is_named(fault, tmp_path):
    change, form, sentence = BAD_LAYERS[fault]
    with pytest.raises(BadFile) as told:
        loaded(changed(tmp_path, change, form))
    assert sentence in str(told.value), told.value


def test_an_error_is_one_line_of_bounded_length_whatever_names_a_file_has(tmp_path):
    for name in ("a" * 40_000, "a\n\0b", "\u202egnp.x"):
        save_file({f"{name}.weight": torch.zeros(4, 4)}, tmp_path / "odd.safetensors")
        with pytest.raises(BadFile) as told:
            loaded(tmp_path / "odd.safetensors")
        assert len(str(told.value)) < 520 and str(told.value).isprintable()


def test_no_network_larger_than_the_file_is_built(tmp_path, monkeypatch):
    """A header whose shapes ask for a huge network, of tensors that hold next to nothing."""
    tensors, metadata = read("flux")
    tensors["img_in.weight"] = torch.zeros(1 << 20, 4, dtype=torch.float16)      # a width of a million
    save_file(tensors, tmp_path / "huge.safetensors", metadata=metadata)
    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", lambda *args, **more: pytest.fail("the host was asked to build it"))
    with pytest.raises(BadFile, match="'huge.safetensors'"):
        loaded(tmp_path / "huge.safetensors")


@pytest.mark.parametrize("form", _flips.FILES)
def test_flipped_bytes_in_a_header_are_an_error_or_what_the_header_now_says(form, tmp_path):
    """A sample; `bench quant --flips` tries 10 000."""
    assert not _flips.wrong(_flips.FILES[form](tmp_path), tmp_path, count=150)
