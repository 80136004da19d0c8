"""Numbers that are none, or out of their range, are refused in a sentence before anything runs; the host lets a NaN through."""
import math

import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.internal import make_locked_method_func
from harness import model, schedule, spied

from pack.core.knob import knobs
from pack.core.reference.handle import Handle
from pack.nodes._api import io
from pack.nodes.attention_backend import AttentionBackend
from pack.nodes.compare_runs import CompareRuns
from pack.nodes.doctor import Doctor
from pack.nodes.easycontrol import EasyControlCondition, EasyControlLoader
from pack.nodes.fastfit import FastFitGarment, FastFitLoader, FastFitPasteBack, FastFitPerson
from pack.nodes.fused_kernels import FusedKernels
from pack.nodes.gguf import GGUFTextEncoderLoader
from pack.nodes.modulation_cache import ModulationCache
from pack.nodes.quantization_report import QuantizationReport
from pack.nodes.quantized import QuantizedModelLoader, SaveQuantizedModel
from pack.nodes.reference_latents import ReferenceLatentCache
from pack.nodes.references import (
    ApplyReferenceCache,
    ClearReferenceCache,
    CombineReferenceCache,
    InspectReferenceCache,
    LoadReferenceCache,
    SaveReferenceCache,
)
from pack.nodes.run_report import RunReport
from pack.nodes.step_cache import MENUS, StepCache
from pack.nodes.step_cache_calibrate import StepCacheCalibrate
from pack.nodes.template_carriers import TemplateLora, TemplateText
from pack.nodes.templates import TemplateImage, TemplateLoader, TemplateScalar
from testbed import tiny

NODES = (StepCache, StepCacheCalibrate, RunReport, CompareRuns, EasyControlLoader, EasyControlCondition, FastFitLoader, FastFitPerson, FastFitGarment,
         FastFitPasteBack, TemplateLoader, TemplateScalar, TemplateImage, TemplateLora, TemplateText, ReferenceLatentCache, ApplyReferenceCache,
         CombineReferenceCache, SaveReferenceCache, LoadReferenceCache, InspectReferenceCache, ClearReferenceCache,
         QuantizedModelLoader, SaveQuantizedModel, QuantizationReport, GGUFTextEncoderLoader, ModulationCache, AttentionBackend, FusedKernels, Doctor)
NUMBERS = [pytest.param(node, entry, id=f"{node.__name__}: {entry.id}") for node in NODES for entry in node.GET_SCHEMA().inputs
           if isinstance(entry, (io.Float.Input, io.Int.Input))]
KNOBS = [pytest.param(kind, name, knob, id=f"{kind} {name}: {knob.name}") for kind, registry in MENUS.items() for name, entry in registry.items()
         for knob in knobs(entry) if knob.metadata["low"] is not None]


def called(node, patcher, **inputs):
    """The node with what it cannot do without, as the host calls it: on a clone of its class that nothing may be written to."""
    picture = torch.zeros(1, 16, 16, 3)
    needed = {
        StepCache: {"model": patcher, "preset": "custom"},
        StepCacheCalibrate: {
            "model": patcher, "positive": tiny.conditioning("flux", 11), "negative": tiny.conditioning("flux", 12),
            "sampler": comfy.samplers.ksampler("euler"), "sigmas": schedule("flux", 9), "latent_image": {"samples": torch.full((1, 16, 8, 8), 1e-6)}},
        CompareRuns: {"image_a": picture, "image_b": picture},
        EasyControlCondition: {"adapter": None},
        FastFitGarment: {"image": picture, "garment": "upper", "vae": None},
        FastFitPasteBack: {"result": picture, "image": picture, "mask": torch.zeros(1, 16, 16)},
        TemplateScalar: {"template": None},
        TemplateImage: {"template": None, "positive": []},
        TemplateLora: {"model": patcher, "template": None},
        ReferenceLatentCache: {"model": patcher, "mode": "freeze"},
        ApplyReferenceCache: {"model": patcher, "positive": [], "negative": [], "reference": Handle()},
        LoadReferenceCache: {"name": "none"},
        AttentionBackend: {"model": patcher},
        QuantizationReport: {
            "model": patcher, "positive": tiny.conditioning("flux", 11), "negative": tiny.conditioning("flux", 12),
            "sampler": comfy.samplers.ksampler("euler"), "sigmas": schedule("flux", 2), "latent_image": {"samples": torch.zeros(1, 16, 8, 8)}},
    }
    clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": {}})
    return make_locked_method_func(node, "execute", clone)(**{**needed[node], **inputs})


def refusal(node, **inputs) -> str:
    patcher = spied(model("flux"), WrappersMP.PREDICT_NOISE, lambda *call: pytest.fail("a run began"))
    with torch.inference_mode(), pytest.raises(ValueError) as caught:
        called(node, patcher, **inputs)
    message = str(caught.value)
    assert "\n" not in message and 20 < len(message) < 250
    return message


@pytest.mark.parametrize(("node", "entry"), NUMBERS)
def test_a_number_out_of_its_range_is_refused_with_the_range_before_any_run(node, entry):
    for value in (math.nan, math.inf, -math.inf, entry.min - 1, entry.max + 1):
        assert refusal(node, **{entry.id: value}) == f"{entry.id} is {value}; it must lie between {entry.min} and {entry.max}"


@pytest.mark.parametrize(("kind", "name", "knob"), KNOBS)
def test_a_knob_that_is_no_number_is_refused(kind, name, knob):
    for value in (math.nan, math.inf, -math.inf):
        assert f"{name}: {knob.name} is {value}; it must lie between" in refusal(StepCache, **{kind: {kind: name, knob.name: value}})


def test_every_node_of_the_pack_is_looked_at():
    from importlib import import_module

    from pack import nodes

    assert {node for name in nodes.GROUPS for node in import_module(f"{nodes.__name__}.{name}").NODES} == set(NODES)


@pytest.mark.parametrize("sigmas", [[], [1.0]], ids=str)
def test_a_schedule_without_steps_is_refused_as_such(sigmas):
    message = refusal(StepCacheCalibrate, sigmas=torch.tensor(sigmas))
    assert f"the schedule has {len(sigmas)} sigma" in message and "-1" not in message and "connect" in message


@pytest.mark.parametrize("at", [0, 4, 9])
def test_a_schedule_with_a_number_that_is_none_is_refused_by_calibrate(at):
    sigmas = schedule("flux", 9).clone()
    sigmas[at] = math.nan
    assert f"sigma {at} is nan" in refusal(StepCacheCalibrate, sigmas=sigmas)


@pytest.mark.parametrize(("node", "entry"), NUMBERS)
def test_what_is_no_number_at_all_is_refused_alike(node, entry):
    for value in (None, "2", []):
        assert f"{entry.id} is {value}; it must lie between" in refusal(node, **{entry.id: value})
