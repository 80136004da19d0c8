"""Run Report and Compare Runs in a graph on a real server: with Step Cache and without it, in one prompt."""
import asyncio
import math
from copy import deepcopy

import numpy
import pytest
from PIL import Image

from testbed.client import Outcome, Server, ServerError, afresh
from testbed.workflow import is_link, nodes_of, read_workflow

TEXTS = ("report text", "plain text", "comparison text", "psnr", "ssim")


@pytest.fixture(scope="module")
def graph(object_info) -> dict:
    """The first workflow with Step Cache, and beside it the same without Step Cache; both are reported on, compared and saved."""
    from .conftest import STEP_CACHES

    prompt = read_workflow(STEP_CACHES[0], object_info)
    [cache] = keys(prompt, "Reprise_StepCache")
    # coarse enough that 8 bits do not matter: the pictures that are measured here are those that were saved
    prompt[cache]["inputs"] = {"model": prompt[cache]["inputs"]["model"], "preset": "custom", "policy": "interval", "policy.interval": 20, "policy.warm_up": 1,
                               "predictor": "hold", "level": "guided output", "level.look_back": False, "max_consecutive_skips": 50}
    [sampler], [decode], [save] = keys(prompt, "KSampler"), keys(prompt, "VAEDecode"), keys(prompt, "SaveImage")
    plain = {key: deepcopy(prompt[key]) for key in (cache, sampler, decode, save)}
    for node in plain.values():
        node["inputs"] = {name: [f"plain {value[0]}", value[1]] if is_link(value) and value[0] in plain else value for name, value in node["inputs"].items()}
    plain[cache]["inputs"]["enabled"] = False
    prompt |= {f"plain {key}": node for key, node in plain.items()}

    def node(kind: str, **inputs) -> dict:
        return {"class_type": kind, "inputs": inputs}

    prompt |= {
        "report": node("Reprise_RunReport", model=[cache, 0], trigger=[decode, 0]),
        "plain report": node("Reprise_RunReport", model=[f"plain {cache}", 0], trigger=[f"plain {sampler}", 0]),
        "compare": node("Reprise_CompareRuns", image_a=[f"plain {decode}", 0], image_b=[decode, 0], report_a=["plain report", 0], report_b=["report", 0]),
        "comparison": node("SaveImage", images=["compare", 0], filename_prefix="comparison"),
        "plot": node("SaveImage", images=["compare", 1], filename_prefix="plot"),
        "report text": node("PreviewAny", source=["report", 1]),
        "plain text": node("PreviewAny", source=["plain report", 1]),
        "comparison text": node("PreviewAny", source=["compare", 2]),
        "psnr": node("PreviewAny", source=["compare", 3]),
        "ssim": node("PreviewAny", source=["compare", 4]),
    }
    return prompt


def keys(prompt: dict, kind: str) -> list[str]:
    return [key for key, node in prompt.items() if node["class_type"] == kind]


def run_as_it_is(server: Server, prompt: dict) -> Outcome:
    """Without the mark that makes a sampler sample again."""
    return asyncio.run(server._run(prompt))


def parted(images: list[Image.Image]) -> tuple[list[Image.Image], Image.Image, Image.Image]:
    """(the two pictures, comparison, plot); a prompt's images come in the order that its nodes ended in."""
    small = [image for image in images if image.size == (128, 128)]
    comparison, plot = sorted((image for image in images if image.size != (128, 128)), key=lambda image: -image.width)
    return small, comparison, plot


def test_a_graph_measures_what_step_cache_cost(server, graph):
    outcome = server.run(graph)
    [record] = outcome.reports
    (a, b), comparison, plot = parted(outcome.images)
    error = ((numpy.asarray(a, dtype=float) - numpy.asarray(b, dtype=float)) ** 2).mean() / 255 ** 2
    psnr = float(outcome.texts["psnr"])
    assert psnr == pytest.approx(-10 * math.log10(error), abs=0.2)
    assert 0.5 < float(outcome.texts["ssim"]) < 1 and f"PSNR {psnr:.2f} dB" in outcome.texts["comparison text"]
    assert comparison.width > 3 * 384 and plot.width > 900
    said = outcome.texts["report text"].splitlines()
    assert said[0].startswith(f"Step Cache: {record['evaluations']:.4g} of {len(record['each'])} evaluations") and len(said) == 4 + len(record["each"])
    assert outcome.texts["plain text"] == "Step Cache is off: the node is switched off"
    assert f"B: {said[0]}" in outcome.texts["comparison text"] and "A: Step Cache is off" in outcome.texts["comparison text"]


def test_a_report_asked_for_later_is_that_of_the_picture_which_the_host_kept(server, graph):
    marked = afresh(graph)
    without = {key: node for key, node in marked.items() if key not in (*TEXTS, "report", "plain report", "compare", "comparison", "plot")}
    [record] = run_as_it_is(server, without).reports
    later = run_as_it_is(server, marked)
    assert not later.reports, "asking for a report made the sampler run again"
    assert later.texts["report text"].splitlines()[0].count(f", {record['seconds']:.2f} s, ") == 1
    assert later.texts["report text"].splitlines()[0].startswith(f"Step Cache: {record['evaluations']:.4g} of")
    again = run_as_it_is(server, marked)
    assert not again.reports and (not again.texts or again.texts == later.texts)


def test_another_seed_brings_another_report(server, graph):
    first, second = deepcopy(graph), deepcopy(graph)
    for seed, prompt in ((1, first), (2, second)):
        for node in nodes_of(prompt, "KSampler"):
            node["inputs"]["seed"] = seed
    a, b = server.run(first), server.run(second)
    for outcome in (a, b):
        assert f"{outcome.reports[0]['seconds']:.2f} s" in outcome.texts["report text"].splitlines()[0]
    assert a.texts["psnr"] != b.texts["psnr"]


def test_a_model_without_step_cache_is_an_error_that_says_what_to_connect(server, graph):
    [loader] = keys(graph, "UNETLoader")
    wrong = deepcopy(graph)
    wrong["report"]["inputs"]["model"] = [loader, 0]
    with pytest.raises(ServerError, match=r"node report \(Reprise_RunReport\) failed: the model has no Step Cache on it; connect"):
        server.run(wrong)
