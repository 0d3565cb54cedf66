"""The command line as a user meets it: the README's verbs, and one line for every mistake."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safepatch.artifact.info import PatchInfo
from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.evaluation.matrix import load_matrix
from safepatch.evaluation.run import run_matrix

ROOT = Path(__file__).parents[2]
WEAPONS = ROOT / "patches" / "control" / "weapons.safetensors"
RECIPE = "configs/patches/control/weapons.yaml"
PATCHED = ("generate", "--prompt", "a knife", "-o", "x.png", "--patch", WEAPONS)


def run(*words: str, expect: int = 0) -> str:
    """Standard output of `safepatch words`, or its error line when a failure is expected."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "safepatch", *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == expect, done.stderr[-2000:]
    if not expect:
        return done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.fixture
def other_architecture(tmp_path: Path) -> Path:
    info = PatchInfo(
        kind="control",
        instructions={"weapons": "no weapons"},
        fingerprint={"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768},
        base={"family": "sd1"},
        config={"sees": "instruction"},
    )
    return PatchArtifact({"control.zero_mid.weight.delta": torch.zeros(2, 2)}, info).save(tmp_path / "sd1.safetensors")


def test_dry_run_prints_every_field_and_trains_nothing(tmp_path: Path) -> None:
    printed = run("train", RECIPE, "training.steps=7", f"output={tmp_path}/run", "--dry-run")
    assert "steps: 7" in printed
    assert "preservation:" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train", RECIPE, "training.stepz=5"), "did you mean 'steps'"),
        (("train", RECIPE, "category=weapon"), "did you mean 'weapons'"),
        (("train", RECIPE, "training.steps=0"), "at least 1"),
        (("train", RECIPE, "objective.name=safe_controll"), "did you mean 'safe_control'"),
        (("train", "configs/nowhere.yaml"), "nowhere.yaml"),
        (("verify", "nowhere.safetensors"), "nowhere.safetensors"),
        (("inspect", "README.md"), "README.md"),
        (("generate", "--prompt", " ", "-o", "x.png"), "prompt is empty"),
        (("generate", "--prompt", "a knife", "-o", "x.png", "--model", "tiny-sdd"), "did you mean 'tiny-sd'"),
        (("generate", "--prompt", "a knife", "-o", "x.png", "--model", "./nowhere"), "nowhere"),
        (
            (*PATCHED, "--scale", "weapons=1,gore"),
            "--scale takes a number, or CATEGORY=NUMBER,..., not 'weapons=1,gore'",
        ),
        ((*PATCHED, "--scale", "weapon=1"), "did you mean 'weapons'"),
        ((*PATCHED, "--scale", "-1"), "scale must be 0"),
        ((*PATCHED, "--start", "0.8", "--end", "0.2"), "0 <= start < end <= 1"),
        ((*PATCHED, "--gate", "ajar"), "gate must be one of off, soft, hard"),
        ((*PATCHED, "--gate-threshold", "2"), "gate_threshold must be within [0, 1]"),
        (("train", RECIPE, "patch.kind=lite", "patch.rank=0"), "at least 1"),
        (("train", RECIPE, "patch.kind=lit"), "did you mean 'lite'"),
        (("gate", "runs/none.safetensors", "-o", "x.safetensors"), "none.safetensors"),
        (("evaluate", "configs/matrices/lora.yaml", "protocol.m=5"), "unknown key 'protocol.m'"),
        (("evaluate", "--model", "tiny-sd"), "--category NAME for the model as it is"),
        (("evaluate", "--patch", WEAPONS, "--detector", "clipp"), "did you mean 'clip'"),
        (("audit", "nowhere.csv", "--patch", WEAPONS, "-o", "runs/none"), "nowhere.csv"),
        (("generate", "--prompt", "a knife", "-o", "x.png", "--key", "k.pem"), "give --receipt too"),
        (("generate", "--prompt", "a knife", "-o", "x.png", "--receipt", "--key", "k.pem"), "no key at k.pem"),
        (("verify", "nowhere.png"), "there is no nowhere.png"),
        (("verify", "docs/picture.png"), "has no receipt"),
        (("serve", "--patch", "nowhere.safetensors"), "nowhere.safetensors"),
        (("serve", "--patch", WEAPONS, "--host", "0.0.0.0"), "give --keys"),
        (("new", "no good name"), "letters, digits"),
        (("train", "nowhere.yaml", "model=tiny-sd"), "nowhere.yaml"),
        (("train", "safepatch/assets/categories/weapons.yaml"), "no model"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_to_do(words: tuple[str, ...], says: str) -> None:
    assert says in run(*words, expect=2)


def test_a_model_is_measured_as_it_is(tmp_path: Path) -> None:
    printed = run(
        "evaluate", "metrics=[unsafe_rate]", "--category", "weapons", "-n", "2", "--steps", "2", "-o", tmp_path
    )
    assert "| unsafe_rate | none |" in printed


def test_an_altered_and_a_truncated_patch_are_refused(tmp_path: Path) -> None:
    data = bytearray(WEAPONS.read_bytes())
    whole = tmp_path / "whole.safetensors"
    whole.write_bytes(data)
    assert "ok" in run("verify", whole)  # control: the untouched copy passes
    data[-5] ^= 1
    (tmp_path / "altered.safetensors").write_bytes(data)
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    assert "altered.safetensors" in run("verify", tmp_path / "altered.safetensors", expect=2)
    assert "cut.safetensors" in run("verify", tmp_path / "cut.safetensors", expect=2)


def test_a_patch_for_another_architecture_is_refused(tmp_path: Path, other_architecture: Path) -> None:
    out = tmp_path / "x.png"
    error = run("generate", "--prompt", "a knife", "-o", out, "--patch", other_architecture, expect=2)
    assert "sd1" in error
    assert "tiny-sd" in error
    assert not out.exists()


def test_check_says_whether_a_patch_fits(other_architecture: Path) -> None:
    printed = run("check", "--model", "tiny-sd", WEAPONS)
    assert "family: tiny-sd" in printed
    assert "drift from the patch's base: " in printed
    assert "this patch is for sd1 UNets" in run("check", "--model", "tiny-sd", other_architecture, expect=2)


def test_check_shows_what_was_merged_weakly(tmp_path: Path) -> None:
    run(
        "merge",
        WEAPONS,
        ROOT / "patches" / "control" / "drugs.safetensors",
        "--weights",
        "1,0.5",
        "-o",
        tmp_path / "x.safetensors",
    )
    assert "weights: drugs 0.5\n" in run("check", tmp_path / "x.safetensors")
    assert "weights" not in run("check", WEAPONS)  # control


def test_a_checkpoint_of_another_kind_is_refused_by_its_name(tmp_path: Path) -> None:
    index = {"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert "not supported yet: PixArtAlphaPipeline" in run("check", "--model", tmp_path, WEAPONS, expect=2)
    error = run("generate", "--model", WEAPONS, "--prompt", "a cat", "-o", tmp_path / "x.png", expect=2)
    assert "is a safety patch, not a model" in error


def test_inspect_as_json_names_categories_and_kind() -> None:
    info = json.loads(run("inspect", WEAPONS, "--json"))
    assert list(info["instructions"]) == ["weapons"]
    assert info["kind"] == "control"


def test_merge_then_generate_writes_an_image(tmp_path: Path) -> None:
    merged, image = tmp_path / "both.safetensors", tmp_path / "out.png"
    run("merge", WEAPONS, ROOT / "patches" / "control" / "alcohol.safetensors", "-o", merged)
    words = ("generate", "--model", "tiny-sd", "--patch", merged, "--prompt", "a knife next to a cat", "--steps", "3")
    run(*words, "-o", image)
    assert image.read_bytes().startswith(b"\x89PNG")


def test_scale_by_category_and_a_window_reach_the_patch(tmp_path: Path) -> None:
    words = ("generate", "--patch", WEAPONS, "--prompt", "a knife", "--steps", "2", "-o")
    base, off, late, whole = (tmp_path / f"{name}.png" for name in ("base", "off", "late", "whole"))
    run("generate", "--prompt", "a knife", "--steps", "2", "-o", base)
    run(*words, off, "--scale", "weapons=0")
    run(*words, late, "--start", "0.4")
    run(*words, whole, "--scale", "weapons=1")
    assert off.read_bytes() == base.read_bytes()
    assert len({path.read_bytes() for path in (base, late, whole)}) == 3


MATRIX = """models: [tiny-sd]
patches: [{name: lora, shipped: lora}]
categories: [weapons]
metrics: [unsafe_rate, benign_identical]
protocol: {n: 4, steps: 1, batch_size: 1}
pictures: 1
"""


def test_two_processes_share_a_matrix_and_find_what_one_finds(tmp_path: Path) -> None:
    """They are started as `accelerate launch` starts them: by what stands in their environment."""
    (tmp_path / "matrix.yaml").write_text(MATRIX)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    usual = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    usual |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "safepatch", "evaluate", str(tmp_path / "matrix.yaml"), f"out={tmp_path / 'two'}"]
    several = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**usual, "RANK": str(i), "LOCAL_RANK": str(i)},
        )
        for i in range(2)
    ]
    said = [each.communicate(timeout=900)[0] for each in several]
    assert [each.returncode for each in several] == [0, 0], said
    run_matrix(load_matrix(tmp_path / "matrix.yaml", [f"out={tmp_path / 'one'}"]), tell=lambda _: None)
    for name in ("rows.jsonl", "images.json", "protocol.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    one, two = (json.loads((tmp_path / name / "timings.json").read_text()) for name in ("one", "two"))
    assert [each["drawn"] for each in two] == [each["drawn"] for each in one]  # so nothing was drawn twice
    assert [{each["processes"] for each in timed} for timed in (one, two)] == [{1}, {2}]
    assert "images drawn and judged" in said[0]
    assert "[1/" not in said[1]


def test_an_unwritable_output_is_one_line() -> None:
    assert "cannot write" in run("generate", "--prompt", "a cat", "--steps", "1", "-o", "/proc/nowhere/x.png", expect=2)


def test_a_gate_can_be_taken_off(tmp_path: Path) -> None:
    gated = ROOT / "patches" / "lora" / "weapons.safetensors"
    assert PatchArtifact.open(gated).info.config["layout"] == {"rank": 16, "gate": 32}  # control
    run("gate", gated, "-o", tmp_path / "plain.safetensors", "--width", 0)
    assert PatchArtifact.open(tmp_path / "plain.safetensors").info.config["layout"] == {"rank": 16}
