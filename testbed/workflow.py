"""Workflow files as users open them, turned into prompts that the tiny models can run.

A workflow names the real models. `substitutions.json` is all that changes: names of models and pictures, nodes that a
fixture stands in for (loaders of text encoders, of whole checkpoints and of some files, and the video file) and sizes of
latents and references. Steps, cfg, sampler and every other setting of our own nodes stay as the file has them. Models
listed as seeded have random weights.
"""
import copy
import json
from pathlib import Path

from comfy_cli.workflow_to_api import WorkflowConversionError, convert_ui_to_api


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def read_workflow(file: Path, object_info: dict) -> dict:
    """The prompt over the tiny models of a workflow file; whatever is wrong with the file is one sentence that names it."""
    try:
        return substitute(convert(read(file), object_info))
    except (ValueError, WorkflowConversionError) as error:      # bytes that are no text, text that is no JSON, JSON that is no workflow
        raise WorkflowError(f"'{file.name}' cannot be used: {error}") from error


SUBSTITUTIONS = read(Path(__file__).with_name("substitutions.json"))
MODEL_FILES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pth", ".pt")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
OURS = "Reprise_"
SAMPLERS = ("KSampler", "SamplerCustom")
STEP_CACHE, LATENTS, REFERENCES = "Reprise_StepCache", "Reprise_ReferenceLatentCache", "Reprise_ApplyReferenceCache"
LOADER = "Reprise_QuantizedModelLoader"
CHANGED = {REFERENCES: ("model", "positive", "negative")}    # what a node of ours changes, in the order of its outputs; the others change a model alone


class WorkflowError(ValueError):
    pass


def convert(workflow: dict, object_info: dict) -> dict:
    """The API prompt of a UI workflow; an unknown node is an error here, where it can still be named."""
    prompt = convert_ui_to_api(workflow, object_info)
    unknown = sorted({node["class_type"] for node in prompt.values()} - object_info.keys())
    if unknown:
        raise WorkflowError(f"the server has no node {', '.join(unknown)}; did its node pack load?")
    return prompt


def substitute(prompt: dict) -> dict:
    """The same prompt over the tiny models. A stand-in for a node keeps its links and nothing else."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        loaded = [value for value in node["inputs"].values() if isinstance(value, str) and value in SUBSTITUTIONS["loaders"]]
        stand_in = SUBSTITUTIONS["loaders"][loaded[0]] if loaded else SUBSTITUTIONS["nodes"].get(node["class_type"])
        if stand_in:
            node.update(class_type=stand_in, inputs={name: value for name, value in node["inputs"].items() if is_link(value)})
        node["inputs"].update(SUBSTITUTIONS["sizes"].get(node["class_type"], {}))
        for name, value in node["inputs"].items():
            if isinstance(value, str) and value.endswith(MODEL_FILES + PICTURES):
                node["inputs"][name] = tiny_file(value)
    return prompt


def tiny_file(name: str) -> str:
    if name not in SUBSTITUTIONS["files"]:
        raise WorkflowError(f"no tiny {'picture' if name.endswith(PICTURES) else 'model'} stands in for '{name}'; add a row to testbed/substitutions.json")
    return SUBSTITUTIONS["files"][name]


def without_reprise(prompt: dict) -> dict:
    """The baseline: our patches of models and prompts taken out, their consumers linked to what they patched, and what then leads nowhere left out."""
    ours = {key: node for key, node in prompt.items() if node["class_type"].startswith(OURS) and "model" in node["inputs"]}

    def unpatched(link: list) -> list:
        while link[0] in ours:
            changed, inputs = CHANGED.get(ours[link[0]]["class_type"], ("model",)), ours[link[0]]["inputs"]
            if link[1] >= len(changed):
                raise WorkflowError(f"node {link[0]} gives more than {' and '.join(changed)}; a graph without it cannot be made")
            link = inputs[changed[link[1]]]
        return link

    kept = {key: copy.deepcopy(node) for key, node in prompt.items() if key not in ours}
    for node in kept.values():
        for name, value in node["inputs"].items():
            if is_link(value):
                node["inputs"][name] = unpatched(value)
    used = {value[0] for node in prompt.values() for value in node["inputs"].values() if is_link(value)}
    while idle := used & kept.keys() - {value[0] for node in kept.values() for value in node["inputs"].values() if is_link(value)}:
        kept = {key: node for key, node in kept.items() if key not in idle}
    return kept


def at_full_precision(prompt: dict) -> dict:
    """The baseline of a loader: the stock loader opens the model that the file was made from. `full` of the substitutions tells which, where it is another."""
    prompt = without_reprise(prompt)
    for node in prompt.values():
        if node["class_type"] == LOADER:
            name = node["inputs"]["model_name"]
            node.update(class_type="UNETLoader", inputs={"unet_name": SUBSTITUTIONS["full"].get(name, name), "weight_dtype": "default"})
    return prompt


def system_of(prompt: dict) -> str:
    """The class of the node of ours that the workflow is about: its loader, or else the one that acts on the sampling."""
    if nodes_of(prompt, LOADER):
        return LOADER
    found = [node["class_type"] for node in prompt.values() if node["class_type"] in (STEP_CACHE, LATENTS, REFERENCES)]
    if len(found) != 1:
        raise WorkflowError(f"the graph has {len(found)} nodes that are Step Cache, Reference Latent Cache or Apply Reference Cache; the demo wants one")
    return found[0]


def model_of(prompt: dict) -> str:
    """What the model that is sampled with comes from: the file that a loader opens, or the fixture in its place."""
    node = next((node for node in prompt.values() if node["class_type"].startswith(SAMPLERS) and "model" in node["inputs"]), None)
    if node is None:
        raise WorkflowError(f"the graph has no sampler that takes a model; known: {', '.join(SAMPLERS)}")
    while "model" in node["inputs"]:
        node = prompt[node["inputs"]["model"][0]]
    files = [value for value in node["inputs"].values() if isinstance(value, str) and value.endswith(MODEL_FILES)]
    return files[0] if files else node["class_type"]


def is_trained(prompt: dict) -> bool:
    """Whether the pictures of a prompt mean anything: nothing in it that draws has random weights."""
    told = {node["class_type"] for node in prompt.values()} | {value for node in prompt.values() for value in node["inputs"].values() if isinstance(value, str)}
    return not told & {*SUBSTITUTIONS["seeded"]}


def steps_of(prompt: dict) -> int:
    """Of the sampler, or of the node that makes its schedule."""
    [steps] = [node["inputs"]["steps"] for node in prompt.values() if isinstance(node["inputs"].get("steps"), int)]
    return steps


def is_link(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def nodes_of(prompt: dict, prefix: str) -> list[dict]:
    """The nodes whose class begins with `prefix`."""
    return [node for node in prompt.values() if node["class_type"].startswith(prefix)]
