"""Files of the user's model folders, as the host lists and finds them."""
from pathlib import Path

import folder_paths

SAFE = (".safetensors", ".sft")     # a pickle may run code when it is opened


def files(folder: str) -> list[str]:
    """Names of the safetensors files of a model folder, such as "diffusion_models"."""
    return [name for name in folder_paths.get_filename_list(folder) if name.lower().endswith(SAFE)]


def path(folder: str, name: str) -> Path:
    return Path(folder_paths.get_full_path_or_raise(folder, name))
