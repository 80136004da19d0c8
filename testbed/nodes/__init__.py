"""Fixture nodes: they stand in for text encoders and VAEs of many gigabytes, in the demo host only."""


async def comfy_entrypoint():
    from .extension import TestbedExtension  # needs the host; training reads .text and .patch_vae without one
    return TestbedExtension()
