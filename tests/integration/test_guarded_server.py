"""A guard at a server's door: what it claims is refused, rewritten or told; what it cannot judge is not drawn."""

import base64
import io
import json
import random
from copy import deepcopy

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from safepatch.cli import app as cli
from safepatch.errors import ArtifactError, PromptBlocked, UnknownName
from safepatch.guard.decide import decide, lacking
from safepatch.guard.encoders import clip
from safepatch.guard.file import PROBE, Guard, GuardInfo
from safepatch.guard.guarded import guarded
from safepatch.guard.heads import fit
from safepatch.hosting import keys
from safepatch.hosting.door import Door
from safepatch.hosting.hashes import text_hash
from safepatch.hosting.limits import Keys, Limits
from safepatch.hosting.receipt import KEYWORD, verify_image
from safepatch.hosting.serve import Service, serving
from safepatch.hosting.service import create_app
from safepatch.hosting.stamp import Stamp
from safepatch.hosting.worker import Worker
from safepatch.runtime.apply import apply
from tests.integration.test_server import STEPS, Asked, pixels
from tests.laws.test_window_laws import listening
from tests.small import new_small_pipe

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
WEAPONS, GORE = "weapons", "gore"
KNIFE = {"name": "a knife", "replacement": "a spoon"}
THINGS = ("dog", "cat", "tree", "cup", "car", "spoon", "house")


def new_guard(pipe, categories=(WEAPONS,)) -> Guard:
    """One that claims knives for the last of its categories."""
    unsafe = [f"{front} knife{end}" for front in ("a", "red", "the", "blue") for end in ("", " and cat", " on a table")]
    safe = [f"{front} {thing}{end}" for thing in THINGS for front in ("a", "red") for end in ("", " on a table")]
    encoder, truth = clip(pipe), torch.tensor([1] * len(unsafe) + [0] * len(safe), dtype=torch.int8)
    labels = torch.zeros(len(truth), len(categories), dtype=torch.int8)
    labels[:, -1] = truth
    heads = fit(encoder([*unsafe, *safe]), labels, 4, 0)
    rewrites = {categories[-1]: [KNIFE]}
    info = GuardInfo(dict.fromkeys(categories, ""), dict.fromkeys(categories, 0.5), "clip", rewrites)
    return Guard(info, heads, encoder([PROBE]).means[0], encoder)


@pytest.fixture(scope="module")
def guard():
    return new_guard(new_small_pipe())


@pytest.fixture
def served(small_pipe, guard):
    """A client of an application with a guard of some action, its worker and handle."""
    doors = []
    with apply(small_pipe, listening(small_pipe)) as handle, Worker(small_pipe, handle, 8, 256) as worker:

        def made(action: str = "block", judge: Guard = guard) -> Asked:
            doors.append(Door(deepcopy(judge), action, "0xguard"))
            return Asked(create_app(worker, "0xpatch", Keys(), Limits(), doors[-1]))

        yield made, worker, handle


class Broken:
    """A guard that fails, or whose answer is no number."""

    categories, thresholds = (WEAPONS,), torch.tensor([0.5])
    info = GuardInfo({WEAPONS: ""}, {WEAPONS: 0.5}, "clip")

    def __init__(self, answer) -> None:
        self.answer = answer

    def __call__(self, texts):
        return self.answer()

    def rewritten(self, text, category):
        return text


def test_a_blocked_prompt_is_told_with_its_category_and_nothing_is_drawn(served):
    made, _, handle = served
    passes = made("score")({"prompt": "a knife", **STEPS})[0]
    assert passes.status_code == 200  # control
    drawn = handle.stats.unet_calls
    ask = made()
    for path in ("/generate", "/v1/images/generations"):
        (answer,) = ask({"prompt": "a knife"}, path=path)
        error = answer.json()["error"]
        assert (answer.status_code, error["category"], error["code"]) == (400, WEAPONS, "content_policy_violation")
        assert "a prompt is blocked: weapons with probability" in error["message"]
        assert "\n" not in error["message"]
    assert handle.stats.unet_calls == drawn
    assert ask({"prompt": "a dog", **STEPS})[0].json()["guard"]["claimed"] is False
    page = ask.get("/metrics").text
    assert 'safepatch_guard_prompts_total{category="weapons",outcome="blocked"} 2.0' in page
    assert 'safepatch_guard_prompts_total{category="",outcome="passed"} 1.0' in page
    assert ask.get("/status").json()["guard"] == {"hash": "0xguard", "action": "block", "categories": [WEAPONS]}


def test_scoring_draws_and_tells(served):
    made, *_ = served
    ask = made("score")
    said = ask({"prompt": "a knife", **STEPS})[0].json()
    assert said["guard"]["claimed"]
    assert said["guard"]["probability"] > 0.5
    assert said["opened"] == [WEAPONS]  # and the patch corrects what the guard lets pass
    assert 'outcome="claimed"} 1.0' in ask.get("/metrics").text


def test_a_rewritten_prompt_is_what_its_words_draw_and_one_without_a_concept_is_blocked(served):
    made, *_ = served
    ask = made("rewrite")
    rewritten, spoon = (
        each.json() for each in ask(*({"prompt": p, "seed": 1, **STEPS} for p in ("a knife", "a spoon")))
    )
    assert abs(pixels(rewritten["image"]) - pixels(spoon["image"])).max() <= 1
    assert (rewritten["guard"]["rewritten"], spoon["guard"]["rewritten"]) == (True, False)
    (like_openai,) = ask({"prompt": "a knife"}, path="/v1/images/generations")
    assert like_openai.json()["data"][0]["revised_prompt"] == "a spoon"
    (without,) = made("rewrite", Broken(lambda: torch.tensor([[0.9]])))({"prompt": "a dog", **STEPS})
    assert "no rewriting helps" in without.json()["error"]["message"]


def test_of_many_at_once_none_that_is_claimed_is_drawn(served):
    made, *_ = served
    ask, asked = made(), random.Random(0).choices(["a knife", "red knife", "a dog", "a red cat"], k=60)
    answers = ask(*({"prompt": prompt, "seed": 1, **STEPS} for prompt in asked))
    for prompt, answer in zip(asked, answers, strict=True):
        assert answer.status_code == (400 if "knife" in prompt else 200)
        assert ("image" in answer.json()) == ("knife" not in prompt)


@pytest.mark.parametrize(
    "answer", [lambda: 1 / 0, lambda: torch.tensor([[torch.nan]]), lambda: torch.tensor([[-torch.inf]])]
)
def test_what_the_guard_cannot_judge_is_not_drawn(served, answer):
    made, _, handle = served
    ask = made("score", Broken(answer))
    (refused,) = ask({"prompt": "a dog", **STEPS})
    assert refused.status_code == 503
    assert "could not judge" in refused.json()["error"]["message"]
    assert refused.headers["retry-after"] == "60"
    assert handle.stats.unet_calls == 0
    assert 'outcome="failed"} 1.0' in ask.get("/metrics").text
    good = Broken(lambda: torch.tensor([[0.1]]))
    assert made("block", good)({"prompt": "a dog", **STEPS})[0].status_code == 200  # control


def test_no_number_is_no_pass_in_a_pipeline_either(small_pipe, guard):
    broken = Broken(lambda: torch.tensor([[torch.nan]]))
    with pytest.raises(PromptBlocked, match="could not judge"):
        decide(broken, "block", ["a dog"])
    with pytest.raises(UnknownName, match="did you mean 'block'"):
        guarded(small_pipe, guard, "blok")


def test_a_guard_at_the_door_reads_with_an_encoder_of_its_own(small_pipe, guard, tmp_path):
    guard.save(tmp_path / "guard.safetensors")
    listening(small_pipe).save(tmp_path / "patch.safetensors")
    service = Service(tmp_path / "patch.safetensors", Limits(), guard=tmp_path / "guard.safetensors")
    read = []
    with serving(small_pipe, Keys(), service) as app:
        small_pipe.text_encoder.register_forward_hook(lambda *_: read.append(1))
        ask = Asked(app)
        assert ask({"prompt": "a knife", **STEPS})[0].status_code == 400
        assert not read  # what is refused is read by nothing that draws
        assert ask({"prompt": "a dog", **STEPS})[0].status_code == 200
        assert read  # control
        assert ask.get("/status").json()["guard"]["hash"].startswith("0x")


def test_what_only_one_of_guard_and_patch_knows_is_said(small_pipe, tmp_path, capsys):
    new_guard(small_pipe, (GORE, WEAPONS)).save(tmp_path / "guard.safetensors")
    listening(small_pipe).save(tmp_path / "patch.safetensors")
    service = Service(tmp_path / "patch.safetensors", Limits(), guard=tmp_path / "guard.safetensors")
    with serving(small_pipe, Keys(), service):
        assert "warning: the patch knows nothing of gore" in capsys.readouterr().err
    assert lacking([WEAPONS], [WEAPONS]) == []


def test_no_server_starts_without_its_guard(small_pipe, tmp_path, guard):
    patch = listening(small_pipe).save(tmp_path / "patch.safetensors")
    with pytest.raises(ArtifactError, match="no such file"):
        Service(patch, Limits(), guard=tmp_path / "nowhere.safetensors")
    with pytest.raises(ArtifactError, match="is no guard"):
        Service(patch, Limits(), guard=patch)
    with pytest.raises(UnknownName, match="did you mean 'rewrite'"):
        Service(patch, Limits(), guard_action="rewritten")


def test_a_servers_receipts_name_patch_and_guard(small_pipe, guard, tmp_path):
    keys.keygen(tmp_path / "key.pem")
    content_hash = guard.save(tmp_path / "guard.safetensors")
    listening(small_pipe).save(tmp_path / "patch.safetensors")
    stamp = Stamp.of(tmp_path / "key.pem")
    files = {"guard": tmp_path / "guard.safetensors", "guard_action": "rewrite", "stamp": stamp}
    with serving(small_pipe, Keys(), Service(tmp_path / "patch.safetensors", Limits(), **files)) as app:
        answers = Asked(app)(*({"prompt": prompt, "seed": 5, **STEPS} for prompt in ("a dog", "a knife")))
    for number, answer in enumerate(answers):
        path = tmp_path / f"{number}.png"
        path.write_bytes(base64.b64decode(answer.json()["image"]))
        verified = verify_image(path, tmp_path / "key.pub.pem")
        assert verified.is_vouched_for
        receipt = verified.receipt
        assert (receipt["guard"]["hash"], receipt["guard"]["action"]) == (content_hash, "rewrite")
        assert (receipt["seed"], receipt["patch"]["categories"]) == (5, [WEAPONS])
        assert ("asked" in receipt["guard"]) == (number == 1)
        assert any(content_hash in line for line in verified.lines())
    with Image.open(io.BytesIO(base64.b64decode(answers[0].json()["image"]))) as picture:
        picture.load()
        assert "dog" not in json.dumps(json.loads(picture.text[KEYWORD]))  # type: ignore[attr-defined]


def generated(out, prompt: str, *more: str) -> str:
    words = ["generate", "--prompt", prompt, "--steps", "1", "-o", str(out), "--receipt", *more]
    return CliRunner().invoke(cli, words, catch_exceptions=False).stdout


def test_generate_asks_a_guard_first_and_its_receipt_says_so(small_pipe, guard, tmp_path, monkeypatch):
    monkeypatch.setattr("safepatch.cli.apply.opened", lambda *_: small_pipe)
    content_hash, file, out = (
        guard.save(tmp_path / "g.safetensors"),
        str(tmp_path / "g.safetensors"),
        tmp_path / "o.png",
    )
    with pytest.raises(PromptBlocked, match="a prompt is blocked: weapons with probability"):
        generated(out, "a knife", "--guard", file)
    assert not out.exists()
    said = generated(out, "a knife", "--guard", file, "--guard-action", "rewrite")
    assert "drawn in other words, 'a spoon'" in said
    receipt = verify_image(out).receipt
    assert receipt["prompt"]["sha256"] == text_hash("a spoon")
    assert receipt["guard"] == {"action": "rewrite", "asked": {"sha256": text_hash("a knife")}, "hash": content_hash}
    assert "drawn nevertheless" in generated(out, "a knife", "--guard", file, "--guard-action", "score")
    assert "guard:" not in generated(out, "a dog", "--guard", file)
    assert verify_image(out).receipt["guard"]["hash"] == content_hash
    generated(out, "a knife")  # control: without a guard it is drawn
    assert verify_image(out).receipt["guard"] is None


def test_a_guard_that_is_none_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("safepatch.cli.apply.opened", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ArtifactError, match="no such file"):
        generated(tmp_path / "o.png", "a dog", "--guard", str(tmp_path / "nowhere.safetensors"))
    with pytest.raises(UnknownName, match="did you mean 'block'"):
        generated(tmp_path / "o.png", "a dog", "--guard", str(tmp_path / "g.safetensors"), "--guard-action", "blok")
