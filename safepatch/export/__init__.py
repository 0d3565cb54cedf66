"""Other programs' files: a lora patch as a LoRA, a LoRA as a patch, and a control patch as a ControlNet."""

from safepatch.export.controlnet import export_controlnet, require_controlnet
from safepatch.export.lora_in import import_lora
from safepatch.export.lora_out import FORMATS, export

__all__ = ["FORMATS", "export", "export_controlnet", "import_lora", "require_controlnet"]
