"""Compare Runs as the host calls it; what is measured and drawn has its own tests in tests/unit."""
import inspect
import math

import comfy.utils
import pytest
import torch
from harness import attached, model, sample

from pack.compare.metrics import EXACT
from pack.core.attach import runs_on
from pack.core.report import Report
from pack.nodes import notify
from pack.nodes._api import io
from pack.nodes.compare_runs import CompareRuns


def pictures(count: int = 2, height: int = 24, width: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.rand((count, height, width, 3), generator=torch.Generator().manual_seed(seed))


def execute(a, b, **more):
    return CompareRuns.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "7"}}).execute(a, b, **more).result


def test_the_outputs_are_pictures_text_and_numbers_of_the_host_s_types():
    a, b = pictures(), pictures(seed=1)
    comparison, plot, text, psnr, ssim = execute(a, b)
    assert comparison.shape[0] == 2 and plot.shape[0] == 1
    for image in (comparison, plot):
        assert image.dtype == torch.float32 and image.shape[-1] == 3 and 0 <= image.min() < image.max() <= 1
    errors = [((x - y) ** 2).mean().item() for x, y in zip(a, b, strict=True)]
    assert psnr == pytest.approx(sum(-10 * math.log10(error) for error in errors) / 2, abs=1e-3)
    assert isinstance(psnr, float) and isinstance(ssim, float) and -1 < ssim < 0.2
    assert f"mean: PSNR {psnr:.2f} dB, SSIM {ssim:.4f}" in text and text.startswith("1: PSNR ")


def test_equal_pictures_are_exact():
    *_, text, psnr, ssim = execute(pictures(), pictures())
    assert psnr == EXACT and ssim == pytest.approx(1, abs=1e-6) and "(equal)" in text


def test_a_single_pixel_has_a_psnr_and_says_why_it_has_no_ssim():
    comparison, _, text, psnr, ssim = execute(torch.zeros(1, 1, 1, 3), torch.full((1, 1, 1, 3), 0.1))
    assert psnr == pytest.approx(20, abs=1e-3) and math.isnan(ssim) and "SSIM needs" in text and comparison.shape[2] > 1000


def test_reports_are_told_and_drawn():
    patcher = attached(model("flux"))
    sample(patcher, "flux")
    report = runs_on(patcher).strays(())[0]
    _, blank, without, *_ = execute(pictures(1), pictures(1))
    _, one, text, *_ = execute(pictures(1), pictures(1), report_b=report)
    _, two, both, *_ = execute(pictures(1), pictures(1), report_a=Report(state="off", reason="why not"), report_b=report)
    assert "Step Cache" not in without and text.endswith(f"\nB: {report.line()}") and "\nA: Step Cache is off: why not\nB: " in both
    assert blank.shape[1] < one.shape[1] < two.shape[1]


def test_the_gain_changes_the_picture_and_no_number():
    low, high = (execute(pictures(), pictures() * 0.99, gain=gain) for gain in (2, 200))
    assert not low[0].equal(high[0]) and low[2:] == high[2:]


def test_progress_is_shown_and_the_text_reaches_the_node(monkeypatch):
    bars, texts = [], []

    class Server:
        client_id = "client"

        def send_progress_text(self, *sent):
            texts.append(sent)

    monkeypatch.setattr(notify, "running_server", Server)
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, node_id=None: bars.append((value, total)))
    text = execute(pictures(3), pictures(3, seed=1))[2]
    assert bars[0] == (1, 3) and bars[-1] == (3, 3) and texts == [(text, "7", "client")]


@pytest.mark.parametrize(("a", "b"), [(pictures(2), pictures(3)), (pictures(), pictures(height=25)), (pictures(), pictures() * float("nan"))])
def test_what_cannot_be_compared_is_one_sentence(a, b):
    with pytest.raises(ValueError) as caught:
        execute(a, b)
    assert "\n" not in str(caught.value) and "image B" in str(caught.value)


def test_the_schema_is_valid_and_agrees_with_the_function():
    schema = CompareRuns.GET_SCHEMA()
    schema.validate()
    parameters = inspect.signature(CompareRuns.execute).parameters
    assert {entry.id for entry in schema.inputs} == set(parameters) and all(entry.tooltip for entry in (*schema.inputs, *schema.outputs))
    assert all(entry.optional == (parameters[entry.id].default is not inspect.Parameter.empty) for entry in schema.inputs)
    assert [output.io_type for output in schema.outputs] == ["IMAGE", "IMAGE", "STRING", "FLOAT", "FLOAT"]
