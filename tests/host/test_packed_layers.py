"""Layers that stay packed: what they compute, how the host moves and saves them."""
from types import SimpleNamespace

import comfy.lora
import comfy.memory_management
import comfy.model_patcher
import comfy.utils
import comfy.weight_adapter
import pytest
import safetensors.torch
import torch
from comfy.quant_ops import QuantizedTensor
from packed_layers import COMPUTE, K, N, Net, change, found, inputs, lora, net, off, patcher, values
from torch.nn import functional as F

from pack.core.quant import blocks, packed
from pack.core.quant.machine import Route
from pack.core.quant.packed import pack
from pack.core.quant.packed_ops import is_packed, packed_ops
from testbed.gguf_files import TYPES, block


@pytest.fixture(autouse=True)
def as_the_host_runs():
    """Nodes and samplers run in inference mode; a model that was made outside of it cannot be moved within."""
    with torch.inference_mode():
        yield


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
