"""Headers with a flipped bit: an error of one sentence or what the header now says, in no time, and nothing larger than the file."""
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pack.core.quant.detect import detect, without_prefix
from pack.core.quant.files import BadFile, open_file
from pack.core.quant.formats import layers_of
from pack.core.quant.gguf_header import read_header
from testbed import quantized

MODEL = "flux_tiny.safetensors"
LONGEST = 2.0       # seconds for one file
FILES: dict[str, Callable[[Path], Path]] = {
    "safetensors": lambda folder: quantized.write(MODEL, "float8_e4m3fn scaled", folder / "good.safetensors"),
    "gguf": lambda folder: quantized.write_gguf(MODEL, "Q4_K", folder / "good.gguf"),
    "nunchaku": lambda folder: quantized.write_svdquant(MODEL, folder / "good_nunchaku.safetensors"),
}


def header_bytes(path: Path) -> int:
    content = path.read_bytes()
    if path.suffix != ".gguf":
        return 8 + struct.unpack("<Q", content[:8])[0]
    import gguf

    return min(info.offset for info in read_header(content, path.name, {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}).infos)


def wrong(good: Path, folder: Path, count: int, seed: int = 5, tell: Callable[[int], None] = lambda done: None) -> list[str]:
    """What went wrong over `count` files with one flipped bit in the header each. Files are as long as the header and what is looked at."""
    content, header = bytearray(good.read_bytes()), header_bytes(good)
    chance, faults, path = random.Random(seed), [], folder / f"flipped{good.suffix}"
    path.write_bytes(content)
    for done in range(count):
        place, bit = chance.randrange(header), 1 << chance.randrange(8)
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([content[place] ^ bit]))
        fault, took = timed(path, len(content))
        if took > LONGEST:      # perhaps the machine was busy, and not the reader
            fault, took = timed(path, len(content))
        if took > LONGEST:
            fault = f"{took:.1f} s"
        if fault:
            faults.append(f"{good.name}, byte {place}: {fault}")
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([content[place]]))
        tell(done + 1)
    return faults


def timed(path: Path, size: int) -> tuple[str, float]:
    began = time.perf_counter()
    return tried(path, size), time.perf_counter() - began


def tried(path: Path, size: int) -> str:
    """What is wrong with how a file is taken, up to where the host would build its network; other errors than BadFile are raised."""
    try:
        file = open_file(path)
        layers, rest = layers_of(file)
        shapes = {**rest, **{f"{name}.weight": torch.empty(layer.shape, device="meta") for name, layer in layers.items()}}
        detect(without_prefix(shapes)[0], file.metadata, file.name)
    except BadFile as error:
        return "more than a line: " + str(error) if "\n" in str(error).strip() else ""
    return next((f"{layer.name} is larger than the file" for layer in layers.values() if layer.shape[0] * layer.shape[1] > 4 * size), "")


def main(folder: Path, count: int = 10_000) -> int:
    faults = []
    for name, write in FILES.items():
        began = time.perf_counter()
        found = wrong(write(folder), folder, count)
        print(f"{name}: {count} headers, {len(found)} wrong, {time.perf_counter() - began:.0f} s", flush=True)
        faults += found
    for fault in faults[:20]:
        print(f"  {fault}")
    return 1 if faults else 0
