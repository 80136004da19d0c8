"""A profile in graphs on a real server: made and used in one prompt, and noticed when it changes on disk."""
import os
from pathlib import Path

import pytest

from .conftest import STEP_CACHES
from .test_compare import keys, run_as_it_is
from testbed.workflow import read_workflow


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture(scope="module")
def graph(object_info) -> dict:
    """The first workflow with Step Cache at 9 steps, with Step Cache on policy profile."""
    prompt = read_workflow(STEP_CACHES[0], object_info)
    [cache], [sampler] = keys(prompt, "Reprise_StepCache"), keys(prompt, "KSampler")
    prompt[cache]["inputs"] = {"model": prompt[cache]["inputs"]["model"], "preset": "custom", "policy": "profile", "policy.profile": "p", "policy.target": "2x"}
    prompt[sampler]["inputs"]["steps"] = 9
    return prompt


def with_calibration(graph: dict) -> dict:
    """Calibrate beside the sampler, for the run that it makes, linked to Step Cache by the profile's name."""
    [cache], [sampler] = keys(graph, "Reprise_StepCache"), keys(graph, "KSampler")
    model, run = graph[cache]["inputs"]["model"], graph[sampler]["inputs"]
    calibrate = node("Reprise_StepCacheCalibrate", model=model, positive=run["positive"], negative=run["negative"], sampler=["sampler", 0],
                     sigmas=["sigmas", 0], latent_image=run["latent_image"], cfg=run["cfg"], name="p")
    added = {
        "calibrate": calibrate, "sampler": node("KSamplerSelect", sampler_name=run["sampler_name"]),
        "sigmas": node("BasicScheduler", model=model, scheduler=run["scheduler"], steps=run["steps"], denoise=1.0),
    }
    return graph | added | {cache: {**graph[cache], "inputs": {**graph[cache]["inputs"], "policy.profile": ["calibrate", 0]}}}


def folder_of(server) -> Path:
    said = server.get("/system_stats")["system"]["argv"]
    return Path(said[said.index("--base-directory") + 1]) / "user" / "reprise" / "profiles"


def test_a_profile_is_made_and_used_in_one_graph(server, graph):
    [report] = [report for report in run_as_it_is(server, with_calibration(graph)).reports if report["settings"]["policy"]["name"] == "profile"]
    assert (report["computed_steps"], report["steps"], report["reason"]) == (5, 9, ""), "half of 9 steps, as the profile says"
    assert (folder_of(server) / "p.json").is_file()


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_profile_that_changed_on_disk_is_used_at_once_and_one_that_did_not_costs_nothing(server, graph, suffix):
    run_as_it_is(server, with_calibration(graph))
    run_as_it_is(server, graph)
    assert not run_as_it_is(server, graph).reports, "nothing changed, and the server sampled again"
    file = folder_of(server) / f"p{suffix}"
    os.utime(file)
    assert len(run_as_it_is(server, graph).reports) == 1
    file.unlink()
    with pytest.raises(RuntimeError, match="there is no profile 'p'|profile 'p' cannot be read"):
        run_as_it_is(server, graph)
