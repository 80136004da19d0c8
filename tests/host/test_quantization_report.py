"""Quantization Report: true errors on real activations, plans that keep to their budget, and nothing left on the model."""
import re

import comfy.samplers
import folder_paths
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quantized import SUBJECTS, bench, drawn, nearness, write
from test_quantized_loader import loaded, network, stock, weights

from pack.core.quant import folders
from pack.core.quant.budget import ladder, planned, size
from pack.core.quant.measure import measure
from pack.core.quant.plan import read_plan
from pack.core.quant.score import SCORES, Scored, listening, measured_layers
from pack.core.quant.transcode import BITS, TRANSCODERS
from pack.nodes.quantization_report import QuantizationReport

NAMES = ("flux", "z_image")


def arguments(name: str, model, steps: int = 3) -> dict:
    caption, noise = next(SUBJECTS[name].pictures())
    positive, negative = bench.conditions([caption])
    return {
        "model": model, "positive": positive, "negative": negative, "sampler": comfy.samplers.sampler_object("euler"),
        "sigmas": comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps), "latent_image": {"samples": noise * 0},
    }


def measured(name, model, score="output error", targets=tuple(TRANSCODERS), **more):
    with torch.inference_mode():
        return measure(**arguments(name, model, **more), cfg=1.0, seed=0, targets=targets, score=score, bar=lambda total: lambda: None)


@pytest.mark.parametrize("name", [None, 5, ["plan"]], ids=str)
def test_a_plans_name_that_is_no_text_is_a_sentence(name):
    with pytest.raises(ValueError, match="a plan's name is 1 to 80 letters"):
        QuantizationReport.execute(*[None] * 6, name=name)


@pytest.mark.parametrize("sigmas", [torch.zeros(3), torch.tensor([1.0, torch.nan, 0.0]), torch.ones(1), torch.tensor([torch.inf, 0.0])], ids=str)
def test_sigmas_that_give_no_errors_cost_no_plan(sigmas, files, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    folders.new_plan("mine").write_text("a plan")
    with pytest.raises(ValueError, match="sigmas are .*; connect a scheduler"), torch.inference_mode():
        QuantizationReport.execute(**{**arguments("flux", stock(files["flux"])), "sigmas": sigmas}, name="mine")
    assert folders.new_plan("mine").read_text() == "a plan"


def test_a_latent_without_numbers_costs_no_plan(files, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    folders.new_plan("mine").write_text("a plan")
    given = arguments("flux", stock(files["flux"]))
    given["latent_image"] = {"samples": given["latent_image"]["samples"] * torch.nan}
    with pytest.raises(ValueError, match="are no numbers.*nothing was saved"), torch.inference_mode():
        QuantizationReport.execute(**given, name="mine")
    assert folders.new_plan("mine").read_text() == "a plan"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return {name: write(name, "fp16", tmp_path_factory.mktemp(name) / "model.safetensors") for name in NAMES}


@pytest.fixture(scope="module")
def found(files):
    return {name: measured(name, stock(files[name])) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_that_is_not_sensitive_is_measured_in_every_format_that_fits(name, found, files):
    _, told = loaded(files[name], compute="int8")
    assert {layer.name for layer in found[name].layers} == {layer for layer, target in told.layers.items() if target == "int8"}
    for layer in found[name].layers:
        assert 0 < layer.errors["int8"] < layer.errors["fp8"] < layer.errors["nvfp4"] < 0.3, layer
        assert layer.activation > 0 and layer.change > 0


@pytest.mark.parametrize("name", NAMES)
def test_an_error_is_that_of_the_layers_product_on_what_went_through_it(name, found, files):
    """Written out independently: the same rows, int8 by hand."""
    model = stock(files[name])
    layers = measured_layers(network(model), found[name] and {"flux": "flux", "z_image": "lumina2"}[name])
    inputs, hooks = {}, []
    for layer, module in layers.items():
        hooks.append(module.register_forward_pre_hook(lambda module, args, layer=layer: inputs.setdefault(layer, []).append(args[0].clone())))
    with torch.inference_mode():
        measured(name, model, targets=("int8",))
    for hook in hooks:
        hook.remove()
    for layer in list(layers)[::7]:
        x = torch.cat([part.reshape(-1, part.shape[-1]) for part in inputs[layer]]).double()
        weight = weights(model)[layer].double()
        rounded = torch.round(weight / (weight.abs().amax(1, keepdim=True) / 127)) * weight.abs().amax(1, keepdim=True) / 127
        codes = torch.round(x / (x.abs().amax(1, keepdim=True) / 127)) * x.abs().amax(1, keepdim=True) / 127
        by_hand = ((codes @ rounded.T - x @ weight.T).norm() / (x @ weight.T).norm()).item()
        told = next(one for one in found[name].layers if one.name == layer).errors["int8"]
        assert told < 2 * by_hand and by_hand < 6 * told, (layer, told, by_hand)      # rotation makes it smaller where there are outliers


@pytest.mark.parametrize("name", NAMES)
def test_nothing_stays_on_the_model(name, files):
    model = stock(files[name])
    before = drawn(name, model, 1, steps=3)[0]
    measured(name, model)
    assert torch.equal(before, drawn(name, model, 1, steps=3)[0])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network(model).modules())


def test_an_interrupted_run_leaves_no_hook(files):
    model = stock(files["flux"])
    layers = measured_layers(network(model), "flux")
    with pytest.raises(KeyboardInterrupt), listening(network(model), layers):
        raise KeyboardInterrupt
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in network(model).modules())


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_keeps_to_its_budget_and_a_larger_budget_comes_nearer(name, score, found):
    layers = found[name].layers
    small, large = (sum(size(layer, target) for layer in layers) for target in ("nvfp4", "full"))
    costs = []
    for share in (0.05, 0.3, 0.6, 1.0):
        budget = small + share * (large - small)
        plan = planned(layers, budget, score)
        assert sum(size(layer, plan[layer.name]) for layer in layers) <= budget
        costs.append(sum(layer.cost(plan[layer.name], score) for layer in layers))
    assert costs == sorted(costs, reverse=True) and costs[-1] == 0


def test_a_budget_below_the_smallest_formats_says_what_is_needed(found):
    with pytest.raises(ValueError, match=r"the weights need 3\.\d MiB in their smallest formats, and the budget is 1\.5 MiB"):
        planned(found["flux"].layers, 1.5 * 2**20, "output error", found["flux"].others)


errors = st.fixed_dictionaries({"int8": st.floats(1e-4, 1), "fp8": st.floats(1e-4, 1), "nvfp4": st.floats(1e-4, 1)})


@given(st.lists(st.tuples(st.integers(1, 10**6), errors), min_size=1, max_size=12), st.floats(0, 1.2))
def test_no_single_change_within_the_budget_would_take_more_error_away_per_byte(rows, share):
    layers = [Scored(str(n), weights, told, 1.0, 1.0) for n, (weights, told) in enumerate(rows)]
    small = sum(size(layer, ladder(layer, "output error")[0]) for layer in layers)
    budget = small + share * (sum(size(layer, "full") for layer in layers) - small)
    plan = planned(layers, budget, "output error")
    used = sum(size(layer, plan[layer.name]) for layer in layers)
    assert used <= budget * (1 + 1e-12)
    for layer in layers:
        rungs = ladder(layer, "output error")
        at = rungs.index(plan[layer.name])
        assert at + 1 == len(rungs) or used + size(layer, rungs[at + 1]) - size(layer, plan[layer.name]) > budget, "room was left for a better format"


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_plan_is_what_the_loader_loads_and_nearer_than_4_bits_alone(name, files, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "plans_folder", lambda: tmp_path / "plans")
    model = stock(files[name])
    full = drawn(name, model, 1)
    ample = measured(name, model)
    least = ample.others / 2**20 + sum(size(layer, "nvfp4") for layer in ample.layers) / 2**20
    with torch.inference_mode():
        result = QuantizationReport.execute(**arguments(name, model), budget_mib=least * 1.12, smallest="nvfp4 too", name="mine").result
    plan = read_plan(folders.plan_path("mine"))
    assert result[0] == "mine" and len(set(plan.values())) > 1
    mixed, told = loaded(files[name], layers=plan)
    small, _ = loaded(files[name], layers={layer: "nvfp4" for layer in plan})
    assert {layer: told.layers[layer] for layer in plan} == {layer: "stored" if target == "full" else target for layer, target in plan.items()}
    assert nearness(drawn(name, mixed, 1), full) > nearness(drawn(name, small, 1), full) + 2
    assert re.search(r"plan: .*nvfp4.*MiB of weights", result[1])


def test_a_quantized_model_is_refused_with_what_to_do(files):
    model, _ = loaded(files["flux"], compute="int8")
    with pytest.raises(ValueError, match="the model is quantized already .* load it at full precision"):
        measured("flux", model)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 81, "a\0"])
def test_a_plan_is_called_by_a_files_name(name, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "plans_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match="name is "):
        folders.new_plan(name)


def test_bits_are_told_for_every_target():
    assert set(BITS) == {*TRANSCODERS, "full"}
