"""What comes from other nodes, looked at before anything is made of it: an image, a mask, a latent."""
import torch
from torch import Tensor


def image_of(image: Tensor, what: str = "image") -> Tensor:
    """[B, H, W, 3] of an IMAGE, or a ValueError."""
    if not torch.is_tensor(image) or image.ndim != 4 or 0 in image.shape or image.shape[-1] < 3:
        raise ValueError(f"the {what} is {told(image)} and [images, height, width, 3] was expected, none of them 0; connect an IMAGE, as Load Image gives it")
    return image[..., :3]


def mask_of(mask: Tensor) -> Tensor:
    """[B, H, W] of a MASK, or a ValueError."""
    if not torch.is_tensor(mask) or mask.ndim < 2 or 0 in mask.shape:
        raise ValueError(f"the mask is {told(mask)} and [masks, height, width] was expected, none of them 0; connect a MASK of the size of the image")
    if not mask.isfinite().all():
        raise ValueError("the mask has values that are no numbers; mend what made it, or paint it by hand")
    return mask.reshape(-1, *mask.shape[-2:])


def samples_of(latent) -> Tensor:
    """[B, C, h, w] of a LATENT, or a ValueError."""
    if not isinstance(latent, dict) or "samples" not in latent:
        held = f"holds {', '.join(map(str, latent)) or 'nothing'}" if isinstance(latent, dict) else f"is a {type(latent).__name__}"
        raise ValueError(f"the latent {held} and 'samples' was expected; connect a LATENT, as VAE Encode gives it")
    check_latent(latent["samples"])
    return latent["samples"]


def check_latent(samples: Tensor, what: str = "latent", channels: int | None = None, vae: str = "") -> None:
    """Raise unless these are the latents of pictures. channels: that each must have; vae: which one gives them."""
    advice = f"encode the picture with {vae}" if vae else "connect the latent of a picture"
    if not torch.is_tensor(samples) or samples.is_nested or samples.ndim != 4 or 0 in samples.shape:
        kind = ", as a video has it," if torch.is_tensor(samples) and not samples.is_nested and samples.ndim == 5 else ""
        raise ValueError(f"the {what} is {told(samples)}{kind} and [pictures, {channels or 'channels'}, height, width] was expected, none of them 0; {advice}")
    if channels is not None and samples.shape[1] != channels:
        raise ValueError(f"the {what} has {samples.shape[1]} channels and {channels} were expected; {advice}")
    if not samples.isfinite().all():
        raise ValueError(f"the {what} has values that are no numbers, which would make the whole picture so; mend what made it, a VAE in 16 bits for example")


def told(value) -> str:
    """A tensor by its shape, anything else by its kind."""
    if getattr(value, "is_nested", False):      # the host's, which is no tensor, or torch's
        return "several tensors in one, as video with sound,"
    return f"of shape {list(value.shape)}" if torch.is_tensor(value) else f"a {type(value).__name__}"
