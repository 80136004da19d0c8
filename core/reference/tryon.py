"""Pictures for try-on: what the model is shown of the person, the frame of a garment, and the result put back.

    shown = person (1 - mask) + (pose / 2 + 1/2) mask        pixels in [0, 1]

FastFit reads person and garments in [-1, 1] and the pose in [0, 1], so black, where the pose is drawn on nothing, is middle grey here.
"""
import comfy.utils
import torch
from torch import Tensor
from torch.nn import functional as F

from .fastfit_unet import LATENT_CHANNELS
from .inputs import check_latent, image_of, mask_of

MULTIPLE = 8        # pixels to a latent one


def scaled(image: Tensor, height: int, width: int) -> Tensor:
    """[B, H, W, C] at another size."""
    if image.shape[1:3] == (height, width):
        return image
    return comfy.utils.common_upscale(image.movedim(-1, 1), width, height, "bicubic", "disabled").movedim(1, -1).clamp(0, 1)


def sharp(mask: Tensor, height: int, width: int) -> Tensor:
    """A MASK [H, W] or [B, H, W] as [B, height, width] of zeros and ones."""
    mask = mask_of(mask)[:, None].float()
    return (F.interpolate(mask, (height, width), mode="bilinear") if mask.shape[-2:] != (height, width) else mask)[:, 0].round()


def cropped(size: int) -> slice:
    """The part of a side that makes a whole number of latent pixels; what is too much goes on both ends, as the host's VAE does it."""
    begin = size % MULTIPLE // 2
    return slice(begin, begin + size // MULTIPLE * MULTIPLE)


def like(what: str, tensor: Tensor, batch: int) -> Tensor:
    """One for all images, or one for each."""
    if len(tensor) not in (1, batch):
        raise ValueError(f"{len(tensor)} {what} came for {batch} images; give one for all of them, or one for each")
    return tensor.expand(batch, *tensor.shape[1:])


def shown(person: Tensor, mask: Tensor, pose: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The picture [B, H, W, 3] that is encoded for the model, and the mask at the size of its latent [B, 1, H / 8, W / 8]."""
    person = image_of(person)
    batch, height, width = person.shape[:3]
    rows, columns = cropped(height), cropped(width)
    inside = like("masks", sharp(mask, height, width), batch)[:, rows, columns]
    person = person[:, rows, columns]
    if pose is None:
        drawn = torch.full_like(person, 0.5)
    else:
        drawn = like("poses", scaled(image_of(pose, "pose"), height, width), batch)[:, rows, columns] / 2 + 0.5
    small = F.interpolate(inside[:, None], scale_factor=1 / MULTIPLE, mode="nearest")
    if small.numel() and not small.any():
        raise ValueError(f"the mask marks nothing of the person, or less than {MULTIPLE} x {MULTIPLE} pixels, so the picture would come back as it was; "
                         "mark the clothes that change, white in the mask")
    return torch.where(inside[..., None] > 0, drawn, person), small


def encoded(vae, picture: Tensor) -> Tensor:
    """The latent [B, 4, h, w] of a picture."""
    height, width = picture.shape[1:3]
    if min(height, width) < MULTIPLE:
        raise ValueError(f"a picture of {width} x {height} pixels came and the VAE makes one latent pixel of {MULTIPLE} x {MULTIPLE}; give a larger one, "
                         "FastFit was trained at 384 x 512 and above")
    latent = vae.encode(picture)
    if latent.ndim != 4 or latent.shape[1] != LATENT_CHANNELS:
        raise ValueError(f"the VAE gives a latent of shape {list(latent.shape)} and FastFit takes [images, {LATENT_CHANNELS}, height, width]; "
                         "load the VAE of SD 1.5")
    check_latent(latent, "VAE's latent")
    return latent


def framed(image: Tensor, height: int) -> Tensor:
    """A garment [B, H, W, C] as large as it goes into 3 x 4 of this height, centred on white; at height 0 as it is."""
    image = image_of(image)
    if not height:
        return image
    width = height * 3 // 4
    factor = min(height / image.shape[1], width / image.shape[2])
    high, wide = (max(1, round(side * factor)) for side in image.shape[1:3])
    frame = image.new_ones(len(image), height, width, 3)
    top, left = (height - high) // 2, (width - wide) // 2
    frame[:, top:top + high, left:left + wide] = scaled(image, high, wide)
    return frame


def pasted(result: Tensor, person: Tensor, mask: Tensor, feather: int = 0) -> Tensor:
    """`result` inside of the mask and `person` outside of it, with a ramp of `feather` pixels to either side of the edge."""
    result, batch = image_of(result, "result"), len(result)
    person = like("images of the person", image_of(person), batch)
    height, width = person.shape[1:3]
    inside = like("masks", sharp(mask, height, width), batch)[..., None]
    if feather:
        side = 2 * feather + 1
        soft = F.pad(inside.movedim(-1, 1), (feather,) * 4, mode="replicate")
        inside = F.avg_pool2d(F.avg_pool2d(soft, (side, 1), 1), (1, side), 1).movedim(1, -1)
    rows, columns = cropped(height), cropped(width)
    whole = person.clone()
    if result.shape[1:3] == whole[:, rows, columns].shape[1:3]:
        whole[:, rows, columns] = result
    else:
        whole = scaled(result, height, width)
    return whole * inside + person * (1 - inside)
