"""Every workflow with and without Reprise, on a running server: pictures side by side, a contact sheet and a report.

    python -m testbed.demo --server http://127.0.0.1:8188 --out demo-output --workflows workflows

Each graph runs twice; the first run warms up, the second is timed and must give the same picture. `seconds` in
report.json is how long the sampler node was executing. `psnr_db` and `ssim` compare the two pictures in 8-bit RGB;
`psnr_db` is null, and `identical` true, when no pixel differs. They are measured as the node Compare Runs does it.
"""
import argparse
import json
import re
import sys
from pathlib import Path

from PIL import Image

from .client import Outcome, Server, ServerError
from .picture import SHOWN, column, difference, enlarged, framed, image_of, psnr, side_by_side, ssim, tensor_of
from .workflow import OURS, WorkflowError, nodes_of, read_workflow, without_reprise

ROOT = Path(__file__).resolve().parent.parent
GAIN = 32


def main():
    options = argparse.ArgumentParser(prog="python -m testbed.demo", description=__doc__.split("\n\n")[0])
    options.add_argument("--server", required=True, metavar="URL")
    options.add_argument("--out", required=True, type=Path, metavar="DIR")
    options.add_argument("--workflows", type=Path, default=ROOT / "workflows", metavar="DIR")
    options.add_argument("--only", metavar="NAME", help="run the workflows with NAME in their file name")
    options.add_argument("--thumbnails", action="store_true", help="also write each workflow's picture beside its file, for ComfyUI's template list")
    chosen = options.parse_args()
    try:
        demo(Server(chosen.server), chosen.workflows, chosen.out, chosen.only or "", chosen.thumbnails)
    except (ServerError, WorkflowError, OSError) as error:
        sys.exit(f"demo: {error}")


def demo(server: Server, folder: Path, out: Path, only: str, thumbnails: bool):
    files = [file for file in sorted(folder.glob("*.json")) if only.lower() in file.stem.lower()]
    if not files:
        raise WorkflowError(f"no workflow in {folder}" + (f" has '{only}' in its name" if only else ""))
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").unlink(missing_ok=True)   # neither an older run nor a folder that cannot be written to shall be noticed late
    (out / "report.json").touch()
    machine, object_info = describe(server), server.get("/object_info")
    rows, sheets, faults = [], [], []
    for file in files:
        try:
            measured, without, cached = compare(server, file, object_info)
        except WorkflowError as error:      # the other files still run
            faults.append(str(error))
            continue
        rows.append({**measured, **machine})
        sheets.append(strip(measured, without, cached))
        without.save(out / f"{file.stem} - without.png")
        cached.save(out / f"{file.stem} - with.png")
        framed(sheets[-1]).save(out / f"{file.stem} - side by side.png")
        if thumbnails:
            enlarged(cached, SHOWN).save(file.with_suffix(".jpg"), quality=90)
    (out / "report.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if rows:
        framed(column(sheets)).save(out / "contact-sheet.png")
        print_table(rows)
        print(f"pictures, contact-sheet.png and report.json are in {out}")
    if faults:
        raise WorkflowError("; ".join(faults))


def describe(server: Server) -> dict:
    stats = server.get("/system_stats")
    version = re.search(r'^version\s*=\s*"(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return {"reprise_version": version[1], "host_version": stats["system"]["comfyui_version"], "device": stats["devices"][0]["name"]}


def compare(server: Server, file: Path, object_info: dict) -> tuple[dict, Image.Image, Image.Image]:
    """Runs one workflow both ways; returns its row of the report and the pictures without and with Reprise."""
    prompt = read_workflow(file, object_info)
    print(f"{file.stem}: without Reprise", flush=True)
    without = timed(server, without_reprise(prompt))
    print(f"{file.stem}: with Reprise", flush=True)
    cached = timed(server, prompt)
    if len(cached.reports) != 1:
        raise WorkflowError(f"'{file.name}' has {len(nodes_of(prompt, OURS))} node(s) of Reprise and sent {len(cached.reports)} reports; "
                            "the demo wants one sampling run with Step Cache enabled and not bypassed")
    report = cached.reports[0]
    if report["state"] != "ran":
        raise WorkflowError(f"Reprise stayed off in '{file.name}': {report['reason']}")
    full, fewer = (tensor_of(outcome.images[0]) for outcome in (without, cached))
    identical, similarity = full.equal(fewer), ssim(full, fewer)
    return {
        "workflow": file.stem,
        "model": nodes_of(prompt, "UNETLoader")[0]["inputs"]["unet_name"],
        "steps": report["steps"],
        "evaluations": round(report["evaluations"], 3),
        "baseline_evaluations": report["baseline_evaluations"],
        "computed_steps": report["computed_steps"],
        "skipped_steps": report["skipped_steps"],
        "seconds": round(cached.sampling, 3),
        "baseline_seconds": round(without.sampling, 3),
        "psnr_db": None if identical else round(psnr(full, fewer), 2),
        "ssim": None if similarity is None else round(similarity, 5),
        "identical": identical,
        "settings": report["settings"],
    }, without.images[0], cached.images[0]


def timed(server: Server, prompt: dict) -> Outcome:
    """The second of two runs, which must give the picture of the first."""
    first, second = server.run(prompt), server.run(prompt)
    if not second.images:
        raise ServerError("the graph ended without a picture; has it a Save Image node?")
    if [image.tobytes() for image in first.images] != [image.tobytes() for image in second.images]:
        raise ServerError("the same graph gave two different pictures")
    return second


def strip(measured: dict, without: Image.Image, cached: Image.Image) -> Image.Image:
    quality = "identical" if measured["identical"] else f"{measured['psnr_db']:.1f} dB"
    apart = image_of(difference(tensor_of(without), tensor_of(cached), GAIN))
    return side_by_side(without, cached, apart, (
        f"{measured['workflow']}: without\n"
        f"{measured['steps']} steps, {measured['baseline_evaluations']:g} evaluations, {measured['baseline_seconds']:.2f} s",
        f"with Reprise: {quality}\n{measured['steps']} steps, {measured['evaluations']:.2f} evaluations, {measured['seconds']:.2f} s",
        f"difference x {GAIN}\n{measured['model']}"))


def print_table(rows: list[dict]):
    print(f"\n{'workflow':<32}{'steps':>6}{'evaluations':>16}{'seconds':>18}{'PSNR':>12}")
    for r in rows:
        evaluations = f"{r['baseline_evaluations']:g} -> {r['evaluations']:.2f}"
        seconds = f"{r['baseline_seconds']:.2f} -> {r['seconds']:.2f}"
        quality = "identical" if r["identical"] else f"{r['psnr_db']:.1f} dB"
        print(f"{r['workflow']:<32}{r['steps']:>6}{evaluations:>16}{seconds:>18}{quality:>12}")
    print()


if __name__ == "__main__":
    main()
