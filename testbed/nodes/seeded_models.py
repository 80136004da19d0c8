"""Seeded checkpoints, and one template, written when the host starts, for workflows without a trained tiny model.

They are of the host's real classes and its stock loaders open them. Their weights are random: what they draw means
nothing, what a cache changes about it does.
"""
from pathlib import Path

import folder_paths

from .. import tiny, tiny_fastfit, tiny_template

FILES = {
    "diffusion_models": {
        "wan_seeded.safetensors": lambda path: tiny.write("wan_words", path),
        "flux2_seeded.safetensors": lambda path: tiny.write("flux2_words", path),
        "fastfit_seeded.safetensors": tiny_fastfit.write,
    },
    "vae": {"wan_vae_seeded.safetensors": tiny.write_wan_vae},
    "templates": {"template_seeded/model.safetensors": tiny_template.write},
}


def offer_seeded_models() -> None:
    """Write them into the host's temporary folder, which it empties at its start and its end, and have them listed."""
    for kind, files in FILES.items():
        folder = Path(folder_paths.get_temp_directory()) / "seeded" / kind
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write(folder / name)
        folder_paths.add_model_folder_path(kind, str(folder))
