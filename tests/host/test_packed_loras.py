"""LoRAs on packed layers, by each way in which the host brings them."""
import comfy.lora
import comfy.memory_management
import comfy.model_patcher
import comfy.ops
import pytest
import torch
from comfy.weight_adapter.bypass import BypassInjectionManager
from packed_layers import COMPUTE, K, N, change, found, inputs, lora, net, off, patcher, values
from torch.nn import functional as F

from pack.core.quant.packed_ops import is_packed
from pack.core.quant.stand_in import lent


@pytest.fixture(autouse=True)
def as_the_host_runs():
    """Nodes and samplers run in inference mode; a model that was made outside of it cannot be moved within."""
    with torch.inference_mode():
        yield


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

    def __init__(self, layer, patches, of_weight=1.0):
        owner = patcher(torch.nn.ModuleDict({"layer": layer}))
        owner.add_patches(patches, 1.0, of_weight)
        self.patch = comfy.model_patcher.LowVramPatch("layer.weight", owner.patches)
        layer.weight_lowvram_function = self.patch


ADAPTERS = {
    "plain": ({"layer.weight": lora()}, lambda w: w + change(lora())),
    "of some rows": ({("layer.weight", (0, 16, 32)): lora(rows=32)}, lambda w: w + F.pad(change(lora(rows=32)), (0, 0, 16, 0))),
    "of some columns": ({("layer.weight", (1, 256, 256)): lora(columns=256)}, lambda w: w + F.pad(change(lora(columns=256)), (256, 0))),
    "difference": ({"layer.weight": (inputs(N, K) * 0.01,)}, lambda w: w + inputs(N, K) * 0.01),
    "DoRA": ({"layer.weight": lora(dora=1.0 + inputs(N, 1) * 0.1)}, lambda w: comfy.lora.calculate_weight(
        [(1.0, lora(dora=1.0 + inputs(N, 1) * 0.1), 1.0, None, None)], w.clone(), "layer.weight")),
    "over a scaled weight": ({"layer.weight": lora()}, lambda w: 0.5 * w + change(lora())),
}
BESIDE = ("plain", "of some rows", "of some columns")


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("name", ADAPTERS)
def test_under_dynamic_memory_a_patch_is_put_on_at_each_call_and_never_written_back(name, compute):
    patches, changed = ADAPTERS[name]
    layer, x = net(compute).diffusion_model["a"], inputs(2, 3, K)
    held = layer.weight._qdata.clone()
    base = layer(x)
    Dynamic(layer, patches, 0.5 if "scaled" in name else 1.0)
    assert layer.weight_lowvram_function is None        # so the host neither decodes the layer nor asks for it as blocks again
    got = layer(x)
    wanted = F.linear(x, changed(values(found())), inputs(N))
    # a branch adds to the product as it is; a patch on the decoded weight makes an ordinary product of it
    exact = base + F.linear(x, changed(values(found())) - values(found())) if name in BESIDE else wanted
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


def as_dynamic_memory_leaves_it(layer, patcher) -> None:
    layer.weight_lowvram_function = comfy.model_patcher.LowVramPatch("diffusion_model.a.weight", patcher.patches)


@pytest.mark.parametrize("kind", (*COMPUTE, "float"))
def test_a_modulation_that_is_lent_to_one_clone_has_not_the_lora_of_another(kind):
    model = net("decode" if kind == "float" else kind)
    if kind == "float":
        model.diffusion_model["a"] = comfy.ops.manual_cast.Linear(K, N, dtype=torch.float32).requires_grad_(False)
        model.diffusion_model["a"].load_state_dict({"weight": values(found()), "bias": inputs(N)})
    layer, x = model.diffusion_model["a"], inputs(2, 3, K)
    wanted, other, mine = layer(x), patcher(model), patcher(model)
    other.add_patches({"diffusion_model.a.weight": lora()}, 1.0)
    as_dynamic_memory_leaves_it(layer, other)
    with_lora = layer(x)
    assert kind == "float" or off(with_lora, wanted) > 0.01
    with lent(layer, "diffusion_model.a", mine, x):
        assert torch.equal(layer(x), wanted)
    assert torch.equal(layer(x), with_lora), "the other clone lost its LoRA"


def test_a_patch_that_fails_gives_the_weight_back(monkeypatch):
    model, back = net("decode"), []
    layer, changed = model.diffusion_model["a"], patcher(model)
    changed.add_patches({"diffusion_model.a.weight": ("diff", (inputs(N, K),))}, 1.0)
    as_dynamic_memory_leaves_it(layer, changed)

    def stop(self, weight):
        raise KeyboardInterrupt

    monkeypatch.setattr(comfy.model_patcher.LowVramPatch, "__call__", stop)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", lambda *args: back.append(args))
    with pytest.raises(KeyboardInterrupt):
        layer(inputs(2, 3, K))
    assert len(back) == 1
