"""One workflow both ways, by what acts in it: its row of the report, its strip of the sheet, and the pictures.

Each system has its own baseline, which the row names:

    Step Cache                every evaluation computed
    Reference Latent Cache    the reference pictures in the sequence on every step, as the host does it
    Apply Reference Cache     the references encoded anew, where the other run finds them kept
    Quantized Model Loader    the full model, by the stock loader, and every evaluation computed

Removing references changes the picture by design, so that is no baseline of a cache. It is shown beside the picture, and
`without_reference_psnr_db` tells how far apart the two are.
"""
import torch
from PIL import Image

from .client import Outcome, Server, ServerError
from .picture import column, difference, image_of, psnr, side_by_side, ssim, tensor_of
from .workflow import (
    LATENTS,
    LOADER,
    OURS,
    REFERENCES,
    STEP_CACHE,
    WorkflowError,
    at_full_precision,
    is_link,
    is_trained,
    model_of,
    nodes_of,
    steps_of,
    system_of,
    without_reprise,
)

GAIN = 32
CLEAR = {"clear": {"class_type": "Reprise_ClearReferenceCache", "inputs": {}}}
BASELINES = {STEP_CACHE: "every evaluation computed", LATENTS: "references in every step", REFERENCES: "references encoded anew", LOADER: "the full model"}
Compared = tuple[dict, Image.Image, list[Image.Image], list[Image.Image]]


def compare(server: Server, name: str, prompt: dict) -> Compared:
    """Runs a prompt both ways; returns its row, its strip, and the pictures without and with Reprise, of a video its frames."""
    ways = {STEP_CACHE: with_step_cache, LATENTS: with_latents, REFERENCES: with_references, LOADER: with_loader}
    return ways[system_of(prompt)](server, name, prompt)


def with_step_cache(server: Server, name: str, prompt: dict) -> Compared:
    without, cached = both(server, name, prompt)
    if len(cached.reports) != 1:
        raise WorkflowError(f"'{name}' has {len(nodes_of(prompt, OURS))} node(s) of Reprise and sent {len(cached.reports)} reports; "
                            "the demo wants one sampling run with Step Cache enabled and not bypassed")
    report = cached.reports[0]
    if report["state"] != "ran":
        raise WorkflowError(f"Reprise stayed off in '{name}': {report['reason']}")
    row = measured(name, prompt, without, cached) | {
        "steps": report["steps"], "evaluations": round(report["evaluations"], 3), "baseline_evaluations": report["baseline_evaluations"],
        "computed_steps": report["computed_steps"], "skipped_steps": report["skipped_steps"], "settings": report["settings"]}
    return row, strip(row, without.images, cached.images), without.images, cached.images


def with_latents(server: Server, name: str, prompt: dict) -> Compared:
    without, cached = both(server, name, prompt)
    row = measured(name, prompt, without, cached)
    return row, strip(row, without.images, cached.images), without.images, cached.images


def with_loader(server: Server, name: str, prompt: dict) -> Compared:
    print(f"{name}: the full model", flush=True)
    without = timed(server, at_full_precision(prompt))
    print(f"{name}: with Reprise", flush=True)
    loaded = timed(server, prompt)
    row = measured(name, prompt, without, loaded)
    return row, strip(row, without.images, loaded.images), without.images, loaded.images


def with_references(server: Server, name: str, prompt: dict) -> Compared:
    print(f"{name}: without its references", flush=True)
    without = pictured(server.run(without_reprise(prompt)))
    print(f"{name}: with its references, encoded anew and then kept", flush=True)
    server.run(CLEAR)
    anew, kept = pictured(server.run(prompt)), pictured(server.run(prompt))
    row = measured(name, prompt, anew, kept)
    row["without_reference_psnr_db"] = round(psnr(stacked(without), stacked(kept)), 2)
    shown = reference_picture(server, prompt)
    place = middle(kept.images)
    apart = image_of(difference(tensor_of(without.images[place]), tensor_of(kept.images[place]), GAIN)) if shown is None else shown
    return row, side_by_side(without.images[place], kept.images[place], apart, (
        f"{name}: without\n{row['steps']} steps",
        f"with Reprise; kept and encoded anew: {quality(row)}\n{row['steps']} steps, {row['seconds']:.2f} s, encoding anew {row['baseline_seconds']:.2f} s",
        f"{f'difference x {GAIN}' if shown is None else 'the reference'}\n{told(row)}")), without.images, kept.images


def both(server: Server, name: str, prompt: dict) -> tuple[Outcome, Outcome]:
    print(f"{name}: without Reprise", flush=True)
    without = timed(server, without_reprise(prompt))
    print(f"{name}: with Reprise", flush=True)
    return without, timed(server, prompt)


def timed(server: Server, prompt: dict) -> Outcome:
    """The second of two runs, which must give the picture of the first; with what nodes said in the first that needed not run again."""
    first, second = server.run(prompt), pictured(server.run(prompt))
    if [image.tobytes() for image in first.images] != [image.tobytes() for image in second.images]:
        raise ServerError("the same graph gave two different pictures")
    second.lines.update({key: line for key, line in first.lines.items() if key not in second.lines})
    return second


def pictured(outcome: Outcome) -> Outcome:
    if not outcome.images:
        raise ServerError("the graph ended without a picture; has it a Save Image node?")
    return outcome


def measured(name: str, prompt: dict, baseline: Outcome, cached: Outcome) -> dict:
    """A row of the report; what a system does not have is null."""
    full, near, system = stacked(baseline), stacked(cached), system_of(prompt)
    identical, similarity = full.equal(near), ssim(full, near)
    [key] = [key for key, node in prompt.items() if node["class_type"] == system]
    return {
        "workflow": name,
        "system": system.removeprefix(OURS),
        "baseline": BASELINES[system],
        "model": model_of(prompt),
        "trained": is_trained(prompt),
        "steps": steps_of(prompt),
        "evaluations": None,
        "baseline_evaluations": None,
        "computed_steps": None,
        "skipped_steps": None,
        "seconds": round(cached.sampling, 3),
        "baseline_seconds": round(baseline.sampling, 3),
        "psnr_db": None if identical else round(psnr(full, near), 2),
        "ssim": None if similarity is None else round(similarity, 5),
        "identical": identical,
        "without_reference_psnr_db": None,
        "said": cached.lines.get(key, ""),
        "settings": {setting: value for setting, value in prompt[key]["inputs"].items() if not is_link(value)},
    }


def stacked(outcome: Outcome) -> torch.Tensor:
    return torch.cat([tensor_of(image) for image in outcome.images])


def quality(row: dict) -> str:
    return "identical" if row["identical"] else f"{row['psnr_db']:.1f} dB"


def told(row: dict) -> str:
    return row["model"] + ("" if row["trained"] else "\nrandom weights: only the comparison counts")


def strip(row: dict, without: list[Image.Image], cached: list[Image.Image]) -> Image.Image:
    place = middle(without)
    frame = f", frame {place + 1} of {len(without)}" if len(without) > 1 else ""
    apart = image_of(difference(tensor_of(without[place]), tensor_of(cached[place]), GAIN))
    evaluations = ("", "") if row["evaluations"] is None else (f"{row['baseline_evaluations']:g} evaluations, ", f"{row['evaluations']:.2f} evaluations, ")
    return side_by_side(without[place], cached[place], apart, (
        f"{row['workflow']}: without\n{row['steps']} steps, {evaluations[0]}{row['baseline_seconds']:.2f} s",
        f"with Reprise: {quality(row)}\n{row['steps']} steps, {evaluations[1]}{row['seconds']:.2f} s",
        f"difference x {GAIN}{frame}\n{told(row)}"))


def middle(frames: list[Image.Image]) -> int:
    """The place of the picture that stands for them all."""
    return len(frames) // 2


def reference_picture(server: Server, prompt: dict) -> Image.Image | None:
    """What a reference is made of; of several the last, beside the others in a column; none where it is made of numbers."""
    seen, links = [nodes_of(prompt, REFERENCES)[0]["inputs"]["reference"]], []
    while seen:
        node = prompt[seen.pop()[0]]
        links += [node["inputs"]["image"]] if "image" in node["inputs"] else []
        seen += [node["inputs"][name] for name in ("reference", "previous", "first", "second") if name in node["inputs"]]
    pictures = [server.run(upstream(prompt, link) | {"shown": {"class_type": "PreviewImage", "inputs": {"images": link}}}).images[0] for link in links]
    return column(pictures) if pictures else None


def upstream(prompt: dict, link: list) -> dict:
    """The nodes that make what comes over a link."""
    found, waiting = {}, [link[0]]
    while waiting:
        key = waiting.pop()
        found[key] = prompt[key]
        waiting += [value[0] for value in prompt[key]["inputs"].values() if is_link(value)]
    return found
