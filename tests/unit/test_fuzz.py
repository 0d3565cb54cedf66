"""Altered files through every reader, the short form of `make fuzz`."""

from pathlib import Path

from safepatch.artifact.patch_artifact import PatchArtifact
from tests.stress.fuzz import fuzz


def test_no_altered_file_is_accepted_and_every_refusal_is_one_line() -> None:
    result = fuzz(mutants=150, seed=1)
    assert result.examples == {}
    assert result.failures == {"accepted": 0, "tracebacks": 0, "hangs": 0, "memory": 0}
    assert result.counts["mutants"] == 150
    assert result.counts["open passed"] > 5  # control: lies get past the hash, or they would try nothing behind it


def test_control_failures_are_counted() -> None:
    kept: list[bytearray] = []

    def careless(path: Path) -> None:
        PatchArtifact.open(path).info.config["gate"]["weapons"]["threshold"]

    def greedy(path: Path) -> None:
        kept[:] = [bytearray(b"\1") * 600_000_000]
        kept.clear()

    def slow(path: Path) -> None:
        while True:
            pass

    result = fuzz(mutants=8, seed=2, also={"careless": careless})
    assert result.failures["tracebacks"] > 0
    result = fuzz(mutants=1, seed=2, also={"greedy": greedy, "slow": slow})
    assert (result.failures["memory"], result.failures["hangs"]) == (1, 1)
