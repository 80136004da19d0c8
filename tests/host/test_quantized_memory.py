"""What turning a layer takes: a few rows in single precision at a time, whatever the layer's size."""
import re
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pack.core.quant import transcode
from pack.core.quant.layer import Layer

ROWS, COLUMNS = 16384, 4096     # 64 M weights, more than FLUX.1's largest layer has
ALLOWED = 300                   # MiB above the result
STATUS = Path("/proc/self/status")


def anonymous() -> float:
    """MiB that no file backs."""
    return int(re.search(r"RssAnon:\s+(\d+)", STATUS.read_text())[1]) / 1024


@pytest.mark.skipif(not STATUS.exists(), reason="this system does not tell anonymous memory")
@pytest.mark.parametrize("target", ["int8", "fp8"])
def test_the_largest_layer_of_a_file_takes_little_memory_beyond_its_result(target, tmp_path):
    save_file({"x.weight": torch.randn(ROWS, COLUMNS, dtype=torch.bfloat16) * 0.02}, tmp_path / "large.safetensors")
    over, seen = threading.Event(), []
    with safe_open(tmp_path / "large.safetensors", framework="pt") as file:
        weight = file.get_tensor("x.weight")
        small = Layer("x", "bf16", (64, COLUMNS), lambda start, stop: weight[start:stop], 0)
        transcode.TRANSCODERS[target](small)        # what is loaded once is not the layer's
        layer = Layer("x", "bf16", (ROWS, COLUMNS), lambda start, stop: weight[start:stop], weight.nbytes)
        before = anonymous()
        watcher = threading.Thread(target=lambda: [seen.append(anonymous()) for _ in iter(lambda: over.wait(0.002), True)])
        watcher.start()
        try:
            made = transcode.TRANSCODERS[target](layer)
        finally:
            over.set()
            watcher.join()
    result = sum(part.nbytes for part in made.values()) / 2**20
    assert len(seen) > 20 and max(seen) - before - result < ALLOWED, (max(seen) - before, result)
