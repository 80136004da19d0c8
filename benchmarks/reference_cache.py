"""What the reference caches save, and what they cost.

    python3 dev.py bench reference-cache     -> results/reference-cache.json; some minutes, on the CPU

FLOPs are those of one evaluation, counted by torch at the published sizes on the meta device. `flops_without` is the
official cached path of each system, `flops_with` ours. Seconds are medians of runs of 20 steps on tiny models, in turn.
`max_abs_error` is that of the final latent against the references recomputed on every step.
"""
import json
import os
import sys
from pathlib import Path

from testbed import inprocess

inprocess.start(cpu=True)
from benchmarks import _easycontrol  # noqa: I001 - the host must be on the path first

import torch

SYSTEMS = (_easycontrol,)
RESULTS = Path(__file__).resolve().parent / "results" / "reference-cache.json"
TERA = 1e12


def line(row: dict) -> str:
    many = "s" * (row["references"] != 1)
    return (f"{row['system']}, {row['references']} reference{many}: {row['flops_without'] / TERA:.2f} -> {row['flops_with'] / TERA:.2f} TFLOP per evaluation"
            f" ({row['flops_without'] / row['flops_with']:.2f}x fewer), wall time ratio {row['wall_ratio']:.3f}, entry "
            f"{row['entry_bytes'] / 2 ** 20:.1f} MiB (formula {row['formula_bytes'] / 2 ** 20:.1f}), encoding costs {row['prefill_steps']:.2f} evaluations, "
            f"max error {row['max_abs_error']:.1e}, {row['exactness']}")


def main() -> int:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rows = []
    for system in SYSTEMS:
        for row in system.rows():
            rows.append(row)
            print(line(row), flush=True)
    text = json.dumps(rows, indent=2) + "\n"
    try:
        RESULTS.write_text(text)
        print(f"written to {RESULTS}")
    except OSError as error:
        print(f"{text}{RESULTS} cannot be written ({error.strerror}); the rows stand above")
    return 0


if __name__ == "__main__":
    sys.exit(main())
