"""Reprise: the same picture sooner and in less memory, and how far off it is.

Nothing of the host is imported until it asks for the nodes, so that tests and tools can import the pack without it.
"""
WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import Pack

    return Pack()
