"""Pictures as the host has them, [B, H, W, C] in 0..1, made ready to be measured and drawn."""
from collections.abc import Iterator

import numpy
import torch
from PIL import Image
from torch import Tensor


def check_pair(a: Tensor, b: Tensor) -> None:
    """Raise one sentence where two batches cannot be compared picture by picture."""
    for name, batch in (("A", a), ("B", b)):
        if batch.ndim != 4 or not batch.numel() or batch.shape[-1] not in (1, 3, 4):
            raise ValueError(f"image {name} has the shape {list(batch.shape)}; [pictures, height, width, 1, 3 or 4 channels] is expected, so connect an IMAGE")
    if len(a) != len(b):
        raise ValueError(f"image A has {len(a)} picture{'s' * (len(a) != 1)} and image B {len(b)}; connect batches of the same length")
    if a.shape[1:3] != b.shape[1:3]:
        (height, width), (other_height, other_width) = a.shape[1:3], b.shape[1:3]
        raise ValueError(f"image A is {width} x {height} and image B {other_width} x {other_height}; pictures of one size are expected, so scale one of them")


def notes(a: Tensor, b: Tensor) -> list[str]:
    """What `pairs` leaves out of these pictures, in a sentence each."""
    told = []
    if 4 in (a.shape[-1], b.shape[-1]):
        told.append("Alpha is left out: red, green and blue are compared.")
    beyond = [name for name, batch in (("A", a), ("B", b)) if any(bool((picture < 0).any() or (picture > 1).any()) for picture in batch)]
    if beyond:
        subject = f"Image {beyond[0]} has" if len(beyond) == 1 else f"Images {' and '.join(beyond)} have"
        told.append(f"{subject} values beyond 0..1; they are clamped, as they are in a saved picture.")
    return told


def pairs(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each picture of A with its partner, as `ready` makes them; one pair at a time, because batches can be large."""
    for number, (mine, other) in enumerate(zip(a, b, strict=True), 1):
        yield ready(mine, f"picture {number} of image A"), ready(other.to(mine.device), f"picture {number} of image B")


def ready(picture: Tensor, name: str) -> Tensor:
    """[H, W, 1, 3 or 4] to [1, 3, H, W] in float32, clamped to 0..1, without alpha. Numbers that are none are an error."""
    picture = picture.float()
    if not torch.isfinite(picture).all():
        count = int((~torch.isfinite(picture)).sum())
        which = "values that are" if count != 1 else "value that is"
        raise ValueError(f"{name} has {count} {which} NaN or infinite and cannot be compared; look for the model or VAE that makes them")
    colours = picture[..., :3].clamp(0, 1).movedim(-1, 0)[None]
    return colours.expand(1, 3, *colours.shape[2:]).contiguous()


def tensor_of(picture: Image.Image) -> Tensor:
    """[1, 3, H, W] in 0..1."""
    return torch.from_numpy(numpy.array(picture.convert("RGB"))).movedim(-1, 0)[None].float() / 255


def image_of(picture: Tensor) -> Image.Image:
    """The 8-bit picture of [1, 3, H, W]."""
    return Image.fromarray((picture[0].movedim(0, -1) * 255).round().to(torch.uint8).cpu().numpy())


def batch_of(images: list[Image.Image]) -> Tensor:
    """[B, H, W, 3] in 0..1, as the host has it. The pictures have one size."""
    return torch.from_numpy(numpy.stack([numpy.asarray(image) for image in images])).float() / 255


def difference(a: Tensor, b: Tensor, gain: float) -> Tensor:
    return ((a - b).abs() * gain).clamp(0, 1)
