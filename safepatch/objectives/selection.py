"""A detector that chooses which pictures a patch learns from; it should not be the one that judges the patch."""

import torch
from torch import Tensor

from safepatch.data.corpus import Corpus
from safepatch.data.settings import DataConfig
from safepatch.data.twin_pictures import TwinBank, build_twins
from safepatch.detectors import open_detector, parse_detector
from safepatch.detectors.base import BATCH, shows_any
from safepatch.diffusion import Host, decode_latents


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
        images = [decode_latents(vae, part.to(vae.device, vae.dtype)).float().cpu() for part in latents.split(BATCH)]
        return shows_any(detector.find(torch.cat(images)), labels)

    return build_twins(host, corpus, data, retain, shows)
