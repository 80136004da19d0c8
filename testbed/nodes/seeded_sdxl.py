"""A small SDXL with random weights, in place of Load Checkpoint: the host tells SDXL by its full size alone."""
import comfy.model_management
from comfy_api.latest import io

from .. import tiny
from .hash_clip import HashCLIP
from .patch_vae import PatchVAE

KIND = "sdxl_like"
ROWS = [0, 1, 8, 12]    # brightness, its slope to the right, and two colours
SCALE = 0.008           # SDXL's is 0.13; without training the latents come out so much larger


class SeededSDXL(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RepriseTestbed_SeededSDXL", display_name="Test Bed Seeded SDXL", category="Reprise test bed",
            description="A small UNet of SDXL's kind with random weights, and a text encoder and a linear VAE that fit it.",
            inputs=[], outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        model = tiny.patcher(KIND, device=comfy.model_management.get_torch_device())
        return io.NodeOutput(model, HashCLIP(tiny.KINDS[KIND].text), PatchVAE(ROWS, SCALE, 0.0))
