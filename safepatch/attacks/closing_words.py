"""Words that anybody could type to keep a gate closed on a prompt: a greedy search for what to put in front of it.

CLIP's text encoder is causal: words in front of a prompt change the states of all words behind them, and with them what
a gate reads; words behind it cannot. As in the coordinate steps of GCG (Zou et al. 2023, arXiv 2307.15043) one word is
chosen at a time, but from the whole vocabulary, tried out rather than ranked by gradients.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from safepatch.diffusion import UNetHost, batched
from safepatch.errors import ConfigError
from safepatch.patch.bags import Bags
from safepatch.patch.gate import TextGate

BATCH = 256


@torch.no_grad()
def closing_prefix(
    host: UNetHost, gate: TextGate, prompt: str, vocabulary: Sequence[str], words: int = 3, windows: int = 0
) -> tuple[str, float]:
    """`prompt` behind `words` words of `vocabulary`, each the one that lowers the gate's logit most, and that logit.

    The budget is words * len(vocabulary) readings of the gate. Of a gate that reads features, the text's share of the
    logit is lowered, which is all there is when the host shows it nothing suspicious.

    Args:
        host: the frozen model.
        gate: of one category.
        prompt: which it should let pass.
        vocabulary: what the words are taken from.
        words: how many.
        windows: words of the widest window that the gate reads alone, as its record says.

    Raises:
        ConfigError: for no words, or an empty vocabulary.
    """
    if words < 1 or not vocabulary:
        raise ConfigError("an attack with words needs at least one, and a vocabulary to take it from")
    for _ in range(words):
        texts = [f"{word} {prompt}" for word in vocabulary]
        logits = text_logits(host, gate, texts, windows)
        prompt = texts[int(logits.argmin())]
    return prompt, float(logits.min())


@torch.no_grad()
def text_logits(host: UNetHost, gate: TextGate, texts: Sequence[str], windows: int = 0) -> Tensor:
    """What the gate of one category makes of each text, whole and by its windows of at most so many words, (N,)."""
    parts = [host.encode([texts[i] for i in part]).states for part in batched(len(texts), BATCH)]
    whole = torch.cat([gate.read(states.to(gate.bias.device, torch.float32))[:, 0] for states in parts])
    if not windows:
        return whole
    return torch.maximum(whole, Bags.of(host, texts, windows).read(gate, torch.arange(len(texts))).to(whole.device))
