"""The host's node API, imported here alone, so that a renaming is one edit."""
from comfy.utils import ProgressBar
from comfy_api.latest import ComfyExtension, io
from comfy_execution.utils import get_executing_context

__all__ = ["ComfyExtension", "ProgressBar", "get_executing_context", "io"]
