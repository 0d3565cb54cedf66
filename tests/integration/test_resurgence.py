"""A model is trained further: its weights move, the patch is measured on it, and a fused one is trained like any."""

from pathlib import Path

import pytest
import torch

from safepatch.data.bank import DataConfig
from safepatch.data.corpus import Corpus
from safepatch.data.latents import Drawing, Latents
from safepatch.diffusion import Components, UNetHost
from safepatch.errors import ConfigError, UnknownName
from safepatch.evaluation.bench import Protocol
from safepatch.evaluation.matrix import Matrix, PatchEntry
from safepatch.models.load import load_pipeline
from safepatch.results import read_rows
from safepatch.resurgence import WAYS, Tuning, further, run_resurgence
from safepatch.shipped import shipped_patches


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return DataConfig(steps=4, cache=str(tmp_path / "cache"))


@pytest.mark.parametrize("full", [False, True])
def test_training_further_lowers_its_loss_and_leaves_the_unet_frozen(data: DataConfig, full: bool) -> None:
    pipe = load_pipeline("tiny-sd")
    host = UNetHost(Components.of(pipe))
    latents = Latents(host, [Drawing("a cat", 0), Drawing("a dog", 1)], data, "drawing")
    shuffled = [torch.roll(latents[[i]], 1, dims=1) for i in range(2)]  # channels in another order: something to learn

    class Odd:
        """Pictures that the model does not draw."""

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
            return torch.cat([shuffled[i] for i in index.tolist()])

    def loss() -> float:
        noise = torch.randn(2, *host.latent_shape, generator=torch.Generator().manual_seed(5))
        times, clean = torch.tensor([300, 600]), torch.cat(shuffled)
        noisy = host.add_noise(clean, noise, times)
        with torch.no_grad():
            made = host.predict(noisy, times, host.encode(["a cat", "a dog"]))
        return float((made - host.from_x0(noisy, times, clean)).pow(2).mean())

    before = loss()
    further(pipe, host, ["a cat", "a dog"], Odd(), full, Tuning(steps=12, learning_rate=3e-3, data=data))
    assert loss() < before
    assert not any(parameter.requires_grad for parameter in host.unet.parameters())


def test_every_way_is_measured_with_the_patch_without_it_and_fused(tmp_path: Path, data: DataConfig) -> None:
    path = str(shipped_patches("lora")["weapons"].path)
    matrix = Matrix(
        ["tiny-sd"], patches=[PatchEntry("mine", path=path)], protocol=Protocol(n=2, steps=1), out=str(tmp_path / "out")
    )
    rows = run_resurgence(matrix, Tuning(steps=1, batch_size=2, pictures=2, data=data), lambda _: None)
    assert read_rows(tmp_path / "out" / "rows.jsonl") == rows
    found = {(row.attack, row.patch) for row in rows if row.prompt_set == "plain"}
    assert found == {(way, patch) for way in ("none", *WAYS) for patch in ("none", "mine", "mine (fused first)")}
    assert Corpus.open("weapons").name in {row.category for row in rows}


def test_what_cannot_be_asked_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'benign-lora'"):
        Tuning(ways=("benign-lorra",))
    with pytest.raises(ConfigError, match="at least 1"):
        Tuning(steps=0)
    with pytest.raises(ConfigError, match="no patch"):
        run_resurgence(Matrix(["tiny-sd"], categories=["weapons"], out=str(tmp_path)), Tuning(), print)
    with pytest.raises(ConfigError, match="need a judge"):
        run_resurgence(Matrix(["./foreign"], categories=["weapons"], out=str(tmp_path)), Tuning(), print)
