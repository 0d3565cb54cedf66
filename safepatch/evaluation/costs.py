"""What a patch costs, counted and not timed: the same for the same files, on whatever machine.

Seconds depend on the machine and on what else it does: `benchmarks/` measures them, patched beside unpatched. Measures
are as in `effects`.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.data.corpus import Corpus
from safepatch.diffusion import generate, quiet
from safepatch.evaluation.bench import Bench
from safepatch.evaluation.metrics import Estimate, exactly
from safepatch.runtime.apply import apply


def extra_flops(bench: Bench, corpus: Corpus, patch: PatchArtifact | None) -> Estimate | None:
    """How many more operations one call of the host takes while the patch acts, as a share: of one row, gate open.

    Counted, not timed: equal for equal files, on whatever machine. What a shut gate costs is in `benchmarks/gate.py`.
    """
    if patch is None:
        return None
    plain, patched = (step_flops(bench.pipe, each) for each in (None, patch))
    return exactly(patched / plain - 1)


def megabytes(bench: Bench, corpus: Corpus, patch: PatchArtifact | None) -> Estimate | None:
    """The patch's tensors in its file, in 10^6 bytes."""
    return exactly(sum(tensor.nbytes for tensor in patch.tensors.values()) / 1e6) if patch else None


@torch.no_grad()
def step_flops(pipe: Any, patch: PatchArtifact | None) -> int:
    """Floating-point operations of one denoising step of one image, without guidance, the patch acting if there is one.

    That is what two steps take less what one step takes: text encoders and autoencoder are not in it.
    """
    quiet(pipe)
    with apply(pipe, patch, gate="off") if patch else nullcontext():
        return _flops(pipe, 2) - _flops(pipe, 1)


def _flops(pipe: Any, steps: int) -> int:
    with FlopCounterMode(display=False) as counter:
        generate(pipe, ["a picture"], [0], steps=steps, guidance_scale=1.0)
    return counter.get_total_flops()
