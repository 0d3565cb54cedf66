"""A detector that chooses which pictures a patch learns from; it should not be the one that judges the patch."""

import torch
from torch import Tensor

from safepatch.data.corpus import Corpus
from safepatch.data.settings import DataConfig
from safepatch.data.twin_pictures import TwinBank, build_twins
from safepatch.detectors import open_detector, parse_detector
from safepatch.detectors.base import shows_any
from safepatch.diffusion import Host, decode_latents
from safepatch.progress import bar


def selected_twins(host: Host, corpus: Corpus, data: DataConfig, retain: bool = False) -> TwinBank:
    """Both members' pictures of each pair, of which the detector `data.select` agrees, if there is one.

    Raises:
        UnknownName: when there is no such detector.
        ConfigError: when it has no labels for the category, agrees of too few, and as `build_twins`.
    """
    if not data.select:
        return build_twins(host, corpus, data, retain)
    detector = open_detector(parse_detector(data.select), [corpus.category], host.device)
    vae, labels = host.components.vae, detector.labels_of(corpus.category)

    def shows(latents: Tensor) -> Tensor:
        parts = bar(latents.split(data.batch_size), desc=f"{data.select} looks at pictures", leave=False)
        return torch.cat([shows_any(detector.find(decode_latents(vae, part)), labels) for part in parts])

    return build_twins(host, corpus, data, retain, shows)
