"""The host's node API, imported here alone, so that a renaming is one edit."""
from comfy_api.latest import ComfyExtension, io

__all__ = ["ComfyExtension", "io"]
