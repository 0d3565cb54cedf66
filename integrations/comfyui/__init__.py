"""ComfyUI nodes that load a safety patch and put it on a model; see README.md beside this file."""

from .nodes import SafepatchApply, SafepatchLoader

NODE_CLASS_MAPPINGS = {"SafepatchLoader": SafepatchLoader, "SafepatchApply": SafepatchApply}
NODE_DISPLAY_NAME_MAPPINGS = {"SafepatchLoader": "Load safety patch", "SafepatchApply": "Apply safety patch"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
