"""The shipped workflows of the quantized loader on a real server: they run, say what became of the layers, and draw the full model's picture."""
from copy import deepcopy

import pytest

from testbed.compared import stacked
from testbed.picture import psnr
from testbed.workflow import LOADER, STEP_CACHE, at_full_precision, nodes_of

LEAST = {"flux_tiny_fp8.safetensors": 35, "flux_tiny_Q4_K.gguf": 28, "flux_tiny_svdquant.safetensors": 25, "z_image_tiny.safetensors": 40}    # dB


@pytest.fixture(scope="session")
def ran(server, loader_prompt):
    return server.run(loader_prompt)


def key_of(prompt: dict, node: str) -> str:
    [key] = [key for key, found in prompt.items() if found["class_type"] == node]
    return key


def test_the_picture_is_that_of_the_full_model(server, loader_prompt, ran):
    [node] = nodes_of(loader_prompt, LOADER)
    full = server.run(at_full_precision(loader_prompt))
    assert psnr(stacked(full), stacked(ran)) >= LEAST[node["inputs"]["model_name"]]


def test_the_loader_says_what_became_of_the_layers(loader_prompt, ran):
    said = ran.lines[key_of(loader_prompt, LOADER)]
    assert nodes_of(loader_prompt, LOADER)[0]["inputs"]["model_name"] in said and " layers " in said


def test_the_file_alone_is_all_that_the_loader_needs(server, loader_prompt, ran):
    """What the workflow holds beside compute are the defaults."""
    prompt = deepcopy(loader_prompt)
    for node in nodes_of(prompt, LOADER):
        node["inputs"] = {name: node["inputs"][name] for name in ("model_name", "compute")}
    assert [image.tobytes() for image in server.run(prompt).images] == [image.tobytes() for image in ran.images]


def test_step_cache_says_why_it_stands_aside_on_a_few_steps(loader_prompt, ran):
    if not nodes_of(loader_prompt, STEP_CACHE):
        assert not ran.reports
        return
    [report] = ran.reports
    assert report["state"] != "ran" and "8 steps" in report["reason"]
