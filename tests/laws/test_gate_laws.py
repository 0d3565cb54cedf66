"""The gate, for every patch kind: closed changes no bit and costs no patch, open is the patch as it was."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

from safepatch.artifact.patch_artifact import PatchArtifact, is_gate
from safepatch.data.bank import DataConfig, build_bank
from safepatch.data.category import Rewrite
from safepatch.data.corpus import Corpus
from safepatch.diffusion import Components, UNetHost
from safepatch.errors import ConfigError, MergeError, PatchBypassed, SafepatchError
from safepatch.merging import merge, split
from safepatch.patch import PATCH_KINDS, LoraPatch, Patch
from safepatch.patch.files import from_artifact, to_artifact
from safepatch.patch.gate import Gate, TextGate
from safepatch.reporting.plots import save_gate_plot
from safepatch.runtime.apply import apply, attach
from safepatch.taxonomy import Category
from safepatch.tiny.models import load_tiny
from safepatch.training import gates
from tests.laws.test_patch_laws import PROJECTS
from tests.small import (
    DOWN,
    INSTRUCTION,
    LAYOUTS,
    MID,
    awaken,
    images,
    new_patch,
    new_small_host,
    new_small_pipe,
    new_small_unet,
    rows,
    small_artifact,
    spied,
)

every_kind = pytest.mark.parametrize("kind", PATCH_KINDS)


def gate_class(kind: str) -> type[TextGate]:
    return TextGate if kind == "lora" else Gate


def gated_patch(kind: str, seed: int = 0, width: int = 4) -> Patch:
    """An awake patch whose gate is awake too."""
    unet = new_small_unet()
    patch = new_patch(unet, kind, seed=None)
    patch.add_gate(unet, width)
    return awaken(patch, seed)


def gated(kind: str, category: str = "weapons", threshold: float = 0.5, seed: int = 0, width: int = 4) -> PatchArtifact:
    artifact = to_artifact(gated_patch(kind, seed, width), new_small_unet(), {category: INSTRUCTION})
    config = {**artifact.info.config, "gate": {category: {"threshold": threshold}}}
    return replace(artifact, info=replace(artifact.info, config=config))


@torch.no_grad()
def outputs(pipe, **options) -> Tensor:
    """The UNet's prediction for two random rows with the patch, (2, 4, 16, 16)."""
    sample, timesteps, states = rows()
    with spied(pipe.unet) as calls:
        if options:
            with apply(pipe, **options):
                pipe.unet(sample, timesteps, encoder_hidden_states=states)
        else:
            pipe.unet(sample, timesteps, encoder_hidden_states=states)
    return calls[0]["output"]


@every_kind
def test_a_gate_goes_by_what_a_unet_is_handed_that_projects_its_text_states(kind):
    pipe = new_small_pipe(new_small_unet(**PROJECTS))
    patch = PATCH_KINDS[kind].from_unet(pipe.unet, gate=4, **LAYOUTS.get(kind, {}))
    made = to_artifact(awaken(patch), pipe.unet, {"weapons": INSTRUCTION})
    config = {**made.info.config, "gate": {"weapons": {"threshold": 0.5}}}
    artifact, base = replace(made, info=replace(made.info, config=config)), images(pipe)
    forward, others = pipe.unet.forward, torch.randn(4, *pipe.encode_prompt("a dog", "cpu", 1, False)[0].shape[1:])
    with apply(pipe, artifact, gate_threshold=0.0):
        assert not torch.equal(images(pipe), base)
        pipe.unet.forward = lambda *args, **given: forward(*args, **{**given, "encoder_hidden_states": others})
        with pytest.raises(PatchBypassed, match="'encoder_hidden_states' was exchanged on the way"):
            images(pipe)  # control: it is looked at


@every_kind
def test_a_closed_gate_changes_no_bit_and_an_open_one_nothing_of_the_patch(small_pipe, kind):
    patch = gated(kind)
    base, ungated = outputs(small_pipe), outputs(small_pipe, patch=patch, gate="off")
    assert not torch.equal(ungated, base)  # control
    assert torch.equal(outputs(small_pipe, patch=patch, gate_threshold=1.0), base)
    opened = outputs(small_pipe, patch=patch, gate_threshold=0.0)
    torch.testing.assert_close(opened, ungated, rtol=1e-4, atol=1e-5)
    with apply(small_pipe, patch, gate_threshold=1.0):
        closed = images(small_pipe)
    assert torch.equal(closed, images(small_pipe))


@every_kind
def test_a_gate_judges_in_float32_on_a_half_precision_host(small_pipe, kind, monkeypatch):
    small_pipe.to(torch.bfloat16)
    seen, gate = [], gate_class(kind)
    forward = gate.forward
    monkeypatch.setattr(gate, "forward", lambda self, *args: seen.append(0 * forward(self, *args) + 7.6) or seen[-1])
    with apply(small_pipe, gated(kind), gate_threshold=1.0) as handle:
        images(small_pipe)
    assert {logits.dtype for logits in seen} == {torch.float32}
    assert handle.stats.open_rows == 0  # a probability of 0.9995
    assert torch.tensor(7.6, dtype=torch.bfloat16).sigmoid() == 1  # control: in the host's dtype it would have opened


@every_kind
def test_each_row_is_gated_on_its_own(small_pipe, kind, monkeypatch):
    patch = gated(kind)
    base, ungated = outputs(small_pipe), outputs(small_pipe, patch=patch, gate="off")
    monkeypatch.setattr(gate_class(kind), "forward", lambda self, mid, *_: torch.tensor([[9.0], [-9.0]]))
    mixed = outputs(small_pipe, patch=patch)
    torch.testing.assert_close(mixed[0], ungated[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(mixed[1], base[1])
    assert not torch.equal(ungated[1], base[1])  # control


@every_kind
def test_a_soft_gate_opens_in_proportion(small_pipe, kind, monkeypatch):
    halfway = lambda self, mid, timesteps, states: torch.zeros(len(states), 1)  # noqa: E731 - a probability of 0.5
    monkeypatch.setattr(gate_class(kind), "forward", halfway)
    patch = gated(kind)
    half = outputs(small_pipe, patch=patch, gate="off", scale=0.5)
    torch.testing.assert_close(outputs(small_pipe, patch=patch, gate="soft"), half, rtol=1e-4, atol=1e-5)


@every_kind
def test_behind_a_closed_gate_the_patch_is_not_run(small_pipe, kind):
    artifact = gated(kind)
    for threshold, runs in ((1.0, 0), (0.0, 1)):
        with apply(small_pipe, artifact, gate_threshold=threshold) as handle:
            ran, patch = [], handle._parts[0].patch
            module = patch.updates[0] if isinstance(patch, LoraPatch) else patch
            module.register_forward_hook(lambda *_, ran=ran: ran.append(1))
            images(small_pipe)
            assert len(ran) == runs
            assert (handle.stats.gated_rows, handle.stats.open_rows) == (2, 2 * runs)


def test_nothing_appended_to_a_prompt_lowers_a_gates_logit():
    gate = gated_patch("lite").gate
    assert gate is not None
    draw = torch.Generator().manual_seed(0)
    mid, timesteps, states = torch.zeros(64, 32, 4, 4), torch.arange(64), torch.randn(64, 5, 192, generator=draw)
    more = 10 * torch.randn(64, 4, 192, generator=draw)
    with torch.no_grad():
        before, after = (gate(mid, timesteps, text) for text in (states, torch.cat((states, more), dim=1)))
        fewer = gate(mid, timesteps, states[:, :2])
    assert (after >= before).all()
    assert (after > before).any()  # control: the states are read
    assert (fewer < before).any()  # control: taking words away does lower it


@every_kind
def test_the_gate_is_kept_in_the_file(tmp_path, kind):
    unet, artifact = new_small_unet(), gated(kind)
    opened = from_artifact(PatchArtifact.open(artifact.save(tmp_path / "gated.safetensors")), unet)
    sample = torch.randn(2, 32, 4, 4), torch.tensor([10, 900]), torch.randn(2, 5, 192)
    gate, wanted = opened.gate, gated_patch(kind).gate
    assert gate is not None
    assert wanted is not None
    with torch.no_grad():
        torch.testing.assert_close(gate(*sample), wanted(*sample))
        assert not torch.allclose(gate(*sample)[0], gate(*sample)[1])  # control: rows differ


def test_the_gate_can_be_watched(small_pipe):
    seen = []
    with apply(small_pipe, gated("lite")) as handle:
        handle.on_gate = lambda timesteps, probabilities: seen.append((timesteps, probabilities))
        images(small_pipe)
    (timesteps, probabilities), *others = seen
    assert not others
    assert timesteps.shape == (2,)
    assert probabilities.shape == (2, 1)
    assert ((probabilities > 0) & (probabilities < 1)).all()


def test_side_by_side_each_category_has_its_own_gate(tmp_path, small_pipe):
    first, second = gated("lite", "weapons"), gated("lite", "gore", threshold=0.999999, seed=1)
    paths = [a.save(tmp_path / f"{a.info.categories[0]}.safetensors") for a in (first, second)]
    merged = merge(paths, tmp_path / "both.safetensors", "cat")
    assert {name: gate["threshold"] for name, gate in merged.info.config["gate"].items()} == {
        "gore": 0.999999,
        "weapons": 0.5,
    }
    alone = outputs(small_pipe, patch=first)
    torch.testing.assert_close(outputs(small_pipe, patch=merged), alone, rtol=1e-4, atol=1e-4)  # gore's stays closed
    assert not torch.allclose(outputs(small_pipe, patch=merged, gate="off"), alone, atol=1e-3)  # control
    assert split(tmp_path / "both.safetensors", "gore").content_hash == second.content_hash


@every_kind
@pytest.mark.parametrize("method", ["linear", "ties", "dare"])
def test_a_sum_acts_where_the_gate_of_any_source_opens(tmp_path, small_pipe, kind, method):
    patches = [gated(kind, name, seed=i) for i, name in enumerate(("gore", "drugs"))]
    paths = [patch.save(tmp_path / f"{patch.info.categories[0]}.safetensors") for patch in patches]
    merged = merge(paths, tmp_path / "sum.safetensors", method)

    def judged(**thresholds: float) -> PatchArtifact:
        judges = {name: {"threshold": threshold} for name, threshold in thresholds.items()}
        return replace(merged, info=replace(merged.info, config={**merged.info.config, "gate": judges}))

    base, everywhere = outputs(small_pipe), outputs(small_pipe, patch=merged, gate="off")
    assert not torch.allclose(everywhere, base, atol=1e-3)  # control
    assert torch.equal(outputs(small_pipe, patch=judged(drugs=1.0, gore=1.0)), base)
    for one_open in (judged(drugs=1.0, gore=0.0), judged(drugs=0.0, gore=1.0)):
        torch.testing.assert_close(outputs(small_pipe, patch=one_open), everywhere, rtol=1e-4, atol=1e-5)


@every_kind
def test_a_sums_gates_answer_as_they_did_alone(tmp_path, kind):
    patches = [gated(kind, name, seed=i) for i, name in enumerate(("gore", "drugs", "weapons"))]
    drugs_gore_weapons = [patches[1], patches[0], patches[2]]
    paths = [patch.save(tmp_path / f"{patch.info.categories[0]}.safetensors") for patch in patches]
    nested = [merge(paths[:2], method="linear").save(tmp_path / "two.safetensors"), paths[2]]
    sample, unet = (torch.randn(2, 32, 4, 4), torch.tensor([10, 900]), torch.randn(2, 5, 192)), new_small_unet()

    def logits(artifact: PatchArtifact) -> Tensor:
        gate = from_artifact(artifact, unet).gate
        assert gate is not None
        return gate(*sample)

    alone = torch.cat([logits(patch) for patch in drugs_gore_weapons], dim=1)
    assert not torch.allclose(alone[:, 0], alone[:, 1])  # control
    for sources in (paths, nested):
        torch.testing.assert_close(logits(merge(sources, method="ties")), alone, rtol=1e-3, atol=1e-3)


def test_a_fast_patch_is_asked_again_at_every_second_step_unless_its_gate_was_closed(small_pipe):
    sample, _, states = rows()

    def runs(timesteps: list[int], **options) -> list[int]:
        ran: list[int] = []
        with torch.no_grad(), apply(small_pipe, gated("control"), **options) as handle:
            handle._attachment.corrector.parts[0].patch.register_forward_pre_hook(
                lambda *_: ran.append(handle.stats.unet_calls)
            )
            for timestep in timesteps:
                small_pipe.unet(sample, timestep, encoder_hidden_states=states)
        return ran

    steps = [900, 700, 500, 300, 900]
    assert runs(steps, gate_threshold=0.0) == [1, 2, 3, 4, 5]  # control
    assert runs(steps, gate_threshold=0.0, speed="fast") == [1, 3, 5]
    assert runs(steps, gate_threshold=1.0, speed="fast") == []
    with torch.no_grad(), apply(small_pipe, gated("control"), gate_threshold=1.0, speed="fast") as handle:
        for timestep in steps:
            small_pipe.unet(sample, timestep, encoder_hidden_states=states)
    assert handle.stats.gated_rows == len(steps) * len(sample)  # closed, it is asked at every step
    assert runs([900, 900, 700, 700], gate_threshold=0.0, speed="fast") == [1, 2, 3, 4]  # tile by tile


def test_a_tile_is_never_given_the_residuals_of_one_whose_gate_was_open(small_pipe):
    """Under `fast`, the first tile's gate is closed and the second's open; the next step begins with the first."""
    sample, _, states = rows()
    with torch.no_grad(), apply(small_pipe, gated("control"), speed="fast") as handle:
        judged: list[bool] = []
        gate = handle._attachment.corrector.parts[0].patch.gate
        gate.register_forward_hook(lambda *_: torch.full((2, 1), 9.0 if len(judged) % 2 else -9.0))
        handle.on_gate = lambda _, probabilities: judged.append(bool(probabilities.round().any()))
        for timestep in (900, 900, 700, 700):
            small_pipe.unet(sample, timestep, encoder_hidden_states=states)
    assert judged == [False, True, False, True]


def test_a_row_whose_gate_opens_late_is_corrected_at_once_whatever_its_neighbours_do(small_pipe):
    """Under `fast`: row 0's gate is open from the start, row 1's from the second step on."""
    sample, _, states = rows()

    def second_step(picked: slice) -> Tensor:
        with (
            torch.no_grad(),
            apply(small_pipe, gated("control"), speed="fast") as handle,
            spied(small_pipe.unet) as seen,
        ):
            gate, asked = handle._attachment.corrector.parts[0].patch.gate, []
            assert gate is not None
            logits = [torch.tensor([[9.0], [-9.0]]), torch.tensor([[9.0], [9.0]])]
            gate.register_forward_hook(lambda *_: (asked.append(1), logits[len(asked) - 1][picked])[1])
            for timestep in (900, 700):
                small_pipe.unet(sample[picked], timestep, encoder_hidden_states=states[picked])
        return seen[1]["output"][-1]

    base = outputs_at(small_pipe, sample, 700, states)
    alone, beside = second_step(slice(1, 2)), second_step(slice(0, 2))
    assert not torch.allclose(alone, base[1], atol=1e-3)  # control: it is corrected
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def outputs_at(pipe, sample: Tensor, timestep: int, states: Tensor) -> Tensor:
    return pipe.unet(sample, timestep, encoder_hidden_states=states).sample


def test_a_gate_stays_as_it_was_when_a_patch_is_compressed_or_rounded(tmp_path):
    paths = [gated("control", n, seed=i).save(tmp_path / f"{n}.safetensors") for i, n in enumerate(("gore", "drugs"))]
    merged = merge(paths, method="linear")
    rounded, compressed = merge(paths, method="linear", dtype="bfloat16"), merged.compress(1)
    names = [name for name in merged.tensors if is_gate(name)]
    assert names
    assert all(
        torch.equal(merged.tensors[name], made.tensors[name]) for name in names for made in (rounded, compressed)
    )
    assert compressed.info.shapes  # control: something was compressed
    assert {t.dtype for name, t in rounded.tensors.items() if name not in names} == {torch.bfloat16}
    third = gated("control", "weapons").save(tmp_path / "weapons.safetensors")
    merge([compressed.save(tmp_path / "small.safetensors"), third], method="linear")


def test_one_patch_weighted_anew_is_a_patch_like_others(tmp_path):
    names = ("gore", "drugs")
    paths = [gated("lite", name, seed=i).save(tmp_path / f"{name}.safetensors") for i, name in enumerate(names)]
    halved = [
        merge([path], method="task-arithmetic", weights=[0.5]).save(tmp_path / f"half-{path.name}") for path in paths
    ]
    for sources in (halved, [halved[0], paths[1]]):
        both = from_artifact(merge(sources, method="cat"), new_small_unet())
        assert both.gate is not None
        assert len(both.gate.bias) == 2
    lora = gated("lora").save(tmp_path / "lora.safetensors")
    assert "gate" in merge([lora], method="cat", weights=[0.5]).info.config  # one part shares its gate with none


def no_gate(category: str) -> PatchArtifact:
    return gates.without_gate(gated("control", category))


def wide(category: str) -> PatchArtifact:
    return gated("control", category, width=8)


UNLIKE = {
    "one without": (gated("control", "gore"), no_gate("drugs"), "linear", "have no gate and a gate"),
    "widths": (gated("control", "gore"), wide("drugs"), "linear", "have gates of width 4 and 8"),
    "one category twice": (
        gated("control"),
        gated("control", seed=1),
        "linear",
        "more than one patch is for 'weapons'",
    ),
    "cat": (gated("lora", "gore"), gated("lora", "drugs"), "cat", "cat cannot keep it to its own part"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_gates_that_do_not_fit_together(tmp_path, name):
    first, second, method, says = UNLIKE[name]
    paths = [patch.save(tmp_path / f"{i}.safetensors") for i, patch in enumerate((first, second))]
    with pytest.raises(MergeError, match=says):
        merge(paths, tmp_path / "sum.safetensors", method)
    assert not (tmp_path / "sum.safetensors").exists()
    merge(paths, tmp_path / "both.safetensors", "bundle")  # control


def test_lite_patches_that_keep_their_categories_apart_are_not_summed_behind_their_gates(tmp_path):
    names = ("gore", "drugs", "weapons", "horror")
    paths = [gated("lite", name, seed=i).save(tmp_path / f"{name}.safetensors") for i, name in enumerate(names)]
    pairs = [merge(paths[i : i + 2], method="cat").save(tmp_path / f"pair{i}.safetensors") for i in (0, 2)]
    with pytest.raises(MergeError, match="keeps its categories apart"):
        merge(pairs, method="linear")
    merge(pairs, method="cat")  # control


BAD = {
    "hard without a gate": ({"patch": small_artifact("lite"), "gate": "hard"}, "has no gate to be hard"),
    "soft without a gate": ({"patch": small_artifact("control"), "gate": "soft"}, "has no gate to be soft"),
    "no such mode": ({"patch": gated("lite"), "gate": "ajar"}, "gate must be one of off, soft, hard"),
    "threshold without a gate": ({"patch": small_artifact("lite"), "gate_threshold": 0.5}, "has no gate"),
    "threshold above 1": ({"patch": gated("lite"), "gate_threshold": 1.5}, r"within \[0, 1\]"),
    "threshold below 0": ({"patch": gated("lite"), "gate_threshold": -0.1}, r"within \[0, 1\]"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_a_gate_that_cannot_be_is_refused(small_pipe, case):
    options, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as caught:
        apply(small_pipe, **options)
    assert "\n" not in str(caught.value)
    assert not small_pipe.unet._forward_pre_hooks


@every_kind
def test_a_width_below_one_is_refused(kind):
    unet = new_small_unet()
    with pytest.raises(ConfigError, match="width of at least 1"):
        new_patch(unet, kind).add_gate(unet, 0)


def test_a_fresh_gate_of_a_patch_in_memory_is_open(small_pipe):
    patch = new_patch(small_pipe.unet, "lite", seed=None)
    patch.add_gate(small_pipe.unet, 4)
    with attach(small_pipe, patch, [INSTRUCTION]) as handle, spied(small_pipe.unet) as calls:
        images(small_pipe)
    assert handle.stats.open_rows == handle.stats.gated_rows == 2
    assert {DOWN, MID} <= calls[0].keys()


# ---- fitting ---------------------------------------------------------------------------------------------------


FEW = {"CAPTIONS": 24, "UNSEEN": 24, "STEPS": 5}
DATA = DataConfig(pairs=6, steps=1)
MINE = Category("weapons", "things of the test", "no knives")


@pytest.fixture
def few(monkeypatch) -> Callable[..., None]:
    """Makes fitting quick."""

    def set_to(**values: object) -> None:
        for name, value in {**FEW, **values}.items():
            monkeypatch.setattr(gates, name, value)

    set_to()
    return set_to


@every_kind
def test_fitting_tells_what_the_patch_is_for(few, kind):
    """On the embedded model, whose text encoder was taught what words mean."""
    few(CAPTIONS=960, UNSEEN=96, STEPS=300)
    host, corpus, data = UNetHost(Components.of(load_tiny())), Corpus.open("weapons"), DataConfig()
    made = [new_gate(host, kind), new_gate(host, kind)]
    records = [gates.fit_gate(gate, host, corpus, data) for gate in made]
    assert records[0] == records[1]  # equal seeds, equal gates
    assert all(torch.equal(a, b) for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True))
    assert records[0]["harmless_opened"] <= 0.02
    assert records[0]["unsafe_opened"] > 0.9
    assert records[0]["certified_recall"] > 0.9
    few(STEPS=0, UNSEEN=96)
    unfitted = gates.fit_gate(new_gate(host, kind), host, corpus, data)
    assert unfitted["unsafe_opened"] < 0.9  # control: untrained, it cannot tell them apart
    assert unfitted["certified_recall"] < 0.9
    assert "certified_recall" not in gates.fit_gate(new_gate(host, kind), host, corpus, data, windows=0)


def listed(n: int) -> Corpus:
    """A category of a file's prompts alone."""
    return Corpus(MINE, pairs=[(f"knife number {i}", f"spoon number {i}") for i in range(n)])


def test_each_step_sees_what_the_gate_is_for_however_few_prompts_there_are(few, monkeypatch):
    """Of the 60 prompts of a file there would be one among 128 captions: half of them were never learned."""
    few(CAPTIONS=240, STEPS=3)
    shares, among, read = list[float](), list[float](), gates.Captions.whole

    def note(rows: gates.Captions, gate: TextGate, index: torch.Tensor) -> torch.Tensor:
        if gate.training:
            shares.append(float(rows.wanted[index].mean()))
            among.append(float(rows.wanted.mean()))
        return read(rows, gate, index)

    monkeypatch.setattr(gates.Captions, "whole", note)
    host = new_small_host()
    gates.fit_gate(new_gate(host, "lora"), host, listed(4), DATA)
    assert shares == [0.25] * 3
    assert max(among) < 0.1  # control: they are far fewer


def test_a_gate_that_is_judged_by_what_it_learned_from_says_so(few):
    few(UNSEEN=96)
    host, weapons = new_small_host(), Corpus.open("weapons")
    assert "learned" not in gates.fit_gate(new_gate(host, "lora"), host, weapons, DATA)  # control: it makes others
    for pairs, is_learned in ((2000, False), (4, True)):
        assert gates.fit_gate(new_gate(host, "lora"), host, listed(pairs), DATA).get("learned", False) == is_learned


@every_kind
def test_a_gate_can_be_fitted_to_a_finished_patch(few, small_pipe, tmp_path, kind):
    plain, corpus = small_artifact(kind), Corpus.open("weapons")
    made = gates.add_gate(plain, small_pipe, corpus, width=4, data=DATA)
    made = PatchArtifact.open(made.save(tmp_path / "gated.safetensors"))
    assert set(made.info.config["gate"]) == {"weapons"}
    assert torch.equal(outputs(small_pipe, patch=made, gate="off"), outputs(small_pipe, patch=plain))
    again = gates.add_gate(made, small_pipe, corpus, width=8, data=DATA)  # an older gate gives way
    assert again.info.config["layout"]["gate"] == 8
    assert from_artifact(again, small_pipe.unet).gate is not None
    assert made.content_hash != plain.content_hash  # control
    assert gates.without_gate(made).content_hash == plain.content_hash


@every_kind
def test_fitting_a_gate_needs_no_pictures(few, monkeypatch, tmp_path, kind):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("drew")

    monkeypatch.setattr(UNetHost, "draw", never)
    host, corpus = new_small_host(), Corpus.open("weapons")
    data = replace(DATA, cache=str(tmp_path))  # what another test drew is not found
    record = gates.fit_gate(new_gate(host, kind), host, corpus, data)
    assert 0 <= record["threshold"] <= 1
    with pytest.raises(AssertionError, match="drew"):  # control
        build_bank(host, corpus, data)


def test_a_fitted_gate_goes_by_words_alone(few):
    """The kinds' gates are one gate: what a picture could add is nothing, and taken off."""
    host, corpus = new_small_host(), Corpus.open("weapons")
    looking, reading = new_gate(host, "lite"), new_gate(host, "lora")
    _, timesteps, states = rows(4)
    mids = [torch.randn(4, looking.look.shape[-1], 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    looking.decide.data += 1
    assert not torch.equal(looking(mids[0], timesteps, states), looking(mids[1], timesteps, states))  # control
    assert gates.fit_gate(looking, host, corpus, DATA) == gates.fit_gate(reading, host, corpus, DATA)
    read = reading(None, timesteps, states)
    for mid in mids:
        torch.testing.assert_close(looking(mid, timesteps, states), read)


@every_kind
@pytest.mark.parametrize("by", ["column", "guided"])
def test_a_gate_can_be_fitted_to_two_prompts_of_ones_own(few, kind, by):
    """Too few to leave any unseen; where there is no rewrite, the twin is the unsafe prompt and is not harmless."""
    pairs = [("a knife", "a spoon"), ("an axe", "a hammer")]
    corpus = Corpus(MINE, pairs, retain=["a quiet street"], rewrite=Rewrite(by))
    host = new_small_host()
    record = gates.fit_gate(new_gate(host, kind), host, corpus, DATA)
    assert 0 <= record["threshold"] <= 1
    unsafe, harmless = gates.captions(corpus, 40, seed=0)
    assert set(unsafe) == {"a knife", "an axe"}
    assert not set(unsafe) & set(harmless)
    assert ("a spoon" in harmless) == (by == "column")
    assert len({*harmless} - {"", "a spoon", "a hammer", "a quiet street"}) >= 9  # common things, of a shipped list


def test_a_merged_patch_gets_no_gate(small_pipe, tmp_path):
    paths = [gated("lite", name).save(tmp_path / f"{name}.safetensors") for name in ("gore", "drugs")]
    with pytest.raises(ConfigError, match="fit a gate to each patch, then merge"):
        gates.add_gate(merge(paths, method="bundle"), small_pipe, Corpus.open("gore"))
    for method in ("bundle", "cat", "linear"):
        with pytest.raises(ConfigError, match="take the gates off its sources"):
            gates.without_gate(merge(paths, method=method))


def test_another_categorys_words_are_refused(small_pipe):
    with pytest.raises(ConfigError, match="this patch is for weapons, the words are for gore") as caught:
        gates.add_gate(small_artifact("lite"), small_pipe, Corpus.open("gore"))
    assert "\n" not in str(caught.value)


def test_gates_do_not_count_as_agreement(tmp_path):
    def cosine(gates_off: bool) -> float:
        patches = [gated("lora", name, seed=i) for i, name in enumerate(("gore", "drugs"))]
        patches = [gates.without_gate(patch) if gates_off else patch for patch in patches]
        paths = [patch.save(tmp_path / f"{patch.info.categories[0]}.safetensors") for patch in patches]
        return merge(paths, method="bundle").info.recipe["conflicts"][0]["overall"]["cosine"]

    assert cosine(gates_off=False) == cosine(gates_off=True)
    first, second = (gated("lora", seed=i).tensors["lora.gate.detect.delta"].flatten() for i in range(2))
    assert torch.cosine_similarity(first, second, dim=0) > 0.1  # control: counted, they would have agreed


def test_what_a_gate_hears_is_drawn(tmp_path):
    heard = {"a red knife": {"(all of it)": 0.2, "knife": 0.9}, "a cat": {"(all of it)": 0.1}}
    save_gate_plot(tmp_path / "gates.png", heard, 0.5)
    drawn = Image.open(tmp_path / "gates.png").convert("RGB")
    save_gate_plot(tmp_path / "shut.png", heard, 0.95)
    assert drawn.tobytes() != Image.open(tmp_path / "shut.png").convert("RGB").tobytes()  # control
    with pytest.raises(SafepatchError, match=r"give a writable \.png or \.svg"):
        save_gate_plot(tmp_path / "no" / "gates.png", heard, 0.5)


def new_gate(host: UNetHost, kind: str) -> TextGate:
    patch = new_patch(host.unet, kind, seed=None)
    patch.add_gate(host.unet, 8)
    assert patch.gate is not None
    return patch.gate


def test_a_gate_that_is_very_sure_has_a_threshold_that_a_file_may_state():
    threshold = gates._record(gates.Scores(torch.full((4,), 60.0), torch.full((4,), 40.0), None))["threshold"]
    assert threshold < 1
    assert torch.tensor(40.0).sigmoid() == 1  # control: as a float32 it would be 1
    assert torch.tensor(60.0).sigmoid() >= threshold  # and an unsafe prompt still opens it
