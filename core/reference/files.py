"""References on disk: <name>.safetensors with the keys and values of their entries, and what these were made for.

    0.double.3.k, 0.double.3.v, 0.ids, 1.input.1.0.k, ...    [1, H, T, D] and [T, axes]
    0.double.3.ks, 0.double.3.vs                             [1, H, 1, 1], of blocks kept in 8 bits
    metadata: format, version, references = JSON list of {seam, other},
    entries = JSON list of {reference, null, family, rope, carrier, exactness, source, key}

A file may come from a stranger: the header is checked whole, names, types and shapes, before a tensor is read.
"""
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..knob import shown
from .entry import CARRIERS, FP8, ROPES, Entry, Key
from .seams import SEAMS
from .stored import NULL, OTHERS, Stored
from .weights import finite

FORMAT, VERSION = "reprise.reference", "1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_,-]*(\.[A-Za-z0-9_,-]+)*")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)    # names that Windows keeps for devices
TENSOR = re.compile(r"(\d{1,3})\.(?:(ids)|([a-z]+\.\d{1,4}(?:\.\d{1,4})?)\.(ks?|vs?))")
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": FP8}
TEXTS = ("family", "rope", "carrier", "exactness", "source")
MOST = 64       # references, or entries
LONG = 2000     # characters of a text


def no_name(name: str) -> str:
    """What a name should be, where this is none."""
    if isinstance(name, str) and len(name) <= 100 and NAME.fullmatch(name) and not RESERVED.fullmatch(name):
        return ""
    return "expected letters, digits, '-', '_', ',' and single dots, 100 at most"


def path_of(folder: Path, name: str) -> Path:
    if fault := no_name(name):
        raise ValueError(f"reference name {shown(name)!r} is refused; {fault}")
    return folder / f"{name}.safetensors"


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.safetensors") if path.is_file() and not no_name(path.stem)) if folder.is_dir() else []


def stamp(folder: Path, name: str) -> str:
    """Another text as soon as the file is another one, is gone or is there. It is not opened."""
    try:
        found = path_of(folder, name).stat()
    except (OSError, ValueError):   # the error is told when it is read
        return "-"
    return f"{found.st_size}:{found.st_mtime_ns}"


def write(folder: Path, name: str, references: Sequence[Stored]) -> Path:
    """The references, in the place of an older file of that name. A reader finds it whole or not at all."""
    path, tensors, told = path_of(folder, name), {}, []
    every = [(number, null, entry) for number, reference in enumerate(references)
             for null, entries in ((False, reference.entries), (True, reference.nulls)) for entry in entries]
    for i, (number, null, entry) in enumerate(every):
        for block, (k, v) in entry.blocks.items():
            tensors[f"{i}.{block}.k"], tensors[f"{i}.{block}.v"] = k.contiguous(), v.contiguous()
            tensors |= {f"{i}.{block}.{half}s": scale.contiguous() for half, scale in zip("kv", entry.scales.get(block, ()), strict=False)}
        if entry.ids is not None:
            tensors[f"{i}.ids"] = entry.ids.contiguous()
        told.append({"reference": number, "null": null, "key": dict(entry.key.fields), **{name: getattr(entry, name) for name in TEXTS}})
    sides = [{"seam": reference.seam, "other": reference.other} for reference in references]
    metadata = {"format": FORMAT, "version": VERSION, "references": json.dumps(sides), "entries": json.dumps(told)}
    folder.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=folder, prefix=".", suffix=".part")
    os.close(handle)
    try:
        save_file({key: tensor.clone() for key, tensor in tensors.items()}, beside, metadata)     # two may share their storage, which it refuses
        os.replace(beside, path)
    finally:
        Path(beside).unlink(missing_ok=True)
    return path


def read(folder: Path, name: str) -> list[Stored]:
    """The references of a file, each as a recipe, or a ValueError that names the first thing which is not as it should be."""
    path = path_of(folder, name)
    if not path.is_file():
        known = ", ".join(names(folder)[:12])
        raise ValueError(f"there is no saved reference '{name}'; {f'known: {known}' if known else 'save one with Save Reference Cache'}")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}      # noqa: SIM118 - no mapping
            sides, told, blocks = checked(name, dict(file.metadata() or {}), slices)
            entries = [entry_of(name, file, i, facts, blocks[i]) for i, facts in enumerate(told)]
        return [Stored(name, facts["seam"], of(entries, told, number, False), facts["other"], of(entries, told, number, True))
                for number, facts in enumerate(sides)]
    except SafetensorError as error:
        raise ValueError(f"reference '{name}' is damaged or cut off ({str(error)[:80]}); save it again") from error
    except OSError as error:
        raise ValueError(f"reference '{name}' cannot be read ({error.strerror or error}); save it again") from error


def of(entries: Sequence[Entry], told: Sequence[dict], reference: int, null: bool) -> tuple[Entry, ...]:
    return tuple(entry for entry, facts in zip(entries, told, strict=True) if (facts["reference"], facts["null"]) == (reference, null))


def listed(text: str | None) -> list[dict] | None:
    """The objects of a JSON list of some of them, or None."""
    try:
        told = json.loads(text or "")
    except (ValueError, RecursionError):
        return None
    return told if isinstance(told, list) and 0 < len(told) <= MOST and all(isinstance(facts, dict) for facts in told) else None


def checked(name: str, metadata: dict[str, str], slices: dict) -> tuple[list[dict], list[dict], list[dict[str, list[str]]]]:
    """What is told of every reference and of every entry, and {block: [k and v names]} for each entry."""
    def wrong(text: str) -> ValueError:
        return ValueError(f"reference '{name}': {text}; save it again")

    if metadata.get("format") != FORMAT:
        raise wrong(f"the format is {shown(metadata.get('format'))!r}, expected '{FORMAT}'")
    if metadata.get("version") != VERSION:
        raise wrong(f"the version is {shown(metadata.get('version'))!r}, expected '{VERSION}'")
    sides, told = listed(metadata.get("references")), listed(metadata.get("entries"))
    if sides is None or told is None:
        raise wrong("its list of references or entries is none")
    for facts in sides:
        if facts.get("seam") not in SEAMS or facts.get("seam") != sides[0]["seam"] or facts.get("other") not in OTHERS:
            raise wrong(f"it has a reference with seam '{shown(facts.get('seam'))}' and other side '{shown(facts.get('other'))}'")
    for number, facts in enumerate(sides):
        for null in (False, True) if facts["other"] == NULL else (False,):
            if not any((facts.get("reference"), facts.get("null")) == (number, null) for facts in told):
                raise wrong(f"reference {number} has no entries")
    blocks: list[dict[str, dict]] = [{} for _ in told]
    for key, part in slices.items():
        match = TENSOR.fullmatch(key)
        if match is None or int(match[1]) >= len(told):
            raise wrong(f"it has a tensor {shown(key)!r}, which no entry of it has")
        if match[3]:
            blocks[int(match[1])].setdefault(match[3], {})[match[4]] = part
        elif len(part.get_shape()) != 2 or part.get_dtype() != "F32":
            raise wrong(f"{key} is {part.get_dtype()} {part.get_shape()}, expected F32 [tokens, axes]")
    for i, (facts, found) in enumerate(zip(told, blocks, strict=True)):
        for field in TEXTS:
            if not isinstance(facts.get(field), str) or len(facts[field]) > LONG:
                raise wrong(f"{field} of entry {i} is no text")
        fields = facts.get("key")
        if not isinstance(fields, dict) or not all(isinstance(text, str) and len(text) <= LONG for pair in fields.items() for text in pair):
            raise wrong(f"the key of entry {i} is none")
        if facts["rope"] not in ROPES or facts["carrier"] not in CARRIERS:
            raise wrong(f"entry {i} has rope '{shown(facts['rope'])}' and carrier '{shown(facts['carrier'])}'")
        if type(facts.get("reference")) is not int or not 0 <= facts["reference"] < len(sides) or not isinstance(facts.get("null"), bool):
            raise wrong(f"entry {i} is of reference '{shown(facts.get('reference'))}', of which there are {len(sides)}")
        if not found:
            raise wrong(f"entry {i} has no blocks")
        for block, pair in found.items():
            scales = {half: pair.pop(half).get_shape() for half in ("ks", "vs") if half in pair and pair[half].get_dtype() == "F32"}
            sizes = [part.get_shape() for part in pair.values()]
            if set(pair) != {"k", "v"} or sizes[0] != sizes[1] or len(sizes[0]) != 4 or sizes[0][0] != 1 or 0 in sizes[0]:
                raise wrong(f"block {block} of entry {i} is {' and '.join(map(str, sizes))}, expected K and V, both [1, heads, tokens, channels]")
            small = {part.get_dtype() for part in pair.values()} == {"F8_E4M3"}
            if list(scales.values()) != ([[1, sizes[0][1], 1, 1]] * 2 if small else []):
                raise wrong(f"block {block} of entry {i} has scales {list(scales.values())}, which do not fit its keys and values")
            if any(part.get_dtype() not in TYPES for part in pair.values()):
                raise wrong(f"block {block} of entry {i} is {next(iter(pair.values())).get_dtype()}, expected one of {', '.join(TYPES)}")
        tokens, ids = {part.get_shape()[2] for pair in found.values() for part in pair.values()}, slices.get(f"{i}.ids")
        if (ids is None) == (facts["rope"] == "pre") or (ids is not None and {ids.get_shape()[0]} != tokens):
            raise wrong(f"entry {i} has rope '{facts['rope']}' and its positions do not fit that")
    return sides, told, [{block: [f"{i}.{block}.{half}" for half in "kv"] for block in found} for i, found in enumerate(blocks)]


def entry_of(name: str, file, i: int, facts: dict, blocks: dict[str, list[str]]) -> Entry:
    tensors = {block: tuple(file.get_tensor(key) for key in pair) for block, pair in blocks.items()}
    scales = {block: tuple(file.get_tensor(f"{key}s") for key in blocks[block]) for block, (k, _) in tensors.items() if k.dtype == FP8}
    ids = file.get_tensor(f"{i}.ids") if facts["rope"] == "pre" else None
    named = [(block, tensor) for parts in (tensors, scales) for block, pair in parts.items() for tensor in pair] + ([("ids", ids)] if ids is not None else [])
    if lost := [block for block, tensor in named if not finite(tensor)]:
        raise ValueError(f"reference '{name}': {lost[0]} of entry {i} has values that are no numbers; save it again")
    return Entry(facts["family"], tensors, Key(facts["key"]), facts["source"], facts["rope"], ids, facts["exactness"], facts["carrier"], scales)
