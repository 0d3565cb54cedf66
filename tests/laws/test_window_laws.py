"""Law 17: a gate that reads windows opens for a prompt whatever words stand around it, and says where it hears none.

The gates here know one thing, what the encoder makes of "knife" alone; the host's weights are random, so in a sentence
the same word reads otherwise.
"""

import copy
import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.diffusion import Components, Spelling, encode_prompts, encode_windows, windows
from safepatch.errors import ArtifactError, PatchBypassed, UnknownName
from safepatch.merging import MergeRecipe, merge
from safepatch.patch import PATCH_KINDS
from safepatch.patch.files import to_artifact
from safepatch.runtime import heard as heard_windows
from safepatch.runtime import words
from safepatch.runtime.apply import activate, apply
from safepatch.runtime.check import status
from safepatch.runtime.words import Words
from safepatch.tiny.text import words as vocabulary
from tests.families import FAMILIES, draw, small_family_pipe
from tests.small import INSTRUCTION, awaken, new_patch, new_small_pipe
from tests.stress.soak import sharing

every_kind = pytest.mark.parametrize("kind", sorted(PATCH_KINDS))
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
KNIFE, BATCH = "knife", 100
DEAF = "sdxl-refiner"  # of its two random layers the first is read, in which a word hardly hears the others


def tokens(pipe, text: str) -> list[int]:
    return Components.of(pipe).text_encoders()[0][0](text).input_ids


def spelled(pipe, text: str) -> list:
    return Spelling(Components.of(pipe).text_encoders()[0][0]).words(tokens(pipe, text))


@torch.no_grad()
def listening(pipe, kind: str = "lora", width: int = 3, category: str = "weapons", word: str = KNIFE) -> PatchArtifact:
    """A patch whose gate opens for what the encoder makes of one word alone, and hardly for anything else."""
    patch = new_patch(pipe.unet, kind)
    patch.add_gate(pipe.unet, 1)
    awaken(patch)
    states = encode_windows(Components.of(pipe), [tuple(spelled(pipe, word))])[0]
    read = states[1] - states[0]  # of the word, against what every prompt begins with
    gate = patch.gate
    for parameter in gate.parameters():
        parameter.zero_()
    gate.detect[0, 0] = read / (read @ states[1])  # 1 for the word
    gate.detect_bias.fill_(0.1)
    gate.weigh.fill_(0.5413)  # a softplus of 1
    gate.bias.fill_(-1.099 - (math.log(2) if gate.reads_features else 0))  # what a blind half adds
    made = to_artifact(patch, pipe.unet, {category: INSTRUCTION})
    record = {"threshold": 0.5} | ({"windows": width} if width else {})
    return replace(made, info=replace(made.info, config={**made.info.config, "gate": {category: record}}))


def heard(pipe, artifact: PatchArtifact, texts: list[str]) -> tuple[Tensor, Tensor]:
    """For which texts the gate hears its word, (N,) bool, and whether their words are known."""
    components = Components.of(pipe)
    listener = Words(components, [activate(part, components) for part in artifact.parts()])
    batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    logits, known = zip(*(listener.behind(encode_prompts(components, batch)) for batch in batches), strict=True)
    listener.hooks.remove()
    return torch.cat(logits).amax(1) >= 0, torch.cat(known)


@torch.no_grad()
def closing(pipe, artifact: PatchArtifact, texts: list[str]) -> list[str]:
    """Those that its gate does not open for where it reads whole prompts only."""
    gate = activate(artifact.parts()[0], Components.of(pipe)).patch.gate
    logits = gate.read(encode_prompts(Components.of(pipe), texts))[:, 0]
    return [text for text, logit in zip(texts, logits.tolist(), strict=True) if logit < -1e-3]


def opened(pipe, artifact: PatchArtifact, **options) -> bool:
    """Whether the gate opened, at every step or at none; all words were known."""
    with apply(pipe, artifact) as handle:
        draw(pipe, **options)
    assert handle.stats.open_rows in (0, handle.stats.gated_rows)
    assert not handle.stats.wordless_rows
    return handle.stats.open_rows > 0


def drowned(n: int, seed: int = 0) -> list[str]:
    """The word behind, before and between others."""
    chance, known = random.Random(seed), [word for word in vocabulary() if word != KNIFE]
    return [
        " ".join(
            [*chance.choices(known, k=chance.randint(0, 8)), KNIFE, *chance.choices(known, k=chance.randint(0, 8))]
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize(("family", "n"), [("tiny", 1000), *((family, 60) for family in FAMILIES)])
def test_no_words_around_a_prompt_close_a_gate_that_reads_windows(family, n):
    pipe = new_small_pipe() if family == "tiny" else small_family_pipe(family)
    texts = drowned(n)
    artifact = listening(pipe)
    opens, known = heard(pipe, artifact, texts)
    assert known.all()
    assert opens.all()
    assert not heard(pipe, artifact, [text.replace(KNIFE, "") for text in texts[:40]])[0].any()  # control
    assert closing(pipe, artifact, texts) or family == DEAF  # control: read whole, some of them close it


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != DEAF])
def test_a_pipeline_that_draws_is_heard(family):
    pipe = small_family_pipe(family)
    artifact = listening(pipe)
    text = closing(pipe, artifact, drowned(60, seed=2))[0]
    assert not opened(pipe, listening(pipe, width=0), prompt=text)  # control
    assert opened(pipe, artifact, prompt=text)
    assert not opened(pipe, artifact, prompt="dog", negative_prompt=KNIFE)
    assert not opened(pipe, artifact, prompt="dog")  # control


@every_kind
def test_rows_are_judged_by_their_own_words(kind):
    pipe = new_small_pipe()
    artifact = listening(pipe, kind)
    alone = [drawn(pipe, artifact, [text])[0] for text in ("dog", "cat knife dog")]
    assert torch.equal(alone[0], drawn(pipe, None, ["dog"])[0])  # its bits are the base's
    assert not torch.equal(alone[1], drawn(pipe, None, ["cat knife dog"])[0])  # control
    both = drawn(pipe, artifact, ["dog", "cat knife dog"])
    for each, expected in zip(both, alone, strict=True):
        torch.testing.assert_close(each, expected, rtol=1e-4, atol=1e-4)


def drawn(pipe, artifact, texts, **options) -> Tensor:
    generators = [torch.Generator().manual_seed(0) for _ in texts]
    settings = {"num_inference_steps": 2, "output_type": "pt", "generator": generators, "guidance_scale": 4.0}
    if artifact is None:
        return pipe(texts, **settings, **options).images
    with apply(pipe, artifact):
        return pipe(texts, **settings, **options).images


def states_of(pipe, text: str) -> Tensor:
    return pipe.encode_prompt(text, "cpu", 1, False)[0]


def test_states_that_were_weighted_mixed_or_cut_into_chunks_are_known_by_their_words(small_pipe):
    artifact = listening(small_pipe)
    listener = Words(Components.of(small_pipe), [activate(artifact.parts()[0], Components.of(small_pipe))])
    knife, empty, dog = (states_of(small_pipe, text) for text in ("cat knife dog", "", "a red dog"))
    for states in (
        knife.repeat(2, 1, 1),
        0.4 * knife,
        1.6 * knife,
        empty + 0.5 * (knife - empty),
        0.3 * knife + 0.7 * dog,
        torch.cat((dog, knife), dim=1),
        torch.cat((0.5 * knife + 0.5 * dog, dog, empty), dim=1),
        knife.half().float(),
        knife.bfloat16().float(),
    ):
        logits, known = listener.behind(states)
        assert known.all()
        assert (logits >= 0).all()
    for states in (dog, 0.5 * dog + 0.5 * empty, torch.cat((dog, empty), dim=1), dog + 0.01 * (knife - dog)):
        logits, known = listener.behind(states)
        assert known.all()
        assert (logits < 0).all()
    for states in (
        torch.randn_like(dog),
        knife + torch.randn_like(knife),
        torch.full_like(knife, torch.nan),
        knife[:, :7],
        torch.cat((dog[:, :7], knife[:, :7]), 1),
    ):
        logits, known = listener.behind(states)
        assert not known.any()
        assert (logits == -torch.inf).all()
    logits, known = listener.behind(torch.cat((knife, torch.randn_like(knife[:, :4])), dim=1))
    assert not known.any()
    assert (logits >= 0).all()  # what is added takes nothing away
    listener.hooks.remove()


def test_states_without_words_are_judged_by_themselves_and_counted(small_pipe):
    artifact = listening(small_pipe)
    before = states_of(small_pipe, "cat knife dog")
    with apply(small_pipe, artifact) as handle:
        draw(small_pipe, prompt=None, prompt_embeds=before, negative_prompt_embeds=torch.zeros_like(before))
        assert status(small_pipe)[0].stats.wordless_rows == 1  # once a denoising
        draw(small_pipe, prompt="cat knife dog")
        draw(small_pipe, prompt=None, prompt_embeds=before, negative_prompt_embeds=torch.zeros_like(before))
    assert handle.stats.wordless_rows == 1  # the same states as of words that it has heard since


def test_what_a_gate_made_of_words_is_forgotten_in_order_and_judged_again(small_pipe, monkeypatch):
    monkeypatch.setattr(words, "PROMPTS", 4)
    monkeypatch.setattr(words, "WINDOWS", 2)
    artifact = listening(small_pipe)
    with apply(small_pipe, artifact) as handle:
        for text in ("cat knife dog", *(f"dog {other}" for other in vocabulary()[:5]), "cat knife dog"):
            draw(small_pipe, prompt=text)
        assert handle.stats.open_rows == 4
        assert len(handle._attachment._words._prompts) == 4
        assert len(handle._attachment._words._windows.memo) == 2


def other_weights(pipe) -> None:
    with torch.no_grad():
        pipe.text_encoder.encoder.layers[0].self_attn.v_proj.weight.mul_(-1)


def an_adapter(pipe) -> None:
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))


@pytest.mark.parametrize("change", [other_weights, an_adapter])
def test_what_a_gate_made_of_words_is_forgotten_when_the_encoder_reads_otherwise(small_pipe, change):
    components, artifact = Components.of(small_pipe), listening(small_pipe)

    def new_listener() -> Words:
        return Words(components, [activate(part, components) for part in artifact.parts()])

    def heard_by(listener: Words) -> Tensor:
        return listener.behind(encode_prompts(components, [KNIFE]))[0]

    listener = new_listener()
    before = heard_by(listener)
    assert torch.equal(heard_by(listener), before)
    change(small_pipe)
    fresh = heard_by(new_listener())
    assert not torch.allclose(fresh, before, atol=1e-3)  # the control
    assert torch.equal(heard_by(listener), fresh)


def learn(pipe, token: str, like: str) -> None:
    """Give the pipeline a token that its encoder reads as another word, as textual inversion does."""
    if token in pipe.tokenizer.get_added_vocab():
        pipe.unload_textual_inversion([token])
    pipe.load_textual_inversion(pipe.text_encoder.get_input_embeddings().weight[spelled(pipe, like)[0][0]], token=token)


def test_tokens_learned_while_a_patch_is_applied_are_words_of_their_own(small_pipe):
    small_pipe.tokenizer = copy.deepcopy(small_pipe.tokenizer)  # others share it
    with apply(small_pipe, listening(small_pipe)) as handle:
        draw(small_pipe, prompt="a cat")
        learn(small_pipe, "<it>", "dog")
        draw(small_pipe, prompt="a <it>")
        assert handle.stats.open_rows == 0  # the control
        draw(small_pipe, prompt="a <it> knife")
        assert handle.stats.open_rows == 2
        learn(small_pipe, "<it>", KNIFE)
        draw(small_pipe, prompt="a <it>")
        assert handle.stats.open_rows == 4


def test_more_windows_than_are_read_open_the_gate_and_it_says_so(small_pipe, monkeypatch):
    monkeypatch.setattr(heard_windows, "MOST", 5)
    with apply(small_pipe, listening(small_pipe)) as handle, pytest.warns(UserWarning, match="windows, more than 5"):
        draw(small_pipe, prompt="a red dog on a big table")
    assert handle.stats.open_rows == 2


def test_a_text_encoder_whose_hooks_are_lost_is_noticed(small_pipe):
    with apply(small_pipe, listening(small_pipe)) as handle:
        small_pipe.text_encoder._forward_hooks.clear()
        assert not handle.is_active
        with pytest.raises(PatchBypassed, match="hooks inside it are lost"):
            draw(small_pipe)
    assert not small_pipe.text_encoder._forward_hooks


def test_a_text_encoder_that_is_dropped_after_it_has_encoded_is_no_fault(small_pipe):
    with apply(small_pipe, listening(small_pipe)) as handle:
        states, encoder = states_of(small_pipe, "cat knife dog"), small_pipe.text_encoder
        small_pipe.text_encoder = None
        assert handle.is_active
        draw(small_pipe, prompt=None, prompt_embeds=states, negative_prompt_embeds=0 * states)
        small_pipe.text_encoder = encoder
    assert handle.stats.open_rows == 2


def test_a_copied_pipeline_hears_for_itself(small_pipe):
    with apply(small_pipe, listening(small_pipe)) as handle:
        copied = copy.deepcopy(small_pipe)
        draw(copied, prompt="cat knife dog")
        assert handle.stats.open_rows == 0
        assert status(copied)[0].stats.open_rows == 2
        assert status(copied)[0].stats.wordless_rows == 0


def test_threads_hear_their_own_words(small_pipe):
    texts = ["cat knife dog", "a red dog", "dog", "knife", "cat and knife", "a cat"] * 4
    with apply(small_pipe, listening(small_pipe)) as handle, ThreadPoolExecutor(4) as pool:
        pipes = [sharing(small_pipe) for _ in texts]
        list(pool.map(lambda pipe, text: draw(pipe, prompt=text), pipes, texts))
    assert handle.stats.open_rows == 2 * sum(KNIFE in text for text in texts)
    assert handle.stats.wordless_rows == 0


def test_both_prompts_of_sdxl_are_heard():
    pipe = small_family_pipe("sdxl")
    assert opened(pipe, listening(pipe), prompt="dog", prompt_2="cat knife dog")
    assert not opened(pipe, listening(pipe), prompt="dog", prompt_2="cat")  # control


@pytest.mark.parametrize("method", ["bundle", "task-arithmetic"])
def test_gates_stay_certified_in_merges(small_pipe, method, tmp_path):
    sources = [listening(small_pipe), listening(small_pipe, category="gore", word="blood")]
    files = [str(source.save(tmp_path / f"{i}.safetensors")) for i, source in enumerate(sources)]
    merged = merge(MergeRecipe(tuple(files), method=method))
    for text in ("cat knife dog", "dog blood red cat"):
        with apply(small_pipe, merged) as handle:
            draw(small_pipe, prompt=text)
        assert handle.stats.open_rows == 2  # of one of the two gates, at each step
    assert not opened(small_pipe, merged, prompt="a red dog")  # control


def test_a_prompt_may_be_read_whole(small_pipe):
    artifact = listening(small_pipe)
    text = closing(small_pipe, artifact, drowned(60, seed=2))[0]
    assert opened(small_pipe, artifact, prompt=text)
    with apply(small_pipe, artifact, reads="prompt") as handle:
        draw(small_pipe, prompt=text)
        assert handle.stats.open_rows == 0
        handle.reads = "windows"
        draw(small_pipe, prompt=text)
        assert handle.stats.open_rows == 2
        with pytest.raises(UnknownName, match="did you mean 'windows'"):
            handle.reads = "window"


def test_older_files_read_whole_prompts(small_pipe):
    with apply(small_pipe, listening(small_pipe, width=0)):
        assert not small_pipe.text_encoder._forward_hooks
    with apply(small_pipe, listening(small_pipe)):
        assert small_pipe.text_encoder._forward_hooks  # control
    assert not small_pipe.text_encoder._forward_hooks


def test_a_record_of_windows_that_are_no_number_is_refused(small_pipe):
    info = listening(small_pipe).info
    with pytest.raises(ArtifactError, match="windows"):
        replace(info, config={**info.config, "gate": {"weapons": {"threshold": 0.5, "windows": "three"}}})


def test_words_are_those_that_the_encoder_reads(small_pipe):
    spelling, knife = Spelling(small_pipe.tokenizer), tuple(tokens(small_pipe, KNIFE)[1:-1])
    assert spelling.words(tokens(small_pipe, "a knife, (knife) <|endoftext|> knife!!! ...")).count(knife) == 3
    assert spelling.words(tokens(small_pipe, "")) == spelling.words(tokens(small_pipe, "?!, <|startoftext|>")) == []
    small_pipe.tokenizer = copy.deepcopy(small_pipe.tokenizer)
    small_pipe.tokenizer.add_tokens("<toy>")
    added = small_pipe.tokenizer.convert_tokens_to_ids("<toy>")
    assert Spelling(small_pipe.tokenizer).words(tokens(small_pipe, "a <toy> cat"))[1] == (added,)


def test_windows_are_all_few_words_in_a_row():
    a, b, c = (1,), (2, 3), (4,)
    assert windows([a, b, c, a], 2) == [(a,), (a, b), (b,), (b, c), (c,), (c, a)]
    assert windows([a, a], 3) == [(a,), (a, a)]
    assert windows([], 3) == windows([a], 0) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_reads_the_same_beside_others_of_any_length(family):
    pipe = small_family_pipe(family)
    short, long = tuple(spelled(pipe, "dog")), tuple(spelled(pipe, "zqxjwvk zqxjwvkzqxjwvk dog"))
    alone, beside = encode_windows(Components.of(pipe), [short]), encode_windows(Components.of(pipe), [short, long])
    assert beside.shape[1] > alone.shape[1]  # control: the long one needs more states
    torch.testing.assert_close(beside[0, : alone.shape[1]], alone[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(beside[0, alone.shape[1] :], beside[0, :1].expand_as(beside[0, alone.shape[1] :]))
