"""Sibling checkpoints are kept as differences to the base: low-rank where that is smaller, dense where it is not."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from safepatch.errors import ModelNotFound
from safepatch.tiny.models import add_deltas
from safepatch.tiny.siblings import KEPT_RANK, compressed_deltas


def new_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 400), nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6))


@torch.no_grad()
def fine_tuned(base: nn.Module) -> nn.Module:
    """Every weight changed, the largest by a matrix of rank 8."""
    tuned = copy.deepcopy(base)
    for parameter in tuned.parameters():
        low_rank = parameter.numel() > 100_000
        parameter += torch.randn(400, 8) @ torch.randn(8, 300) / 30 if low_rank else torch.randn(parameter.shape) / 10
    return tuned


def test_a_full_fine_tune_comes_back(tmp_path):
    base = new_module()
    tuned, half = fine_tuned(base), copy.deepcopy(base)
    deltas = compressed_deltas({name: p.detach().clone() for name, p in base.named_parameters()}, tuned)
    assert deltas["0.weight.up"].shape == (400, KEPT_RANK)
    assert deltas["1.weight.delta"].shape == (6, 4, 3, 3)
    save_file(deltas, tmp_path / "d.safetensors")
    add_deltas(half, tmp_path / "d.safetensors", 0.5)
    whole = copy.deepcopy(half)
    add_deltas(whole, tmp_path / "d.safetensors", 0.5)
    for ours, theirs, old in zip(whole.parameters(), tuned.parameters(), base.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-3, rtol=1e-2)
        assert not torch.allclose(theirs, old, atol=1e-2)  # control
    first, middle, last = (dict(module.named_parameters())["0.weight"] for module in (base, half, tuned))
    torch.testing.assert_close(middle, (first + last) / 2, atol=3e-3, rtol=1e-2)


def test_missing_weights_are_one_line(tmp_path):
    with pytest.raises(ModelNotFound, match="no sibling weights at"):
        add_deltas(new_module(), tmp_path / "none.safetensors")
