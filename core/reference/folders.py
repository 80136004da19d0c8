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


def model_stamp(kind: str, name: str) -> str:
    """Another text as soon as the file is another one; it is not opened."""
    path = folder_paths.get_full_path(kind, name) if isinstance(name, str) else None
    found = None if path is None else Path(path).stat()
    return "" if found is None else f"{found.st_size}:{found.st_mtime_ns}"


def references_folder() -> Path:
    return Path(folder_paths.get_user_directory()) / "reprise" / "references"
