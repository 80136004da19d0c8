"""The demo, as `python3 dev.py demo` runs it."""
import json
import shutil

import pytest
from PIL import Image

from .conftest import STEP_CACHES
from devtools.server import ROOT
from testbed import captions_sheet
from testbed.captions import DEMO
from testbed.demo import demo
from testbed.workflow import WorkflowError

ROW = ("workflow", "system", "baseline", "model", "trained", "steps", "evaluations", "baseline_evaluations", "computed_steps", "skipped_steps", "seconds",
       "baseline_seconds", "psnr_db", "ssim", "identical", "without_reference_psnr_db", "said", "settings", "reprise_version", "host_version", "device")
OF_STEP_CACHE = ("evaluations", "baseline_evaluations", "computed_steps", "skipped_steps")


@pytest.mark.parametrize("content", [b"{ broken", b"", b"[]", b"{}", b"\xff\xfe"])
def test_a_broken_workflow_is_named_and_the_others_still_run(server, tmp_path, content):
    folder = tmp_path / "workflows"
    folder.mkdir()
    [good, *_] = STEP_CACHES
    shutil.copy(good, folder)
    (folder / "A broken.json").write_bytes(content)
    with pytest.raises(WorkflowError, match="'A broken.json' cannot be used: "):
        demo(server, folder, tmp_path / "out", "", thumbnails=False)
    assert [row["workflow"] for row in json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))] == [good.stem]


def test_the_demo_writes_pictures_a_contact_sheet_and_one_row_for_each_workflow(server, tmp_path):
    demo(server, ROOT / "workflows", tmp_path, "", thumbnails=False)
    rows = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert [row["workflow"] for row in rows] == sorted(file.stem for file in (ROOT / "workflows").glob("*.json"))
    for row in rows:
        assert tuple(row) == ROW
        if row["system"] == "StepCache":
            assert 0 < row["computed_steps"] <= row["evaluations"] < row["baseline_evaluations"] == row["steps"]
        else:
            assert row["steps"] > 0 and all(row[name] is None for name in OF_STEP_CACHE)
        if row["system"] == "ApplyReferenceCache":
            assert row["identical"] and row["without_reference_psnr_db"] < 60 and "exact" in row["said"]
            assert "from the bank" in row["said"] or "ready-made" in row["said"]
        else:
            assert row["without_reference_psnr_db"] is None and (row["identical"] or 20 < row["psnr_db"] < 120 and 0.5 < row["ssim"] < 1)
        assert row["system"] != "ReferenceLatentCache" or "approximate" in row["said"] and "measured error" in row["said"]
        assert row["system"] != "QuantizedModelLoader" or " layers " in row["said"]
        assert row["seconds"] > 0 and row["baseline_seconds"] > 0
        for kind in ("without", "with", "side by side"):
            assert Image.open(tmp_path / f"{row['workflow']} - {kind}.png").height >= 128
        with Image.open(tmp_path / f"{row['workflow']} - with.png") as picture:
            assert getattr(picture, "n_frames", 1) == (9 if row["workflow"].startswith("Wan") else 1)
    assert {row["workflow"].split()[0] for row in rows if not row["trained"]} == {"Wan", "SDXL", "FLUX.2", "FastFit"}
    assert len({row["baseline"] for row in rows}) == len({row["system"] for row in rows}) == 4
    assert Image.open(tmp_path / "contact-sheet.png").height >= 128 * len(rows)


def test_the_sheet_of_captions_has_every_trained_model_and_no_other(server, tmp_path, monkeypatch):
    monkeypatch.setattr(captions_sheet, "DEMO", DEMO[:2])
    out = tmp_path / "new" / "captions.png"
    monkeypatch.setattr("sys.argv", ["captions_sheet", "--server", server.url, "--out", str(out), "--workflows", str(ROOT / "workflows"), "--blind"])
    captions_sheet.main()
    places = json.loads(out.with_suffix(".json").read_text(encoding="utf-8")).values()
    assert {model for model, _ in places} == {"flux_tiny.safetensors", "z_image_tiny.safetensors"}
    assert sorted(caption for _, caption in places) == sorted(2 * DEMO[:2])
    assert Image.open(out).width >= 4 * 128
