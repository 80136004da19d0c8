"""Where the user's files for references lie: model files in the host's folders, saved references in the user's."""
from pathlib import Path

import folder_paths

SAFE = (".safetensors", ".sft")     # a pickle may run code when it is opened


def model_files(kind: str) -> list[str]:
    """Names in one of the host's model folders, such as loras; safetensors files alone."""
    return [name for name in folder_paths.get_filename_list(kind) if name.lower().endswith(SAFE)]


def model_path(kind: str, name: str) -> Path:
    """The file behind a name of the menu. Other names are refused, so that no path leaves the folders."""
    if name not in folder_paths.get_filename_list(kind):
        raise ValueError(f"'{name[:100]}' is not among the files of the folder {kind}; choose one from the menu, or press R to have it read anew")
    return Path(folder_paths.get_full_path_or_raise(kind, name))


def references_folder() -> Path:
    return Path(folder_paths.get_user_directory()) / "reprise" / "references"
