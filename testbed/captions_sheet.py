"""The sixteen captions of the demo, drawn by each trained model through a running server, on one sheet.

    python -m testbed.captions_sheet --server http://127.0.0.1:8188 --out captions.png [--blind]

Every workflow gives one model and its settings; only the prompt changes and Reprise is left out. With --blind the
pictures are shuffled and numbered, and the key lies beside the sheet, for someone who matches them to the captions.
"""
import argparse
import copy
import json
import random
import sys
from pathlib import Path

from PIL import Image

from .captions import DEMO
from .client import Server, ServerError
from .picture import captioned, column, framed, row
from .workflow import STEP_CACHE, WorkflowError, is_trained, model_of, nodes_of, read_workflow, system_of, without_reprise

WORKFLOWS = Path(__file__).resolve().parent.parent / "workflows"
COLUMNS = 8


def main():
    options = argparse.ArgumentParser(prog="python -m testbed.captions_sheet", description=__doc__.split("\n\n")[0])
    options.add_argument("--server", required=True, metavar="URL")
    options.add_argument("--out", required=True, type=Path, metavar="FILE")
    options.add_argument("--workflows", type=Path, default=WORKFLOWS, metavar="DIR")
    options.add_argument("--blind", action="store_true", help="shuffle, number instead of caption, write the key as JSON")
    options.add_argument("--shuffle", type=int, default=0, metavar="SEED", help="order of a blind sheet")
    chosen = options.parse_args()
    try:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)    # before minutes go by
        pictures = drawn(Server(chosen.server), chosen.workflows)
        key = {str(number): place for number, place in enumerate(places(pictures, chosen.shuffle if chosen.blind else None), 1)}
        tiles = [captioned(pictures[model][caption], number if chosen.blind else caption) for number, (model, caption) in key.items()]
        each = [column([row(tiles[at:at + COLUMNS]) for at in range(start, start + len(DEMO), COLUMNS)]) for start in range(0, len(tiles), len(DEMO))]
        framed(column(each if chosen.blind else [captioned(part, model) for part, model in zip(each, pictures, strict=True)])).save(chosen.out)
        if chosen.blind:
            chosen.out.with_suffix(".json").write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")
    except (ServerError, WorkflowError, OSError) as error:
        sys.exit(f"captions sheet: {error}")


def places(pictures: dict, shuffle: int | None) -> list[tuple[str, str]]:
    """(model, caption) in the order of the sheet: model by model, each shuffled by itself."""
    order = random.Random(shuffle)
    return [(model, caption) for model in pictures for caption in (DEMO if shuffle is None else order.sample(DEMO, len(DEMO)))]


def drawn(server: Server, workflows: Path) -> dict[str, dict[str, Image.Image]]:
    """{model file: {caption: picture}}; the first workflow with Step Cache that loads a trained model speaks for it."""
    sheet, object_info = {}, server.get("/object_info")
    for file in sorted(workflows.glob("*.json")):
        prompt = read_workflow(file, object_info)
        model = model_of(prompt)
        if is_trained(prompt) and system_of(prompt) == STEP_CACHE and model not in sheet:
            print(f"{model}: {len(DEMO)} captions", flush=True)
            sheet[model] = {caption: server.run(prompted(without_reprise(prompt), caption)).images[0] for caption in DEMO}
    return sheet


def prompted(prompt: dict, caption: str) -> dict:
    """The prompt with `caption` for its text; an empty text is the negative one and stays."""
    prompt = copy.deepcopy(prompt)
    for node in nodes_of(prompt, "CLIPTextEncode"):
        node["inputs"]["text"] = node["inputs"]["text"] and caption
    return prompt


if __name__ == "__main__":
    main()
