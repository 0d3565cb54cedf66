"""Attacks: what an adversary can still get out of a patched model; each keeps to a stated budget."""

from safepatch.attacks.soft_prompt import SoftPromptConfig, soft_prompt, with_soft_prompt

__all__ = ["SoftPromptConfig", "soft_prompt", "with_soft_prompt"]
