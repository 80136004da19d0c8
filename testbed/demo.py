"""Every workflow with and without Reprise, on a running server: pictures side by side, a contact sheet and a report.

    python -m testbed.demo --server http://127.0.0.1:8188 --out demo-output --workflows workflows

What is compared with what is told in compared.py and, as `baseline`, in every row of report.json. Graphs run twice; the
first run warms up, the second is timed and must give the same picture. `seconds` is how long the sampler node was
executing. `psnr_db` and `ssim` compare the two pictures in 8-bit RGB; `psnr_db` is null, and `identical` true, when no
pixel differs. They are measured as the node Compare Runs does it, of a video over all its frames. Where `trained` is false
something in the graph has random weights: its pictures mean nothing, and only the comparison counts.
"""
import argparse
import json
import re
import sys
from pathlib import Path

from PIL import Image

from .client import Server, ServerError
from .compared import compare, middle, quality
from .picture import SHOWN, column, enlarged, framed
from .workflow import WorkflowError, read_workflow

ROOT = Path(__file__).resolve().parent.parent
FRAME_MS = 62   # of a video's pictures; Wan makes 16 a second


def main():
    options = argparse.ArgumentParser(prog="python -m testbed.demo", description=__doc__.split("\n\n")[0])
    options.add_argument("--server", required=True, metavar="URL")
    options.add_argument("--out", required=True, type=Path, metavar="DIR")
    options.add_argument("--workflows", type=Path, default=ROOT / "workflows", metavar="DIR")
    options.add_argument("--only", metavar="NAME", help="run the workflows with NAME in their file name")
    options.add_argument("--thumbnails", action="store_true", help="also write the picture of each trained model beside its workflow, for the template list")
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
            measured, sheet, without, cached = compare(server, file.stem, read_workflow(file, object_info))
        except WorkflowError as error:      # the other files still run
            faults.append(str(error))
            continue
        rows.append({**measured, **machine})
        sheets.append(sheet)
        save(without, out / f"{file.stem} - without.png")
        save(cached, out / f"{file.stem} - with.png")
        framed(sheets[-1]).save(out / f"{file.stem} - side by side.png")
        if thumbnails and measured["trained"]:
            enlarged(cached[middle(cached)], SHOWN).save(file.with_suffix(".jpg"), quality=90)
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


def save(frames: list[Image.Image], path: Path):
    """A PNG; of several frames an animated one."""
    first, *more = frames
    first.save(path, save_all=bool(more), append_images=more, duration=FRAME_MS)


def print_table(rows: list[dict]):
    print(f"\n{'workflow':<43}{'steps':>5}{'evaluations':>14}{'seconds':>15}{'PSNR':>11}  against")
    for r in rows:
        evaluations = "" if r["evaluations"] is None else f"{r['baseline_evaluations']:g} -> {r['evaluations']:.2f}"
        seconds = f"{r['baseline_seconds']:.2f} -> {r['seconds']:.2f}"
        print(f"{r['workflow']:<43}{r['steps']:>5}{evaluations:>14}{seconds:>15}{quality(r):>11}  {r['baseline']}")
    if seeded := [r["workflow"] for r in rows if not r["trained"]]:
        print(f"\nrandom weights: {', '.join(seeded)}; these pictures mean nothing, only the comparison counts")
    print()


if __name__ == "__main__":
    main()
