"""Laws of `safepatch.config`: three sources in order, and no mistake is silent."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from omegaconf import MISSING

from safepatch.config import assigned, load_config, to_dict, to_yaml
from safepatch.errors import ConfigError
from safepatch.training.config import load_train_config


@dataclass(frozen=True)
class Adapter:
    rank: int = 4
    path: Path | None = None

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"rank {self.rank} is below 1")


@dataclass
class ESD:
    name: str = "esd"
    guidance: float = 1.0


@dataclass(frozen=True)
class Duo:
    name: str = "duo"
    beta: float = 0.1


@dataclass(frozen=True)
class Scored:
    name: str = "score_forgetting"


@dataclass
class Training:
    learning_rate: float = 1e-4
    steps: int = 100
    adapter: Adapter = field(default_factory=Adapter)
    spare: Adapter | None = None
    adapters: list[Adapter] = field(default_factory=list)
    named: dict[str, Adapter] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    objective: Any = None


@dataclass
class Strict:
    steps: int = MISSING


CHOICES = {"objective": {"esd": ESD, "duo": Duo}}


@pytest.fixture
def write(tmp_path):
    def write_file(text: str) -> Path:
        path = tmp_path / "train.yaml"
        path.write_text(text)
        return path

    return write_file


def load(path=None, *overrides):
    return load_config(Training, path, overrides, CHOICES)


def refused(path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_without_sources_the_defaults_stand():
    assert load() == Training()


def test_command_line_beats_file_beats_defaults(write):
    path = write("steps: 7\nlearning_rate: 1e-3\nadapter: {rank: 2}\n")
    assert load(path) == Training(learning_rate=1e-3, steps=7, adapter=Adapter(rank=2))
    assert load(path, "steps=9", "adapter.rank=3") == Training(learning_rate=1e-3, steps=9, adapter=Adapter(rank=3))


def test_an_empty_file_changes_nothing(write):
    assert load(write("")) == load(write("# only a comment\n")) == Training()


def test_frozen_dataclasses_are_built_wherever_they_stand(write):
    text = "spare: {rank: 2}\nadapters: [{rank: 3}, {path: a.bin}]\nnamed: {x: {rank: 5}}\nweights: {x: 1}\n"
    config = load(write(text), "weights.y=2", "named.z.rank=6", "named.x.path=b", "spare.path=c")
    assert config.spare == Adapter(2, Path("c"))
    assert config.adapters == [Adapter(3), Adapter(path=Path("a.bin"))]
    assert config.named == {"x": Adapter(5, Path("b")), "z": Adapter(6)}
    assert config.weights == {"x": 1.0, "y": 2.0}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("learning_rte: 1", "'learning_rte'"),
        ("adapter: {rnk: 1}", "'adapter.rnk'"),
        ("spare: {rnk: 1}", "'spare.rnk'"),
        ("adapters: [{rank: 1}, {rnk: 1}]", "'adapters[1].rnk'"),
        ("named: {x: {rnk: 1}}", "'named.x.rnk'"),
        ("objective: {name: esd, guidence: 2}", "'objective.guidence'"),
    ],
)
def test_an_unknown_key_in_a_file_names_the_file_the_full_key_and_the_nearest(write, text, key):
    path = write(text)
    message = refused(path)
    assert message.startswith(f"{path}: unknown key {key}")
    assert "; did you mean '" in message


def test_an_unknown_key_on_the_command_line_says_so():
    assert refused(None, "adapter.rnk=3") == (
        "command line: unknown key 'adapter.rnk' in Adapter; did you mean 'rank'?"
    )
    assert refused(None, "1=3").startswith("command line: unknown key '1' in Training; known: ")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps=many", ("'steps' is 'many' (str)", "expected int")),
        ("steps=1.5", ("'steps' is 1.5 (float)", "expected int")),
        ("steps=true", ("'steps' is True (bool)", "expected int")),
        ("steps=null", ("'steps' is None", "expected int")),
        ("learning_rate=[1]", ("'learning_rate' is [1] (list)", "expected float")),
        ("learning_rate={a: 1}", ("'learning_rate' is {'a': 1} (dict)", "expected float")),
        ("adapter=3", ("'adapter' is 3 (int)", "expected a mapping")),
        ("adapter.rank=high", ("'adapter.rank' is 'high' (str)", "expected int")),
        ("spare=3", ("'spare' is 3 (int)", "expected a mapping")),
        ("adapters=3", ("'adapters' is 3 (int)", "expected list[", "Adapter]")),
        ("adapters=[{rank: x}]", ("'adapters[0].rank' is 'x' (str)", "expected int")),
        ("weights.a=x", ("'weights' is {'a': 'x'} (dict)", "expected dict[str, float]")),
    ],
)
def test_a_wrong_type_says_what_was_found_and_what_is_expected(override, words):
    message = refused(None, override)
    assert message.startswith("command line: ")
    assert all(word in message for word in words), message


def test_the_name_picks_the_schema_of_a_node(write):
    path = write("objective: {name: esd}")
    assert load(path, "objective.guidance=3").objective == ESD(guidance=3.0)
    assert load(path, "objective.name=duo").objective == Duo()
    assert load(None, "objective={name: duo, beta: 2}").objective == Duo(beta=2.0)
    hyphens = {"objective": {"score_forgetting": Scored}}  # as papers write names
    for given in ("score-forgetting", "score_forgetting"):
        assert load_config(Training, None, (f"objective.name={given}",), hyphens).objective == Scored()


def test_options_of_another_choice_are_unknown_keys(write):
    path = write("objective: {name: esd, guidance: 3}")
    assert refused(path, "objective.name=duo") == f"{path}: unknown key 'objective.guidance' in Duo; known: beta, name"


def test_a_default_choice_keeps_its_values_until_another_is_named():
    @dataclass
    class Defaulted:
        objective: Any = field(default_factory=lambda: ESD(guidance=5.0))

    assert load_config(Defaulted, None, (), CHOICES).objective == ESD(guidance=5.0)
    assert load_config(Defaulted, None, ("objective.name=esd",), CHOICES).objective == ESD(guidance=5.0)
    assert load_config(Defaulted, None, ("objective.name=duo",), CHOICES).objective == Duo()


def test_a_choice_inside_a_frozen_dataclass_is_found_by_its_dotted_key():
    @dataclass(frozen=True)
    class Inner:
        objective: Any = None

    @dataclass(frozen=True)
    class Outer:
        inner: Inner = field(default_factory=Inner)

    choices = {"inner.objective": CHOICES["objective"]}
    assert load_config(Outer, None, ("inner.objective.name=duo",), choices) == Outer(Inner(Duo()))


def test_a_wrong_choice_is_refused():
    assert refused(None, "objective.name=edd") == "command line: no objective 'edd'; did you mean 'esd'?"
    assert refused(None, "objective.guidance=1") == "no value for 'objective.name'; known: esd, duo"
    assert refused(None, "objective=esd") == (
        "command line: 'objective' is 'esd' (str), expected a mapping with a name: esd, duo"
    )


SHORT = {"objective": "name", "adapter": "path"}


def load_short(path=None, *overrides):
    return load_config(Training, path, overrides, CHOICES, SHORT)


def test_one_word_may_stand_for_a_mapping(write):
    assert load_short(None, "objective=duo", "adapter=a.bin") == Training(
        objective=Duo(), adapter=Adapter(4, Path("a.bin"))
    )
    path = write("objective: esd\nadapter: a.bin\n")
    assert load_short(path) == Training(objective=ESD(), adapter=Adapter(path=Path("a.bin")))
    long = write("objective: {name: esd, guidance: 2}\nadapter: {path: a.bin, rank: 2}\n")
    assert load_short(long) == Training(objective=ESD(guidance=2.0), adapter=Adapter(2, Path("a.bin")))
    assert load_short(None, "objective={name: duo, beta: 2}").objective == Duo(beta=2.0)


def test_one_word_and_the_rest_of_its_mapping_may_be_written_side_by_side(write):
    wanted = Training(objective=ESD(guidance=3.0), adapter=Adapter(2, Path("b")))
    assert load_short(None, "objective=esd", "objective.guidance=3", "adapter=b", "adapter.rank=2") == wanted
    assert load_short(None, "objective.guidance=3", "objective=esd", "adapter.rank=2", "adapter=b") == wanted
    path = write("objective: {name: esd, guidance: 3}\nadapter: {rank: 2}\n")
    assert load_short(path, "adapter=b") == wanted  # a word keeps what a file says beside it


def test_a_word_that_stands_for_nothing_is_refused(write):
    with pytest.raises(ConfigError, match="no objective 'edd'; did you mean 'esd'"):
        load_short(None, "objective=edd")
    with pytest.raises(ConfigError, match=r"train\.yaml: no objective 'edd'"):
        load_short(write("objective: edd\n"))
    assert refused(None, "adapter=a.bin").startswith("command line: 'adapter' is 'a.bin'")  # control: it is not short
    with pytest.raises(ConfigError, match="'spare' is 'b'"):
        load_short(None, "spare=b")


def test_unreadable_files_are_one_line(tmp_path, write):
    assert refused(tmp_path / "none.yaml").startswith(f"no config file {tmp_path / 'none.yaml'}")
    assert "cannot be read" in refused(tmp_path)
    assert "holds a list" in refused(write("- 1"))
    path = write("steps: 1\nlearning_rate: 2\nadapter: [1\n")
    assert refused(path).startswith(f"{path}, line 4: not valid YAML: ")
    assert "line 2" in refused(write("steps: 1\nsteps: 2\n"))


@pytest.mark.parametrize("override", ["steps", "=3", "adapter=[1", "adapter={a: }}"])
def test_an_override_that_cannot_be_read_is_quoted(override):
    assert f"'{override}'" in refused(None, override)


def test_a_missing_value_is_named():
    with pytest.raises(ConfigError, match="no value for 'steps'"):
        load_config(Strict)
    assert load_config(Strict, None, ("steps=3",)) == Strict(3)  # control


def test_what_post_init_refuses_surfaces_as_it_is():
    assert refused(None, "adapter.rank=0") == "rank 0 is below 1"
    assert refused(None, "adapters=[{rank: 0}]") == "rank 0 is below 1"


def test_interpolations_are_resolved_and_dangling_ones_refused(write):
    assert load(write("steps: ${nothing}"), "steps=3").steps == 3
    assert load(None, "steps=${adapter.rank}").steps == 4
    assert "'steps': Interpolation key 'nothing' not found" in refused(None, "steps=${nothing}")


def test_yaml_reads_back_to_an_equal_config(write):
    config = load(None, "objective={name: duo}", "adapter.path=/a/b", "learning_rate=1e-5", "adapters=[{rank: 3}]")
    assert load(write(to_yaml(config))) == config
    assert to_dict(config)["adapter"] == {"rank": 4, "path": "/a/b"}


@pytest.mark.parametrize("word", ["no", "No", "off", "'no'", "False"])
def test_yamls_truth_values_stand_for_the_words_that_were_typed(write, word):
    words = ("category=weapons", "model=tiny-sd")
    typed = load_train_config(None, [*words, f"training.mixed_precision={word}"])
    assert typed.training.mixed_precision == "no"
    path = write(f"category: weapons\nmodel: tiny-sd\ntraining: {{mixed_precision: {word}}}\n")
    assert load_train_config(path, []).training.mixed_precision == "no"
    assert load_train_config(None, [*words, "training.mixed_precision=bf16"]).training.mixed_precision == "bf16"


@pytest.mark.parametrize("item", ["learning_rate=nan", "learning_rate=.nan", "weights={a: .nan}"])
def test_no_number_is_no_value(item):
    """It would pass the comparisons that are to refuse what is too small."""
    with pytest.raises(ConfigError, match="not a number"):
        load_config(Training, overrides=[item])
    assert load_config(Training, overrides=["learning_rate=inf"]).learning_rate == float("inf")  # control


@pytest.mark.parametrize("text", ["a: b", "a #1", "[x", "no", "1e3", "null", "", 'q"\\', "tab\t", "ü 😀"])
def test_what_is_assigned_is_read_back(text):
    assert load_config(ESD, overrides=[assigned("name", text)]).name == text
    assert load_config(ESD, overrides=[assigned("guidance", 0.5)]).guidance == 0.5


def test_a_file_that_is_nested_without_end_is_one_line(write):
    with pytest.raises(ConfigError, match="train"):
        load_config(Training, write("steps: " + "[" * 5_000))
