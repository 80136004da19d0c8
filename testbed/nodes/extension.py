"""The two fixture nodes, neither with an input: a text encoder and a VAE made of nothing but seeds and cosines."""
from comfy_api.latest import ComfyExtension, io
from torch import Tensor

from .patch_vae import PatchVAE
from .text import encode


class HashCLIP:
    """Duck-typed host CLIP: the stock CLIPTextEncode node runs on it."""

    def tokenize(self, text: str, **_) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **_) -> list[tuple[Tensor, dict]]:
        sequence, pooled = encode(tokens)
        return [(sequence, {"pooled_output": pooled})]


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
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TextEncoder, LinearVAE]
