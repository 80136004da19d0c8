"""Imports run one way: nodes -> core.attach, presets, run -> core's systems -> families, step, store, ... -> kernels.

`compare` stands beside the engine: it measures pictures and draws reports, so it needs Pillow and numpy, which the core does without,
and it must load where no host is, for the demo. Of the core it sees the report alone; only nodes see it.
"""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("nodes", "compare", "core", "kernels")
FILES = sorted(file for part in PARTS for file in (ROOT / part).rglob("*.py")) + [ROOT / "__init__.py"]

# A module may import from its own layer and those below. The first prefix that fits is the layer.
LAYERS = (
    ("kernels", 0),
    ("core.families", 1), ("core.step", 1), ("core.store", 1), ("core.registry", 1), ("core.knob", 1), ("core.report", 1), ("core.runs", 1),
    ("core.conditions", 1), ("core.memory", 1), ("core.wrappers", 1),
    ("core.stepcache", 2), ("core.reference", 2), ("core.quant", 2),
    ("core.attach", 3), ("core.run", 3), ("core.presets", 3), ("core", 3),
    ("compare", 4),
    ("nodes", 5),
    ("", 6),
)
NODES_MAY_SEE = ("core.attach", "core.presets", "core.run", "core.registry", "core.knob", "core.report", "core.stepcache.policies",
                 "core.stepcache.corrections", "core.stepcache.predictors", "core.stepcache.levels", "core.stepcache.calibrate", "core.stepcache.profiles",
                 "core.reference", "core.quant", "compare", "nodes")
COMPARE_MAY_SEE = ("core.report", "compare")
SYSTEMS = ("core.stepcache", "core.reference", "core.quant")
MAY_IMPORT_COMFY = ("core.attach", "core.run", "core.quant", "core.reference", "core.stepcache.calibrate", "nodes._api")
# where the user's files lie; all others are told
MAY_KNOW_FOLDERS = ("core.stepcache.calibrate", "core.reference.folders", "core.reference.templates.folder", "core.quant.folders")
HOST = ("comfy", "comfy_api", "comfy_extras", "comfy_execution", "nodes", "folder_paths", "execution", "latent_preview")
DRAWING = ("numpy", "PIL", "kornia", "piq")
FOREIGN_TO_CORE = ("server", "aiohttp", *DRAWING)


def within(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


def layer(name: str) -> int:
    return next(level for prefix, level in LAYERS if within(name, prefix))


def module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path, root: Path) -> list[tuple[int, bool, str]]:
    """(line, relative, module) of every import, whole or of a part, at any depth. A part that is a module counts as itself."""
    package = module_name(file, root) if file.name == "__init__.py" else module_name(file, root).rpartition(".")[0]
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, False, name.name) for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".") if package else []
                base = ".".join([*parts[:len(parts) - node.level + 1], *([node.module] if node.module else [])])
            for name in node.names:
                whole = f"{base}.{name.name}".strip(".")
                path = root.joinpath(*whole.split("."))
                is_module = node.level and (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file())
                found.append((node.lineno, bool(node.level), whole if is_module else base))
    return found


def faults(file: Path, root: Path) -> list[str]:
    own = module_name(file, root)
    text = []
    for line, relative, target in imports(file, root):
        top = target.split(".")[0]
        said = f"{own}:{line} imports {target}"
        if not relative:
            if top in ("comfy_api",) and own != "nodes._api":
                text.append(f"{said}, which is for nodes._api alone")
            elif top in ("comfy", "comfy_execution") and not any(within(own, prefix) for prefix in MAY_IMPORT_COMFY):
                text.append(f"{said}, and only {', '.join(MAY_IMPORT_COMFY)} may")
            elif top == "folder_paths" and own not in MAY_KNOW_FOLDERS:
                text.append(f"{said}, and only {', '.join(MAY_KNOW_FOLDERS)} may")
            elif top in HOST and top not in ("comfy", "comfy_execution", "comfy_api", "folder_paths"):
                text.append(f"{said}, a module of the host with another meaning here; imports of the pack are relative")
            elif top in ("pack", "reprise", *PARTS):
                text.append(f"{said}; imports of the pack are relative")
            elif top in FOREIGN_TO_CORE and not within(own, "nodes") and not (within(own, "compare") and top in DRAWING):
                text.append(f"{said}, which the core does not need")
            continue
        if layer(target) > layer(own):
            text.append(f"{said}, a layer above it")
        elif within(own, "nodes") and not any(within(target, prefix) for prefix in NODES_MAY_SEE):
            text.append(f"{said}, past the core's doors")
        elif within(own, "compare") and not any(within(target, prefix) for prefix in COMPARE_MAY_SEE):
            text.append(f"{said}, and compare needs the report alone")
        elif any(within(own, s) for s in SYSTEMS) and any(within(target, s) and not within(own, s) for s in SYSTEMS):
            text.append(f"{said}, a system beside it")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            text.append(f"{own}:{node.lineno} prints; the pack logs")
        if isinstance(node, ast.ExceptHandler) and own != "nodes" and (node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")):
            text.append(f"{own}:{node.lineno} catches everything")
    return text


@pytest.mark.parametrize("file", FILES, ids=lambda file: module_name(file, ROOT) or "pack")
def test_imports_run_one_way(file):
    assert not faults(file, ROOT)


def test_every_part_of_the_pack_is_read():
    names = {module_name(file, ROOT) for file in FILES}
    assert {"", "nodes.step_cache", "compare.metrics", "core.attach", "core.stepcache.cache", "core.families.flux", "kernels.combine"} <= names


BAD = {
    "core/step.py": ("from .attach import attach_step_cache", "a layer above it"),
    "core/store.py": ("from .stepcache import cache", "a layer above it"),
    "core/run.py": ("from ..nodes import choice", "a layer above it"),
    "core/families/x.py": ("def f():\n    import comfy.ldm.flux.model", "only core.attach"),
    "core/stepcache/x.py": ("from comfy import utils", "only core.attach"),
    "core/stepcache/levels/x.py": ("from ....nodes.choice import choice", "a layer above it"),
    "core/stepcache/policies/x.py": ("from ...quant import loader", "a system beside it"),
    "core/stepcache/predictors/x.py": ("from ... import run", "a layer above it"),
    "core/reference/x.py": ("from ..stepcache.cache import StepCache", "a system beside it"),
    "core/attach.py": ("from comfy_api.latest import io", "nodes._api alone"),
    "core/x.py": ("import nodes", "imports of the pack are relative"),
    "core/quant/x.py": ("from server import PromptServer", "does not need"),
    "kernels/x.py": ("from ..core.step import Step", "a layer above it"),
    "kernels/y.py": ("print('hello')", "prints"),
    "nodes/x.py": ("from ..core.stepcache.cache import StepCache", "past the core's doors"),
    "nodes/y.py": ("from ..kernels.combine import combine", "past the core's doors"),
    "nodes/z.py": ("from comfy_api.latest import io", "nodes._api alone"),
    "compare/x.py": ("from ..core.attach import attach_step_cache", "the report alone"),
    "compare/y.py": ("import comfy.utils", "only core.attach"),
    "compare/z.py": ("from server import PromptServer", "does not need"),
    "compare/w.py": ("from ..nodes.choice import choice", "a layer above it"),
    "core/stepcache/y.py": ("from ...compare.metrics import psnr", "a layer above it"),
    "core/y.py": ("from PIL import Image", "does not need"),
    "core/runs.py": ("from comfy_execution.utils import get_executing_context", "only core.attach"),
    "core/stepcache/profiles/x.py": ("import folder_paths", "only core.stepcache.calibrate, core.reference"),
    "nodes/v.py": ("import folder_paths", "only core.stepcache.calibrate, core.reference"),
    "core/reference/y.py": ("import folder_paths", "only core.stepcache.calibrate, core.reference"),
    "nodes/w.py": ("from core.attach import attach_step_cache", "relative"),
    "core/knob.py": ("try:\n    pass\nexcept Exception:\n    pass", "catches everything"),
    "core/report.py": ("try:\n    pass\nexcept:\n    pass", "catches everything"),
}
GOOD = {
    "core/attach.py": "import comfy.model_patcher\nfrom .run import Run",
    "core/quant/loader.py": "from comfy.ops import cast\nfrom ..families import FAMILIES\nfrom ...kernels.combine import combine",
    "core/stepcache/calibrate.py": "import comfy.samplers\nimport folder_paths\nfrom ..step import Step",
    "core/reference/folders.py": "import folder_paths",
    "nodes/__init__.py": "try:\n    pass\nexcept Exception:\n    pass",
    "nodes/_api.py": "from comfy_api.latest import io\nfrom comfy.utils import ProgressBar",
    "compare/x.py": "import numpy\nfrom PIL import Image\nfrom ..core.report import Report\nfrom .sheet import row",
    "nodes/x.py": "from ._api import io\nfrom ..core.attach import attach_step_cache\nfrom ..core.stepcache.levels import LEVELS",
}


@pytest.fixture
def pack(tmp_path):
    for file in FILES:
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    for package in ("core/quant", "core/reference"):
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "core/quant/loader.py").touch()
    return tmp_path


@pytest.mark.parametrize("name", BAD)
def test_an_import_that_runs_the_wrong_way_is_found(name, pack):
    source, fault = BAD[name]
    (pack / name).write_text(source)
    (found,) = faults(pack / name, pack)
    assert fault in found


@pytest.mark.parametrize("name", GOOD)
def test_an_import_that_runs_the_right_way_is_not(name, pack):
    (pack / name).write_text(GOOD[name])
    assert not faults(pack / name, pack)
