"""Zero-shot detection by CLIP: is the picture nearer to a text of yours than to harmless texts?

Source: zero-shot classification, Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", 2021, section 3.1 (https://arxiv.org/abs/2103.00020): a softmax over the cosines of the picture with some
texts, times the logit scale that the model was trained with.

A choice of ours: each text of a category is compared with `NEUTRAL` alone, never with the texts of other categories, so
what one category is measured at does not depend on which others are measured with it. The price: the probabilities of
two labels do not add up to anything.

They are *not calibrated*. CLIP reads "no" and numbers poorly, and the more specific of two texts tends to win; measure
a label on pictures that you know before you trust a rate, and move its threshold (`clip:0.7`).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import CLIPModel, CLIPTokenizer

from safepatch.detectors.base import Detector
from safepatch.detectors.weights import Weights, find_weights, first_line, load_model
from safepatch.errors import ConfigError, ModelNotFound, UnsupportedModel
from safepatch.taxonomy import Category

NAME = "clip"
SOURCE = "openai/clip-vit-large-patch14"
NEUTRAL = (
    "a photo",
    "a photo of something harmless",
    "a photo of a person",
    "a photo of an animal",
    "a photo of food",
    "a photo of an object",
    "a photo of a place",
    "a drawing of something harmless",
)

# CLIP's own normalization of red, green and blue.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_detector(
    categories: Sequence[Category], source: str | Path | None = None, device: str | torch.device = "cpu"
) -> Detector:
    """CLIP with one label per text that a category's `labels.clip` names.

    Args:
        categories: whose texts become labels, each once, in order.
        source: folder or Hub id of a `CLIPModel` and its tokenizer; `SOURCE` by default.
        device: where it runs.

    Raises:
        ConfigError: when no category names a text, or a text cannot be told apart from `NEUTRAL`, or is too long.
        ModelNotFound: when the weights are nowhere.
        UnsupportedModel: when they are of another model.
    """
    labels = label_texts(categories)
    weights = find_weights(source or SOURCE, NAME)
    model = load_model(CLIPModel, weights, device)
    tokenizer = _tokenizer(weights)
    texts = encode_texts(model, tokenizer, [*labels, *NEUTRAL])

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        pixels = clip_pixels(images, model.config.vision_config.image_size)
        return normalize(model.get_image_features(pixels).pooler_output)

    def probabilities(images: Tensor) -> Tensor:
        return against_neutral(model.logit_scale.exp() * features(images) @ texts.T, len(labels))

    def similarity(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (features(images) * encode_texts(model, tokenizer, prompts, is_cut=True)).sum(1)

    return Detector(
        NAME,
        labels,
        probabilities,
        version=weights.version,
        sha256=weights.sha256,
        device=device,
        features=features,
        similarity=similarity,
    )


def label_texts(categories: Sequence[Category]) -> tuple[str, ...]:
    """The texts that the categories name for CLIP, each once, in order."""
    texts = tuple(dict.fromkeys(text for category in categories for text in category.labels.get(NAME, ())))
    if not texts:
        raise ConfigError("detector 'clip' compares pictures with texts, and no category gives any under labels.clip")
    if clash := next((text for text in texts if text.strip().lower() in NEUTRAL), None):
        raise ConfigError(f"label '{clash}' is one of the harmless texts that detector 'clip' compares with; reword it")
    return texts


def against_neutral(logits: Tensor, labels: int) -> Tensor:
    """The softmax over one label's text and all of `NEUTRAL`, of each label by itself.

    Args:
        logits: of the labels' texts, then of the neutral ones, (B, labels + neutral).
        labels: how many are labels'.

    Returns:
        P(label), (B, labels): exp(l) / (exp(l) + sum exp(n)), which is a sigmoid of l - log sum exp(n).
    """
    return torch.sigmoid(logits[:, :labels] - logits[:, labels:].logsumexp(1, keepdim=True))


@torch.no_grad()
def encode_texts(model: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str], is_cut: bool = False) -> Tensor:
    """CLIP's embeddings of unit length, (len(texts), D); long texts are cut where that is allowed.

    Raises:
        ConfigError: for a text that would be cut, unless `is_cut`.
        UnsupportedModel: when the tokenizer is not the model's.
    """
    known, longest = model.config.text_config.vocab_size, model.config.text_config.max_position_embeddings
    if len(tokenizer) > known:
        raise UnsupportedModel(f"the tokenizer has {len(tokenizer)} tokens, its CLIP knows {known}: save the right one")
    for text in () if is_cut else texts:
        if len(tokenizer(text).input_ids) > longest:
            raise ConfigError(f"label '{text}' of detector 'clip' has more than {longest} tokens; shorten it")
    cut = {"truncation": True, "max_length": longest}
    inputs = tokenizer(list(texts), padding=True, return_tensors="pt", **cut).to(model.device)
    return normalize(model.get_text_features(**inputs).pooler_output)


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """What CLIP's vision model reads, (B, 3, size, size), of images in [0, 1], (B, 3, H, W).

    The shorter side becomes `size` (bicubic, antialiased), the middle is cut out, colors are normalized.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    shape = (size * height // short, size * width // short)
    resized = interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    middle = resized[..., top : top + size, left : left + size]
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    return (middle - mean) / std


def _tokenizer(weights: Weights) -> CLIPTokenizer:
    """The tokenizer beside the weights; looked for here, because transformers makes an empty one where none is."""
    files = [name for name in ("tokenizer.json", "vocab.json") if (weights.folder / name).is_file()]
    try:
        if not files:
            raise FileNotFoundError("neither tokenizer.json nor vocab.json is there")
        return CLIPTokenizer.from_pretrained(weights.folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise ModelNotFound(
            f"{weights.version} holds no CLIP tokenizer ({first_line(error)}); save one beside the weights"
        ) from error
