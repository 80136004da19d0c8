"""A linear VAE without weights: 16 low-frequency DCT coefficients of every 8 x 8 pixel patch.

    z = (basis @ (2 x - 1)) * gain          model space, [B, 16, H/8, W/8]
    latent = z / 0.3611 + 0.1159            what LATENT holds for FLUX and Z-Image

The basis is orthonormal, so an error in the picture is proportional to the error in the latent. The trained
16-channel TAESD of the test bed decodes the same latents with sharper edges. A model of fewer channels takes some of
the coefficients, with a scale and a shift of its own; one of larger patches takes `wide`.
"""
import math

import torch
from torch import Tensor

SCALE, SHIFT = 0.3611, 0.1159
PATCH = 8
# about 1 / standard deviation of each coefficient on the procedural pictures, damped for the high ones
GAIN = (0.2, 0.8, 0.8, 1.2, 1.4, 1.4, 1.8, 1.8, 0.18, 1.2, 1.2, 1.8, 0.28, 1.6, 1.6, 2.0)


def patch_basis() -> Tensor:
    """[16, 192]: orthonormal rows over 3 x 8 x 8; 8 luma and twice 4 opponent-colour DCT coefficients."""
    dct = torch.zeros(PATCH, PATCH)
    for k in range(PATCH):
        for i in range(PATCH):
            dct[k, i] = math.cos(math.pi * (i + 0.5) * k / PATCH) * math.sqrt((1 if k == 0 else 2) / PATCH)
    colour = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float32)
    colour = colour / colour.norm(dim=1, keepdim=True)
    corner = [(0, 0), (0, 1), (1, 0), (1, 1)]
    frequencies = (corner + [(0, 2), (2, 0), (1, 2), (2, 1)], corner, corner)
    return torch.stack([
        torch.einsum("c,i,j->cij", colour[axis], dct[u], dct[v]).reshape(-1)
        for axis in range(3) for u, v in frequencies[axis]
    ])


def wide(patch: int = 16, luma: tuple[int, int] = (8, 8), colour: tuple[int, int] = (4, 8)) -> tuple[Tensor, Tensor]:
    """Basis [128, 768], orthonormal rows over 3 x 16 x 16, and gain [128]: the low DCT coefficients, 8 x 8 of luma and 4 x 8 of each opponent colour.

    The gain grows with the frequency, as pictures have less of the high ones.
    """
    k, i = torch.arange(patch)[:, None], torch.arange(patch)[None]
    dct = torch.cos(math.pi * (i + 0.5) * k / patch) * math.sqrt(2 / patch)
    dct[0] /= math.sqrt(2)
    axes = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float32)
    axes = axes / axes.norm(dim=1, keepdim=True)
    shapes = (luma, colour, colour)
    basis = [torch.einsum("c,ui,vj->uvcij", axis, dct[:u], dct[:v]).flatten(0, 1).flatten(1) for axis, (u, v) in zip(axes, shapes, strict=True)]
    frequency = [torch.hypot(torch.arange(u)[:, None].float(), torch.arange(v)[None].float()).flatten() for u, v in shapes]
    return torch.cat(basis), (1 + torch.cat(frequency)) / 8


class PatchVAE:
    """Duck-typed host VAE: the stock VAEDecode and VAEEncode nodes run on it."""

    latent_dim = 2

    def __init__(self, rows: list[int] | None = None, scale: float = SCALE, shift: float = SHIFT, coefficients: tuple[Tensor, Tensor] | None = None):
        """coefficients: a basis and its gain, in the place of `rows` of the 8-pixel one."""
        rows = list(range(len(GAIN))) if rows is None else rows
        self.basis, self.gain = coefficients or (patch_basis()[rows], torch.tensor(GAIN)[rows])
        self.scale, self.shift, self.latent_channels = scale, shift, len(self.basis)
        self.patch = self.downscale_ratio = self.upscale_ratio = math.isqrt(self.basis.shape[1] // 3)

    def to_model_space(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] in [0, 1] to z [B, C, H/8, W/8]; 8 or whatever a patch has."""
        b, _, h, w = pixels.shape
        x = (pixels * 2 - 1).reshape(b, 3, h // self.patch, self.patch, w // self.patch, self.patch).permute(0, 2, 4, 1, 3, 5)
        z = x.reshape(b, h // self.patch, w // self.patch, 3 * self.patch * self.patch) @ self.basis.T * self.gain
        return z.permute(0, 3, 1, 2).contiguous()

    def from_model_space(self, z: Tensor) -> Tensor:
        """z [B, C, h, w] to pixels [B, 3, 8h, 8w]; not clamped."""
        b, _, h, w = z.shape
        x = (z.permute(0, 2, 3, 1) / self.gain) @ self.basis
        x = x.reshape(b, h, w, 3, self.patch, self.patch).permute(0, 3, 1, 4, 2, 5).reshape(b, 3, h * self.patch, w * self.patch)
        return (x + 1) / 2

    def decode(self, samples: Tensor, **_) -> Tensor:
        if samples.ndim == 5:
            samples = samples[:, :, 0]
        return self.from_model_space((samples.float() - self.shift) * self.scale).clamp(0, 1).movedim(1, -1)

    def decode_tiled(self, samples: Tensor, **_) -> Tensor:
        return self.decode(samples)

    def encode(self, pixels: Tensor) -> Tensor:
        x = pixels[..., :3].movedim(-1, 1).float()
        x = x[:, :, : x.shape[2] // self.patch * self.patch, : x.shape[3] // self.patch * self.patch]
        return self.to_model_space(x) / self.scale + self.shift

    def encode_tiled(self, pixels: Tensor, **_) -> Tensor:
        return self.encode(pixels)

    def spacial_compression_decode(self) -> int:
        return self.patch

    def spacial_compression_encode(self) -> int:
        return self.patch

    def temporal_compression_decode(self) -> None:
        return None

    def throw_exception_if_invalid(self) -> None:
        pass
