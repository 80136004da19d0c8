"""What the reference caches save, and what they cost.

    python3 dev.py bench reference-cache     -> results/reference-cache.json; about ten minutes, on the CPU

Every system is compared with what does the same today, which its row names in `against`: where public code has a cache of
its own, with that. FLOPs are those of one evaluation after the first, counted by torch at the published sizes on the meta
device, and so are the bytes and what encoding costs, in evaluations. Seconds are medians of runs of 20 steps on tiny models,
encoding included, in turn; `cpu_ratio` is of processor time, which a busy machine disturbs less than the clock's.
`max_abs_error` is that of the final latent against a joint attention or against references computed on every step, and
`effect` how far the references change that latent at all. Further fields are a system's own.
"""
import json
import os
import sys
from pathlib import Path

from testbed import inprocess

inprocess.start(cpu=True)
from benchmarks import _easycontrol, _fastfit, _image_template, _klein, _templates  # noqa: I001 - the host must be on the path first

import torch

SYSTEMS = (_easycontrol, _fastfit, _templates, _image_template, _klein)
FIELDS = ("system", "references", "shape", "flops_without", "flops_with", "wall_ratio", "entry_bytes", "formula_bytes", "prefill_steps", "max_abs_error",
          "exactness")
RESULTS = Path(__file__).resolve().parent / "results" / "reference-cache.json"
TERA, MIB = 1e12, 2 ** 20


def line(row: dict) -> str:
    many = "s" * (row["references"] != 1)
    return (f"{row['system']}, {row['references']} reference{many} ({row['shape']}), against {row['against']}:\n"
            f"    {row['flops_without'] / TERA:.2f} -> {row['flops_with'] / TERA:.2f} TFLOP per evaluation, "
            f"{row['flops_without'] / row['flops_with']:.3f}x fewer; wall time ratio {row['wall_ratio']:.3f}, of processor time {row['cpu_ratio']:.3f}\n"
            f"    entry {row['entry_bytes'] / MIB:.2f} MiB (formula {row['formula_bytes'] / MIB:.2f}), encoding costs {row['prefill_steps']:.2g} evaluations; "
            f"{row['exactness']}, max error {row['max_abs_error']:.1e}, relative {row['relative_error']:.1e}")


def rows():
    """With the fields of every system first."""
    for system in SYSTEMS:
        for row in system.rows():
            yield {field: row[field] for field in FIELDS} | row


def main() -> int:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    found = []
    for row in rows():
        found.append(row)
        print(line(row), flush=True)
    text = json.dumps(found, indent=2) + "\n"
    try:
        RESULTS.write_text(text, encoding="utf-8")
        print(f"written to {RESULTS}")
    except OSError as error:
        print(f"{text}{RESULTS} cannot be written ({error.strerror}); the rows stand above")
    return 0


if __name__ == "__main__":
    sys.exit(main())
