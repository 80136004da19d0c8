"""The machine and the program that a result of `bench gpu` is of. No path, no name of a user or of a host."""
import datetime
import re
import shutil
import subprocess
from pathlib import Path

import torch

from pack.core.quant.doctor import findings
from pack.core.quant.look import look

NAME = "reprise gpu"      # by which a result is known
ROOT = Path(__file__).resolve().parent.parent


def answer(*command: str) -> str:
    """The output of a program, empty where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def program() -> dict:
    """Which Reprise this is, and when it ran."""
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    git = ("git", "-C", str(ROOT))
    inside = answer(*git, "rev-parse", "--is-inside-work-tree") == "true"
    return {
        "benchmark": NAME, "version": version[1] if version else "", "commit": answer(*git, "rev-parse", "HEAD") if inside else "",
        "changed": bool(answer(*git, "status", "--porcelain", "--untracked-files=no")) if inside else None, "date": datetime.date.today().isoformat(),
    }


def facts(device: torch.device) -> dict:
    """What Doctor finds, and the driver."""
    machine = look(device)
    driver, _, power = answer("nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader", f"--id={device.index or 0}").partition(",")
    return {
        "gpu": machine.gpu, "memory_gib": round(machine.memory / (1 << 30), 1), "architecture": machine.generation, "system": machine.system,
        "torch": torch.__version__, "cuda": machine.cuda, "driver": driver.strip(), "power_limit": power.strip(),
        "triton": machine.triton or "works", "comfy_kitchen": dict(machine.kitchen or {}), "serves": dict(machine.serves),
        "attention": {name: why or "works" for name, why in machine.attention.items()}, "doctor": [finding.line() for finding in findings(machine)],
    }


def run(bench) -> None:
    device = bench.meter.device
    bench.record.set(machine={"gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else ""})      # should the rest fail
    found = bench.tried({"facts": "of the machine"}, lambda: facts(device))
    if found is not None:
        bench.record.set(machine=found)
        bench.say("\n".join(f"  {line}" for line in found["doctor"]))
