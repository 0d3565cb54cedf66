"""Attacks: what an adversary can still get out of a patched model; each keeps to a stated budget."""

from safepatch.attacks.soft_prompt import SoftPromptConfig, soft_prompt, with_soft_prompt
from safepatch.attacks.words import closing_prefix, text_logits

__all__ = ["SoftPromptConfig", "closing_prefix", "soft_prompt", "text_logits", "with_soft_prompt"]
