"""Profiles on disk: <name>.json and, beside it, <name>.safetensors with the tensors. They may come from strangers.

Nothing is trusted: sizes are bounded before anything is read, every field is looked at, the tensor file must be the one that
the JSON was written with, and a name cannot leave the folder. What is wrong is told in one sentence.
"""
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...knob import shown
from .facts import Facts
from .plan import Plan
from .profile import Check, Polynomial, Profile
from .recording import NAMES

FORMAT, VERSION = "reprise.profile", 1
MOST_JSON, MOST_TENSORS = 1 << 20, 4 << 20      # bytes; a profile of 200 steps has 60 KB and 320 KB
MOST_STEPS, MOST_CHECKS, MOST_CHARACTERS, MOST_NUMBERS = 200, 16, 200, 200
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_,-]*(\.[A-Za-z0-9_,-]+)*")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)    # names that Windows keeps for devices
LARGE = 1e12
OVERLAPS = "overlaps"


def no_name(name: str) -> str:
    """What a profile's name should be, where this is none."""
    if isinstance(name, str) and len(name) <= 100 and NAME.fullmatch(name) and not RESERVED.fullmatch(name):
        return ""
    return "expected the name of a profile: letters, digits, '-', '_', ',' and single dots, 100 at most"


def path_of(folder: Path, name: str) -> Path:
    if fault := no_name(name):
        raise ValueError(f"profile name {shown(name)!r} is refused; {fault}")
    return folder / f"{name}.json"


def stamp(folder: Path, name: str) -> str:
    """Size and time of change of both files; another text as soon as one of them is another, is gone or is there. They are not opened."""
    return "" if no_name(name) else " ".join(stamp_of(folder / f"{name}{suffix}") for suffix in (".json", ".safetensors"))


def stamp_of(path: Path) -> str:
    try:
        found = path.stat()
    except OSError:     # the error is told when the profile is read
        return "-"
    return f"{found.st_size}:{found.st_mtime_ns}"


def write(folder: Path, name: str, profile: Profile) -> Path:
    """The profile, in the place of an older one of that name. A reader finds it whole or not at all."""
    path = path_of(folder, name)
    tensors = save({OVERLAPS: profile.overlaps.double().contiguous()})
    text = json.dumps(as_json(profile, hashlib.sha256(tensors).hexdigest()), indent=1, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    replace(path.with_name(f"{name}.safetensors"), tensors)
    replace(path, text.encode("utf-8"))
    return path


def replace(path: Path, content: bytes) -> None:
    """The file all at once, by way of another one beside it; an interrupt leaves nothing."""
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(beside, path)
    finally:
        Path(beside).unlink(missing_ok=True)


def read(folder: Path, name: str) -> Profile:
    path = path_of(folder, name)
    if not path.is_file():
        known = ", ".join(names(folder)[:12])
        raise ValueError(f"there is no profile '{name}'; {f'known: {known}' if known else 'make one with Step Cache Calibrate'}")
    try:
        return checked(name, bounded(path, MOST_JSON), bounded(path.with_name(f"{name}.safetensors"), MOST_TENSORS))
    except OSError as error:
        raise ValueError(f"profile '{name}' cannot be read ({error.strerror}); calibrate again") from error


def names(folder: Path) -> list[str]:
    """Those of the profiles that are there; a folder or a pipe is none."""
    return sorted(path.stem for path in folder.glob("*.json") if path.is_file() and not no_name(path.stem)) if folder.is_dir() else []


def bounded(path: Path, most: int) -> bytes:
    """The content of a file that is no larger than it should be."""
    if path.exists() and not path.is_file():    # to open a pipe is to wait for whoever writes into it
        raise ValueError(f"{path.name} is no file; remove it and calibrate again")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path.name} has more than {most >> 10} KiB and is no profile; calibrate again")
    return content


def as_json(profile: Profile, digest: str) -> dict:
    facts, fit = profile.facts, profile.teacache
    return {
        "format": FORMAT, "version": VERSION, "pack": profile.pack, "date": profile.date,
        "made_for": {
            "family": facts.family, "model": facts.model, "precision": facts.precision, "sampler": facts.sampler, "steps": facts.steps,
            "sigmas": list(facts.sigmas), "shape": list(facts.shape), "cfg": facts.cfg, "flow": profile.flow,
        },
        "pictures": profile.pictures, "looks_back": profile.looks_back, "checks": [check._asdict() for check in profile.checks],
        "refined": [{"computed": list(plan.computed), "planned": plan.error, "measured": plan.measured} for plan in profile.refined],
        "each": {name: list(values) for name, values in profile.each.items()},
        "teacache": fit and {**fit._asdict(), "coefficients": list(fit.coefficients)},
        "magcache": [list(curve) for curve in profile.magcache], "tensors": digest,
    }


def checked(name: str, text: bytes, tensors: bytes) -> Profile:
    """The profile that these are, or a ValueError that names the first field which is not as it should be."""
    try:
        record = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"profile '{name}' is not JSON ({str(error)[:80]}); calibrate again") from error
    fields = Fields(name, "", record)
    if fields.take("format") != FORMAT:
        raise fields.wrong("format", f"expected '{FORMAT}'")
    if fields.whole("version", 0, 1 << 30) != VERSION:
        raise fields.wrong("version", f"expected {VERSION}")
    made = Fields(name, "made_for.", fields.take("made_for"))
    steps = made.whole("steps", 1, MOST_STEPS)
    facts = Facts(
        made.text("family"), made.text("model"), made.text("sampler"), made.numbers("sigmas", steps + 1, 0.0, 1e6),
        tuple(int(n) for n in made.numbers("shape", None, 1, 1 << 20, whole=True)), made.number("cfg", -1e3, 1e3), made.text("precision"))
    if any(later >= sooner for sooner, later in zip(facts.sigmas, facts.sigmas[1:], strict=False)):
        raise made.wrong("sigmas", "expected numbers that fall")
    if not 3 <= len(facts.shape) <= 4:
        raise made.wrong("shape", "expected channels, frames where there are any, height and width")
    flow = made.truth("flow")
    made.end()
    profile = Profile(
        facts, flow, overlaps_of(name, tensors, fields.text("tensors"), steps), fields.whole("pictures", 1, 10_000),
        fields.truth("looks_back"), checks_of(name, fields.take("checks"), steps), refined_of(name, fields.take("refined"), steps),
        each_of(name, fields.take("each"), steps), fit_of(name, fields.take("teacache")),
        curves_of(fields, steps), fields.text("date"), fields.text("pack"))
    fields.end()
    return profile


def overlaps_of(name: str, content: bytes, digest: str, steps: int) -> Tensor:
    """The matrix, whose file has been bounded, so that what it claims to hold is bounded too."""
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"profile '{name}': {name}.safetensors is not the file that its JSON was written with; calibrate again")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"profile '{name}': {name}.safetensors is damaged ({str(error)[:80]!r}); calibrate again") from error
    if set(tensors) != {OVERLAPS} or tensors[OVERLAPS].dtype != torch.float64 or tensors[OVERLAPS].shape != (steps, steps):
        raise ValueError(f"profile '{name}': {name}.safetensors does not hold one fp64 tensor '{OVERLAPS}' of {steps} x {steps}; calibrate again")
    overlaps = tensors[OVERLAPS]
    if not (overlaps.isfinite().all() and (overlaps.diagonal() >= 0).all() and overlaps.abs().max() < LARGE):
        raise ValueError(f"profile '{name}': '{OVERLAPS}' has numbers that no run gives; calibrate again")
    return (overlaps + overlaps.T) / 2


def checks_of(name: str, value, steps: int) -> tuple[Check, ...]:
    if not isinstance(value, list) or len(value) > MOST_CHECKS:
        raise ValueError(f"profile '{name}': 'checks' is no list of at most {MOST_CHECKS}; calibrate again")
    found = []
    for n, entry in enumerate(value):
        fields = Fields(name, f"checks[{n}].", entry)
        found.append(Check(fields.whole("computed", 1, steps), fields.number("planned", 0.0, 1e6), fields.number("measured", 0.0, 1e6)))
        fields.end()
    return tuple(found)


def refined_of(name: str, value, steps: int) -> tuple[Plan, ...]:
    if not isinstance(value, list) or len(value) > MOST_CHECKS:
        raise ValueError(f"profile '{name}': 'refined' is no list of at most {MOST_CHECKS}; calibrate again")
    found = []
    for n, entry in enumerate(value):
        fields = Fields(name, f"refined[{n}].", entry)
        count = len(entry.get("computed") or ()) if isinstance(entry.get("computed"), list) else 0
        computed = tuple(int(step) for step in fields.numbers("computed", min(count, steps), 0, steps - 1, whole=True))
        if sorted(set(computed)) != list(computed) or not {0, steps - 1} <= set(computed):
            raise fields.wrong("computed", "expected steps that rise from the first to the last")
        found.append(Plan(computed, fields.number("planned", 0.0, 1e6), fields.number("measured", 0.0, 1e6)))
        fields.end()
    return tuple(found)


def each_of(name: str, value, steps: int) -> dict:
    fields = Fields(name, "each.", value)
    found = {key: fields.numbers(key, steps, 0.0, LARGE, unknown=True) for key in NAMES}
    fields.end()
    return found


def fit_of(name: str, value) -> Polynomial | None:
    if value is None:
        return None
    fields = Fields(name, "teacache.", value)
    found = Polynomial(fields.text("signal"), fields.numbers("coefficients", 5, -LARGE, LARGE), fields.number("error", 0.0, LARGE))
    fields.end()
    return found


def curves_of(fields: "Fields", steps: int) -> tuple[tuple[float, ...], ...]:
    curves = fields.take("magcache")
    if not isinstance(curves, list) or len(curves) > 2:
        raise fields.wrong("magcache", "expected a list of at most two curves")
    return tuple(Fields(fields.profile, "magcache.", {str(n): curve}).numbers(str(n), steps, 0.0, LARGE) for n, curve in enumerate(curves))


class Fields:
    """A JSON object that is taken apart field by field; each may be taken once, and none may be left over."""

    def __init__(self, profile: str, prefix: str, record):
        self.profile, self.prefix = profile, prefix
        if not isinstance(record, dict):
            raise ValueError(f"profile '{profile}': {prefix.rstrip('.') or 'the file'} is no JSON object; calibrate again")
        self.record, self.left = record, dict(record)

    def wrong(self, field: str, expected: str) -> ValueError:
        came = repr(self.record.get(field))
        came = came if len(came) < 60 else f"{came[:57]}..."
        return ValueError(f"profile '{self.profile}': '{self.prefix}{field}' is {came}; {expected}, so calibrate again")

    def take(self, field: str):
        if field not in self.left:
            raise ValueError(f"profile '{self.profile}' has no field '{self.prefix}{field}'; calibrate again")
        return self.left.pop(field)

    def end(self) -> None:
        if self.left:
            raise ValueError(f"profile '{self.profile}' has a field {f'{self.prefix}{min(self.left)}'[:60]!r}, which is not known; calibrate again")

    def text(self, field: str) -> str:
        value = self.take(field)
        if not isinstance(value, str) or len(value) > MOST_CHARACTERS or not value.isprintable():
            raise self.wrong(field, f"expected text of at most {MOST_CHARACTERS} characters")
        return value

    def truth(self, field: str) -> bool:
        value = self.take(field)
        if not isinstance(value, bool):
            raise self.wrong(field, "expected true or false")
        return value

    def number(self, field: str, low: float, high: float) -> float:
        value = self.take(field)
        if not numeric(value, low, high):
            raise self.wrong(field, f"expected a number from {low:g} to {high:g}")
        return float(value)

    def whole(self, field: str, low: int, high: int) -> int:
        value = self.take(field)
        if not isinstance(value, int) or not numeric(value, low, high):
            raise self.wrong(field, f"expected a whole number from {low} to {high}")
        return value

    def numbers(self, field: str, count: int | None, low: float, high: float, unknown: bool = False, whole: bool = False) -> tuple:
        value = self.take(field)
        fits = isinstance(value, list) and (len(value) == count if count is not None else len(value) <= MOST_NUMBERS)
        if not fits or not all((n is None and unknown) or (numeric(n, low, high) and (isinstance(n, int) or not whole)) for n in value):
            raise self.wrong(field, f"expected {count if count is not None else 'a few'} numbers from {low:g} to {high:g}")
        return tuple(None if n is None else float(n) for n in value)


def numeric(value, low: float, high: float) -> bool:
    """A number between these, which NaN is not; Python would take true for 1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
