"""What of a pipeline an exported patch changes: one side of it, or, of a bundle, a text encoder and what denoises."""

from typing import NamedTuple

from safepatch.artifact.patch_artifact import Factors, PatchArtifact
from safepatch.diffusion import UNET, config_kind
from safepatch.errors import ConfigError
from safepatch.patch import LoraPatch
from safepatch.patch.lora import updated_weights


class Changed(NamedTuple):
    """A lora patch that changes one component of a pipeline.

    Attributes:
        component: diffusers' name for it.
        weight: what its updates are multiplied by.
        factors: by layer, in the shapes that others have them in: of a convolution, both are kernels.
    """

    component: str
    weight: float
    factors: dict[str, Factors]

    @property
    def ranks(self) -> dict[str, int]:
        """By layer."""
        return {layer: len(each.down) for layer, each in self.factors.items()}


def changed_by(artifact: PatchArtifact) -> list[Changed]:
    """The sides of a pipeline that a patch changes; raises `ConfigError` where there is no LoRA that does the same."""
    info = artifact.info
    if not info.is_bundle:
        return [_changed(artifact, 1.0)]
    parts = [(artifact.part(index), float(source["weight"])) for index, source in enumerate(info.sources)]
    if len(info.components) < len(parts) or any(part.info.is_bundle for part, _ in parts):
        raise ConfigError(
            "a bundle is several patches, and a LoRA is one for each component; export its parts (safepatch split), "
            "or merge them by cat"
        )
    return [_changed(part, weight) for part, weight in parts]


def _changed(artifact: PatchArtifact, weight: float) -> Changed:
    _require_factors(artifact)
    component = artifact.info.component
    component = config_kind(artifact.info.fingerprint).component if component == UNET.component else component
    return Changed(component, weight, _factors(artifact))


def _require_factors(artifact: PatchArtifact) -> None:
    kind = artifact.info.kind
    if kind != LoraPatch.kind:
        nor = "; one that sees the prompt alone is a ControlNet (--format controlnet)" if kind == "control" else ""
        raise ConfigError(
            f"a {kind} patch is a network of its own and no LoRA{nor}; train one with patch.kind=lora, or in ComfyUI "
            "use safepatch's nodes (integrations/comfyui)"
        )
    if dense := [name for name in updated_weights(artifact) if artifact.rank(f"lora.{name}") is None]:
        raise ConfigError(f"'{dense[0]}' has no factors after this merge; merge by cat, or train one patch")


def _factors(artifact: PatchArtifact) -> dict[str, Factors]:
    found = {}
    for name in updated_weights(artifact):
        (up, down), kernel = artifact.factors(f"lora.{name}"), artifact.info.shapes[f"lora.{name}"][2:]
        if kernel:
            up, down = up[:, :, None, None], down.reshape(len(down), -1, *kernel)
        found[name.removesuffix(".weight")] = Factors(up, down)
    return found
