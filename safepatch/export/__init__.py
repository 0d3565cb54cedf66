"""Other programs' files: a lora patch as an ordinary LoRA, and an ordinary LoRA as a patch."""

from safepatch.export.lora_in import import_lora
from safepatch.export.lora_out import FORMATS, export

__all__ = ["FORMATS", "export", "import_lora"]
