"""GGUF files: what is read, what is refused, and that no header can hang the server or fill its memory."""
import resource
import struct
import sys
import time
import tracemalloc

import comfy.supported_models
import gguf
import numpy as np
import pytest
import torch

from pack.core.knob import shown
from pack.core.quant.blocks import TYPES, values
from pack.core.quant.files import BadFile, open_file
from pack.core.quant.formats import layers_of
from pack.core.quant.gguf_file import ANY, ARCHITECTURES, expect_architecture, refuse_text_model, strange_architecture
from testbed.gguf_files import K_QUANTS, block, encoded, write

# relative L2 error of Gaussian weights: what the format allows, and no more than a tenth above it
ERROR = {"Q8_0": 0.006, "Q6_K": 0.021, "Q5_K": 0.038, "Q5_1": 0.042, "Q5_0": 0.045, "Q4_K": 0.079, "Q4_1": 0.085, "Q4_0": 0.095, "Q3_K": 0.18, "Q2_K": 0.34}


def weights(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def off(got, wanted) -> float:
    got, wanted = (torch.as_tensor(x).double() for x in (got, wanted))
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("type", K_QUANTS)
def test_the_encoder_of_these_tests_writes_what_the_package_reads(type):
    x = weights(6, 1024)
    assert off(gguf.quants.dequantize(encoded(x, type), gguf.GGMLQuantizationType[type]), x) < ERROR[type]


@pytest.mark.parametrize("type", TYPES)
def test_every_type_is_read_as_the_package_reads_it(type, tmp_path):
    x = weights(5, 3 * block(type), seed=1)
    file = open_file(write(tmp_path / "model.gguf", {"a.weight": (x, type), "norm.weight": x[0]}))
    layers, left = layers_of(file)
    layer = layers["a"]
    assert (file.container, file.metadata["general.architecture"]) == ("gguf", "flux")
    assert layer.format == type and layer.shape == x.shape and layer.nbytes == encoded(x, type).nbytes
    wanted = torch.from_numpy(gguf.quants.dequantize(encoded(x, type), gguf.GGMLQuantizationType[type]))
    assert torch.equal(layer.rows(0, 5), wanted) and torch.equal(layer.rows(2, 4), wanted[2:4])
    assert off(wanted, x) < ERROR[type]
    assert torch.equal(left["norm.weight"], torch.from_numpy(x[0]))


def test_floats_are_read_to_the_bit(tmp_path):
    x = weights(4, 64)
    file = open_file(write(tmp_path / "model.gguf", {"a.weight": x, "b.weight": x.astype(np.float16), "c.weight": (x, "BF16"), "d": x.reshape(2, 2, 8, 8)}))
    x = torch.from_numpy(x)
    for key, wanted in {"a.weight": x, "b.weight": x.half(), "c.weight": x.bfloat16(), "d": x.reshape(2, 2, 8, 8)}.items():
        assert file.tensors[key].dtype == wanted.dtype and torch.equal(file.tensors[key], wanted)
    assert {name: layer.format for name, layer in layers_of(file)[0].items()} == {"a": "fp32", "b": "fp16", "c": "bf16"}


@pytest.mark.parametrize("type", ("Q8_0", "Q4_K"))
def test_what_is_no_layer_is_unpacked_in_its_own_shape(type, tmp_path):
    x = weights(8, 512)
    file = open_file(write(tmp_path / "model.gguf", {"conv.weight": (x, type), "b.bias": (x[0], type)},
                           settings=[("add_array", "comfy.gguf.orig_shape.conv.weight", [64, 4, 4, 4])]))
    layers, left = layers_of(file)
    assert not layers and left["conv.weight"].shape == (64, 4, 4, 4) and left["b.bias"].shape == (512,)
    assert torch.equal(left["conv.weight"].reshape(8, 512), values(torch.from_numpy(encoded(x, type)), type))


def test_a_vocabulary_is_passed_over(tmp_path):
    words = [f"word {i}" for i in range(150_000)]
    path = write(tmp_path / "model.gguf", {"a.weight": weights(2, 32)}, "qwen3", [("add_token_list", words), ("add_token_scores", [0.0] * len(words))])
    began = time.perf_counter()
    file = open_file(path)
    assert time.perf_counter() - began < 2 and "tokenizer.ggml.tokens" not in file.metadata
    assert torch.equal(file.tensors["a.weight"], torch.from_numpy(weights(2, 32)))


def test_a_write_to_a_weight_does_not_reach_the_file(tmp_path):
    path = write(tmp_path / "model.gguf", {"a.weight": weights(2, 32)})
    before = path.read_bytes()
    open_file(path).tensors["a.weight"].zero_()
    assert path.read_bytes() == before


# refused ---------------------------------------------------------------------------------------------------------------
def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def setting(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(name=b"a", dims=(32,), type=0, offset=0) -> bytes:
    return text(name) + struct.pack("<I", len(dims)) + b"".join(struct.pack("<Q", d) for d in dims) + struct.pack("<IQ", type, offset)


def file_of(tmp_path, settings=(), infos=(), *, version=3, counts=None, data=b"\0" * 4096, magic=b"GGUF"):
    head = magic + struct.pack("<I", version) + struct.pack("<QQ", *(counts or (len(infos), len(settings)))) + b"".join(settings) + b"".join(infos)
    path = tmp_path / "bad.gguf"
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


NESTED = struct.pack("<IQ", 9, 1)
BAD = {
    "big-endian": (dict(version=3 << 24), "big-endian"),
    "version 1": (dict(version=1), "version 1"),
    "huge tensor count": (dict(counts=(1 << 60, 0)), "tensors"),
    "huge setting count": (dict(counts=(0, 1 << 60)), "settings"),
    "more tensors than there are": (dict(counts=(9999, 0), data=b""), "ends within"),
    "long name": (dict(settings=[struct.pack("<Q", 1 << 62)]), "bytes long"),
    "no UTF-8": (dict(settings=[setting(b"\xff\xfe", 4, b"\0" * 4)]), "UTF-8"),
    "setting twice": (dict(settings=[setting(b"x", 4, b"\0" * 4)] * 2), "twice"),
    "setting of the reader": (dict(settings=[setting(b"GGUF.version", 4, b"\0" * 4)]), "twice"),
    "setting of no type": (dict(settings=[setting(b"x", 77, b"")]), "type 77"),
    "list beyond the file": (dict(settings=[setting(b"x", 9, struct.pack("<IQ", 10, 1 << 61))]), "ends within"),
    "list of endless texts": (dict(settings=[setting(b"x", 9, struct.pack("<IQ", 8, 1 << 40))]), "texts"),
    "texts beyond the file": (dict(settings=[setting(b"x", 9, struct.pack("<IQQ", 8, 3, 1 << 63))]), "ends within"),
    "lists in lists": (dict(settings=[setting(b"x", 9, NESTED * 2000)]), "entries of type 9"),
    "alignment 3": (dict(settings=[setting(b"general.alignment", 4, struct.pack("<I", 3))]), "power of two"),
    "alignment 0": (dict(settings=[setting(b"general.alignment", 4, struct.pack("<I", 0))]), "power of two"),
    "alignment as text": (dict(settings=[setting(b"general.alignment", 8, text(b"32"))]), "power of two"),
    "alignment as list": (dict(settings=[setting(b"general.alignment", 9, struct.pack("<IQI", 4, 1, 32))]), "power of two"),
    "five dimensions": (dict(infos=[info(dims=(2,) * 5)]), "5 dimensions"),
    "dimension 0": (dict(infos=[info(dims=(0, 4))]), "no shape"),
    "dimensions that overflow": (dict(infos=[info(dims=(1 << 32, 1 << 32))]), "no shape"),
    "dimension of 2^63": (dict(infos=[info(dims=(1 << 63,))]), "no shape"),
    "unknown type": (dict(infos=[info(type=12345)]), "type 12345"),
    "type that is not read": (dict(infos=[info(dims=(256,), type=23)]), "IQ4_XS"),
    "no whole block": (dict(infos=[info(dims=(48, 2), type=8)]), "blocks of 32"),
    "offset off the grid": (dict(infos=[info(offset=4)]), "multiple of 32"),
    "offset beyond the file": (dict(infos=[info(offset=1 << 40)]), "not whole"),
    "tensor beyond the file": (dict(infos=[info(dims=(4096,))]), "not whole"),
    "tensors over each other": (dict(infos=[info(b"a", (64,)), info(b"b", (8,), offset=128)]), "over each other"),
    "one name twice": (dict(infos=[info(b"a"), info(b"a", offset=128)]), "one name"),
    "shape of other size": (dict(settings=[setting(b"comfy.gguf.orig_shape.a", 9, struct.pack("<IQII", 4, 2, 5, 5))], infos=[info()]), "was [5, 5]"),
    "shape below zero": (dict(settings=[setting(b"comfy.gguf.orig_shape.a", 9, struct.pack("<IQii", 5, 2, -4, -8))], infos=[info()]), "no shape"),
    "shape of floats": (dict(settings=[setting(b"comfy.gguf.orig_shape.a", 9, struct.pack("<IQff", 6, 2, 4, 8))], infos=[info()]), "no shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_header_is_refused_in_a_sentence_at_once(case, tmp_path):
    given, said = BAD[case]
    path = file_of(tmp_path, **given)
    open_file(write(tmp_path / "good.gguf", {"a.weight": weights(2, 32)}))      # imports are no part of what is measured
    tracemalloc.start()
    began = time.perf_counter()
    with pytest.raises(BadFile) as caught:
        open_file(path)
    took, peak = time.perf_counter() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert said in str(caught.value) and "bad.gguf" in str(caught.value) and "\n" not in str(caught.value)
    assert took < 1 and peak < 1 << 20


def test_the_good_twin_of_the_bad_headers_is_read(tmp_path):
    settings, infos = [setting(b"x", 9, struct.pack("<IQQ", 8, 1, 0)), setting(b"y", 7, b"\1")], [info(), info(b"b", (2, 4), 1, 128)]
    file = open_file(file_of(tmp_path, settings, infos))
    assert {key: tuple(tensor.shape) for key, tensor in file.tensors.items()} == {"a": (32,), "b": (4, 2)} and file.metadata == {"y": "True"}


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    whole = write(tmp_path / "model.gguf", {"a.weight": (weights(4, 256), "Q4_K"), "b.bias": weights(32)}).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 400, 7), *range(400, len(whole) - 31, 97), len(whole) - 32]:
        path.write_bytes(whole[:length])
        with pytest.raises(BadFile):
            open_file(path)


def test_without_the_package_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    path = write(tmp_path / "model.gguf", {"a.weight": weights(2, 32)})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(BadFile, match="pip install gguf"):
        open_file(path)


def test_text_models_and_diffusion_models_are_told_apart(tmp_path):
    text_model = open_file(write(tmp_path / "text.gguf", {"token_embd.weight": weights(2, 32)}, "qwen3"))
    liar = open_file(write(tmp_path / "liar.gguf", {"a.weight": weights(2, 32)}, "qwen3"))
    picture = open_file(write(tmp_path / "model.gguf", {"a.weight": weights(2, 32)}, "lumina2"))
    with pytest.raises(BadFile, match="GGUF Text Encoder Loader"):
        refuse_text_model(text_model)
    refuse_text_model(picture)
    refuse_text_model(liar)     # its tensors decide
    assert strange_architecture(liar, "lumina2") == "the file says it is 'qwen3' and its tensors are those of lumina2, as which it was loaded"
    with pytest.raises(BadFile, match="'lumina2', and a text encoder"):
        expect_architecture(picture, ("t5", "qwen3"), "a text encoder", "load it with Quantized Model Loader")


SCALES = {"Q8_0": {0: "d"}, "Q4_0": {0: "d"}, "Q5_0": {0: "d"}, "Q4_1": {0: "d", 2: "m"}, "Q5_1": {0: "d", 2: "m"}, "Q4_K": {0: "d", 2: "dmin"},
          "Q5_K": {0: "d", 2: "dmin"}, "Q6_K": {208: "d"}, "Q3_K": {108: "d"}, "Q2_K": {80: "d", 82: "dmin"}}     # ggml's structs: byte -> fp16 field


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize(("type", "at"), [(type, at) for type in TYPES for at in SCALES[type]])
@pytest.mark.parametrize("key", ["double_blocks.0.img_attn.qkv.weight", "norm.bias"])
def test_a_block_whose_scale_is_no_number_is_refused_with_its_layer(key, type, at, value, tmp_path):
    blocks = encoded(weights(4, 3 * block(type)) if key.endswith("weight") else weights(3 * block(type)), type)
    layers_of(open_file(write(tmp_path / "good.gguf", {key: (blocks, type)})))
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]][1]
    for index in (1, 2):
        blocks.reshape(-1, size)[index, at:at + 2] = np.array([value], np.float16).view(np.uint8)
    with pytest.raises(BadFile) as caught:
        layers_of(open_file(write(tmp_path / "bad.gguf", {"a.weight": (weights(2, 256), type), key: (blocks, type)})))
    assert str(caught.value) == (
        f"'bad.gguf': '{key}' is stored as {type}, and 2 of its blocks have scales that are no numbers; download the file again")


@pytest.mark.parametrize("type", TYPES)
def test_largest_scales_and_whatever_numbers_lie_beside_them_are_read(type, tmp_path):
    """All bytes are tried but those of the scales, which are the largest that fp16 holds."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]][1]
    blocks = np.random.default_rng(2).integers(0, 256, (64, size), np.uint8)
    blocks[:8] = 255
    for at in SCALES[type]:
        blocks[:, at:at + 2] = np.array([-65504], np.float16).view(np.uint8)
    layers, _ = layers_of(open_file(write(tmp_path / "model.gguf", {"a.weight": (blocks, type)})))
    assert layers["a"].rows(0, 64).isfinite().all()


@pytest.mark.parametrize("told", ["sd1", "zzz", "wan", "z" * 500, "two\nlines"])
def test_a_file_that_says_it_is_another_model_is_told_as_such(told, tmp_path):
    file = open_file(write(tmp_path / "model.gguf", {"a.weight": weights(2, 32)}, told))
    said = shown(told.replace("\n", " "))
    assert strange_architecture(file, "flux") == f"the file says it is '{said}' and its tensors are those of flux, as which it was loaded"
    assert "of a UNet" in strange_architecture(file, "") or told == "sd1"


@pytest.mark.parametrize(("told", "family"), [(told, family) for told, families in ARCHITECTURES.items() for family in families])
def test_a_name_that_files_for_comfyui_have_is_no_remark(told, family, tmp_path):
    known = {config.unet_config.get("image_model", "") for config in comfy.supported_models.models} | {"sd3"}
    assert family in known
    for name in (told, told.upper(), told.replace("_", "-"), family or told, ANY):
        assert not strange_architecture(open_file(write(tmp_path / "model.gguf", {"a.weight": weights(2, 32)}, name)), family)


def test_a_file_that_does_not_say_what_it_is_is_no_remark(tmp_path):
    assert not strange_architecture(open_file(file_of(tmp_path, (), [info()])), "flux")


# hostile ---------------------------------------------------------------------------------------------------------------
def check_flips(tmp_path, count: int) -> tuple[int, float]:
    """Flips bytes of a header, one to four at a time. Returns how many files were read and the longest time."""
    from pack.core.quant.gguf_header import read_header

    x = weights(3, 256)
    whole = bytearray(write(tmp_path / "model.gguf", {
        "a.weight": (x, "Q4_K"), "b.weight": (x, "Q8_0"), "c.weight": x.astype(np.float16), "d.bias": x[0], "e.weight": (x, "BF16")},
        settings=[("add_token_list", ["a", "b"]), ("add_array", "comfy.gguf.orig_shape.c.weight", [3, 16, 16]), ("add_uint32", "x", 7)]).read_bytes())
    sizes = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    header = min(info.offset for info in read_header(bytes(whole), "x", sizes).infos)
    chance, path, read, longest = np.random.default_rng(3), tmp_path / "flipped.gguf", 0, 0.0
    for _ in range(count):
        flipped = bytearray(whole)
        for at in chance.integers(0, header, chance.integers(1, 5)):
            flipped[at] = chance.integers(0, 256) if chance.random() < 0.7 else chance.choice([0, 1, 0x7f, 0x80, 0xff])
        path.write_bytes(flipped)
        began = time.perf_counter()
        try:
            file = open_file(path)
            layers, left = layers_of(file)
        except BadFile as error:
            assert len(str(error)) < 600
        else:
            read += 1
            by_package = gguf.GGUFReader(path)          # which says what the header now says
            assert {tensor.name for tensor in by_package.tensors} == {*file.tensors, *file.packed}
            for tensor in by_package.tensors:
                got = file.tensors[tensor.name] if tensor.name in file.tensors else file.packed[tensor.name].bytes
                assert got.contiguous().view(torch.uint8).numpy().tobytes() == np.asarray(tensor.data).tobytes()
        longest = max(longest, time.perf_counter() - began)
    return read, longest


def test_flipped_bytes_in_a_header_are_an_error_or_what_the_header_now_says(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read, longest = check_flips(tmp_path, 1500)
    assert 50 < read < 1450 and longest < 2
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 64 << 10     # KiB
