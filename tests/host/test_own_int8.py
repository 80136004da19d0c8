"""Where comfy_kitchen has no fast int8 product and Reprise has, the loader's models use it: layers as the host's, products by the kernel."""
import comfy.sd
import pytest
import torch
from quantized import bench, nearness
from safetensors import safe_open
from torch.nn import functional as F

from pack.core.quant import loader, packed
from pack.core.quant.packed_ops import packed_ops
from pack.core.quant.plan import Settings
from pack.core.quant.save import save
from testbed import quantized

SUBJECT = bench.SUBJECTS[0]     # 256 wide: what the kernels rotate


@pytest.fixture(autouse=True)
def as_the_host_runs():
    with torch.inference_mode():
        yield


@pytest.fixture
def own(monkeypatch):
    """As on a GPU with a torch for CUDA 12 and Triton; counts the products."""
    calls = []
    real = packed.int8_linear
    monkeypatch.setattr(loader, "own_product", lambda device: True)
    monkeypatch.setattr(packed, "int8_linear", lambda *given, **more: (calls.append(given[0].shape), real(*given, **more))[1])
    return calls


def drawn(model, steps=8):
    caption, noise = next(SUBJECT.pictures())
    return bench.sample(model, caption, noise, steps, 1.0, "euler")


def loaded(path, **settings):
    told = []
    return loader.load(path, Settings(**settings), report=told.append), told[0]


@pytest.mark.parametrize("form", ["fp16", "int8_tensorwise, rotated"])
def test_every_int8_layer_of_every_evaluation_goes_through_the_kernel_and_the_picture_is_the_hosts(form, own, tmp_path, monkeypatch):
    if "rotated" in form:
        monkeypatch.setitem(quantized.WRITERS, form, lambda weight: quantized.int8(weight, 256))
    path = quantized.write(SUBJECT.file, form, tmp_path / "model.safetensors")
    model, told = loaded(path, compute="int8")
    picture = drawn(model)
    layers = [name for name, target in told.layers.items() if target == "int8" or told.formats[name] == "int8_tensorwise"]
    assert len(own) == 8 * len(layers) > 0
    monkeypatch.setattr(loader, "own_product", lambda device: False)
    host, _ = loaded(path, compute="int8")
    assert nearness([picture], [drawn(host)]) > 50 and len(own) == 8 * len(layers)


def test_nothing_is_in_the_way_of_models_without_int8_layers(own, tmp_path):
    path = quantized.write(SUBJECT.file, "fp16", tmp_path / "model.safetensors")
    model, _ = loaded(path, compute="host")
    assert torch.equal(drawn(model, 2), drawn(comfy.sd.load_diffusion_model(str(path)), 2)) and not own


def test_what_is_saved_is_the_hosts_int8_to_the_bit(own, tmp_path, monkeypatch):
    path = quantized.write(SUBJECT.file, "fp16", tmp_path / "model.safetensors")
    save(loaded(path, compute="int8")[0], tmp_path / "own.safetensors")
    monkeypatch.setattr(loader, "own_product", lambda device: False)
    save(loaded(path, compute="int8")[0], tmp_path / "host.safetensors")
    with safe_open(tmp_path / "own.safetensors", "pt") as ours, safe_open(tmp_path / "host.safetensors", "pt") as theirs:
        int8 = [key for key in theirs.keys() if theirs.get_tensor(key).dtype is torch.int8]      # noqa: SIM118
        assert int8 and set(ours.keys()) == set(theirs.keys()) and all(torch.equal(ours.get_tensor(key), theirs.get_tensor(key)) for key in int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("columns", "scalar"), [(512, False), (512, True), (80, False)])
def test_a_layer_gives_what_the_hosts_product_gives(dtype, columns, scalar, own):
    generator = torch.Generator().manual_seed(7)
    weight, x, bias = (torch.randn(shape, generator=generator) for shape in ((48, columns), (2, 5, columns), (48,)))
    made = quantized.int8(weight, 256 if columns % 256 == 0 else None)
    if scalar:
        made = {".weight": (weight / weight.abs().max() * 127).round().to(torch.int8), ".weight_scale": weight.abs().max() / 127,
                ".comfy_quant": quantized.mark(format="int8_tensorwise")}
    layers = []
    for flag in (True, False):
        layer = packed_ops(dtype, own=flag).Linear(columns, 48, device="cpu", dtype=dtype)
        layer.load_state_dict({end.removeprefix("."): part for end, part in made.items()} | {"bias": bias.to(dtype)}, strict=False)
        layers.append(layer)
    ours, theirs = (layer(x.to(dtype)) for layer in layers)
    true = F.linear(x, weight, bias)
    assert len(own) == 1 and ours.shape == true.shape and ours.dtype is dtype
    assert (ours.float() - true).norm() / true.norm() < 0.02
    assert (ours.float() - theirs.float()).norm() / true.norm() < (3e-3 if dtype is torch.float32 else 1e-2)
