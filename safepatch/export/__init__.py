"""Other programs' files: a lora patch as an ordinary LoRA, and an ordinary LoRA as a patch."""

from safepatch.export.lora_files import FORMATS, export, import_lora

__all__ = ["FORMATS", "export", "import_lora"]
