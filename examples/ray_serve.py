"""Two copies of a server behind one door, with Ray Serve: on a cluster, Ray sets them on machines of their own.

Needs two extras: pip install 'safepatch-diffusion[serve,ray]'. A copy that cannot load its patch never comes up.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from urllib.request import Request, urlopen

import ray
from ray import serve

PATCH, PORT = Path("patches/lora/weapons.safetensors").resolve(), 8189


def build() -> object:
    """One copy, in a process of its own: a model, its patch, and who draws with it."""
    import safepatch
    from safepatch.hosting.limits import Keys, Limits
    from safepatch.hosting.serve import Service, serving

    opened = ExitStack()
    app = opened.enter_context(serving(safepatch.load_pipeline("tiny-sd"), Keys(), Service(PATCH, Limits())))
    app.state.opened = opened  # as long as the application lives
    return app


ray.init(num_cpus=2, include_dashboard=False)
serve.start(http_options={"host": "127.0.0.1", "port": PORT})
serve.run(serve.deployment(num_replicas=2, max_ongoing_requests=16)(serve.ingress(build)()).bind())
body = json.dumps({"prompt": "a knife on a table", "steps": 4}).encode()
ask = Request(f"http://127.0.0.1:{PORT}/generate", body, {"content-type": "application/json"})
with ThreadPoolExecutor() as pool:
    answers = list(pool.map(lambda _: json.load(urlopen(ask, timeout=600)), range(6)))
(copies,) = serve.status().applications["default"].deployments.values()
print(f"{len(answers)} images of {copies.replica_states}, in each of which the patch acted")
assert copies.replica_states == {"RUNNING": 2}
assert all(each["opened"] == ["weapons"] for each in answers)
