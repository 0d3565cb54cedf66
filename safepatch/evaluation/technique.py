"""A patched model as eval-unlearn knows techniques, so that its benchmarks score a patch file.

That package (1.1.2 on PyPI, MIT) finds techniques by the entry point group `eval_unlearn.techniques`, makes one of the
keys of its configuration, and asks it for images of a batch's prompts. It need not be installed here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from safepatch.diffusion import denoiser, quiet, usual_guidance
from safepatch.models.load import dtype_of, load_pipeline
from safepatch.runtime.apply import apply


class SafepatchTechnique:
    """What eval-unlearn runs as `safepatch`.

    Args:
        model: name, folder, single file or Hub id of the model.
        patch: file of the patch.
        scale: of the patch, at least 0.
        device: where it draws; a GPU by default, if there is one.
        dtype: of the model, such as `float16`; float32 by default.
        tokenizer: of a model that is a single file.
        num_inference_steps, guidance_scale: of each image, unless a call names others; by default 50, and what is usual
            for the model.

    Raises:
        TypeError: for a key that is none of these; the package itself would ignore it.
        SafepatchError: for a model or patch that cannot be opened, or do not fit.
    """

    def __init__(
        self,
        *,
        model: str,
        patch: str,
        scale: float = 1.0,
        device: str | None = None,
        dtype: str | None = None,
        tokenizer: str | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
    ) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.pipe = quiet(load_pipeline(model, tokenizer, dtype=dtype_of(dtype)).to(self.device))
        self.handle = apply(self.pipe, patch, scale)
        scale = usual_guidance(denoiser(self.pipe)) if guidance_scale is None else guidance_scale
        self._options = {"num_inference_steps": num_inference_steps, "guidance_scale": scale}

    def generate(self, prompts: Sequence[str], seed: int | None = None, **options: Any) -> list[Image.Image]:
        """An image for each prompt; the i-th starts from the noise of `seed` + i, as that package's own do."""
        made = []
        for i, prompt in enumerate(prompts):
            generator = None if seed is None else torch.Generator(self.device).manual_seed(seed + i)
            made += self.pipe(prompt, generator=generator, **{**self._options, **options}).images
        return made
