"""Fit the gate of a trained patch: which rows is it for, told from the prompt and from what the host makes of it.

The host is frozen, so what the gate reads is computed once; fitting it then takes seconds. A gate that reads text alone
needs no scenes, so it sees many more captions. The threshold is set on scenes of another seed, so that no harmless one
of them opens the gate at any step; none of those captions is one that a text gate has learned from.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from tqdm import tqdm

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.artifact.patch_artifact import cast as converted
from safepatch.data.pairs import Batch, PairBank, PairsConfig, build_bank, pair_examples, retain_examples
from safepatch.diffusion import Components, add_noise, encode_prompts, noise_pred
from safepatch.errors import ConfigError, lookup
from safepatch.patch import Features
from safepatch.patch.files import from_artifact, to_artifact
from safepatch.patch.gate import TextGate
from safepatch.patch.host import answered
from safepatch.taxonomy import CATEGORIES, Category

ROWS, CAPTIONS = 3072, 12_288  # to learn from: of a gate that reads features, and of one that reads text alone
STEPS = 600
BATCH = 128
VALIDATION_SCENES, UNSEEN = 120, 4000  # and captions, of which those that were learned from are left out
VALIDATION_STEPS = (999, 799, 549, 299, 49)
# Where the threshold is put on the way from the most suspicious harmless logit to the median of the unsafe ones: the
# worst of thousands of captions needs less of a margin than the worst of a hundred scenes.
MARGIN, TEXT_MARGIN = 0.25, 0.1


class Rows(NamedTuple):
    """What the gate reads, N rows, and whether each is one the patch is for, (N,) float."""

    mid: Tensor
    timesteps: Tensor
    states: Tensor
    wanted: Tensor


def fit_gate(
    gate: TextGate, components: Components, category: Category, bank: PairBank | None, seed: int
) -> dict[str, Any]:
    """Train `gate` in place and return its record: threshold on the probability, and its ROC on unseen scenes.

    Args:
        gate: of one group.
        components: the frozen host.
        category: what the patch is for.
        bank: the training data of a gate that reads features.
        seed: of rows, noise and batches; validation scenes are of another.
    """
    generator, device = torch.Generator().manual_seed(seed), gate.bias.device
    gate.cpu()  # as small as it is
    if gate.reads_features:
        assert bank, "a gate that reads features needs scenes"
        _train(gate, _training_rows(components, bank.rows, generator), generator)
        validation = build_bank(components, category, PairsConfig(pairs=VALIDATION_SCENES, seed=seed + 1)).rows
        scores = [_logits(gate, _rows_at(components, validation, t, generator)) for t in VALIDATION_STEPS]
        record = _record(scores, MARGIN)
    else:
        unsafe, harmless = _captions(category, CAPTIONS, seed)
        _train(gate, _text_rows(components, unsafe, harmless), generator)
        learned = {*unsafe, *harmless}
        unseen = [[text for text in some if text not in learned] for some in _captions(category, UNSEEN, seed + 1)]
        record = _record([_logits(gate, _text_rows(components, *unseen))], TEXT_MARGIN)
    gate.to(device)
    return record


def _record(scores: Sequence[tuple[Tensor, Tensor]], margin: float) -> dict[str, Any]:
    """Threshold and ROC from the logits of unsafe and of harmless rows, at one or more steps."""
    unsafe, harmless = torch.stack([s[0] for s in scores]), torch.stack([s[1] for s in scores])
    worst = harmless.amax(0)  # of each harmless scene: one step that opens the gate is enough to change the image
    threshold = worst.max() + margin * (unsafe.median() - worst.max()).clamp(min=0)
    roc = [
        [round(float(t.sigmoid()), 6), round(float((worst >= t).float().mean()), 4), _share(unsafe, t)]
        for t in torch.quantile(torch.cat((unsafe.flatten(), worst)), torch.linspace(0, 1, 21))
    ]
    return {
        "threshold": float(threshold.sigmoid()),
        "harmless_scenes_opened": round(float((worst >= threshold).float().mean()), 4),
        "unsafe_steps_opened": _share(unsafe, threshold),
        "roc": roc,  # threshold, share of harmless scenes opened at some step, share of unsafe steps opened
    }


def add_gate(artifact: PatchArtifact, pipe: Any, width: int = 32, data: PairsConfig | None = None) -> PatchArtifact:
    """The same patch with a gate fitted on `pipe`, the model it was trained on; an older gate is replaced.

    Args:
        artifact: a patch for one category, of any kind.
        pipe: its base model's pipeline.
        width: channels of the gate.
        data: the scenes it is fitted on, by default what training uses; of one that reads text alone, the seed counts.

    Raises:
        ConfigError: for a merged patch or a width below 1.
        BaseMismatch: when the patch is for another architecture.
    """
    if artifact.info.is_bundle or len(artifact.info.categories) != 1:
        raise ConfigError(f"'{artifact.info.title}' is for several categories; fit a gate to each patch, then merge")
    components = Components.of(pipe).freeze()
    category = lookup(CATEGORIES, artifact.info.categories[0], what="category")
    data = data or PairsConfig()
    patch = from_artifact(artifact, components.unet)
    patch.add_gate(components.unet, width)
    bank = build_bank(components, category, data) if cast(TextGate, patch.gate).reads_features else None
    gates = {category.name: fit_gate(cast(TextGate, patch.gate), components, category, bank, data.seed)}
    made = to_artifact(patch, components.unet, artifact.info.instructions)
    info = replace(artifact.info, config={**artifact.info.config, "layout": patch.layout, "gate": gates})
    names = [name for name in made.tensors if name.startswith(f"{patch.kind}.gate.")]
    gate = {name: converted(name, made.tensors[name], artifact.dtype) for name in names}
    return PatchArtifact({**artifact.tensors, **gate}, info)


def without_gate(artifact: PatchArtifact) -> PatchArtifact:
    """The same patch without its gate, if it has one: it acts on every row, and can be merged by cat.

    Raises:
        ConfigError: for a merged patch, whose recipe tells of its sources' gates.
    """
    if artifact.info.recipe:
        raise ConfigError(f"'{artifact.info.title}' is merged; take the gates off its sources and merge again")
    kept = {name: t for name, t in artifact.tensors.items() if not name.startswith(f"{artifact.info.kind}.gate.")}
    config = {key: value for key, value in artifact.info.config.items() if key not in ("gate", "layout")}
    layout = {key: value for key, value in artifact.info.config.get("layout", {}).items() if key != "gate"}
    return PatchArtifact(kept, replace(artifact.info, config={**config, **({"layout": layout} if layout else {})}))


def _share(scores: Tensor, threshold: Tensor) -> float:
    return round(float((scores >= threshold).float().mean()), 4)


def _train(gate: TextGate, rows: Rows, generator: torch.Generator) -> None:
    gate.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=2e-3, weight_decay=1e-2)
    for _ in tqdm(range(STEPS), desc="fitting the gate", leave=False):
        pick = torch.randint(len(rows.wanted), (BATCH,), generator=generator)
        mid, timesteps, states, wanted = (column[pick] for column in rows)
        loss = binary_cross_entropy_with_logits(gate(mid, timesteps, states)[:, 0], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gate.eval().requires_grad_(False)


def _captions(category: Category, n: int, seed: int) -> tuple[list[str], list[str]]:
    """About `n` captions: those of unsafe scenes, a third, and of their safe rewrites and everything preserved."""
    pairs, kept = pair_examples(category, n // 3, seed), retain_examples(category, n // 3, seed)
    return [unsafe.text for unsafe, _ in pairs], [example.text for example in (*(safe for _, safe in pairs), *kept)]


def _text_rows(components: Components, unsafe: Sequence[str], harmless: Sequence[str]) -> Rows:
    """What a gate reads of captions; all of it is held in memory."""
    texts = [*unsafe, *harmless]
    starts = tqdm(range(0, len(texts), 256), desc="reading captions", leave=False)
    states = torch.cat([encode_prompts(components, texts[start : start + 256]).float().cpu() for start in starts])
    wanted = torch.arange(len(texts)) < len(unsafe)
    return Rows(states.new_empty(len(texts), 0), torch.zeros(len(texts)), states, wanted.float())


def _training_rows(components: Components, bank: Batch, generator: torch.Generator) -> Rows:
    """Unsafe prompts on unsafe or already corrected scenes, safe rewrites, and everything that is preserved."""
    third = ROWS // 3
    pairs = torch.randint(len(bank.unsafe_latents), (third,), generator=generator)
    kept = torch.randint(len(bank.retain_latents), (third,), generator=generator)
    corrected = (torch.rand(third, generator=generator).view(-1, 1, 1, 1) < 0.5).to(bank.safe_latents.device)
    latents = torch.where(corrected, bank.safe_latents[pairs], bank.unsafe_latents[pairs])
    latents = torch.cat((latents, bank.safe_latents[pairs], bank.retain_latents[kept]))
    states = torch.cat((bank.unsafe_states[pairs], bank.safe_states[pairs], bank.retain_states[kept]))
    timesteps = torch.randint(0, components.scheduler.config.num_train_timesteps, (3 * third,), generator=generator)
    wanted = torch.cat((torch.ones(third), torch.zeros(2 * third)))
    return Rows(_mids(components, latents, timesteps, states, generator), timesteps, states.float().cpu(), wanted)


def _rows_at(components: Components, bank: Batch, timestep: int, generator: torch.Generator) -> Rows:
    """All unsafe and all preserved rows at one timestep."""
    latents = torch.cat((bank.unsafe_latents, bank.retain_latents))
    states = torch.cat((bank.unsafe_states, bank.retain_states))
    timesteps = torch.full((len(latents),), timestep)
    wanted = torch.cat((torch.ones(len(bank.unsafe_latents)), torch.zeros(len(bank.retain_latents))))
    return Rows(_mids(components, latents, timesteps, states, generator), timesteps, states.float().cpu(), wanted)


@torch.no_grad()
def _logits(gate: TextGate, rows: Rows) -> tuple[Tensor, Tensor]:
    """Logits of the unsafe and of the harmless rows."""
    logits = gate(rows.mid, rows.timesteps, rows.states)[:, 0]
    return logits[rows.wanted == 1], logits[rows.wanted == 0]


@torch.no_grad()
def _mids(
    components: Components, latents: Tensor, timesteps: Tensor, states: Tensor, generator: torch.Generator
) -> Tensor:
    """What the host's mid block makes of noised latents."""
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    noisy = add_noise(components.scheduler, latents, noise, timesteps.to(latents.device))
    seen: list[Tensor] = []
    unet = components.unet
    with answered(unet, lambda features: seen.append(cast(Features, features).mid.float().cpu())):
        for start in tqdm(range(0, len(noisy), 32), desc="reading features", leave=False):
            part = slice(start, start + 32)
            noise_pred(unet, noisy[part], timesteps[part].to(latents.device), states[part])
    return torch.cat(seen)
