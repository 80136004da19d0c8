"""What the Doctor says of machines that are not here, and the README's tables of them."""
import re
from dataclasses import replace
from pathlib import Path

import pytest

from pack.core.quant.doctor import PROBES, Finding, findings
from pack.core.quant.features import CUDA_13, FEATURES, SAGE, TRITON
from pack.core.quant.machine import EAGER, EIGHT_BIT_ATTENTION, INT8, NVFP4, OWN_GGUF, OWN_INT8, SVDQUANT, Capabilities, Machine
from pack.core.quant.typical import TYPICAL, costs_table, machines_table

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
CUDA_13_RTX_40 = TYPICAL["Linux, CUDA 13, RTX 40"]
CUDA_12 = replace(TYPICAL["Windows portable, CUDA 12"], triton="", system="Linux")
ALL_EAGER = dict.fromkeys((INT8, NVFP4, *SVDQUANT), EAGER)
OLD = "the GPU is older than Ampere (compute capability 7.5)"
MACHINES = {
    **TYPICAL,
    "no CUDA": Machine(kitchen={EAGER: "", "cuda": "it does not load here"}, serves=ALL_EAGER, triton="Reprise's kernels are for NVIDIA GPUs, not for cpu"),
    "CUDA 12 build": replace(CUDA_12, kernels=frozenset()),
    "CUDA 12 build, Reprise's kernels": replace(CUDA_12, kernels=frozenset({OWN_INT8, f"{OWN_GGUF} codes"})),
    "CUDA 13 build": CUDA_13_RTX_40,
    "comfy_kitchen's Triton": replace(CUDA_12, serves={**ALL_EAGER, INT8: "triton"}, kitchen={"cuda": "off", "triton": "", EAGER: ""}),
    "no Triton": replace(CUDA_13_RTX_40, triton="Triton is not installed, or does not fit this torch"),
    "Triton that cannot compile": replace(CUDA_13_RTX_40, triton="Triton is installed and cannot compile here; most often a C compiler is missing"),
    "Triton not tried": replace(CUDA_13_RTX_40, tried=False),
    "old GPU, sm_75": replace(
        CUDA_13_RTX_40, gpu="RTX 2080", capability=(7, 5), fp8=False, triton=OLD, serves={**ALL_EAGER, INT8: "cuda"}),
    "sm_89": CUDA_13_RTX_40,
    "sm_90": replace(CUDA_13_RTX_40, gpu="H200", capability=(9, 0)),
    "sm_120": TYPICAL["Linux, CUDA 13, RTX 50"],
    "no comfy_kitchen": replace(CUDA_13_RTX_40, kitchen=None, serves={}, kernels=frozenset()),
    "no gguf": replace(CUDA_13_RTX_40, gguf="not installed"),
    "nothing answers": Machine(kind="cuda", failed=("gpu", "kitchen"), triton="it could not be asked", gguf="it could not be asked"),
    **{f"{name} installed": replace(CUDA_13_RTX_40, attention={**CUDA_13_RTX_40.attention, name: ""}) for name in EIGHT_BIT_ATTENTION},
}
KITCHEN, OWN, TORCH, CAST = "comfy_kitchen cuda", "Reprise's Triton kernel", "plain torch", "16 bits"
ROUTES = {      # who does int8, fp8, nvfp4, svdquant; what is not in brackets is fast
    "no CUDA": ([TORCH], [CAST], [CAST], [TORCH]),
    "CUDA 12 build": ([TORCH], "torch's fp8 product", [CAST], [TORCH]),
    "CUDA 12 build, Reprise's kernels": (OWN, "torch's fp8 product", [CAST], [TORCH]),
    "CUDA 13 build": (KITCHEN, "torch's fp8 product", [CAST], KITCHEN),
    "comfy_kitchen's Triton": ("comfy_kitchen triton", "torch's fp8 product", [CAST], [TORCH]),
    "AMD, ROCm, RX 7000 or 9000": ("comfy_kitchen hip", [CAST], [CAST], "comfy_kitchen hip"),
    "Mac": ([TORCH], [CAST], [CAST], [TORCH]),
    "no Triton": (KITCHEN, "torch's fp8 product", [CAST], KITCHEN),
    "old GPU, sm_75": (KITCHEN, [CAST], [CAST], [TORCH]),
    "sm_89": (KITCHEN, "torch's fp8 product", [CAST], KITCHEN),
    "sm_90": (KITCHEN, "torch's fp8 product", [CAST], [f"{KITCHEN}, emulated"]),
    "sm_120": (KITCHEN, "torch's fp8 product", KITCHEN, [f"{KITCHEN}, emulated"]),
    "no comfy_kitchen": ([TORCH], "torch's fp8 product", [CAST], [TORCH]),
    "nothing answers": ([TORCH], [CAST], [CAST], [TORCH]),
}


def said(machine: Machine, topic: str) -> Finding:
    return next(finding for finding in findings(machine) if finding.topic == topic)


@pytest.mark.parametrize("name", ROUTES)
def test_who_does_the_work_follows_from_what_was_found(name):
    able = Capabilities.of(MACHINES[name])
    for route, expected in zip((able.int8, able.fp8, able.nvfp4, able.svdquant), ROUTES[name], strict=True):
        assert (route.by, route.fast) == ((expected[0], False) if isinstance(expected, list) else (expected, True))
        assert route.fast or route.why, "what is not fast says why"


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("probe", PROBES)
def test_every_probe_has_a_short_answer_for_every_machine(probe, name):
    finding = PROBES[probe].look(MACHINES[name])
    if finding is None:
        assert probe == "questions" and not MACHINES[name].failed
        return
    line = finding.line()
    assert finding.topic == probe and finding.use and line.startswith(probe)
    assert "\n" not in line and len(line) < 420 and "Error" not in line and "None" not in line and ": ," not in line.replace("torch: ,", "")


@pytest.mark.parametrize("name", MACHINES)
def test_what_is_said_of_a_feature_is_what_the_readme_says_of_its_way(name):
    for feature in FEATURES.values():
        finding, way = said(MACHINES[name], feature.name), feature.on(MACHINES[name])
        assert finding.use == way.by and way.cost_on(MACHINES[name]).lower() in finding.advice.lower()


@pytest.mark.parametrize("feature", FEATURES)
def test_every_way_is_that_of_some_machine(feature):
    assert {FEATURES[feature].pick(machine) for machine in MACHINES.values()} == set(FEATURES[feature].ways)


@pytest.mark.parametrize("feature", FEATURES)
def test_the_best_way_costs_nothing_and_every_other_one_of_the_machines_tables_is_in_the_table_of_costs(feature):
    ways = list(FEATURES[feature].ways.values())
    assert not ways[0].cost
    for way in {FEATURES[feature].on(machine) for machine in TYPICAL.values()}:
        assert not way.cost or f"| {feature} | {way.by} | {way.cost} |" in costs_table()


def test_the_readme_has_the_tables_of_the_same_records():
    assert machines_table() in README, f"the README's table of machines should be\n{machines_table()}"
    assert costs_table() in README, f"the README's table of costs should be\n{costs_table()}"


CARD = re.compile(r"RTX \d|A100|H\d00")


@pytest.mark.parametrize("name", MACHINES)
def test_figures_of_nvidia_gpus_are_told_to_those_alone_who_have_one(name):
    machine = MACHINES[name]
    for feature in FEATURES.values():
        told, way = said(machine, feature.name).advice, feature.on(machine)
        assert machine.nvidia or not re.search(r"\d ?ms|\d ?%|A100|RTX \d{4}", told), told
        assert not machine.nvidia or way.cost.lower() in told.lower()
        assert not re.search(r"\d ms|\d%", way.cost) or CARD.search(way.cost), "figures say whose they are"


def advice(name: str) -> str:
    return " ".join(finding.advice for finding in findings(MACHINES[name])).lower()


@pytest.mark.parametrize(("name", "told"), [
    ("CUDA 12 build", CUDA_13), ("Windows portable, CUDA 12", CUDA_13), ("no Triton", TRITON), ("Triton that cannot compile", TRITON),
    ("Windows portable, CUDA 13", TRITON), ("sm_89", SAGE), ("no gguf", "install gguf"), ("no comfy_kitchen", "install comfy-kitchen"),
    ("nothing answers", "restart comfyui"), ("sm_120", "nvfp4 files"), ("sm_89", "int8 files")])
def test_advice_is_given_where_it_helps(name, told):
    assert told.lower() in advice(name)


@pytest.mark.parametrize(("name", "untold"), [
    *((name, told) for name in ("Mac", "CPU alone", "no CUDA", "AMD, ROCm, RX 7000 or 9000") for told in (CUDA_13, TRITON, SAGE)),
    ("sm_89", CUDA_13), ("sm_89", "triton-windows for"), ("old GPU, sm_75", TRITON), ("old GPU, sm_75", SAGE), ("sm_120", CUDA_13)])
def test_no_advice_is_given_that_a_machine_cannot_follow_or_does_not_need(name, untold):
    assert untold.lower() not in advice(name)


@pytest.mark.parametrize(("name", "topic", "words"), [
    ("no Triton", "Triton", "not installed"), ("Triton that cannot compile", "Triton", "C compiler"), ("Triton not tried", "Triton", "first needed"),
    ("old GPU, sm_75", "Triton", "older than Ampere"), ("old GPU, sm_75", "GPU", "sm_75"), ("Mac", "GPU", "MPS"), ("no CUDA", "GPU", "none"),
    ("Windows portable, CUDA 12", "torch", "CUDA 12.8"), ("AMD, ROCm, RX 7000 or 9000", "torch", "ROCm 7.0"),
    ("no comfy_kitchen", "comfy_kitchen", "not installed"),
    ("Windows portable, CUDA 12", "comfy_kitchen", "off: cuda"), ("nothing answers", "questions", "gpu, kitchen")])
def test_what_was_found_is_told(name, topic, words):
    assert words in said(MACHINES[name], topic).found


@pytest.mark.parametrize("name", EIGHT_BIT_ATTENTION)
def test_attention_in_eight_bits_is_used_where_it_is_installed(name):
    machine = MACHINES[f"{name} installed"]
    assert Capabilities.of(machine).attention == (name, True, "") and said(machine, "Attention Backend").use == name


def test_of_several_attentions_the_preferred_one_is_used():
    both = replace(CUDA_13_RTX_40, attention=dict.fromkeys(reversed(EIGHT_BIT_ATTENTION), ""))
    assert Capabilities.of(both).attention.by == EIGHT_BIT_ATTENTION[0]
