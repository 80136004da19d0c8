"""What Reprise does on this GPU, in under eight minutes: one command, one JSON file.

    python3 dev.py bench gpu [--out FILE] [--minutes M]      -> results/gpu.json

Machine, kernels, int8 products, blocks of FLUX.1 and Z-Image, and FLUX.1 dev end to end with random weights; no model file is needed.
The file is written after every row, so nothing is lost by an interrupt. It holds no paths and no name of a user.
"""
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

MOST_READ = 200     # characters of a file that is there already
STARTED = time.monotonic()
from benchmarks import kernels  # noqa: I001 - sets Triton up before anything imports it
from testbed import inprocess

inprocess.start(cpu=not kernels.GPU)
from benchmarks import _gpu_blocks, _gpu_kernels, _gpu_machine, _gpu_model
from benchmarks._gpu_meter import GpuMeter
from benchmarks._gpu_record import FAILURES, Bench, NotWritten, Record, reason
from benchmarks._gpu_subjects import Subject, flux, z_image
from benchmarks._gpu_verdict import line, verdicts

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.json"
MINUTES, MOST_MINUTES = 7.75, 24 * 60.0


@dataclass(frozen=True)
class Sizes:
    """What is measured. The real ones; the tests run tiny ones through the same code."""

    small_kernels: bool = False                             # the kernels' cases for tests
    products: tuple[tuple[int, int, int], ...] = (          # M, N, K: 4096 tokens of a picture and 256 of text, or 96 for Z-Image
        (4352, 9216, 3072), (4352, 12288, 3072), (4352, 21504, 3072), (4352, 3072, 15360), (4352, 3072, 3072), (4192, 11520, 3840), (4192, 3840, 10240))
    subjects: tuple[Subject, ...] = (flux(), z_image())     # of which blocks are timed
    whole: Subject = flux()                                 # which is sampled from end to end
    blocks: tuple[int, int] = (1, 3)                        # few and many
    block_steps: int = 9
    steps: int = 20
    latent: int = 128                                       # 1024 pixels
    text_tokens: tuple[int, ...] = (256, 512)
    memory_share: float = 1.0                               # of what the whole model needs


@dataclass(frozen=True)
class Section:
    """seconds: its share; what one leaves goes to the next."""

    name: str
    seconds: float
    run: Callable[[Bench], None]
    title: str


SECTIONS = (
    Section("facts", 15, _gpu_machine.run, "the machine"),
    Section("kernels", 90, _gpu_kernels.run, "each kernel against its floor, the host and comfy_kitchen"),
    Section("products", 30, _gpu_kernels.run_products, "matrix products"),
    Section("blocks", 120, _gpu_blocks.run, "a block of FLUX.1 and of Z-Image"),
    Section("model", 210, _gpu_model.run, "FLUX.1 dev from end to end"),
)


def measure(bench: Bench, began: float, minutes: float = MINUTES) -> None:
    """All sections, each within its time."""
    whole, until = sum(section.seconds for section in SECTIONS), began
    for section in SECTIONS:
        until += section.seconds * 60 * minutes / whole
        bench.begin(section.name, until)
        bench.say(f"\n{section.title}")
        start = bench.now()
        try:
            section.run(bench)
        except KeyboardInterrupt:
            bench.record.set(stopped=f"interrupted in the section '{section.name}'")
            raise
        except FAILURES as error:    # between rows: such as a GPU that went away
            bench.record.add(section.name, {"failed": reason(error)})
            bench.say(f"  this section ended: {reason(error)}")
        finally:
            bench.record.content["seconds"][section.name] = round(bench.now() - start, 1)
            bench.record.write()
    bench.record.set(finished=True)


def minutes_of(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        raise ArgumentTypeError(f"'{text}' came; a number was expected") from None
    if not 0 < minutes <= MOST_MINUTES:
        raise ArgumentTypeError(f"{text} came; more than 0 and at most {MOST_MINUTES:g} was expected")
    return minutes


def result_file(text: str) -> Path:
    """A file that is not there, or an earlier result."""
    try:
        file = Path(text).expanduser().resolve()
    except RuntimeError as error:
        raise ArgumentTypeError(f"'{text}': {error}".rstrip(".")) from None
    if not text or file.is_dir():
        raise ArgumentTypeError(f"'{text}' names no file, but a folder; name a file in it")
    if file.exists() and (not file.is_file() or f'"{_gpu_machine.NAME}"'.encode() not in beginning(file)):
        raise ArgumentTypeError(f"'{text}' is there and is no result of this benchmark; name another file")
    return file


def beginning(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(MOST_READ)


def main(arguments: Sequence[str] = ()) -> int:
    parser = ArgumentParser(prog="dev.py bench gpu", description="What Reprise does on this GPU, in under eight minutes.")
    parser.add_argument("--out", type=result_file, default=RESULTS, help="file for the result")
    parser.add_argument("--minutes", type=minutes_of, default=MINUTES, help="time for all of it; what does not fit is named in the file")
    options = parser.parse_args(arguments)
    if not kernels.GPU:
        print("There is no GPU that torch can use here, or REPRISE_CPU is set, and this benchmark measures nothing else. Nothing was written.")
        return 1
    record = Record(options.out, _gpu_machine.program(), verdicts)
    try:
        record.write()      # before minutes go by
        bench = Bench(record, GpuMeter(), Sizes())
        measure(bench, STARTED, options.minutes)
    except NotWritten as error:
        print(error)
        return 1
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was measured is in {record.file}")
        return 130
    finish(bench)
    print(f"\nwritten to {record.file}; the README says where to send it")
    return 0


def finish(bench: Bench) -> None:
    """The verdicts, and what was left out."""
    judged = verdicts(bench.record.content)["verdicts"]
    bench.say("\n" + ("\n".join(map(line, judged)) or "No numbers were set for this card, so nothing is judged."))
    if left := len(bench.record.content["not_run"]):
        bench.say(f"{left} rows were not run; the file says which and why")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
