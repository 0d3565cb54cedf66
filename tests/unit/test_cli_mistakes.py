"""What could only be a mistake is one line, told before a model is read: nothing that was asked for goes unheard."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from safepatch.cli import app, main
from safepatch.cli.evaluate import fields, matrix_of
from safepatch.cli.train import planned
from safepatch.data.category import CategoryFile, read_category
from safepatch.data.corpus import Corpus
from safepatch.data.new import write_category
from safepatch.diffusion.askable import require_device
from safepatch.errors import ArtifactError, ConfigError, ModelNotFound, PromptError, ReceiptError, SafepatchError
from safepatch.files import require_writable
from safepatch.guard.score import score_file
from tests.small import small_artifact

GENERATE = ("generate", "--prompt", "a knife", "-o", "x.png")
SERVE, AUDIT, MERGE = (
    ("serve", "--patch", "a.st"),
    ("audit", "p.csv", "--patch", "a.st"),
    ("merge", "a.st", "-o", "m.st"),
)


def run(*words: str, expect: type[Exception] | tuple[type[Exception], ...] = SafepatchError) -> str:
    """The message of the error that a command line ends in."""
    with pytest.raises(expect) as caught:
        CliRunner().invoke(app, words, catch_exceptions=False, standalone_mode=False)
    return str(caught.value)


@pytest.fixture(autouse=True)
def reads_no_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("read a model")

    for verb in ("apply", "artifact", "hosting", "guard"):
        monkeypatch.setattr(f"safepatch.cli.{verb}.opened", never)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("verb", [(*GENERATE, "--patch", "a.st"), SERVE, AUDIT], ids=lambda words: words[0])
@pytest.mark.parametrize(("flag", "instead"), [("--patch", "safepatch merge"), ("--guard", "safepatch guard train")])
def test_of_two_patches_or_guards_none_is_left_out_in_silence(verb, flag, instead):
    twice = ("--patch", "b.st") if flag == "--patch" else ("--guard", "b.st", "--guard", "c.st")
    assert re.search(f"{flag} is given 2 times, and one would count; .*{instead}", run(*verb, *twice))
    assert "no such file" in run(*verb, expect=ArtifactError)  # control: one may be given


def test_a_patch_whose_name_is_empty_is_none():
    """As of a variable of a shell that is not set."""
    run(*GENERATE, "--patch", "", expect=ArtifactError)
    with pytest.raises(AssertionError, match="read a model"):  # control: without one an image would be drawn
        run(*GENERATE)


@pytest.mark.parametrize(
    ("words", "needs"),
    [
        ((*GENERATE, "--scale", "0.5"), "--patch"),
        ((*GENERATE, "--gate", "soft"), "--patch"),
        ((*GENERATE, "--trust", "me.pub"), "--patch"),
        ((*GENERATE, "--guard-action", "block"), "--guard"),
        ((*GENERATE, "--receipt-prompt"), "--receipt"),
        ((*GENERATE, "--key", "me.pem"), "--receipt"),
        ((*SERVE, "--guard-action", "block"), "--guard"),
        ((*SERVE, "--receipt-key", "me.pem"), "--receipt"),
        ((*MERGE, "--mixed-precision", "bf16"), "--heal"),
        (("verify", "a.st", "--prompt", "a knife"), "--replay"),
        (("guard", "train", "weapons", "-o", "g.st", "--steps", "4"), "--detector"),
        (("guard", "attack", "weapons", "--guard", "g.st", "--steps", "4"), "--draw"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, tuple) else value,
)
def test_an_option_that_would_do_nothing_is_refused(words, needs):
    assert f"does nothing alone; give {needs} too" in run(*words)
    given = {"--heal": ("--heal", "5"), "--replay": ("--replay",), "--detector": ("--detector", "none")}
    more = given.get(needs, (needs,) if needs in ("--receipt", "--draw") else (needs, "nowhere.st"))
    said = run(*words, *more, expect=(SafepatchError, AssertionError))
    assert "does nothing alone" not in said  # control: with the other it is heard


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--steps", "0"), "steps must be from 1 to 1000"),
        (("--steps", "1001"), "steps must be from 1 to 1000"),
        (("--seed", str(1 << 64)), "seed must be below"),
        (("--guidance-scale", "nan"), "guidance_scale must be a number"),
        (("-o", "."), "no regular file"),
        (("-o", "file/x.png"), "Not a directory"),
    ],
)
def test_what_no_image_can_be_drawn_with_or_into(words, says, tmp_path):
    (tmp_path / "file").touch()
    assert says in run(*GENERATE, *words)


@pytest.mark.parametrize("name", ["meta", "hpu", "foo", ""])
def test_a_device_that_computes_nothing_here_is_none(name):
    with pytest.raises(ConfigError, match=f"no device '{name}' here"):
        require_device(name)
    assert require_device("cpu").type == "cpu"  # control


def test_a_file_is_written_where_one_is_or_could_be(tmp_path):
    require_writable(tmp_path / "new" / "x.png")
    (tmp_path / "x.png").touch()
    require_writable(tmp_path / "x.png")
    with pytest.raises(SafepatchError, match="no regular file"):
        require_writable(tmp_path)


# ---- train -------------------------------------------------------------------------------------------------------


def test_train_takes_a_shipped_category_by_its_name_and_fields_alone(tmp_path):
    by_name, by_field = planned("weapons", ["model=x"]), planned("category=weapons", ["model=x"])
    assert by_name == by_field
    assert (by_name.category, by_name.model.path) == ("weapons", "x")
    with pytest.raises(ConfigError, match="no config file wepons"):
        planned("wepons", [])


def test_a_file_of_prompts_is_no_category(tmp_path):
    assert "safepatch new NAME" in run("train", "prompts.csv", "model=x")


def test_a_category_file_that_lacks_a_key_is_told_which(tmp_path):
    (tmp_path / "mine.yaml").write_text("name: mine\ninstruction: no x\nconcepts: [{name: a knife}]\n")
    assert "no value for 'definition'" in run("train", "mine.yaml", "model=x")
    (tmp_path / "run.yaml").write_text("modell: x\n")
    assert "unknown key 'modell' in TrainConfig" in run("train", "run.yaml")  # control: a run's file


def test_what_a_file_is_called_inside_reaches_no_terminal_as_it_is(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"train\x1b[2J": [{"prompt": "a knife"}], "other": [{"prompt": "x"}]}))
    (tmp_path / "c.yaml").write_text("name: c\ndefinition: d\ninstruction: i\npairs: p.json\nrewrite: {by: empty}\n")
    done = CliRunner().invoke(app, ["train", "c.yaml", "model=./nowhere.safetensors"])
    assert isinstance(done.exception, ModelNotFound)
    assert "took 'prompt' as prompt, 'train\\x1b[2J' as rows" in done.stdout
    assert "\x1b" not in done.stdout


# ---- measuring ---------------------------------------------------------------------------------------------------


def test_a_matrix_of_options_hears_its_fields_too():
    none = {"models": None, "categories": None, "detectors": None}
    assert matrix_of(None, none, []).models == ["tiny-sd"]
    made = matrix_of(None, none, ["models=[other]", "categories=[gore]", "detectors=[clip]", "pictures=2"])
    assert (made.models, made.categories, made.detectors, made.pictures) == (["other"], ["gore"], ["clip"], 2)
    assert matrix_of(None, {**none, "models": ["mine"]}, ["models=[other]"]).models == ["mine"]  # an option goes before


@pytest.mark.parametrize("name", ["a: b", "a #1", "[x", "no", "1e3", 'q"\\', "ü 😀"])
def test_a_path_is_no_yaml(name):
    written = fields("cpu", None, Path(name), False, 3, None, Path(name))
    made = matrix_of(None, {}, written)
    assert (made.tokenizer, made.out, made.protocol.n) == (name, name, 3)


# ---- other files -------------------------------------------------------------------------------------------------


class Nobody:
    """A guard that is asked nothing."""

    categories = ("weapons",)


def test_a_scored_file_is_not_the_prompts_own_and_may_be_in_a_new_folder(tmp_path):
    prompts, guard = tmp_path / "p.csv", Nobody()
    prompts.write_text("prompt\n")
    with pytest.raises(PromptError, match="is the file of the prompts itself; choose another -o"):
        score_file(guard, prompts, prompts)  # type: ignore[arg-type]
    assert prompts.read_text() == "prompt\n"
    score_file(guard, prompts, tmp_path / "new" / "o.csv")  # type: ignore[arg-type]
    assert (tmp_path / "new" / "o.csv").read_text().startswith("row,prompt,verdict,weapons")
    with pytest.raises(PromptError, match="Is a directory"):
        score_file(guard, tmp_path, tmp_path / "o.csv")  # type: ignore[arg-type]


def test_keys_need_a_name():
    assert "name one: -o me.pem" in run("keygen", "-o", "", expect=ReceiptError)


def test_a_file_that_is_not_there_is_not_called_damaged():
    assert run("verify", "nowhere.png").startswith("there is no nowhere.png")


@pytest.mark.parametrize("verb", ["resurge", "variants"])
def test_a_rate_that_is_no_number_trains_nothing(verb):
    assert "rate above 0" in run(verb, "--category", "weapons", "--learning-rate", "nan")
    assert "rate above 0" not in run(verb, "--learning-rate", "1e-3")  # control


def test_a_server_has_an_end_of_waiting():
    assert "timeout" in run("serve", "--patch", "a.st", "--timeout", "nan")


def test_a_new_category_file_shows_every_key_there_is(tmp_path):
    path, _ = write_category("mine", tmp_path)
    text = path.read_text()
    shown = {*re.findall(r"^(?:# )?(\w+):", text, re.MULTILINE)}
    assert {each.name for each in dataclasses.fields(CategoryFile)} <= shown
    path.write_text(re.sub(r"^# (\w+: [\[{])", r"\1", text, flags=re.MULTILINE))  # what is commented out is valid too
    assert read_category(path).fills == {"color": ["white", "blue"]}
    assert Corpus.open(path).pairs(4, seed=0)


def test_a_full_device_is_one_line(monkeypatch, capsys):
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr("safepatch.cli.app", full)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert re.fullmatch("error: no memory is left .CUDA out of memory.* 2.00 GiB.*--dtype.*\n", capsys.readouterr().err)
    monkeypatch.setattr("safepatch.cli.app", lambda: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError):  # control: a mistake of ours is none of the user's
        main()


def test_a_subject_without_a_name_is_none():
    assert "a subject is empty" in run("variants", "--category", "weapons", "--subject", " ")
    assert "a subject is empty" not in run("variants", "--subject", "a cat")  # control


def test_what_is_no_lora_is_told_what_it_is(tmp_path):
    assert "no LoRA at nowhere.safetensors" in run("import", "nowhere.safetensors", "-o", "p.st")
    patch = small_artifact("lora").save(tmp_path / "patch.safetensors")
    for category in ((), ("--category", "weapons")):
        assert "is a patch already" in run("import", str(patch), "-o", "p.st", *category)


def test_labelled_pictures_need_a_folder(tmp_path):
    assert "no folder nowhere" in run("detector", "train", "nowhere", "-o", "heads")
    assert "a folder of pictures for each label" in run("detector", "train", str(tmp_path), "-o", "heads")  # control


def test_the_studio_knows_its_judge_before_it_is_shown():
    assert "no detector 'clipp'; did you mean 'clip'?" in run("studio", "--detector", "clipp", "--port", "-1")
    assert "choose another --port" in run("studio", "--detector", "clip", "--port", "-1")  # control


def test_a_demo_of_no_steps_is_told_so():
    assert "training.steps must be at least 1, not 0" in run("demo", "--steps", "0")
