"""Fit the gate of a trained patch: which prompts is it for.

The host is frozen, so what the gate reads is computed once; fitting it then takes a minute or two, and no pictures.
Every gate sees thousands of captions: of the user's words, of what must stay, and of a shipped vocabulary of common
things, so that it has met more English than the category's own. It learns to tell a caption from any few words of it in
a row as well, so that no words around them can close it. The threshold is set on captions of another seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from safepatch.artifact.patch_artifact import PatchArtifact, is_gate
from safepatch.artifact.patch_artifact import cast as converted
from safepatch.data.bank import DataConfig, Texts
from safepatch.data.corpus import Corpus
from safepatch.diffusion import UNET, Components, Conditioning, Host, batched, open_host
from safepatch.errors import ConfigError, lookup
from safepatch.merging import MergeRecipe, combine
from safepatch.patch.bags import Bags
from safepatch.patch.base import GATE_LAYOUT
from safepatch.patch.files import from_artifact, to_artifact
from safepatch.patch.gate import WIDEST, WINDOWS, Gate, TextGate
from safepatch.patch.picture import KEYS, TEXT
from safepatch.progress import bar
from safepatch.training.captions import captions
from safepatch.training.pictures import fit_picture_key

CAPTIONS, UNSEEN = 12_288, 4000  # to learn from, and to set the threshold by, less those that were learned from
BYTES = 1 << 30  # that what a gate learns from may take: of larger models it sees fewer captions
STEPS, BATCH, UNSAFE = 600, 128, 32  # of each batch so many are for the category: of a file there are few among many
VALIDATION_SEED = 7919  # is added to the seed, far from what anybody chooses for another run
FEW = 20  # unseen unsafe captions; with fewer, those that were learned from set the threshold
# Where the threshold is put on the way from the most suspicious harmless logit to the median of the unsafe ones. A
# single odd word must not close the gate ("trombone", which a tokenizer splits off "bone"): of thousands of captions,
# one in a thousand may open it.
MARGIN, ODD = 0.1, 0.001
PICTURE_WIDTH = 32  # channels of a key that looks at what is drawn
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1: at 1, to which a sure gate's logits round, files are refused


class Read(Protocol):
    """What an encoder makes of captions."""

    def __getitem__(self, index: Tensor, /) -> Conditioning:
        """Of those of these numbers, (B,)."""
        ...


class Captions(NamedTuple):
    """What a gate reads of N captions.

    Attributes:
        texts: what the host reads of each, whole.
        bags: their windows; None of a gate that reads whole prompts only.
        wanted: whether each is one the patch is for, (N,) float.
    """

    texts: Read
    bags: Bags | None
    wanted: Tensor

    @classmethod
    def of(
        cls, host: Host, unsafe: Sequence[str], harmless: Sequence[str], data: DataConfig, windows: int
    ) -> "Captions":
        """Those that the patch is for, and all others, each distinct."""
        distinct = list(dict.fromkeys((*unsafe, *harmless)))
        bags = Bags.of(host, distinct, windows) if windows else None
        return cls(Texts(host, distinct, data, words=host.kind is not UNET), bags, _among(distinct, unsafe))

    def whole(self, gate: TextGate, index: Tensor) -> Tensor:
        """What a gate of one group makes of some of them, each read whole, (B,)."""
        return gate.read(self.texts[index].states.float())[:, 0]

    def heard(self, gate: TextGate, index: Tensor) -> Tensor | None:
        """What it makes of the strongest window of each, (B,)."""
        return None if self.bags is None else self.bags.read(gate, index)


class Scores(NamedTuple):
    """Logits of unseen captions.

    Attributes:
        unsafe, harmless: of those that the gate is for, and of all others.
        heard: of the unsafe ones' windows alone, whatever the whole caption adds; None of a gate that reads none.
    """

    unsafe: Tensor
    harmless: Tensor
    heard: Tensor | None


def fit_gate(gate: TextGate, host: Host, corpus: Corpus, data: DataConfig, windows: int = WINDOWS) -> dict[str, Any]:
    """Train `gate` in place and return its record: threshold on the probability, and its ROC on unseen captions.

    Where nearly all unsafe captions that there are were learned from, as of a file, it is judged by those: `learned`.
    Its half that looks at pictures, where it has one, is blinded: see DESIGN.md, 55.

    Args:
        gate: of one group.
        host: the frozen model.
        corpus: of the category the patch is for.
        data: where what the host reads is kept, and the seed of everything random; validation has another.
        windows: words of the widest window that it reads alone; 0 for whole prompts only.
    """
    generator, device = torch.Generator().manual_seed(data.seed), gate.bias.device
    gate.cpu()  # as small as it is
    unsafe, harmless = captions(corpus, _affordable(CAPTIONS, host.words(host.encode([""]))), data.seed)
    learn(gate, Captions.of(host, unsafe, harmless, data, windows), generator)
    unseen = unseen_captions(corpus, unsafe, harmless, data.seed + VALIDATION_SEED)
    record = judged(gate, Captions.of(host, *unseen, data, windows))
    record |= {"learned": True} if len({*unseen[0]} - {*unsafe}) < FEW else {}
    if isinstance(gate, Gate):
        gate.blind()
    gate.to(device)
    return record | ({"windows": windows} if windows else {})


def judged(gate: TextGate, unseen: Captions) -> dict[str, Any]:
    """The record of a gate by captions that it did not learn from, whatever encoder read them."""
    return _record(_scores(gate, unseen))


def fit_keys(
    gate: TextGate, host: Host, corpus: Corpus, data: DataConfig, windows: int, keys: str = TEXT
) -> dict[str, Any]:
    """`fit_gate`, and `fit_picture_key` where what is drawn counts too."""
    picture, gate.picture = gate.picture, None
    record = fit_gate(gate, host, corpus, data, windows)
    if picture is None:
        return record
    gate.picture = picture
    return with_picture(record, keys, fit_picture_key(picture, host, corpus, data))


def unseen_captions(
    corpus: Corpus, unsafe: Sequence[str], harmless: Sequence[str], seed: int
) -> tuple[list[str], list[str]]:
    """Captions of another seed that were not learned from; of few prompts, those that were."""
    learned, fresh = {*unsafe, *harmless}, captions(corpus, UNSEEN, seed)
    new = [[text for text in some if text not in learned] for some in fresh]
    return (new[0] if len(new[0]) >= FEW else fresh[0]), (new[1] if len(new[1]) >= FEW else fresh[1])


def _record(scores: Scores) -> dict[str, Any]:
    """Threshold and ROC from the logits of unseen captions."""
    unsafe, harmless = scores.unsafe, scores.harmless
    level = harmless.max() if len(harmless) * ODD < 1 else torch.quantile(harmless, 1 - ODD)
    threshold = level + MARGIN * (unsafe.median() - level).clamp(min=0)
    roc = [
        [round(float(t.sigmoid()), 6), _share(harmless, t), _share(unsafe, t)]
        for t in torch.quantile(torch.cat((unsafe, harmless)), torch.linspace(0, 1, 21))
    ]
    certified = {} if scores.heard is None else {"certified_recall": _share(scores.heard, threshold)}
    return {
        "threshold": min(float(threshold.sigmoid()), BELOW_ONE),
        "harmless_opened": _share(harmless, threshold),
        "unsafe_opened": _share(unsafe, threshold),
        **certified,  # share of unsafe captions that open it by windows alone, so that no words around close it
        "roc": roc,  # threshold, share of harmless captions opened, share of unsafe ones
    }


def with_picture(record: Mapping[str, Any], keys: str, picture: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a gate with a second key; only where either opens it is what words alone open certified.

    Args:
        record: of the key that reads text.
        keys: of `KEYS`.
        picture: the record of the other key.
    """
    dropped = () if keys == "either" else ("certified_recall",)
    return {name: value for name, value in record.items() if name not in dropped} | {"keys": keys, "picture": picture}


def add_gate(
    artifact: PatchArtifact,
    pipe: Any,
    corpus: Corpus,
    width: int = 32,
    data: DataConfig | None = None,
    windows: int = WINDOWS,
    keys: str = TEXT,
) -> PatchArtifact:
    """The same patch with a gate fitted on `pipe`, the model it was trained on; an older gate is replaced.

    Args:
        artifact: a patch for one category, of any kind; of a bundle for one category, each part gets a gate.
        pipe: its base model's pipeline.
        corpus: of its category.
        width: channels of the gate.
        data: where what the model reads is kept, and the seed; nothing else of it counts.
        windows: words of the widest window that it reads alone; 0 for whole prompts only, which words can close.
        keys: what opens it: `text`, what is asked for; `picture`, what is being drawn; `either` of them, or `both`.
            For others than `text`, pictures are drawn, `data.pairs` pairs of them and as many that must stay.

    Raises:
        ConfigError: for a merged patch, another category's corpus, a width below 1 or windows that are too wide.
        UnknownName: for keys that there are not.
        BaseMismatch: when the patch is for another architecture.
    """
    if artifact.info.is_bundle and artifact.info.categories == (corpus.name,):  # one for each side of the model
        parts = artifact.parts()
        gated = [add_gate(part.artifact, pipe, corpus, width, data, windows, keys) for part in parts]
        names, weights = (tuple(part.artifact.info.title for part in parts), tuple(part.weight for part in parts))
        return combine(gated, MergeRecipe(names, weights, conflicts=False))
    if artifact.info.is_bundle or len(artifact.info.categories) != 1:
        raise ConfigError(f"'{artifact.info.title}' is for several categories; fit a gate to each patch, then merge")
    if artifact.info.categories != (corpus.name,):
        raise ConfigError(f"this patch is for {artifact.info.categories[0]}, the words are for {corpus.name}")
    if artifact.info.config.get("one_step"):
        raise ConfigError("this patch draws every picture in one step, so no gate may keep it off; leave it without")
    if not 0 <= windows <= WIDEST:
        raise ConfigError(f"windows must be of 0 to {WIDEST} words, not {windows}")
    lookup(dict.fromkeys(KEYS), keys, what="set of keys")
    host, data = open_host(Components.of(pipe)), data or DataConfig()
    patch = from_artifact(artifact, host.components)
    patch.add_gate(host.unet, width, picture=0 if keys == TEXT else PICTURE_WIDTH)
    gates = {corpus.name: fit_keys(cast(TextGate, patch.gate), host, corpus, data, windows, keys)}
    made = to_artifact(patch, host.components, artifact.info.instructions)
    info = replace(artifact.info, config={**artifact.info.config, "layout": patch.layout, "gate": gates})
    names = [name for name in made.tensors if name.startswith(f"{patch.kind}.gate.")]
    gate = {name: converted(name, made.tensors[name], artifact.dtype) for name in names}
    kept = {name: tensor for name, tensor in artifact.tensors.items() if not is_gate(name)}
    return PatchArtifact({**kept, **gate}, info)


def without_gate(artifact: PatchArtifact) -> PatchArtifact:
    """The same patch without its gate, if it has one: it acts on every row, and can be merged by cat.

    Raises:
        ConfigError: for a merged patch, whose recipe tells of its sources' gates.
    """
    if artifact.info.recipe:
        raise ConfigError(f"'{artifact.info.title}' is merged; take the gates off its sources and merge again")
    kept = {name: t for name, t in artifact.tensors.items() if not name.startswith(f"{artifact.info.kind}.gate.")}
    config = {key: value for key, value in artifact.info.config.items() if key not in ("gate", "layout")}
    layout = {key: value for key, value in artifact.info.config.get("layout", {}).items() if key not in GATE_LAYOUT}
    return PatchArtifact(kept, replace(artifact.info, config={**config, **({"layout": layout} if layout else {})}))


def _share(scores: Tensor, threshold: Tensor) -> float:
    return round(float((scores >= threshold).float().mean()), 4)


def _affordable(rows: int, one: Tensor) -> int:
    """How many of `rows` fit into `BYTES`, each as large as `one`."""
    return max(64, min(rows, BYTES // (one.numel() * one.element_size())))


def _among(texts: Sequence[str], some: Sequence[str]) -> Tensor:
    """Whether each text is one of some, (N,) float."""
    known = {*some}
    return torch.tensor([float(text in known) for text in texts])


def learn(gate: TextGate, rows: Captions, generator: torch.Generator) -> None:
    """Train a gate in place. Both readings must tell: the whole caption, and its strongest window alone."""
    gate.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=2e-3, weight_decay=1e-2)
    sides = [((rows.wanted == side).nonzero()[:, 0], n) for side, n in ((1, UNSAFE), (0, BATCH - UNSAFE))]
    for _ in bar(range(STEPS), desc="fitting the gate", leave=False):
        pick = torch.cat([side[torch.randint(len(side), (n,), generator=generator)] for side, n in sides])
        wanted, heard = rows.wanted[pick], rows.heard(gate, pick)
        loss = binary_cross_entropy_with_logits(rows.whole(gate, pick), wanted)
        if heard is not None:
            loss = loss + binary_cross_entropy_with_logits(heard, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gate.eval().requires_grad_(False)


@torch.no_grad()
def answers(gate: TextGate, rows: Captions) -> tuple[Tensor, Tensor | None]:
    """What it makes of all captions, the stronger of both readings, and of their windows alone, (N,) each."""
    parts = [torch.arange(part.start, part.stop) for part in batched(len(rows.wanted), BATCH)]
    whole = torch.cat([rows.whole(gate, part) for part in parts])
    if rows.bags is None:
        return whole, None
    heard = torch.cat([rows.bags.read(gate, part) for part in parts])
    return torch.maximum(whole, heard), heard


def _scores(gate: TextGate, rows: Captions) -> Scores:
    (logits, heard), is_unsafe = answers(gate, rows), rows.wanted == 1
    return Scores(logits[is_unsafe], logits[~is_unsafe], None if heard is None else heard[is_unsafe])
