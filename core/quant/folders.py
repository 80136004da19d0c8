"""Where the user's model files lie: the host's folders, with .gguf files among them, and what is written."""
import os
import re
from pathlib import Path

import folder_paths

from ..knob import shown

SAFE = (".safetensors", ".sft", ".gguf")    # a pickle may run code when it is opened
PLANS = "plans"
LONGEST = 255       # bytes of a file's name, on the usual file systems
NAME = re.compile(r"\w[\w .-]{0,79}")


def with_gguf(kind: str) -> str:
    """A key of our own over the host's folders of a kind, whose files include .gguf."""
    name = f"reprise_{kind}"
    folder_paths.folder_names_and_paths[name] = (folder_paths.get_folder_paths(kind), set(SAFE))
    return name


def model_files(kind: str = "diffusion_models") -> list[str]:
    return [name for name in folder_paths.get_filename_list(with_gguf(kind)) if name.lower().endswith(SAFE)]


def model_path(name: str, kind: str = "diffusion_models") -> Path:
    """The file behind a name of the menu. Other names are refused, so that no path leaves the folders."""
    key = with_gguf(kind)
    if name not in folder_paths.get_filename_list(key):
        raise ValueError(f"'{str(name)[:100]}' is not among the files of the folder {kind}; choose one from the menu, or press R to have it read anew")
    path = folder_paths.get_full_path(key, name)
    if path is None:
        raise ValueError(f"'{name[:100]}' is a link in the folder {kind} that leads to no file; put the file back to where it leads, or choose another")
    return Path(path)


def embeddings() -> list[str]:
    """The folders of textual inversions, which text encoders read."""
    return folder_paths.get_folder_paths("embeddings")


def stamp(name: str, kind: str = "diffusion_models") -> str:
    """Another text as soon as the file is another one; it is not opened."""
    path = folder_paths.get_full_path(with_gguf(kind), name)
    found = None if path is None else os.stat(path)
    return "" if found is None else f"{found.st_size}:{found.st_mtime_ns}"


def output_path(prefix: str) -> Path:
    """A file that is not there yet, numbered as the host's are. The host would make a hidden file of a prefix without a name."""
    if not isinstance(prefix, str) or not os.path.basename(os.path.normpath(prefix)).strip(". "):
        raise ValueError(f"filename_prefix is '{shown(prefix)}', which names no file; end it with a name, such as diffusion_models/reprise")
    output = Path(folder_paths.get_output_directory())
    try:
        if (output / prefix).resolve().is_relative_to(output.resolve()):        # else the host's error is three lines long
            folder, name, counter, *_ = folder_paths.get_save_image_path(prefix, str(output))
            file = Path(folder) / f"{name}_{counter:05}_.safetensors"
            if len(os.fsencode(file.name)) <= LONGEST:
                return file
    except (OSError, ValueError):       # a folder's name that is too long, a file in a folder's place, a zero byte
        pass
    raise ValueError(f"filename_prefix is '{shown(prefix)}', and the output folder cannot have such a file; choose another, such as diffusion_models/reprise")


def plans_folder() -> Path:
    return Path(folder_paths.get_user_directory()) / "reprise" / PLANS


def plans() -> list[str]:
    return sorted(file.stem for file in plans_folder().glob("*.json"))


def plan_path(name: str) -> Path:
    if name not in plans():
        raise ValueError(f"no plan '{str(name)[:100]}' is in {plans_folder()}; save one with Quantization Report, or choose none")
    return plans_folder() / f"{name}.json"


def new_plan(name: str) -> Path:
    """A place for a plan. Its name is a file's name and no path."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"name is '{str(name)[:100]}'; a plan's name is 1 to 80 letters, digits, blanks, dots, - and _, the first a letter or digit")
    plans_folder().mkdir(parents=True, exist_ok=True)
    return plans_folder() / f"{name}.json"


def plan_stamp(name: str) -> str:
    """Another text as soon as the plan is another one."""
    path = plans_folder() / f"{name}.json"
    return str(path.stat().st_mtime_ns) if name in plans() else ""
