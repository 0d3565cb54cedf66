"""What `safepatch serve` does, in a program of one's own: images over HTTP, each drawn with the patch or not at all."""

import json
import threading
from pathlib import Path
from urllib.request import Request, urlopen

import uvicorn

import safepatch
from safepatch.hosting.limits import Keys, Limits
from safepatch.hosting.serve import Service, listening, serving

PATCH = Path("patches/lora/weapons.safetensors")
EVERYBODY = Keys()  # from this machine; others need keys
pipe, answers = safepatch.load_pipeline("tiny-sd"), []
with (
    listening("127.0.0.1", 0, EVERYBODY) as ours,  # 0: any port that is free
    serving(pipe, EVERYBODY, Service(PATCH, Limits(steps=20))) as app,
):
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([ours],))
    thread.start()
    address = f"http://127.0.0.1:{ours.getsockname()[1]}"
    for prompt in ("a dog on a blue background", "a knife on a blue background"):
        body = json.dumps({"prompt": prompt, "steps": 4, "seed": 3}).encode()
        with urlopen(Request(f"{address}/generate", body, {"content-type": "application/json"})) as answer:
            answers.append(json.load(answer))
    with urlopen(f"{address}/status") as answer:
        status = json.load(answer)
    server.should_exit = True
    thread.join()

assert status["active"]
assert status["categories"] == ["weapons"]
assert [each["opened"] for each in answers] == [[], ["weapons"]]
assert [each["identical_to_base"] for each in answers] == [True, False]
