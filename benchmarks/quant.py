"""What the loader makes of every format: time, memory, and the picture against the full model's.

    python3 dev.py bench quant              -> results/quant.json; about ten minutes on idle cores
    python3 dev.py bench quant --memory     a file of 2 GB at the width of FLUX.1, in a process of its own
    python3 dev.py bench quant --flips      10 000 headers with one flipped byte each, of every container
    python3 dev.py bench quant --lora       a LoRA on wide layers, baked and beside them -> results/quant-lora.json

Rows are of the trained models of the test bed, whose layers are narrow: they tell formats apart, and say nothing of the speed
of large ones. `psnr_image_db` is the mean over two captions, 20 steps, euler, against the full model; no row without it.
`peak_extra_mib` is the anonymous memory above what was left after loading, sampled while the file was read.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from testbed import inprocess

inprocess.start(cpu=True)

import comfy.sd
import torch

from benchmarks import _flips, _large_file, _lora, _quantized_files
from benchmarks._peak import Peak
from benchmarks._quantized_files import FAMILIES, FILES
from pack.core.quant.loader import load
from pack.core.quant.plan import COMPUTE, Settings

RESULTS = Path(__file__).resolve().parent / "results" / "quant.json"
FIELDS = ("family", "format", "load_seconds", "peak_extra_mib", "psnr_image_db", "file_mib", "compute")
MIB = 2 ** 20


def rows(folder: Path):
    for family in FAMILIES:
        full = _quantized_files.drawn(family, comfy.sd.load_diffusion_model(str(_quantized_files.full(family))))
        for form, write in FILES.items():
            path = write(family, folder)
            for compute in COMPUTE if form in _quantized_files.FULL else ("host", "int8"):
                began = time.perf_counter()
                with Peak() as peak:
                    model = load(path, Settings(compute=compute))
                seconds = time.perf_counter() - began
                near = _quantized_files.nearness(_quantized_files.drawn(family, model), full)
                yield dict(zip(FIELDS, (family, form, round(seconds, 3), round(peak.extra, 1), round(near, 1), round(path.stat().st_size / MIB, 2), compute),
                               strict=True))


def line(row: dict) -> str:
    return (f"{row['family']:8} {row['format']:34} {row['compute']:5} {row['psnr_image_db']:6.1f} dB   {row['file_mib']:6.2f} MiB   "
            f"{row['load_seconds']:6.2f} s   {row['peak_extra_mib']:6.1f} MiB extra")


def main() -> int:
    options = argparse.ArgumentParser(prog="dev.py bench quant", description=__doc__.split("\n\n")[0])
    options.add_argument("--memory", action="store_true", help="load a large file and tell what it took")
    options.add_argument("--flips", action="store_true", help="flip bytes of headers")
    options.add_argument("--lora", action="store_true", help="what a LoRA costs on each route")
    chosen = options.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        if chosen.flips:
            return _flips.main(Path(folder))
        if chosen.memory:
            return _large_file.main(Path(folder))
        if chosen.lora:
            return _lora.main(Path(folder))
        found = []
        for row in rows(Path(folder)):
            found.append(row)
            print(line(row), flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"written to {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
