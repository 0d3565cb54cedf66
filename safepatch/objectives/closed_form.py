"""closed_form: cross-attention's keys and values are edited by least squares, in seconds and without any picture.

UCE (Unified Concept Editing; Gandikota et al. 2024, arXiv 2308.14761, eq. 7): for every key and value projection W,

    min over W'  Σ_i a |W' c_i - W s_i|² + Σ_j b |W' p_j - W p_j|² + λ |W' - W|²

where c_i are text states of the concepts, s_i of what takes their place, and p_j of what is preserved. Its solution is
W' = W (I + D) with one D for all layers, which depends on text states alone:

    D = Σ a (s_i - c_i) c_iᵀ M⁻¹,    M = Σ a c_i c_iᵀ + Σ b p_j p_jᵀ + λ I

RECE (Gong et al. 2024, arXiv 2407.12383, eq. 5 to 8) looks, after that, for the states that bring a concept back,

    c' = argmin Σ_W |W' c' - W c|² + μ |c'|² = ((I + D)ᵀ G (I + D) + μ I)⁻¹ (I + D)ᵀ G c,    G = Σ_W Wᵀ W

and edits those too, in rounds. Published: λ = 0.5 and the concept's last token
(UCE); μ = 0.1, 3 rounds, b = 0.1 (RECE).

Ours: the edit is not written into the weights but kept as factors W P and Q of a lora patch, D = P Q, which is exact at
the rank of D, at most the number of edited states; below it, P Q is the D of that rank that does most to the states at
hand. What takes a concept's place is its replacement, its caption's safe twin, or the empty prompt. `rest` and
`captions` edit the states of whole captions, aligned from the last word backwards: all that cross-attention reads.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from safepatch.data.bank import DataConfig
from safepatch.data.concepts import distinct_concepts, require_prompts
from safepatch.data.corpus import Corpus
from safepatch.data.prompts import Pair
from safepatch.diffusion import UNET, Host, batched
from safepatch.errors import ConfigError
from safepatch.objectives.base import Usual
from safepatch.patch import LoraPatch, Patch

LAYERS = r"attentions\..*\.attn2\.to_[kv]$"
TOKENS = ("last", "rest")
NONE = 1e-9  # singular values below this share of the largest are rounding


class Edit(NamedTuple):
    """All that the solution depends on, float64 on the CPU; each matrix is (width, width).

    Attributes:
        concepts: Σ c cᵀ of the states that are edited.
        crossed: Σ s cᵀ, with their targets.
        targets: Σ |s|².
        kept: Σ p pᵀ of what must stay.
        count: of the states that are edited.
    """

    concepts: Tensor
    crossed: Tensor
    targets: float
    kept: Tensor
    count: int


@dataclass(frozen=True)
class ClosedFormConfig(Usual):
    """Map a concept's keys and values onto its replacement's by least squares (UCE, RECE); no training steps.

    UCE is `prompts: concepts, tokens: last, preserve_scale: 1`, RECE the same with `rounds: 3, preserve_scale: 0.1`.

    Attributes:
        name: `closed_form`.
        prompts: `captions`, as many of the category's unsafe prompts as `data.pairs` says; `concepts`, each concept's
            names. Without concepts, always the former.
        tokens: which text states are edited and preserved: `rest`, from the first on in which a prompt and its twin
            differ, and of what is preserved all; `last`, that of the last word, as published.
        rounds: of RECE's search for states that bring a concept back; 0 is UCE.
        preserve: prompts that must stay, from the category's look-alikes, neighbours and harmless things.
        erase_scale, preserve_scale: a and b, weights of each edited and of each preserved state.
        regularization: λ, what keeps the weights where they are.
        return_regularization: μ, of RECE.
        rank: at most, of what is kept: exact where D has no more, as with `last` of fewer names; 0 keeps all of any D.
            `patch.rank` has no say.
    """

    kinds: ClassVar[tuple[str, ...]] = ("lora",)
    components: ClassVar[tuple[str, ...]] = (UNET.component,)
    has_steps: ClassVar[bool] = False

    name: str = "closed_form"
    prompts: str = "captions"
    tokens: str = "rest"
    rounds: int = 0
    preserve: int = 128
    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    regularization: float = 0.5
    return_regularization: float = 0.1
    rank: int = 32

    def __post_init__(self) -> None:
        """Refuse what has no solution."""
        require_prompts(self.prompts)
        if self.tokens not in TOKENS:
            raise ConfigError(f"objective.tokens must be one of {', '.join(TOKENS)}, not '{self.tokens}'")
        if min(self.rounds, self.preserve, self.rank) < 0 or self.preserve_scale < 0:
            raise ConfigError("objective.rounds, preserve, preserve_scale and rank must be at least 0")
        if min(self.erase_scale, self.regularization, self.return_regularization) <= 0:
            raise ConfigError("objective.erase_scale, regularization and return_regularization must be above 0")

    @property
    def pictures_per_pair(self) -> int:
        """None."""
        return 0

    def suited(self, patch: Patch) -> Patch:
        """The keys and values of cross-attention; raises `ConfigError` for any kind but lora."""
        super().suited(patch)
        if not any(re.search(LAYERS, layer) for layer in getattr(patch, "layers", ())):
            raise ConfigError("closed_form edits a UNet's cross-attention, this model has none; choose another")
        patch.keep_layers(LAYERS)
        return patch

    def prepare(self, host: Host, corpus: Corpus, data: DataConfig) -> Edit:
        """The text states of the category's concepts or captions, and of what it preserves; nothing is drawn."""
        pairs = distinct_concepts(corpus)
        if self.prompts == "captions" or not pairs:
            pairs = corpus.pairs(data.pairs, data.seed, data.companions)
        kept = [prompt.text for prompt in corpus.retain(self.preserve, data.seed)]
        edit = self._edited(host, list(dict.fromkeys(pairs)), data.batch_size)
        if not edit.count:
            raise ConfigError("every prompt is its own safe twin; give replacements, or rewrite.by: empty")
        preserved = edit.kept
        for part in batched(len(kept), data.batch_size):
            states = self._picked(host, kept[part.start : part.stop])
            preserved = preserved + states.T @ states
        return edit._replace(kept=preserved)

    def solve(self, host: Host, patch: Patch, rows: Any) -> Mapping[str, float]:
        """Put the solution into `patch`.

        Returns:
            `erase`, the share of the concepts' distance to their targets that is left, and `preserve`, how far the
            preserved states are moved, as a share of their length.
        """
        edit, lora = cast(Edit, rows), cast(LoraPatch, patch)
        weights = {layer: host.unet.get_submodule(layer).weight.detach().float().cpu() for layer in lora.layers}
        left, right = factors(
            self.change(edit, list(weights.values())), self._normal(edit.concepts, edit.kept), self.rank
        )
        updates = {layer: (weight @ left.float(), right.float()) for layer, weight in weights.items()}
        lora.put({layer: (up.to(host.device), down.to(host.device)) for layer, (up, down) in updates.items()})
        return residuals(edit, left @ right)

    def change(self, edit: Edit, weights: Sequence[Tensor]) -> Tensor:
        """D of W' = W (I + D), (width, width).

        Args:
            edit: the states.
            weights: of all layers, (out, width) each; only RECE's rounds read them.
        """
        one = torch.eye(len(edit.kept), dtype=torch.float64)
        change, concepts, crossed = torch.zeros_like(one), edit.concepts, edit.crossed
        gram = sum((w.double().T @ w.double() for w in weights), torch.zeros_like(one)) if self.rounds else one
        for i in range(self.rounds + 1):
            if i:  # L of c' = L c, what brings the concepts back
                seen = one + change
                found = seen.T @ gram @ seen + self.return_regularization * one
                back = torch.linalg.solve(found, seen.T @ gram)
                concepts, crossed = back @ edit.concepts @ back.T, edit.crossed @ back.T
            missing = crossed - (one + change) @ concepts
            wanted = self.erase_scale * missing - self.preserve_scale * change @ edit.kept
            change = change + torch.linalg.solve(self._normal(concepts, edit.kept), wanted.T).T
        return change

    def _normal(self, concepts: Tensor, kept: Tensor) -> Tensor:
        """M, (width, width), of Σ c cᵀ and Σ p pᵀ."""
        one = torch.eye(len(kept), dtype=torch.float64)
        return self.erase_scale * concepts + self.preserve_scale * kept + self.regularization * one

    def _edited(self, host: Host, pairs: list[Pair], size: int) -> Edit:
        """The sums over the unsafe prompts' states and the safe ones in their places; nothing is kept yet."""
        width = host.unet.config["cross_attention_dim"]
        none = torch.zeros(width, width, dtype=torch.float64)
        edit = Edit(none, none, 0.0, none, 0)
        for part in batched(len(pairs), size):
            some = pairs[part.start : part.stop]
            unsafe, safe = ([getattr(pair, side).text for pair in some] for side in ("unsafe", "safe"))
            states, ends = [_states(host, texts) for texts in (unsafe, safe)], map(host.last_words, (unsafe, safe))
            rows = [self._aligned(*row) for row in zip(*states, *(end.tolist() for end in ends), strict=True)]
            c, s = (torch.cat(side) for side in zip(*rows, strict=True))
            edit = Edit(
                edit.concepts + c.T @ c,
                edit.crossed + s.T @ c,
                edit.targets + float(s.square().sum()),
                none,
                edit.count + len(c),
            )
        return edit

    def _aligned(self, unsafe: Tensor, safe: Tensor, last: int, last_safe: int) -> tuple[Tensor, Tensor]:
        """The states of one pair, (tokens, width) each, that are edited into each other."""
        if self.tokens == "last":
            return unsafe[last : last + 1], safe[last_safe : last_safe + 1]
        differs = (unsafe != safe).any(-1)
        first, shift = int(differs.int().argmax()) if differs.any() else len(unsafe), last_safe - last
        start, stop = max(first, first - shift), min(len(unsafe), len(unsafe) - shift)
        return unsafe[start:stop], safe[start + shift : stop + shift]

    def _picked(self, host: Host, texts: list[str]) -> Tensor:
        """The states of prompts that are preserved, (P, width)."""
        states = _states(host, texts)
        return states.flatten(0, 1) if self.tokens == "rest" else states[range(len(texts)), host.last_words(texts)]


def begin(host: Host, patch: Patch, corpus: Corpus, data: DataConfig) -> None:
    """Let a fresh lora patch begin as the solution of the default settings, as far as its rank and layers hold it.

    Raises:
        ConfigError: when it updates no keys and values of cross-attention.
    """
    lora, objective = cast(LoraPatch, patch), ClosedFormConfig(rank=0)
    layers = {layer: update for layer, update in lora.each() if re.search(LAYERS, layer)}
    if not layers:
        raise ConfigError("this objective trains no keys and values of cross-attention; set objective.start=zero")
    edit = objective.prepare(host, corpus, data)
    left, right = factors(objective.change(edit, []), objective._normal(edit.concepts, edit.kept))
    for layer, update in layers.items():
        up, down = cast(Tensor, update.up).data, cast(Tensor, update.down).data
        rank = min(len(down), len(right))
        balance = down[:rank].norm(dim=1).cpu() / right[:rank].float().norm(dim=1).clamp(min=1e-12)
        weight = host.unet.get_submodule(layer).weight.detach().float().cpu()
        up[:, :rank].copy_((weight @ left[:, :rank].float()) / balance)
        down[:rank].copy_(right[:rank].float() * balance[:, None])


def residuals(edit: Edit, change: Tensor) -> dict[str, float]:
    """`erase`, Σ |s - (I + D) c| over Σ |s - c|, and `preserve`, Σ |D p| over Σ |p|, as roots of squared sums."""

    def missing(seen: Tensor) -> float:
        return edit.targets - float(2 * (seen * edit.crossed).sum() - ((seen @ edit.concepts) * seen).sum())

    one = torch.eye(len(change), dtype=torch.float64)
    moved, length = float(((change @ edit.kept) * change).sum()), float(edit.kept.trace())
    erase = max(0.0, missing(one + change)) / max(missing(one), 1e-12)
    return {"erase": erase**0.5, "preserve": (max(0.0, moved) / max(length, 1e-12)) ** 0.5}


def factors(change: Tensor, normal: Tensor, rank: int = 0) -> tuple[Tensor, Tensor]:
    """P (width, r) and Q (r, width), whose product is `change`, or nearest to it.

    Args:
        change: D, (width, width).
        normal: M, by which a row x of states weighs x M xᵀ; the product is nearest to D where states are.
        rank: at most; 0 for that of D.
    """
    values, axes = torch.linalg.eigh(normal)
    left, sizes, _ = torch.linalg.svd(change @ (axes * values.sqrt()))
    r = max(1, int((sizes > NONE * sizes[0]).sum()))
    basis = left[:, : min(r, rank) if rank else r]
    return basis, basis.T @ change


def _states(host: Host, texts: list[str]) -> Tensor:
    return host.encode(texts).states.cpu().double()
