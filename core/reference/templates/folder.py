"""Where the user's templates lie: models/templates, or what extra_model_paths.yaml names `templates`."""
import os
from pathlib import Path

import folder_paths

from ...knob import shown
from .file import File, opened

FOLDER = "templates"


def registered() -> str:
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    return FOLDER


def names() -> list[str]:
    return [name for name in folder_paths.get_filename_list(registered()) if name.lower().endswith(".safetensors")]


def stamp(name: str) -> str:
    """Another text as soon as the file is another one; it is not opened."""
    path = folder_paths.get_full_path(registered(), name)
    found = None if path is None else os.stat(path)
    return "" if found is None else f"{found.st_size}:{found.st_mtime_ns}"


def find(name: str) -> File:
    path = folder_paths.get_full_path(registered(), name)
    if path is None:
        places = ", ".join(folder_paths.get_folder_paths(FOLDER))
        raise ValueError(f"no template '{shown(name)}' is in {places}; put the template's model.safetensors there, in a folder of its own name")
    return opened(Path(path), Path(name).as_posix())
