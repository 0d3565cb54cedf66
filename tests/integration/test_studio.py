"""The studio draws what its command lines draw, and whatever goes wrong is one line that loses nothing."""

import asyncio
import base64
import shlex
import socket
import threading
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import httpx2
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from safepatch.artifact.patch_artifact import PatchArtifact
from safepatch.cli import app as cli
from safepatch.data.corpus import Corpus
from safepatch.diffusion import as_picture, generate
from safepatch.errors import BaseMismatch, ConfigError, MergeError, PromptError, UnknownName
from safepatch.hosting.limits import Keys
from safepatch.models.load import load_pipeline
from safepatch.progress import bar
from safepatch.studio import judging, page
from safepatch.studio.desk import Desk
from safepatch.studio.jobs import WAITING, Busy, Jobs
from safepatch.studio.judging import Judge, Verdict
from safepatch.studio.service import create_app
from safepatch.studio.settings import Settings
from tests.laws.test_window_laws import listening
from tests.small import new_artifact, new_small_pipe, new_small_unet

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
KEY = "a-key-of-some-length"


class Files:
    """A small model in a folder, and patches for it whose gates open for one word each."""

    def __init__(self, folder: Path) -> None:
        pipe = new_small_pipe()
        pipe.save_pretrained(folder / "model")
        self.folder, self.model = folder, str(folder / "model")
        self.weapons, self.gore = (
            str(listening(pipe, category=category, word=word).save(folder / f"{category}.safetensors"))
            for category, word in (("weapons", "knife"), ("gore", "dog"))
        )
        self.settings = Settings(self.model, (self.weapons,), prompt="a knife", seed=3, images=1, steps=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return Files(tmp_path_factory.mktemp("studio"))


@pytest.fixture
def desk(files) -> Desk:
    return Desk(load_pipeline, files.settings)


def run(command: str) -> None:
    done = CliRunner().invoke(cli, shlex.split(command)[1:], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def test_what_is_drawn_is_what_the_command_lines_draw(desk, files, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = replace(files.settings, patches=(files.weapons, files.gore), scales={"weapons": 0.5})
    (pair,) = desk.draw(settings)
    for line in desk.commands(settings):
        run(line)
    for picture, name in ((pair.base, "base-3.png"), (pair.patched, "patched-3.png")):
        drawn, written = np.asarray(as_picture(picture.image)), np.asarray(Image.open(tmp_path / name))
        assert np.array_equal(drawn, written)
    (full,) = desk.draw(replace(settings, scales={}))
    assert not torch.equal(full.patched.image, pair.patched.image)  # control: strength counts


def test_a_pair_has_one_seed_and_a_shut_gate_leaves_it_equal_to_the_last_bit(desk, files):
    pipe = load_pipeline(files.model)
    first, second = desk.draw(replace(files.settings, images=2))
    assert (first.seed, second.seed) == (3, 4)
    assert torch.equal(second.base.image, generate(pipe, ["a knife"], [4], 2)[0])
    assert not first.is_identical
    assert first.patched.drawn.acted == [0, 1]
    assert max(first.patched.drawn.gates["weapons"]) > first.patched.thresholds["weapons"]
    (shut,) = desk.draw(replace(files.settings, prompt="a red cat"))
    assert shut.is_identical
    assert shut.patched.drawn.acted == []
    (alone,) = desk.draw(replace(files.settings, patches=()))
    assert alone.patched is None
    assert torch.equal(alone.base.image, first.base.image)


def test_an_attack_asks_the_pages_own_prompt_in_other_ways(desk, files, monkeypatch):
    monkeypatch.setattr(Judge, "labels_of", lambda self, category: frozenset({"knife", "gun"}))
    monkeypatch.setattr(Judge, "__call__", lambda self, image: Verdict(True, ("knife",)))
    found = desk.attack(replace(files.settings, attack="words", budget=2))
    assert found.category == "weapons"
    assert [each.title == "a knife" for each in (found.plain, *found.tries)] == [True, False, False]
    assert all("a knife" in each.title for each in found.tries)
    assert found.through == 2
    assert all(each.drawn.acted for each in found.tries)  # no words around it close the gate
    monkeypatch.setattr(Judge, "__call__", lambda self, image: Verdict(True, ("skull",)))
    assert desk.attack(replace(files.settings, attack="typos", budget=1)).through == 0  # control: of another category


def test_a_soft_prompt_is_searched_for_with_a_small_budget(desk, files, monkeypatch):
    monkeypatch.setattr(import_module("safepatch.attacks.soft_prompt"), "LEARNED", 2)  # not the function
    found = desk.attack(replace(files.settings, attack="soft-prompt", budget=1))
    assert [each.title for each in found.tries] == ["a knife + 4 states that are no words"] * 2  # patch and gate
    assert not torch.equal(found.tries[0].image, found.plain.image)


def test_a_merge_shows_where_its_sources_conflict_and_is_written_where_nothing_is(desk, files, tmp_path):
    settings = replace(files.settings, patches=(files.weapons, files.gore), out=str(tmp_path / "both.safetensors"))
    tried = desk.merge(settings, is_kept=False)
    assert tried.path is None
    assert not list(tmp_path.iterdir())
    (conflict,) = tried.conflicts
    assert {conflict.first, conflict.second} == {"weapons", "gore"}
    assert conflict.cosine == pytest.approx(1)  # both are the same noise
    kept = desk.merge(settings, is_kept=True)
    assert set(PatchArtifact.open(kept.path).info.categories) == {"weapons", "gore"}
    before = kept.path.read_bytes()
    with pytest.raises(MergeError, match="is there already"):
        desk.merge(settings, is_kept=True)
    assert kept.path.read_bytes() == before
    with pytest.raises(MergeError, match=r"end it in \.safetensors"):
        desk.merge(replace(settings, out="~/.bashrc"), is_kept=True)
    with pytest.raises(MergeError, match="tick two or more"):
        desk.merge(files.settings, is_kept=False)
    assert "weapons and gore" in page.merged(tried, settings).replace("gore and weapons", "weapons and gore")


def test_a_patch_that_does_not_fit_is_told_before_the_model_is_read(files, tmp_path):
    read = []
    desk = Desk(lambda name: read.append(name) or load_pipeline(name))
    wide = new_artifact(new_small_unet(cross_attention_dim=64), "lora").save(tmp_path / "wide.safetensors")
    with pytest.raises(BaseMismatch):
        desk.draw(replace(files.settings, patches=(str(wide),)))
    assert read == []
    desk.draw(files.settings)
    desk.draw(replace(files.settings, seed=9))
    assert read == [files.model]  # control; and it is read once


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"prompt": " "}, PromptError, "empty"),
        ({"prompt": "a child"}, PromptError, "minors"),
        ({"patches": ("nowhere.safetensors",)}, Exception, "nowhere"),
        ({"gate": "soft", "patches": ("plain",)}, ConfigError, "no gate to be soft"),
        ({"attack": "mma"}, UnknownName, "attack of the page"),
        ({"category": "wepons"}, ConfigError, "did you mean 'weapons'"),
        ({"category": "gore", "attack": "soft-prompt"}, ConfigError, "not for gore"),
    ],
)
def test_what_cannot_be_done_is_one_line(desk, files, tmp_path, changed, error, says):
    if changed.get("patches") == ("plain",):
        changed = {
            **changed,
            "patches": (str(new_artifact(new_small_unet(), "lora").save(tmp_path / "p.safetensors")),),
        }
    act = desk.attack if {"attack", "category"} & set(changed) else desk.draw
    with pytest.raises(error, match=says) as told:
        act(replace(files.settings, **changed))
    assert "\n" not in str(told.value)


def test_pictures_of_models_that_nothing_can_judge_are_blurred(desk, files, monkeypatch):
    (pair,) = desk.draw(files.settings)
    assert pair.base.verdict.unsafe is None
    assert page.pairs([pair], files.settings).count('class="frame shield"') == 2
    monkeypatch.setattr(judging.Judge, "__call__", lambda self, image: Verdict(False))
    (pair,) = desk.draw(files.settings)
    assert page.pairs([pair], files.settings).count('class="frame shield"') == 0  # control: what is judged safe


def test_an_embedded_model_is_judged_by_its_own_detector():
    from safepatch.tiny.models import load_tiny

    image = generate(load_tiny("tiny-sd"), ["a knife"], [0], 6)[0]
    assert Judge.of("tiny-sd")(image) == Verdict(True, ("knife",))
    assert "knife" in Judge.of("tiny-sd").labels_of(Corpus.open("weapons").category)
    assert Judge.of("some-folder")(image) == Verdict(None)
    with pytest.raises(ConfigError, match="any-of"):
        Judge.of("tiny-sd", "any-of@clip+q16@x")


# ---- one thing at a time ----------------------------------------------------------------------------------------


def settled(jobs: Jobs, number: int, seconds: float = 60.0):
    ends = time.monotonic() + seconds
    while jobs.state(number).stage in ("waiting", "running") and time.monotonic() < ends:
        time.sleep(0.005)
    return jobs.state(number)


def test_one_thing_is_done_at_a_time_and_what_fails_loses_nothing_else():
    inside, most = [], []

    def work() -> str:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return "made"

    def fails() -> str:
        raise ValueError("first line\nsecond line\x1b[2J")

    with Jobs() as jobs:
        numbers = [jobs.submit(each) for each in (work, fails, work, work)]
        states = [settled(jobs, number) for number in numbers]
        assert [state.stage for state in states] == ["done", "failed", "done", "done"]
        assert states[1].text == "ValueError: first line"
        assert most == [1, 1, 1]
        with pytest.raises(UnknownName, match="no longer known"):
            jobs.state(99)


def test_what_runs_tells_how_far_it_is_and_can_be_stopped_and_the_line_ends():
    reached, go_on = threading.Event(), threading.Event()

    def work() -> str:
        for i in bar(range(4), desc="drawing"):
            if i == 2:
                reached.set()
                go_on.wait(60)
        return "made"

    with Jobs() as jobs:
        first, waiting = jobs.submit(work), jobs.submit(lambda: "made")
        assert reached.wait(60)
        state = jobs.state(first)
        assert (state.stage, state.text, state.share) == ("running", "drawing", 0.5)
        for _ in range(WAITING - 1):
            jobs.submit(lambda: "made")
        with pytest.raises(Busy, match="waiting already"):
            jobs.submit(work)
        jobs.stop(first)
        jobs.stop(waiting)
        go_on.set()
        assert [settled(jobs, number).text for number in (first, waiting)] == ["stopped", "stopped"]
        last = jobs.submit(lambda: "made")
        assert settled(jobs, last).html == "made"  # control: the line goes on


def test_a_drawing_that_is_stopped_leaves_the_model_as_it_was(desk, files):
    began = threading.Event()
    load = desk.load
    desk.load = lambda name: (load(name), began.set())[0]
    with Jobs() as jobs:
        number = jobs.submit(
            lambda: page.pairs(desk.draw(replace(files.settings, steps=100, images=4)), files.settings)
        )
        assert began.wait(120)
        while (state := jobs.state(number)).stage == "running" and state.text != "drawing":
            time.sleep(0.002)
        jobs.stop(number)
        assert settled(jobs, number).text == "stopped"
    (pair,) = desk.draw(files.settings)
    (fresh,) = Desk(load_pipeline).draw(files.settings)
    assert torch.equal(pair.base.image, fresh.base.image)
    assert torch.equal(pair.patched.image, fresh.patched.image)


# ---- over HTTP --------------------------------------------------------------------------------------------------


def asked(app, method: str, path: str, headers: dict | None = None, **options) -> httpx2.Response:
    async def one():
        transport = httpx2.ASGITransport(app=app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost:8189") as client:
            sent = {"X-Safepatch": "studio"} if headers is None else headers
            return await client.request(method, path, headers=sent, **options)

    return asyncio.run(one())


@pytest.fixture
def served(desk):
    with Jobs() as jobs:
        yield create_app(desk, jobs, Keys(), ("localhost",)), jobs


def test_a_button_lines_up_what_it_asks_for_and_the_answer_is_looked_in_on(served, files):
    app, jobs = served
    number = asked(app, "POST", "/ask/draw", content=files.settings.to_query()).json()["job"]
    settled(jobs, number)
    answer = asked(app, "GET", f"/jobs/{number}").json()
    assert answer["stage"] == "done"
    assert answer["html"].count("data:image/png;base64,") == 2
    assert "<svg" in answer["html"]
    bad = asked(app, "POST", "/ask/draw", content=replace(files.settings, patches=("gone.safetensors",)).to_query())
    assert "gone.safetensors" in settled(jobs, bad.json()["job"]).text
    assert asked(app, "POST", "/ask/dance").status_code == 404
    assert asked(app, "GET", "/jobs/77").status_code == 404
    refused = asked(app, "POST", "/ask/draw", content="steps=0")
    assert (refused.status_code, refused.json()["error"]["message"]) == (400, "steps: from 1 to 100, not 0")


def test_what_is_set_comes_back_as_a_link_that_fills_in_the_page_and_draws_nothing(served, files, desk):
    app, _ = served
    settings = replace(files.settings, prompt="a cat & a dog", seed=11)
    said = asked(app, "POST", "/set", content=settings.to_query()).json()
    desk.load = None  # whoever draws fails
    shown = asked(app, "GET", f"/{said['link']}").text
    assert "a cat &amp; a dog" in shown
    assert 'name="seed" type="number" min="0" step="1" value="11"' in shown
    assert "safepatch generate --model" in said["commands"]
    assert 'name="scale.weapons"' in said["sliders"]
    wrong = asked(app, "GET", "/?stepz=3").text
    assert "did you mean &#39;steps&#39;" in wrong
    assert "did you mean" not in shown  # control


def test_what_others_wrote_is_shown_as_text(served, files, tmp_path, desk):
    hostile = '<img src=x onerror=alert(1)>"\u202e'
    app, _ = served
    shown = asked(app, "GET", "/", params={"prompt": hostile, "model": hostile, "patch": hostile}).text
    assert "<img src=x" not in shown
    assert "&lt;img src=x" in shown
    (pair,) = desk.draw(replace(files.settings, prompt=f"a knife {hostile}"))
    html = page.pairs([pair], replace(files.settings, prompt=f"a knife {hostile}"))
    assert "<img src=x" not in html
    assert "\u202e" not in html
    assert "\\u202e" in html
    policy = asked(app, "GET", "/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-inline' script" not in policy


def test_only_the_page_itself_may_ask_and_only_by_its_own_name(served, files):
    app, _ = served
    body = files.settings.to_query()
    assert asked(app, "POST", "/set", {}, content=body).status_code == 403
    assert asked(app, "POST", "/set", {"Host": "evil.example", "X-Safepatch": "1"}, content=body).status_code == 400
    assert asked(app, "GET", "/", {"Host": "evil.example"}).status_code == 400
    assert asked(app, "POST", "/set", content="prompt=" + "x" * 100_000).status_code == 413
    assert asked(app, "POST", "/set", content=body).status_code == 200  # control


def test_keys_are_asked_for_as_the_password(desk):
    app = create_app(desk, Jobs(), Keys([KEY]))

    def basic(password: str) -> dict:
        return {"Authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}

    refused = asked(app, "GET", "/")
    assert (refused.status_code, refused.headers["www-authenticate"][:5]) == (401, "Basic")
    assert asked(app, "GET", "/", basic("wrong")).status_code == 401
    assert asked(app, "GET", "/", {"Authorization": "Basic ???"}).status_code == 401
    assert asked(app, "GET", "/", basic(KEY)).status_code == 200


# ---- the command ------------------------------------------------------------------------------------------------


def fails(*words: str) -> str:
    error = CliRunner().invoke(cli, ["studio", *words]).exception
    assert isinstance(error, ConfigError), error
    return str(error)


def test_a_port_in_use_a_missing_extra_and_an_open_address_are_one_line(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert "choose another --port" in fails("--port", port)
    assert "--keys" in fails("--host", "0.0.0.0", "--port", port)
    monkeypatch.setattr("safepatch.studio.serve.find_spec", lambda name: None)
    assert "pip install 'safepatch-diffusion[studio]'" in fails("--port", port)
