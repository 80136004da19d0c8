"""The FastFit nodes: what a person and a garment become, and what is pasted back."""
import folder_paths
import pytest
import torch
from torch.nn import functional as F

from pack.core.reference.fastfit_unet import FastFitUNet
from pack.nodes.fastfit import NODES, FastFitGarment, FastFitLoader, FastFitPasteBack, FastFitPerson
from testbed import tiny_fastfit


class Vae:
    """Encodes to the mean of 8 x 8 pixels and remembers what it was shown."""

    def __init__(self, channels=4):
        self.channels, self.shown = channels, []

    def encode(self, pixels):
        self.shown.append(pixels)
        assert pixels.shape[1] % 8 == 0 and pixels.shape[2] % 8 == 0
        mean = F.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([mean, mean], 1)[:, :4].repeat(1, self.channels // 4, 1, 1)


def drawn(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def person(image, mask, pose=None):
    vae = Vae()
    positive, negative, latent = FastFitPerson.execute(image, mask, vae, pose).args
    return positive, negative, latent["samples"], vae.shown[0]


def test_the_mask_holds_the_pose_in_its_own_range_and_the_rest_the_person():
    image, pose, mask = drawn(1, 2, 32, 24, 3), drawn(2, 1, 32, 24, 3), (drawn(3, 1, 32, 24) > 0.5).float()
    positive, negative, latent, shown = person(image, mask, pose)
    m = mask[..., None]
    wanted = (2 * image - 1) * (1 - m) + m * pose      # as published: the person in [-1, 1], the pose in [0, 1]
    assert ((2 * shown - 1) - wanted).abs().max() <= 1e-6
    text, more = positive[0]
    assert text.shape == (1, 1, 768) and not text.any() and not latent.any() and latent.shape == (2, 4, 4, 3)
    assert torch.equal(more["concat_mask"], F.interpolate(mask[:, None], (4, 3), mode="nearest").expand(2, 1, 4, 3))
    assert torch.equal(more["concat_latent_image"], Vae().encode(shown)) and negative[0][1].keys() == more.keys()
    assert positive[0][1] is not negative[0][1]


def test_without_a_pose_the_mask_is_grey():
    *_, shown = person(drawn(1, 1, 16, 16, 3), torch.ones(1, 16, 16))
    assert torch.equal(shown, torch.full((1, 16, 16, 3), 0.5))


def test_a_soft_mask_of_another_size_is_made_sharp_at_the_size_of_the_image():
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 0.8
    image = drawn(1, 1, 32, 32, 3)
    *_, shown = person(image, mask)
    assert torch.equal(shown[:, :, :15], image[:, :, :15]) and (shown[:, :, 17:] == 0.5).all()


def test_odd_sizes_are_cropped_in_the_middle_and_pasted_back_where_they_came_from():
    image, mask = drawn(1, 1, 37, 27, 3), torch.ones(1, 37, 27)
    corner = torch.zeros(1, 37, 27)
    corner[:, 2:10, 1:9] = 1        # a mask that marks nothing is refused
    *_, latent, shown = person(image, corner)
    inside = image[:, 2:34, 1:25]
    assert latent.shape[-2:] == (4, 3) and torch.equal(shown[:, 8:], inside[:, 8:]) and torch.equal(shown[:, :8, 8:], inside[:, :8, 8:])
    (back,) = FastFitPasteBack.execute(inside, image, mask, 0).args
    assert torch.equal(back, image)


def test_counts_that_do_not_fit_are_one_sentence():
    with pytest.raises(ValueError, match=r"^2 masks came for 3 images; give one for all of them, or one for each$"):
        person(drawn(1, 3, 16, 16, 3), torch.ones(2, 16, 16))
    with pytest.raises(ValueError, match=r"^2 poses came for 3 images"):
        person(drawn(1, 3, 16, 16, 3), torch.ones(16, 16), drawn(2, 2, 16, 16, 3))


@pytest.mark.parametrize("node", ["person", "garment"])
def test_another_vae_is_one_sentence(node):
    with pytest.raises(ValueError, match=r"^the VAE gives a latent of shape \[1, 16, 2, 2\] and FastFit takes \[images, 4, height, width\]; load the VAE"):
        if node == "person":
            FastFitPerson.execute(drawn(1, 1, 16, 16, 3), torch.ones(16, 16), Vae(16))
        else:
            FastFitGarment.execute(drawn(1, 1, 16, 16, 3), "upper", Vae(16), height=0)


def test_a_garment_is_fitted_whole_into_its_frame_on_white():
    vae = Vae()
    FastFitGarment.execute(torch.zeros(1, 100, 300, 3), "upper", vae, height=64)
    (shown,) = vae.shown
    assert shown.shape == (1, 64, 48, 3)
    assert (shown[:, :24] == 1).all() and (shown[:, 24:40] == 0).all() and (shown[:, 40:] == 1).all()


def test_references_chain_to_an_outfit_and_a_batch_is_several():
    vae = Vae()
    (first,) = FastFitGarment.execute(drawn(1, 2, 64, 48, 3), "upper", vae, height=64, weight=0.5).args
    (outfit,) = FastFitGarment.execute(drawn(2, 1, 32, 24, 3), "shoe", vae, height=0, start_percent=0.1, end_percent=0.6, previous=first).args
    assert [(r.recipe.label, r.recipe.size, r.weight, r.start, r.end) for r in outfit.references] == [
        ("upper", (8, 6), 0.5, 0.0, 1.0), ("upper", (8, 6), 0.5, 0.0, 1.0), ("shoe", (4, 3), 1.0, 0.1, 0.6)]
    assert len({r.recipe.content for r in outfit.references}) == 3


def test_impossible_numbers_are_one_sentence():
    image = drawn(1, 1, 64, 48, 3)
    with pytest.raises(ValueError, match=r"^weight is nan; it must lie between 0.0 and 10.0$"):
        FastFitGarment.execute(image, "upper", Vae(), weight=float("nan"))
    with pytest.raises(ValueError, match=r"^start_percent is 0.6 and end_percent 0.5; the start must not lie behind the end$"):
        FastFitGarment.execute(image, "upper", Vae(), start_percent=0.6, end_percent=0.5)


def test_paste_back_keeps_the_person_outside_of_the_mask_and_its_feathered_edge():
    image, result, mask = drawn(1, 1, 64, 64, 3), drawn(2, 2, 64, 64, 3), torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    (hard,) = FastFitPasteBack.execute(result, image, mask, 0).args
    assert torch.equal(hard[:, :, :32], image[:, :, :32].expand(2, -1, -1, -1)) and torch.equal(hard[:, :, 32:], result[:, :, 32:])
    (soft,) = FastFitPasteBack.execute(result, image, mask, 4).args
    assert torch.equal(soft[:, :, :28], image[:, :, :28].expand(2, -1, -1, -1))
    assert torch.allclose(soft[:, :, 36:], result[:, :, 36:], atol=1e-6)
    shares = ((soft - image) / (result - image)).nanmedian(1).values.nanmedian(-1).values[0, 28:36]
    assert torch.allclose(shares, (torch.arange(8) + 1) / 9, atol=1e-3)


def test_a_result_of_another_size_is_scaled_to_the_person():
    image = drawn(1, 1, 64, 48, 3)
    (back,) = FastFitPasteBack.execute(torch.full((1, 128, 96, 3), 0.25), image, torch.ones(64, 48), 0).args
    assert back.shape == image.shape and torch.allclose(back, torch.full_like(image, 0.25))


def test_the_loader_lists_safetensors_of_the_diffusion_models_and_opens_one(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], folder_paths.supported_pt_extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    folder = tmp_path / "FastFit" / "unet"
    folder.mkdir(parents=True)
    tiny_fastfit.write(folder / "diffusion_pytorch_model.safetensors")
    torch.save({}, folder / "diffusion_pytorch_model.bin")
    (name,) = FastFitLoader.define_schema().inputs[0].options
    (loaded,) = FastFitLoader.execute(name).args
    assert isinstance(loaded.model.diffusion_model, FastFitUNet)
    again = loaded.clone(force_deepcopy=True)       # as for a second GPU
    assert again.model is not loaded.model and isinstance(again.model.diffusion_model, FastFitUNet)


def test_the_loader_says_what_the_licence_allows():
    assert "non-commercial" in FastFitLoader.define_schema().description and "independent implementation" in FastFitLoader.define_schema().description


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.define_schema().node_id)
def test_every_input_is_told_about_and_those_behind_the_required_are_optional(node):
    schema = node.define_schema()
    assert schema.node_id.startswith("Reprise_FastFit") and schema.category == "reprise/references" and schema.description
    assert all(entry.tooltip for entry in [*schema.inputs, *schema.outputs])
    flags = [bool(entry.optional) for entry in schema.inputs]
    assert flags == sorted(flags)
