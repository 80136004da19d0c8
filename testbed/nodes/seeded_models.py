"""Checkpoints that are written when the host starts: seeded ones, for workflows without a trained tiny model, and quantized ones.

Seeded ones, and one template, are of the host's real classes and its stock loaders open them. Their weights are random: what they
draw means nothing, what a cache changes about it does. Quantized ones are trained models in the formats that workflows name.
"""
from pathlib import Path

import folder_paths

from .. import quantized, tiny, tiny_fastfit, tiny_template

FLUX = "flux_tiny.safetensors"
FILES = {
    "diffusion_models": {
        "wan_seeded.safetensors": lambda path: tiny.write("wan_words", path),
        "flux2_seeded.safetensors": lambda path: tiny.write("flux2_words", path),
        "fastfit_seeded.safetensors": tiny_fastfit.write,
        "flux_tiny_fp8.safetensors": lambda path: quantized.write(FLUX, "float8_e4m3fn", path),
        "flux_tiny_Q4_K.gguf": lambda path: quantized.write_gguf(FLUX, "Q4_K", path),
        "flux_tiny_svdquant.safetensors": lambda path: quantized.write_svdquant(FLUX, path),
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
