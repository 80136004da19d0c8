"""Edge maps, and the linear VAE of large patches: what the tiny EasyControl adapter and the tiny FLUX.2 are measured with."""
import pytest
import torch

from testbed import procedural
from testbed.edges import agreement, edges
from testbed.nodes.patch_vae import PatchVAE, wide


def pictures(seed: int, count: int = 6) -> torch.Tensor:
    return procedural.batch(count, 128, torch.Generator().manual_seed(seed))[0]


def test_edges_are_thin_lines_where_brightness_jumps_and_none_where_it_does_not():
    square = torch.zeros(1, 3, 64, 64)
    square[:, :, 16:48, 16:48] = 1
    lines = edges(square)[0, 0]
    assert set(lines.unique().tolist()) == {0.0, 1.0}
    assert lines[8:56, 24:40].sum(0).max() <= 4 and lines[32, 12:20].any() and not lines[24:40, 24:40].any()
    assert not edges(torch.rand(1, 3, 1, 1).expand(1, 3, 64, 64)).any()


def test_edges_agree_with_themselves_wholly_and_with_others_hardly():
    lines = edges(pictures(1))
    torch.testing.assert_close(agreement(lines, lines), torch.ones(len(lines)), atol=1e-3, rtol=0)
    assert agreement(lines, lines.roll(1, 0)).abs().mean() < 0.3
    moved = agreement(lines, lines.roll(2, 3))
    assert (moved < 0.99).all() and moved.mean() > agreement(lines, lines.roll(12, 3)).mean()


def test_the_wide_patches_are_orthonormal_and_keep_smooth_pictures():
    vae = PatchVAE(scale=0.5, shift=0.0, coefficients=wide())
    assert (vae.latent_channels, vae.downscale_ratio) == (128, 16)
    torch.testing.assert_close(vae.basis @ vae.basis.T, torch.eye(128), atol=1e-5, rtol=0)
    rough = torch.rand(2, 3, 3, 4, generator=torch.Generator().manual_seed(2))
    smooth = torch.nn.functional.interpolate(rough, (48, 64), mode="bilinear").movedim(1, -1)
    latent = vae.encode(smooth)
    assert latent.shape == (2, 128, 3, 4)
    assert (vae.decode(latent) - smooth).abs().mean() < 0.01


@pytest.mark.parametrize("rows", [None, [0, 1, 8, 12]])
def test_the_small_patches_are_as_they_were(rows):
    vae = PatchVAE(rows)
    assert vae.downscale_ratio == vae.spacial_compression_decode() == 8 and vae.latent_channels == (16 if rows is None else 4)
    picture = torch.rand(1, 16, 24, 3, generator=torch.Generator().manual_seed(3))
    latent = vae.encode(picture)
    assert latent.shape == (1, vae.latent_channels, 2, 3)
    torch.testing.assert_close(vae.encode((vae.from_model_space((latent - vae.shift) * vae.scale)).movedim(1, -1)), latent, atol=1e-4, rtol=1e-4)
