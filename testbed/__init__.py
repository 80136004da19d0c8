"""Tiny models of the real architectures, trained ones and seeded ones, how they were made, and the fixture nodes that feed them.

Nothing here is part of a user's install: the demo and the tests put it into a host of their own.
"""


async def comfy_entrypoint():
    """The fixture nodes, for a host that has this folder among its custom nodes."""
    from .nodes.extension import TestbedExtension  # needs the host; training has none
    return TestbedExtension()
