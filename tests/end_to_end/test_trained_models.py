"""Whole runs on the trained models: near the full picture, nearer than plain sampling, and what the README says."""
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks import _pictures as bench
from pack.core.attach import attach_step_cache
from pack.core.presets import TOLERANCE, preset_settings
from pack.core.run import Settings
from pack.core.stepcache.levels import LEVELS
from pack.core.stepcache.policies import POLICIES
from pack.core.stepcache.predictors import PREDICTORS
from testbed.nodes.text import encode
from testbed.train import NETS

ROOT = Path(__file__).resolve().parent.parent.parent
MODELS = sorted(path.name for path in (ROOT / "testbed" / "models").glob("*.safetensors") if not path.name.startswith(("taef", "easycontrol")))
KINDS = {"flux_tiny.safetensors": "flux", "z_image_tiny.safetensors": "zimage", "tiny_z_image_trained128.safetensors": "zimage-drawn"}


@pytest.fixture(scope="session")
def subjects():
    return {subject.file: (subject, subject.load()) for subject in bench.SUBJECTS}


def test_every_trained_model_is_measured(subjects):
    assert sorted(subjects) == MODELS


@pytest.mark.parametrize("file", MODELS)
def test_the_default_settings_beat_plain_sampling_with_as_many_evaluations(subjects, file):
    subject, patcher = subjects[file]
    reports, gain, errors = [], [], []
    cached = attach_step_cache(patcher, preset_settings("balanced"), reports.append)
    for caption, noise in islice(subject.pictures(), 4):
        full = bench.sample(patcher, caption, noise, 20, 1.0, "euler")
        near = bench.psnr(bench.sample(cached, caption, noise, 20, 1.0, "euler"), full)
        plain = bench.psnr(bench.sample(patcher, caption, noise, round(reports[-1].evaluations), 1.0, "euler"), full)
        gain.append(near - plain)
        errors.append(near)
    assert sum(r.evaluations for r in reports) / 4 <= 12
    assert sum(gain) / 4 > 5, (gain, errors)


@pytest.mark.parametrize("preset", ["safe", "balanced", "fast"])
@pytest.mark.parametrize("file", MODELS)
def test_the_presets_go_from_near_and_slow_to_far_and_fast(subjects, file, preset):
    subject, patcher = subjects[file]
    caption, noise = next(subject.pictures())
    reports = []
    bench.sample(attach_step_cache(patcher, preset_settings(preset), reports.append), caption, noise, 20, 1.0, "euler")
    skipped = [e.predicted_error for e in reports[0].each if not e.computed]
    assert skipped and max(skipped) < TOLERANCE[preset]


@pytest.mark.parametrize("file", MODELS)
def test_switched_off_by_tolerance_zero_the_latent_is_the_hosts_bit_for_bit(subjects, file):
    subject, patcher = subjects[file]
    caption, noise = next(subject.pictures())
    full = bench.sample(patcher, caption, noise, 20, 3.0, "euler")
    for level in LEVELS.values():
        never = Settings(POLICIES["error control"](0.0), PREDICTORS["automatic"](), level())
        assert torch.equal(bench.sample(attach_step_cache(patcher, never), caption, noise, 20, 3.0, "euler"), full)


@pytest.mark.parametrize("file", KINDS)
def test_the_training_code_computes_what_the_host_computes(subjects, file):
    """testbed/arch.py was trained, comfy's class is what runs: the same function of the same weights."""
    subject, patcher = subjects[file]
    net = NETS[KINDS[file]]()
    weights = load_file(ROOT / "testbed" / "models" / file)
    net.load_state_dict({name: weights[name].float() for name in net.state_dict()})
    generator = torch.Generator().manual_seed(3)
    x, sigma = torch.randn((2, 16, 16, 16), generator=generator), torch.tensor([0.9, 0.2])
    tokens, pooled = (torch.cat([value] * 2) for value in encode("red heart"))
    extra = {"y": pooled, "guidance": torch.tensor([3.5, 3.5])} if "flux" in file else {"num_tokens": tokens.shape[1]}
    with torch.inference_mode():
        ours = net(x, sigma, tokens, pooled)
        theirs = patcher.model.diffusion_model.float()(x, sigma, context=tokens, transformer_options={}, **extra)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_published_numbers_hold_what_the_readme_promises():
    rows = {row["model"]: row for row in json.loads((ROOT / "benchmarks" / "results" / "first.json").read_text())}
    least = {"flux_tiny": 45, "z_image_tiny": 42, "tiny_flux_trained128": 48}
    for model, decibel in least.items():
        row = rows[model]
        assert row["evaluations"] <= 10.5 and row["baseline_evaluations"] == 20
        assert row["psnr_db"] >= decibel and row["psnr_db"] - row["plain_psnr_db_at_same_evaluations"] >= 8


def test_every_block_matrix_of_the_flux_model_is_a_multiple_of_256_wide():
    with safe_open(ROOT / "testbed" / "models" / "flux_tiny.safetensors", "pt") as file:
        widths = {name: file.get_slice(name).get_shape()[1] for name in file.keys() if "blocks." in name and len(file.get_slice(name).get_shape()) == 2}
    assert widths and all(width % 256 == 0 for width in widths.values())


def test_the_models_of_the_demo_stay_within_38_mb_and_those_of_the_benchmark_alone_within_15():
    sizes = {path.name: path.stat().st_size for path in (ROOT / "testbed" / "models").iterdir()}
    drawn = sum(size for name, size in sizes.items() if name.endswith("_trained128.safetensors"))
    assert sum(sizes.values()) - drawn <= 38e6 and drawn <= 15e6
