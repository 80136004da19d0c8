"""The fixture nodes, and the seeded models and drawn pictures that stock loaders shall find."""
from comfy_api.latest import ComfyExtension, io

from .hash_clip import HashCLIP
from .patch_vae import PatchVAE, wide
from .pictures import offer_pictures
from .save_frames import SaveFrames
from .seeded_models import offer_seeded_models
from .seeded_sdxl import ROWS, SeededSDXL

FLUX2_SCALE, SD_SCALE = 0.5, 0.03    # of latents; without training those that a model makes are larger than they should be


class TextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RepriseTestbed_TextEncoder", display_name="Test Bed Text Encoder", category="Reprise test bed",
            description="Turns every word into a fixed random vector, as the test bed's models were trained to read it.",
            inputs=[], outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(HashCLIP())


class LinearVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RepriseTestbed_PatchVAE", display_name="Test Bed Patch VAE", category="Reprise test bed",
            description="A linear VAE: an error in the picture is proportional to the error in the latent.",
            inputs=[], outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(PatchVAE())


class Flux2VAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RepriseTestbed_Flux2VAE", display_name="Test Bed FLUX.2 VAE", category="Reprise test bed",
            description="A linear VAE of 128 channels and 16 pixels, as FLUX.2's has them.",
            inputs=[], outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(PatchVAE(scale=FLUX2_SCALE, shift=0.0, coefficients=wide()))


class SDVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RepriseTestbed_SDVAE", display_name="Test Bed SD 1.5 VAE", category="Reprise test bed",
            description="A linear VAE of 4 channels and 8 pixels, as SD 1.5's has them.",
            inputs=[], outputs=[io.Vae.Output()],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(PatchVAE(ROWS, SD_SCALE, 0.0))


class TestbedExtension(ComfyExtension):
    async def on_load(self) -> None:
        offer_seeded_models()
        offer_pictures()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TextEncoder, LinearVAE, Flux2VAE, SDVAE, SeededSDXL, SaveFrames]
