"""Layers that stay packed: what they compute, how the host moves, patches and saves them."""
from types import SimpleNamespace

import comfy.lora
import comfy.memory_management
import comfy.model_patcher
import comfy.utils
import comfy.weight_adapter
import numpy as np
import pytest
import safetensors.torch
import torch
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter.bypass import BypassInjectionManager
from torch.nn import functional as F

from pack.core.quant import blocks, packed
from pack.core.quant.files import Blocks
from pack.core.quant.machine import Route
from pack.core.quant.packed import pack
from pack.core.quant.packed_ops import is_packed, packed_ops
from testbed.gguf_files import TYPES, block, encoded

N, K = 48, 512
COMPUTE = ("int8", "decode")


def found(type="Q4_K", rows=N, columns=K, seed=0, tails=True):
    """A layer with a few weights far from the rest, as trained ones have."""
    x = np.random.default_rng(seed).standard_normal((rows, columns), np.float32) * 0.05
    if tails:
        x[:, ::61] *= 6
    return Blocks(type, (rows, columns), torch.from_numpy(encoded(x, type)))


def values(blocks_):
    return blocks.values(blocks_.bytes, blocks_.type)


def off(got, wanted) -> float:
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm() / wanted.norm())


def inputs(*shape, seed=5, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(autouse=True)
def as_the_host_runs():
    """Nodes and samplers run in inference mode; a model that was made outside of it cannot be moved within."""
    with torch.inference_mode():
        yield


class Net(torch.nn.Module):
    def __init__(self, ops, names=("a", "b"), columns=K):
        super().__init__()
        self.diffusion_model = torch.nn.ModuleDict({name: ops.Linear(columns, N, bias=name == "a", dtype=torch.float32, device="cpu") for name in names})

    def forward(self, x):
        return sum(layer(x) for layer in self.diffusion_model.values())


def net(compute, type="Q4_K", dtype=torch.float32):
    ops = packed_ops(dtype)
    model = Net(ops)
    weights = {f"diffusion_model.{name}.weight": pack(found(type, seed=seed), dtype, compute) for seed, name in enumerate("ab")}
    missing, unexpected = model.load_state_dict(weights | {"diffusion_model.a.bias": inputs(N)}, strict=False)
    assert not missing and not unexpected
    return model.requires_grad_(False).eval()


def patcher(model):
    return comfy.model_patcher.ModelPatcher(model, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


# products --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("type", TYPES)
def test_decoded_products_are_those_of_the_decoded_weight(type, dtype):
    columns = 3 * block(type)
    layer, x = found(type, columns=columns), inputs(2, 5, columns, dtype=dtype)
    wanted = F.linear(x, values(layer).to(dtype))
    assert torch.equal(F.linear(x, pack(layer, dtype, "decode")), wanted)


@pytest.mark.parametrize("type", TYPES)
def test_int8_codes_are_within_the_stated_error_of_the_blocks(type):
    layer = found(type, rows=64, columns=1024)
    weight = pack(layer, torch.float32, "int8")
    codes = blocks.codes(weight._qdata, type, weight._params.scale, weight._params.group)
    back = torch.ops.comfy_kitchen.dequantize_int8_convrot_weight_dtype(codes, weight._params.scale, weight._params.group, 0)
    assert weight._params.group == 256 and 0.004 < off(back, values(layer)) < 0.0095
    assert float(codes.abs().amax(1).min()) == 127      # the scales use the whole range


@pytest.mark.parametrize("columns", (32, 64, 96, 256, 320, 768))
def test_int8_products_stay_near_the_decoded_ones_at_every_rotation(columns):
    layer, x = found("Q8_0", columns=columns), inputs(3, 7, columns)
    x[..., ::13] *= 20
    got = F.linear(x, pack(layer, torch.float32, "int8"), inputs(N))
    assert off(got, F.linear(x, values(layer), inputs(N))) < (0.015 if columns >= 256 else 0.03)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_where_comfy_kitchen_has_no_fast_int8_product_the_packs_own_gives_the_same(dtype, monkeypatch):
    layer, x = found(), inputs(2, 5, K, dtype=dtype)
    theirs = pack(layer, dtype, "int8")
    monkeypatch.setattr(packed, "capabilities", lambda device: SimpleNamespace(int8=Route("Reprise's Triton kernel", True)))
    packed.own_product.cache_clear()
    ours = pack(layer, dtype, "int8")
    packed.own_product.cache_clear()
    assert ours._params.own and not theirs._params.own
    got, wanted = (F.linear(x, weight, inputs(N, dtype=dtype)) for weight in (ours, theirs))
    true = F.linear(x.float(), values(layer), inputs(N, dtype=dtype).float())
    assert got.dtype == dtype and off(got, wanted) < (1e-4 if dtype == torch.float32 else 0.01)     # comfy_kitchen rotates and divides in bf16
    assert off(got, true) < 1.05 * off(wanted, true) < 0.02


@pytest.mark.parametrize("compute", COMPUTE)
def test_products_are_the_same_with_gradients_on_where_linear_is_taken_apart(compute):
    wanted = F.linear(inputs(4, K), pack(found(), torch.float32, compute), inputs(N))
    with torch.inference_mode(False), torch.no_grad():
        weight, x = pack(found(), torch.float32, compute), inputs(4, K)
        assert torch.equal(F.linear(x, weight, inputs(N)), wanted)
        assert torch.equal(torch.mm(x, weight.t()) + inputs(N), F.linear(x, weight) + inputs(N))
        assert torch.equal(weight.t().t().dequantize(), weight.dequantize())


# the host moves them ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compute", COMPUTE)
def test_a_packed_weight_survives_what_the_host_does_with_weights(compute):
    weight = pack(found(), torch.bfloat16, compute)
    wanted = weight.dequantize()
    for same in (weight.clone(), weight.detach(), weight.to("cpu", copy=True), weight.contiguous(), torch.empty_like(weight).copy_(weight),
                 torch.nn.Parameter(weight, requires_grad=False)):
        assert is_packed(same) and same._params.compute == compute and torch.equal(same.dequantize(), wanted)
    assert weight.to(torch.float32).dequantize().dtype == torch.float32
    assert weight.nbytes == N * K * 144 // 256


@pytest.mark.parametrize("compute", COMPUTE)
def test_dynamic_memory_streams_a_packed_weight_through_a_buffer(compute):
    weight, bias = pack(found(), torch.bfloat16, compute), inputs(N)
    geometry = comfy.memory_management.tensors_to_geometries([weight, bias])
    size = comfy.memory_management.vram_aligned_size([weight, bias])
    assert size < N * K * 144 // 256 + 8192
    buffer = torch.full((size,), 0xff, dtype=torch.uint8)
    for view, tensor in zip(comfy.memory_management.interpret_gathered_like([weight, bias], buffer), (weight, bias), strict=True):
        view.copy_(tensor)
    moved, moved_bias = comfy.memory_management.interpret_gathered_like(geometry, buffer)
    x = inputs(3, K, dtype=torch.bfloat16)
    assert torch.equal(F.linear(x, moved), F.linear(x, weight)) and torch.equal(moved_bias, bias)


@pytest.mark.parametrize("compute", COMPUTE)
def test_a_model_computes_the_same_loaded_whole_in_part_and_not_at_all(compute):
    model, x = net(compute), inputs(2, 3, K)
    wanted = model(x)
    whole = patcher(model)
    whole.load(torch.device("cpu"), full_load=True)
    assert torch.equal(model(x), wanted)
    whole.detach()
    part = patcher(model)
    part.load(torch.device("cpu"), lowvram_model_memory=1)
    assert model.model_lowvram and torch.equal(model(x), wanted)
    part.detach()
    assert off(wanted, sum(F.linear(x, values(found(seed=seed))) for seed in (0, 1)) + inputs(N)) < 0.015


def test_the_host_counts_the_bytes_that_are_there():
    for compute in COMPUTE:
        size = comfy.model_management.module_size(net(compute))
        assert 2 * N * K * 144 // 256 < size < 2 * N * K * 144 // 256 + 2000


def test_torch_compile_gives_the_same_bits():
    for compute in COMPUTE:
        model, x = net(compute), inputs(2, 3, K)
        assert torch.equal(torch.compile(model, backend="eager")(x), model(x))


def test_a_weight_of_another_shape_is_an_error_of_the_load():
    model = Net(packed_ops(torch.float32))
    with pytest.raises(RuntimeError, match="has the shape"):
        model.load_state_dict({"diffusion_model.a.weight": pack(found(rows=N + 1), torch.float32, "decode")}, strict=False)


def test_weights_that_are_not_packed_keep_the_type_of_the_file():
    layer = packed_ops(torch.bfloat16).Linear(8, 4, bias=False)
    layer.load_state_dict({"weight": inputs(4, 8)})
    assert layer.weight.dtype == torch.float32
    x = inputs(3, 8, dtype=torch.bfloat16)
    assert torch.equal(layer(x), F.linear(x, layer.weight.to(torch.bfloat16)))


# LoRA ------------------------------------------------------------------------------------------------------------------
def lora(rows=N, columns=K, rank=4, seed=9, alpha=2.0, strength=0.05, reshape=None):
    up, down = inputs(rows, rank, seed=seed) * strength, inputs(rank, columns, seed=seed + 1) * strength
    return comfy.weight_adapter.LoRAAdapter(set(), (up, down, alpha, None, None, reshape))


def change(adapter, strength=1.0):
    up, down, alpha, *_ = adapter.weights
    return up @ down * (alpha / down.shape[0]) * strength


@pytest.mark.parametrize("compute", COMPUTE)
def test_a_baked_lora_makes_int8_with_rotation_and_comes_off_again(compute):
    model, x = net(compute), inputs(2, 3, K)
    adapter = lora()
    before = model(x)
    plain = patcher(model)
    plain.add_patches({"diffusion_model.a.weight": adapter}, 0.7)
    plain.load(torch.device("cpu"), full_load=True)
    a, b = model.diffusion_model["a"], model.diffusion_model["b"]
    assert a.layout_type == "TensorWiseINT8Layout" and a.weight._params.convrot and is_packed(b.weight)
    wanted = values(found(seed=0)) + change(adapter, 0.7)
    assert off(a.weight.dequantize(), wanted) < 0.013           # stochastic rounding, as the host asks for
    assert off(model(x), F.linear(x, wanted, inputs(N)) + F.linear(x, values(found(seed=1)))) < 0.02
    plain.unpatch_model(torch.device("cpu"))
    assert is_packed(a.weight) and torch.equal(model(x), before)


@pytest.mark.parametrize("compute", COMPUTE)
def test_a_lora_in_part_loaded_models_is_exact(compute):
    model, x, adapter = net(compute), inputs(2, 3, K), lora()
    part = patcher(model)
    part.add_patches({"diffusion_model.a.weight": adapter}, 0.7)
    part.load(torch.device("cpu"), lowvram_model_memory=1)
    got = model.diffusion_model["a"](x)
    assert off(got, F.linear(x, values(found()) + change(adapter, 0.7), inputs(N))) < 1e-6


class Dynamic:
    """Stands for the host's patch under dynamic memory, set on a layer as ModelPatcherDynamic sets it."""

    def __init__(self, layer, patches):
        owner = patcher(torch.nn.ModuleDict({"layer": layer}))
        owner.add_patches(patches)
        self.patch = comfy.model_patcher.LowVramPatch("layer.weight", owner.patches)
        layer.weight_lowvram_function = self.patch


ADAPTERS = {
    "plain": ({"layer.weight": lora()}, lambda w: w + change(lora())),
    "of some rows": ({("layer.weight", (0, 16, 32)): lora(rows=32)}, lambda w: w + F.pad(change(lora(rows=32)), (0, 0, 16, 0))),
    "of some columns": ({("layer.weight", (1, 256, 256)): lora(columns=256)}, lambda w: w + F.pad(change(lora(columns=256)), (256, 0))),
    "difference": ({"layer.weight": (inputs(N, K) * 0.01,)}, lambda w: w + inputs(N, K) * 0.01),
}


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("name", ADAPTERS)
def test_under_dynamic_memory_a_patch_is_put_on_at_each_call_and_never_written_back(name, compute):
    patches, changed = ADAPTERS[name]
    layer, x = net(compute).diffusion_model["a"], inputs(2, 3, K)
    held = layer.weight._qdata.clone()
    base = layer(x)
    Dynamic(layer, patches)
    assert layer.weight_lowvram_function is None        # so the host neither decodes the layer nor asks for it as blocks again
    got = layer(x)
    wanted = F.linear(x, changed(values(found())), inputs(N))
    # a branch adds to the product as it is; a patch on the decoded weight makes an ordinary product of it
    exact = F.linear(x, changed(values(found())) - values(found())) + (base if name != "difference" else F.linear(x, values(found()), inputs(N)))
    assert off(got, exact) < 1e-5 and off(got, wanted) < 0.015
    layer.weight_lowvram_function = None
    assert torch.equal(layer(x), base) and torch.equal(layer.weight._qdata, held)


@pytest.mark.parametrize("compute", COMPUTE)
def test_the_hosts_bypass_lora_is_a_branch_beside_the_product(compute):
    model, x, adapter = net(compute), inputs(2, 3, K), lora()
    base = model(x)
    manager = BypassInjectionManager()
    manager.add_adapter("diffusion_model.a", adapter, strength=0.7)
    plain = patcher(model)
    plain.set_injections("bypass", manager.create_injections(model))
    plain.load(torch.device("cpu"), full_load=True)
    plain.inject_model()
    assert off(model(x), base + F.linear(x, change(adapter, 0.7))) < 1e-6
    plain.eject_model()
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("compute", COMPUTE)
def test_the_hosts_streaming_resolves_a_patched_layer_without_encoding_it(compute):
    """What ModelPatcherDynamic's memory does at a layer, with a buffer in the place of its own."""
    layer, x = net(compute).diffusion_model["a"], inputs(2, 3, K)
    Dynamic(layer, ADAPTERS["plain"][0])
    geometry = comfy.memory_management.tensors_to_geometries([layer.weight, layer.bias])
    buffer = torch.empty(comfy.memory_management.vram_aligned_size([layer.weight, layer.bias]), dtype=torch.uint8)
    comfy.model_management.cast_to_gathered([layer.weight, layer.bias], buffer)
    layer.seed_key = "a"
    for resident in (False, True):
        layer._prefetch = {"signature": 1, "resident": resident, "xfer_dest": buffer, "cast_dest": None, "cast_geometry": geometry, "needs_cast": False}
        weight, bias = comfy.ops.resolve_cast_module_with_vbar(layer, torch.float32, torch.device("cpu"), torch.float32, torch.float32, True)
        assert is_packed(weight) and torch.equal(weight._qdata, layer.weight._qdata)
        assert torch.equal(F.linear(x, weight, bias), F.linear(x, layer.weight, layer.bias))


def test_a_lora_on_a_schedule_is_refused_in_a_sentence():
    layer = net("int8").diffusion_model["a"]
    with pytest.raises(ValueError, match="on a schedule"):
        layer.set_weight(inputs(N, K), inplace_update=True)


# saved -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compute", COMPUTE)
def test_what_is_saved_is_the_hosts_int8_and_opens_without_the_pack(compute, tmp_path):
    model, x = net(compute), inputs(2, 3, K)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "saved.safetensors")
    saved = comfy.utils.load_torch_file(str(tmp_path / "saved.safetensors"))
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in saved.items() if ".b." in key and "quant" not in key} == {
        "diffusion_model.b.weight": (torch.int8, (N, K)), "diffusion_model.b.weight_scale": (torch.float32, (N, 1))}
    host = Net(comfy.ops.mixed_precision_ops({}, torch.float32))
    assert not any(host.load_state_dict(saved, strict=False))
    if compute == "int8":
        assert torch.equal(host(x), model(x))
    for seed, name in enumerate("ab"):
        assert off(host.diffusion_model[name].weight.dequantize(), values(found(seed=seed))) < 0.0095


@pytest.mark.parametrize("how", ("whole", "part"))
def test_a_model_with_a_lora_is_saved_with_it(how, tmp_path):
    model, adapter = net("int8"), lora()
    plain = patcher(model)
    plain.add_patches({"diffusion_model.a.weight": adapter}, 0.7)
    plain.load(torch.device("cpu"), full_load=how == "whole", lowvram_model_memory=1)
    safetensors.torch.save_file(plain.model_state_dict_for_saving(), tmp_path / "saved.safetensors")
    host = Net(comfy.ops.mixed_precision_ops({}, torch.float32))
    assert not any(host.load_state_dict(comfy.utils.load_torch_file(str(tmp_path / "saved.safetensors")), strict=False))
    assert off(host.diffusion_model["a"].weight.dequantize(), values(found()) + change(adapter, 0.7)) < 0.013
    assert off(host.diffusion_model["b"].weight.dequantize(), values(found(seed=1))) < 0.0095


def test_asking_for_the_state_dict_decodes_nothing(monkeypatch):
    model = net("int8")
    monkeypatch.setattr(packed.blocks, "values", lambda *given: pytest.fail("decoded"))
    for tensor in model.state_dict().values():
        assert tensor.nbytes >= 0 and tensor.is_contiguous()


# embeddings ------------------------------------------------------------------------------------------------------------
def test_an_embedding_decodes_the_rows_that_are_asked_for(monkeypatch):
    table = found("Q6_K", rows=1000, columns=256)
    layer = packed_ops(torch.float32).Embedding(1000, 256)
    layer.load_state_dict({"weight": pack(table, torch.float32, "decode")})
    decoded = []
    whole = blocks.values
    monkeypatch.setattr(blocks, "values", lambda rows, *given: decoded.append(len(rows)) or whole(rows, *given))
    tokens = torch.tensor([[3, 999, 3], [0, 1, 2]])
    assert torch.equal(layer(tokens, out_dtype=torch.float32), whole(table.bytes, "Q6_K")[tokens]) and decoded == [6]
    assert isinstance(layer.weight, QuantizedTensor)
