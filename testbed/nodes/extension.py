"""The fixture nodes, and the seeded models that stock loaders shall find."""
from comfy_api.latest import ComfyExtension, io

from .hash_clip import HashCLIP
from .patch_vae import PatchVAE
from .save_frames import SaveFrames
from .seeded_models import offer_seeded_models
from .seeded_sdxl import SeededSDXL


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


class TestbedExtension(ComfyExtension):
    async def on_load(self) -> None:
        offer_seeded_models()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TextEncoder, LinearVAE, SeededSDXL, SaveFrames]
