"""A server draws every image with its patch, for whoever asked, or not at all."""

import asyncio
import base64
import io
import json
import random
import socket
import threading

import httpx2
import numpy as np
import pytest
from PIL import Image

from safepatch.diffusion import as_picture, generate
from safepatch.errors import ConfigError, PatchBypassed
from safepatch.hosting import keys
from safepatch.hosting.limits import Keys, Limits
from safepatch.hosting.serve import Service, serve
from safepatch.hosting.serve import listening as taken
from safepatch.hosting.service import create_app
from safepatch.hosting.stamp import Receipts, Stamp
from safepatch.hosting.worker import Worker
from safepatch.patch import LoraPatch
from safepatch.patch.files import to_artifact
from safepatch.runtime.apply import apply
from tests.families import small_transformer_pipe
from tests.laws.test_window_laws import listening
from tests.small import awaken, new_small_pipe

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
OPENS = ("a knife", "cat knife dog", "red knife", "knife and cat")
SHUT = ("a dog", "a red cat", "blue tree", "a cup next to a car")
SEEDS = range(3)
KEY = "a-key-of-some-length"
STEPS = {"steps": 1, "guidance_scale": 4.0}
LITTLE = {"width": 32, "height": 32}  # a quarter of the model's own, where many are drawn


class Asked:
    """A client of an application that runs in this process."""

    def __init__(self, app) -> None:
        self.app = app

    def __call__(self, *bodies: dict, path: str = "/generate", **options) -> list[httpx2.Response]:
        """The answers to requests that are sent all at once."""
        return asyncio.run(self._all(bodies, path, options))

    async def _all(self, bodies, path, options):
        transport = httpx2.ASGITransport(app=self.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://here", timeout=300) as client:
            return await asyncio.gather(*(client.post(path, json=body, **options) for body in bodies))

    def get(self, path: str) -> httpx2.Response:
        async def one():
            transport = httpx2.ASGITransport(app=self.app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.get(path)

        return asyncio.run(one())


@pytest.fixture
def served(small_pipe):
    """An application, its worker and its handle."""
    with apply(small_pipe, listening(small_pipe)) as handle, Worker(small_pipe, handle, 8, 256) as worker:
        yield Asked(create_app(worker, "0xhash", Keys())), worker, handle


def pixels(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))), dtype=int)


def alone(pipe, prompt: str, seed: int) -> np.ndarray:
    return np.asarray(as_picture(generate(pipe, [prompt], [seed], 1, 4.0, **LITTLE)[0]), dtype=int)


def apart(left: np.ndarray, right: np.ndarray) -> int:
    """The largest difference, of 255."""
    return int(np.abs(left - right).max())


def test_of_200_requests_at_once_none_is_unpatched_and_none_gets_anothers_image(served):
    ask, worker, handle = served
    asks = [(prompt, seed) for prompt in (*OPENS, *SHUT) for seed in SEEDS]
    mixed = random.Random(0).choices(asks, k=200)
    answers = ask(*({"prompt": prompt, "seed": seed, **STEPS, **LITTLE} for prompt, seed in mixed))
    assert {each.status_code for each in answers} == {200}
    patched = {each: alone(worker.pipe, *each) for each in asks}
    handle.remove()
    base = {each: alone(worker.pipe, *each) for each in asks}
    for (prompt, seed), answer in zip(mixed, answers, strict=True):
        got, said = pixels(answer.json()["image"]), answer.json()
        nearest = min(asks, key=lambda each: np.abs(got - patched[each]).sum())
        assert nearest == (prompt, seed)
        assert apart(got, patched[prompt, seed]) <= 1  # batches differ in the last bits
        assert said["seed"] == seed
        assert said["opened"] == (["weapons"] if prompt in OPENS else [])
        assert said["identical_to_base"] == (prompt in SHUT)
    for prompt, seed in asks:
        changed = apart(base[prompt, seed], patched[prompt, seed])
        assert (changed > 3) == (prompt in OPENS)  # control: unpatched they are others, far more than bits
    assert len(set(mixed)) == len(asks)


def test_requests_of_other_shapes_are_not_mixed(served):
    ask, *_ = served
    bodies = [{"prompt": "a knife", "seed": i, "steps": 1 + i % 2, "width": 64 + 16 * (i % 3)} for i in range(12)]
    bodies += [{"prompt": "a knife", "negative_prompt": "red", "seed": 0, "steps": 1}]
    answers = [each.json() for each in ask(*bodies)]
    for body, answer in zip(bodies, answers, strict=True):
        assert pixels(answer["image"]).shape[1] == body.get("width", 64)
        assert len(answer["acted_steps"]) == body["steps"]
    assert apart(pixels(answers[-1]["image"]), pixels(answers[0]["image"])) > 0  # the negative prompt counts


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_transformer_is_served(name):
    pipe = small_transformer_pipe(name)
    artifact = to_artifact(awaken(LoraPatch.from_unet(pipe.transformer, rank=4)), pipe.transformer, {"weapons": "none"})
    with apply(pipe, artifact) as handle, Worker(pipe, handle) as worker:
        ask = Asked(create_app(worker, "0xhash", Keys()))
        done, odd = ask(*({"prompt": "a knife", **STEPS, "width": 64, "height": height} for height in (32, 40)))
    assert pixels(done.json()["image"]).shape == (32, 64, 3)
    assert odd.status_code == 400  # of a pipeline an error, or a picture of another size
    assert odd.json()["error"]["message"].startswith("height: a multiple of 16, ")


def test_a_strength_may_be_asked_for_where_the_operator_allows_it_and_nobody_elses_changes(small_pipe, tmp_path):
    keys.keygen(tmp_path / "key.pem")
    with apply(small_pipe, listening(small_pipe)) as handle, Worker(small_pipe, handle, 8, 256) as worker:
        receipts = Receipts(Stamp.of(tmp_path / "key.pem"), small_pipe, handle)
        app = create_app(worker, "0xhash", Keys(), Limits(least_scale=0.25), receipts=receipts)
        scales = [None, 0.25, {"weapons": 0.5}, 1, {}]
        body = {"prompt": "a knife", "seed": 1, **STEPS, **LITTLE}
        answers = Asked(app)(*({**body, "scale": each} for each in scales * 4))
        assert {each.status_code for each in answers} == {200}
        for scale, answer in zip(scales * 4, answers, strict=True):
            told = 1.0 if scale in (None, {}) else scale
            handle.scale = told
            assert apart(pixels(answer.json()["image"]), alone(small_pipe, "a knife", 1)) <= 1
            with Image.open(io.BytesIO(base64.b64decode(answer.json()["image"]))) as picture:
                assert json.loads(picture.text["safepatch.receipt"])["receipt"]["patch"]["scale"] == told
        handle.scale = 0.25
        weak = alone(small_pipe, "a knife", 1)
        handle.scale = 1.0
        assert apart(weak, alone(small_pipe, "a knife", 1)) > 3  # control: strengths differ


@pytest.mark.parametrize(
    ("least", "scale", "says"),
    [
        (None, 1, "scale: this server lets nobody choose the patch's strength"),
        (0.5, 0.4, "scale: from 0.5 to 1"),
        (0.5, 0, "scale: from 0.5 to 1"),
        (0.5, {"weapons": 0.0}, "scale: from 0.5 to 1"),
        (0.5, 2, "scale: from 0.5 to 1"),
        (0.5, {"weapon": 0.5}, "scale: no category of this patch 'weapon'; did you mean 'weapons'?"),
        (0.5, "little", "scale"),
    ],
)
def test_no_other_strength_may_be_asked_for(small_pipe, least, scale, says):
    with apply(small_pipe, listening(small_pipe)) as handle, Worker(small_pipe, handle) as worker:
        ask = Asked(create_app(worker, "0x", Keys(), Limits(least_scale=least)))
        (answer,) = ask({"prompt": "a dog", "scale": scale})
        assert answer.status_code == 400
        assert says in answer.json()["error"]["message"]
        assert handle.stats.unet_calls == 0


def test_a_strength_of_nothing_is_none_that_could_be_allowed():
    for wrong in (0, -1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="within"):
            Limits(least_scale=wrong)


def test_clients_of_openais_api_are_served(served):
    ask, *_ = served
    body = {"model": "x", "prompt": "a dog", "n": 2, "size": "64x80", "quality": "high"}
    (answer,) = ask(body, path="/v1/images/generations")
    first, second = (pixels(each["b64_json"]) for each in answer.json()["data"])
    assert first.shape == second.shape == (80, 64, 3)
    assert apart(first, second) > 0


def test_what_happened_is_told_and_counted(served):
    ask, *_ = served
    ask(*({"prompt": prompt, **STEPS} for prompt in ("a knife", "a dog")))
    state = ask.get("/status")
    assert (state.status_code, state.json()["active"], state.json()["categories"]) == (200, True, ["weapons"])
    page = ask.get("/metrics").text
    assert 'safepatch_images_total{acted="true"} 1.0' in page
    assert 'safepatch_images_total{acted="false"} 1.0' in page
    assert 'safepatch_gate_opened_total{category="weapons"} 1.0' in page
    assert "knife" not in page


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": "a child"}, "minors"),
        ({"prompt": "x" * 5000}, "prompt: 4000 characters at most"),
        ({"prompt": "a dog", "steps": 1000}, "steps: 100 at most"),
        ({"prompt": "a dog", "steps": 0}, "steps: "),
        ({"prompt": "a dog", "width": 65}, "width: a multiple of 8"),
        ({"prompt": "a dog", "height": 1 << 40}, "height: a multiple of 8, 1024 at most"),
        ({"prompt": "a dog", "seed": -1}, "seed: "),
        ({"prompt": "a dog", "guidance_scale": "much"}, "guidance_scale: "),
        ({"prompt": "a dog", "stepz": 1}, "stepz: "),
        ([], "the body: "),
    ],
)
def test_what_is_malformed_is_refused_in_one_sentence(served, body, says):
    ask, _, handle = served
    (answer,) = ask(body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert "\n" not in answer.json()["error"]["message"]
    assert handle.stats.unet_calls == 0


def test_what_openais_clients_ask_wrongly_is_refused(served):
    ask, *_ = served
    wrong = [{"n": 9}, {"size": "big"}, {"size": "64x64x64"}, {"size": "٦٤x64"}, {"response_format": "url"}]
    for answer in ask(*({"prompt": "a dog", **each} for each in wrong), path="/v1/images/generations"):
        assert answer.status_code == 400
    assert ask({}, path="/nowhere")[0].status_code == 404


def test_a_body_that_is_too_large_or_no_json_is_refused(served):
    ask, *_ = served
    assert ask({"prompt": "x" * (1 << 17)})[0].status_code == 413
    for content in (b"{", b"\xff\xfe", b"[" * 10_000):

        async def send(content=content):
            transport = httpx2.ASGITransport(app=ask.app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.post("/generate", content=content, headers={"content-type": "application/json"})

        assert asyncio.run(send()).status_code == 400

    async def pieces():
        for _ in range(100):
            yield b"x" * 1024

    async def send_pieces():
        transport = httpx2.ASGITransport(app=ask.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post("/generate", content=pieces())

    assert asyncio.run(send_pieces()).status_code == 413  # its length was not stated


def test_a_body_that_does_not_arrive_is_not_waited_for(small_pipe):
    with apply(small_pipe, listening(small_pipe)) as handle, Worker(small_pipe, handle) as worker:
        app, sent = create_app(worker, "0x", Keys(), Limits(timeout=1)), []

        async def never():
            await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/generate", "headers": [], "query_string": b""}
        asyncio.run(app(scope, never, send))
    assert sent[0]["status"] == 408


def test_only_who_has_a_key_may_ask(small_pipe):
    with apply(small_pipe, listening(small_pipe)) as handle, Worker(small_pipe, handle) as worker:
        ask = Asked(create_app(worker, "0x", Keys([KEY])))
        body = {"prompt": "a dog", **STEPS}
        for given in ({}, {"authorization": f"Bearer {KEY}x"}, {"authorization": KEY}, {"authorization": "Bearer "}):
            assert ask(body, headers=given)[0].status_code == 401
        assert ask(body, path="/v1/images/generations")[0].status_code == 401
        assert handle.stats.unet_calls == 0
        assert ask(body, headers={"authorization": f"Bearer {KEY}"})[0].status_code == 200
        assert ask.get("/status").status_code == 200


def test_a_pipeline_that_lost_its_patch_gives_no_image(served):
    ask, worker, handle = served
    body = {"prompt": "a knife", **STEPS}
    assert ask(body)[0].status_code == 200  # control
    handle.scale = 0
    assert ask(body)[0].status_code == 503
    handle.scale = dict.fromkeys(handle.categories, 0.0)
    assert ask(body)[0].status_code == 503
    handle.scale = 1
    worker.pipe.unet = new_small_pipe().unet
    answer, state = ask(body)[0], ask.get("/status")
    assert (answer.status_code, state.status_code) == (503, 503)
    assert "image" not in answer.json()
    assert state.json()["active"] is False


def test_a_patch_that_is_bypassed_while_drawing_gives_no_image(served):
    ask, worker, _ = served
    worker.pipe.text_encoder.register_forward_hook(lambda *_: worker.pipe.unet.conv_in._forward_pre_hooks.clear())
    answer = ask({"prompt": "a knife", **STEPS})[0]
    assert answer.status_code == 503
    assert "image" not in answer.json()


def test_a_patch_that_goes_while_others_wait_gives_none_of_them_an_image(small_pipe):
    with apply(small_pipe, listening(small_pipe)) as handle, Worker(small_pipe, handle, 1, 64) as worker:
        app = create_app(worker, "0x", Keys())
        worker.watch = lambda *_: handle.remove()  # after the first
        answers = Asked(app)(*({"prompt": "a knife", "seed": i, **STEPS} for i in range(6)))
        assert sorted(each.status_code for each in answers) == [200] + [503] * 5


def test_overload_is_told_with_a_time_to_come_back(small_pipe):
    with apply(small_pipe, listening(small_pipe)) as handle, Worker(small_pipe, handle, 1, 3) as worker:
        answers = Asked(create_app(worker, "0x", Keys()))(*({"prompt": "a dog", **STEPS} for _ in range(20)))
    codes = [each.status_code for each in answers]
    assert set(codes) == {200, 503}
    assert codes.count(200) >= 3
    assert all(int(each.headers["retry-after"]) >= 1 for each in answers if each.status_code == 503)


def test_what_takes_too_long_is_given_up_and_not_drawn(small_pipe):
    started, go_on = threading.Event(), threading.Event()

    def hold(*_):
        started.set()
        go_on.wait(60)

    small_pipe.vae.decoder.register_forward_pre_hook(hold)
    with apply(small_pipe, listening(small_pipe)) as handle, Worker(small_pipe, handle, 1, 64) as worker:
        app = create_app(worker, "0x", Keys(), Limits(timeout=5))
        answers = Asked(app)(*({"prompt": "a dog", **STEPS} for _ in range(3)))
        go_on.set()
        assert {each.status_code for each in answers} == {504}
        assert started.is_set()
    assert handle.stats.unet_calls == 1  # the others were not begun


def test_an_error_while_drawing_is_the_batchs_alone(served):
    ask, worker, _ = served
    hook = worker.pipe.vae.decoder.register_forward_pre_hook(lambda *_: 1 / 0)
    answer = ask({"prompt": "a dog", **STEPS})[0]
    assert (answer.status_code, answer.json()["error"]["message"]) == (500, "drawing failed: ZeroDivisionError")
    hook.remove()
    assert ask({"prompt": "a dog", **STEPS})[0].status_code == 200


def test_a_worker_that_has_ended_answers_nobody(small_pipe):
    with apply(small_pipe, listening(small_pipe)) as handle:
        with Worker(small_pipe, handle) as worker:
            ask = Asked(create_app(worker, "0x", Keys()))
        assert ask({"prompt": "a dog", **STEPS})[0].status_code == 503


def test_no_server_starts_without_its_patch(tmp_path, small_pipe):
    with taken("127.0.0.1", 0, Keys()) as ours, pytest.raises(Exception, match=r"nowhere\.safetensors"):
        serve(ours, lambda: small_pipe, Keys(), Service(tmp_path / "nowhere.safetensors", Limits()))
    with apply(small_pipe, listening(small_pipe)) as handle:
        handle.remove()
        with pytest.raises(PatchBypassed, match="restart the server"):
            Worker(small_pipe, handle).require_patched()


def test_a_port_in_use_and_an_open_door_are_one_line(tmp_path, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot serve on 127.0.0.1:{port} .*; choose another --port"):
            taken("127.0.0.1", port, Keys()).__enter__()
    with pytest.raises(ConfigError, match="choose another --port"):
        taken("127.0.0.1", 1 << 20, Keys()).__enter__()
    with pytest.raises(ConfigError, match="give --keys"):
        taken("0.0.0.0", 0, Keys()).__enter__()


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "keys"
    path.write_text(f"# whose\n{KEY}\n")
    monkeypatch.setenv("SAFEPATCH_API_KEYS", f"{KEY}-2, {KEY}-3")
    keys = Keys.of(path)
    assert all(keys.let(f"Bearer {KEY}{end}") for end in ("", "-2", "-3"))
    assert not keys.let(f"Bearer {KEY}-4")
    monkeypatch.delenv("SAFEPATCH_API_KEYS")
    assert not Keys.of(None)
    path.write_text("\n")
    for wrong, says in ((path, "holds no API key"), (tmp_path / "nowhere", "cannot read API keys")):
        with pytest.raises(ConfigError, match=says):
            Keys.of(wrong)
    path.write_text("short\n")
    with pytest.raises(ConfigError, match="fewer than 16"):
        Keys.of(path)
    with pytest.raises(ConfigError, match="at least 1"):
        Limits(steps=0)
