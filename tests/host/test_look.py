"""How the Doctor looks at the machine it runs on: asked of the host and of comfy_kitchen, told without a raw error."""
import asyncio
import sys
import types

import comfy.model_management as management
import comfy_kitchen
import pytest
import torch
from comfy_kitchen.constraints import FunctionConstraints
from comfy_kitchen.registry import BackendRegistry

from pack import nodes
from pack.core.quant import look as module
from pack.core.quant.capabilities import capabilities
from pack.core.quant.look import look
from pack.core.quant.machine import EAGER, INT8, NVFP4, SVDQUANT
from pack.kernels import _triton
from pack.nodes.doctor import Doctor, log_machine

CPU = torch.device("cpu")
SECRET = "CUDA error: an illegal memory access was encountered at 0x7f3a"


@pytest.fixture
def kitchen(monkeypatch):
    """comfy_kitchen with a registry of the test's own: kitchen(cuda={op: least capability}, capability, disabled=(), ...)."""
    def stand_in(capability=(8, 9), disabled=(), unavailable=None, **backends):
        registry = BackendRegistry()
        registry.__dict__["_compute_capability"] = capability
        for name, operations in {EAGER: dict.fromkeys((INT8, NVFP4, *SVDQUANT)), **backends}.items():
            registry.register(name, None, {operation: FunctionConstraints(min_compute_capability=least) for operation, least in operations.items()})
        for name, why in (unavailable or {}).items():
            registry.mark_unavailable(name, why)
        for name in disabled:
            registry.disable(name)
        monkeypatch.setattr(comfy_kitchen, "registry", registry)
        monkeypatch.setattr(comfy_kitchen, "list_backends", registry.list_backends)
        return registry
    return stand_in


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as the questions see it; tensors stay on the CPU."""
    def stand_in(capability=(8, 9), hip=None, cuda="13.0"):
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.version, "cuda", None if hip else cuda)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Stand-in 4090")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: type("Properties", (), {
            "total_memory": 24 << 30, "major": capability[0], "minor": capability[1], "gcnArchName": "gfx1100"}))
        monkeypatch.setattr(management, "cpu_state", management.CPUState.GPU)
        monkeypatch.setattr(_triton, "failure", lambda device: "")
        monkeypatch.setattr(_triton, "_probe", _triton.triton.runtime.JITFunction.__new__(_triton.triton.runtime.JITFunction))
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **more: empty(*shape, **more))
        return torch.device("cuda", 0)
    return stand_in


def test_this_machine_answers_every_question():
    machine = look(CPU)
    assert machine.kind == "cpu" and not machine.failed and machine.torch and machine.kitchen and machine.gpu
    assert machine.kitchen[EAGER] == "" and set(machine.serves) == {INT8, NVFP4, *SVDQUANT} and machine.attention["SDPA"] == ""
    assert machine.host_attention == "SDPA" and machine.triton and machine.capability is None


def test_without_a_device_the_hosts_is_looked_at(monkeypatch):
    monkeypatch.setattr(management, "get_torch_device", lambda: torch.device("mps"))
    assert look().kind == "mps"


def test_who_serves_an_operation_is_what_comfy_kitchen_would_choose(kitchen, gpu):
    device = gpu()
    registry = kitchen(cuda={INT8: (7, 5), NVFP4: (10, 0), **dict.fromkeys(SVDQUANT, (8, 0))})
    assert look(device).serves == {INT8: "cuda", NVFP4: EAGER, **dict.fromkeys(SVDQUANT, "cuda")}
    assert capabilities(device).int8.fast and capabilities(device).svdquant.fast and not capabilities(device).nvfp4.fast
    registry.disable("cuda")
    assert set(look(device).serves.values()) == {EAGER}
    able = capabilities(device)
    assert able.int8.by == "Reprise's Triton kernel" and able.int8.fast and "CUDA 13" in able.int8.why and not able.svdquant.fast


@pytest.mark.parametrize(("capability", "int8", "svdquant", "nvfp4"), [
    ((7, 0), False, False, False), ((7, 5), True, False, False), ((8, 9), True, True, False), ((9, 0), True, False, False), ((12, 0), True, False, True)])
def test_what_a_generation_can_do_is_asked_and_not_guessed(kitchen, gpu, capability, int8, svdquant, nvfp4):
    device = gpu(capability)
    kitchen(capability, cuda={INT8: (7, 5), NVFP4: (10, 0), **dict.fromkeys(SVDQUANT, (8, 0))})
    able = capabilities(device)
    assert (able.int8.fast, able.svdquant.fast, able.nvfp4.fast) == (int8, svdquant, nvfp4)
    assert able.fp8.fast == (capability >= (8, 9)) and able.triton.fast == (capability >= (8, 0))


def test_an_operation_that_nobody_serves_is_told_as_such(kitchen):
    registry = kitchen()
    registry.disable(EAGER)
    assert set(look(CPU).serves.values()) == {""} and not look(CPU).failed


def test_why_a_backend_is_off_is_told_in_words(kitchen):
    kitchen(disabled=("cuda", "triton"), unavailable={"hip": SECRET}, cuda={INT8: None}, triton={INT8: None})
    told = look(CPU).kitchen
    assert "CUDA 13" in told["cuda"] and "--enable-triton-backend" in told["triton"] and told[EAGER] == ""
    assert told["hip"] and SECRET not in told["hip"]


OFF = {     # backend, what torch was built for, whether it finds a GPU, whether the backend's compiled part loads -> why it is off
    "cuda without CUDA": ("cuda", {}, False, True, "this torch is not built for CUDA"),
    "cuda without a GPU": ("cuda", {"cuda": "13.0"}, False, True, "torch finds no GPU for it"),
    "cuda that does not load": ("cuda", {"cuda": "13.0"}, True, False, "its compiled part does not load here"),
    "hip without ROCm": ("hip", {"cuda": "13.0"}, True, True, "this torch is not built for ROCm"),
    "hip without a GPU": ("hip", {"hip": "7.0"}, False, True, "torch finds no GPU for it"),
    "hip that does not load": ("hip", {"hip": "7.0"}, True, False, "its compiled part does not load here"),
    "hip for other GPUs": ("hip", {"hip": "7.0"}, True, True, "it has no kernels for this GPU"),
    "triton without a GPU": ("triton", {}, False, None, "torch finds no GPU for it"),
    "a backend of a later day": ("tpu", {"cuda": "13.0"}, True, None, "its compiled part does not load here"),
}


@pytest.mark.parametrize("case", OFF)
def test_a_backend_that_could_not_be_set_up_says_the_one_reason(case, kitchen, monkeypatch):
    name, built, there, loads, why = OFF[case]
    kitchen(unavailable={name: SECRET})
    monkeypatch.setattr(torch.version, "cuda", built.get("cuda"))
    monkeypatch.setattr(torch.version, "hip", built.get("hip"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    module = types.ModuleType(f"comfy_kitchen.backends.{name}")
    if loads is not None:
        module._EXT_AVAILABLE = loads
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert look(CPU).kitchen[name] == why


def test_a_backend_that_lacks_triton_or_was_switched_off_by_its_variable_says_so(kitchen, monkeypatch):
    kitchen(unavailable={"hip": SECRET, "triton": SECRET})
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setenv("COMFY_KITCHEN_DISABLE_HIP", "1")
    monkeypatch.setitem(sys.modules, "triton", None)     # an import of it fails
    told = look(CPU).kitchen
    assert told["hip"] == "COMFY_KITCHEN_DISABLE_HIP switches it off" and told["triton"].startswith("Triton is ")


def test_the_rocm_build_is_known_and_none_of_our_kernels_run_on_it(kitchen, gpu):
    device = gpu(hip="7.0")
    kitchen(hip={INT8: None, **dict.fromkeys(SVDQUANT)})
    machine = look(device)
    assert machine.amd and not machine.nvidia and machine.capability is None and "AMD" in machine.triton and not machine.nvfp4


QUESTIONS = {"gpu": "name_of", "memory": "memory_of", "kitchen": "kitchen", "serves": "serving", "triton": "triton_fault", "attention": "attention_faults",
             "host_attention": "host_name", "gguf": "fault"}


@pytest.mark.parametrize("error", [RuntimeError, AttributeError, KeyError, TypeError, OSError, ImportError, _triton.TritonError],
                         ids=lambda error: error.__name__)
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_that_fails_is_told_and_the_others_are_answered(question, error, monkeypatch):
    def broken(*args):
        raise error(SECRET)

    monkeypatch.setattr(module, QUESTIONS[question], broken)
    text = Doctor.execute().result[0]
    named = ["attention", "gguf"] if question == "gguf" else [question]      # packages of attention are asked for alike
    assert f"questions: no answer to {', '.join(named)}" in text and SECRET not in text and "torch:" in text


def test_no_comfy_kitchen_at_all_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)     # an import of it fails
    machine = look(CPU)
    assert machine.kitchen is None and machine.serves == {} and not machine.failed and machine.attention["comfy_kitchen int8"]


@pytest.fixture
def broken_package(tmp_path, monkeypatch):
    """sageattention is installed and cannot be imported."""
    (tmp_path / "sageattention.py").write_text(f"raise ImportError({SECRET!r})")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_package_that_does_not_load_is_told_in_words(broken_package):
    told = look(CPU).attention["SageAttention 2"]
    assert "does not load" in told and SECRET not in told


def test_at_start_nothing_is_imported_or_compiled(tmp_path, gpu, monkeypatch, caplog):
    (tmp_path / "sageattention.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "gguf")
    device = gpu()

    def compiled(device):
        raise AssertionError("Triton was asked to compile")

    monkeypatch.setattr(_triton, "failure", compiled)
    monkeypatch.setattr(management, "get_torch_device", lambda: device)
    before = set(sys.modules)
    caplog.set_level("INFO", logger="reprise")
    log_machine()
    [record] = caplog.records
    assert record.getMessage().startswith("Reprise on this machine:\n  GPU: Stand-in 4090, 24 GiB, sm_89") and "no answer" not in record.getMessage()
    assert "when a kernel is first needed" in record.getMessage() and "SageAttention 2 where the node" in record.getMessage()
    assert not {"sageattention", "gguf", "xformers"} & (set(sys.modules) - before)


def test_the_log_has_one_block_when_the_pack_loads(caplog):
    caplog.set_level("INFO", logger="reprise")
    found = asyncio.run(nodes.Pack().get_node_list())
    assert Doctor in found and [record.getMessage().partition("\n")[0] for record in caplog.records] == ["Reprise on this machine:"]


def test_a_machine_that_cannot_be_looked_at_costs_no_node(monkeypatch, caplog):
    def broken(*args, **more):
        raise ZeroDivisionError

    every = asyncio.run(nodes.Pack().get_node_list())
    monkeypatch.setattr("pack.nodes.doctor.look", broken)
    assert asyncio.run(nodes.Pack().get_node_list()) == every
    assert "could not be looked at" in caplog.text


def test_the_node_gives_what_it_shows(monkeypatch):
    shown = []
    monkeypatch.setattr("pack.nodes.doctor.show", lambda text, node: shown.append(text))
    text = Doctor.execute().result[0]
    assert shown == [text] and len(text.splitlines()) > 10 and all(" -> " in line for line in text.splitlines())
