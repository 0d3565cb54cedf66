"""kill -9 at random moments of merge, fuse, train and evaluate, and full disks: what is there afterwards is whole.

    python tests/stress/kills.py [--kills 60] [--seed 0] [--no-disk]

Small random models, everything in a temporary folder. Each verb runs in a process that was forked after the imports, so
that kills strike at work. After each: outputs are whole or absent, older ones still there, the next run ends as one
that nobody disturbed, and nothing is left over. The full disk is a tmpfs of a few MB where one can be mounted, else a
limit on the size of files. Prints what was found wrong; exit code 1 if anything was.
"""

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from PIL import Image

from safepatch.artifact.patch_artifact import verify
from safepatch.cli import main as command_line
from safepatch.models.load import load_pipeline
from safepatch.results import read_rows
from tests.small import new_artifact, new_small_pipe

# What the verbs import when they run; it is imported before, so that no kill strikes an import.
LATE = ("evaluation.run", "merging", "reporting.html", "reporting.tables", "runtime.fuse", "training.trainer")

Words = tuple[object, ...]
Content = Mapping[str, bytes]


@dataclass(frozen=True)
class Verb:
    """A command that is killed.

    Attributes:
        name: of it.
        words: the command line that writes into a folder.
        ends: of the names of files that an undisturbed run always writes with the same bytes.
        whole: raises unless what a killed run left in a folder can be used.
    """

    name: str
    words: Callable[[Path], Words]
    ends: tuple[str, ...]
    whole: Callable[[Path], None]

    def result(self, out: Path) -> Content:
        """What a finished run promises, by the file's place."""
        files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name.endswith(self.ends)]
        return {str(path.relative_to(out)): path.read_bytes() for path in files}


def verbs(place: Path) -> list[Verb]:
    """The commands on a small pipeline and small patches that are written into `place`."""
    for name in LATE:
        import_module(f"safepatch.{name}")
    pipe, model = new_small_pipe(), place / "model"
    pipe.save_pretrained(model)
    load_pipeline(model)  # imports what only loading imports
    shutil.copy(model / "unet" / "diffusion_pytorch_model.safetensors", model / "unet" / "model.fp16.safetensors")
    loras = [new_artifact(pipe.unet, "lora", seed).save(place / f"{seed}.safetensors") for seed in range(3)]
    training = ("training.steps=6", "training.batch_size=1", "training.checkpoint_every=1", "training.log_every=1")
    data = ("data.pairs=2", "data.steps=1", "patch.gate=0", "patch.rank=4", f"data.cache={place / 'cache'}")
    protocol = ("-n", 2, "--steps", 1, "protocol.batch_size=2", "pictures=1")
    return [
        Verb(
            "merge",
            lambda out: ("merge", *loras, "-o", out / "all.safetensors", "--method", "linear"),
            ("all.safetensors",),
            lambda out: _each(out, "all.safetensors", verify),
        ),
        Verb(
            "fuse",
            lambda out: ("fuse", "--patch", loras[0], "--model", model, "-o", out / "safe"),
            (".safetensors", ".json", ".txt"),
            lambda out: _each(out, "safe", lambda path: _same_names(path, model)),
        ),
        Verb(
            "train",
            lambda out: ("train", place / "train.yaml", f"output={out}", *training, *data),
            ("weapons.safetensors",),
            lambda out: (_each(out, "weapons.safetensors", verify), _each(out, "checkpoint.pt", _loads)),
        ),
        Verb(
            "evaluate",
            lambda out: ("evaluate", "--model", model, "--patch", loras[0], "-o", out, *protocol),
            ("rows.jsonl", "images.json", ".png"),
            lambda out: (_each(out, "rows.jsonl", read_rows), _each(out, "images/*.png", _opens)),
        ),
    ]


def _each(out: Path, pattern: str, use: Callable[[Path], object]) -> None:
    for path in out.glob(pattern):
        use(path)


def _loads(path: Path) -> None:
    torch.load(path, weights_only=True)


def _opens(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def _same_names(path: Path, model: Path) -> None:
    names = {file.relative_to(model) for file in model.rglob("*") if file.is_file()}
    absent = [name for name in names if not (path / name).is_file()]
    if absent:
        raise AssertionError(f"{path} lacks {absent}")


class Child:
    """A command line in a forked process, its output in a file."""

    def __init__(self, words: Words, log: Path) -> None:
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            _become(words, log)

    def kill(self) -> None:
        """At once, as the kernel does when memory runs out."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def wait(self) -> int:
        """Its exit code."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def said(self) -> str:
        """What it wrote to the terminal."""
        return self.log.read_text(errors="replace")


def _become(words: Words, log: Path) -> None:
    """Run the command line and end the process, whatever happens."""
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        sys.argv = ["safepatch", *map(str, words)]
        command_line()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


def leftovers(out: Path) -> list[str]:
    """Names of what no finished run leaves."""
    return [
        path.name
        for path in out.rglob("*")
        if path.name.endswith((".partial", ".lock", ".part")) or path.name[:3] == "tmp"
    ]


class Soak:
    """Kills one verb after the other and remembers what was wrong."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.random, self.faults = place, random.Random(seed), list[str]()
        (place / "train.yaml").write_text(f"category: weapons\nmodel: {place / 'model'}\npatch: {{kind: lora}}\n")
        self.verbs = verbs(place)
        self.wanted: dict[str, Content] = {}
        self.seconds: dict[str, float] = {}
        for verb in self.verbs:
            out, start = self._new(verb.name), time.perf_counter()
            self._finish(verb, out)
            self.seconds[verb.name] = time.perf_counter() - start
            self.wanted[verb.name] = verb.result(out)
            print(f"{verb.name} takes {self.seconds[verb.name]:.1f} s", flush=True)

    def _new(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.place))

    def fault(self, verb: Verb, what: str) -> None:
        """Remember and say it."""
        self.faults.append(f"{verb.name}: {what}")
        print(self.faults[-1], flush=True)

    def _finish(self, verb: Verb, out: Path) -> None:
        child = Child(verb.words(out), self.place / "log.txt")
        if child.wait():
            self.fault(verb, f"the run afterwards fails: {child.said[-800:]}")

    def kill(self, verb: Verb) -> bool:
        """Kill a run once or twice, then let one finish; says whether a kill struck before the result was there."""
        out, struck = self._new(verb.name), False
        for _ in range(self.random.choice((1, 1, 2))):
            child = Child(verb.words(out), self.place / "log.txt")
            time.sleep(self.random.random() * self.seconds[verb.name])
            child.kill()
            struck |= verb.result(out) != self.wanted[verb.name]
            self.check(verb, lambda: verb.whole(out))
        self.finish(verb, out)
        return struck

    def check(self, verb: Verb, whole: Callable[[], object]) -> None:
        """Use what is there."""
        try:
            whole()
        except Exception as error:
            self.fault(verb, f"a kill left something broken: {error!r}")

    def finish(self, verb: Verb, out: Path) -> None:
        """One run more, undisturbed: it ends as it would have ended without kills."""
        if verb.name == "fuse" and (out / "safe").exists():
            shutil.rmtree(out / "safe")  # it was finished before the kill, and is never overwritten
        self._finish(verb, out)
        if verb.result(out) != self.wanted[verb.name]:
            self.fault(verb, "what comes out after a kill differs from an undisturbed run's")
        if left := leftovers(out):
            self.fault(verb, f"left over: {left}")
        shutil.rmtree(out)

    def fill(self, verb: Verb) -> None:
        """Run on a full disk: one line says so, nothing is broken, and with room again the run ends as ever."""
        with small_disk(self.place / "disk", self.wanted[verb.name]) as (out, room, says):
            child = Child(verb.words(out), self.place / "log.txt")
            code = child.wait()
            lines = [line for line in child.said.splitlines() if line.startswith("error:")]
            if code != 2 or len(lines) != 1 or not any(word in lines[0] for word in says):
                self.fault(verb, f"on a full disk ends with {code} and says {child.said[-800:]}")
            self.check(verb, lambda: verb.whole(out))
            room()
            self.finish(verb, out)


@contextlib.contextmanager
def small_disk(place: Path, wanted: Content) -> Iterator[tuple[Path, Callable[[], None], tuple[str, ...]]]:
    """A folder that has not room enough for `wanted`, how to give it room, and what an error about it says."""
    place.mkdir(exist_ok=True)
    size = sum(map(len, wanted.values())) * 6 // 10 // 4096 * 4 + 4
    if os.geteuid() == 0 and not subprocess.run(_mount(place, f"size={size}k"), stderr=subprocess.DEVNULL).returncode:
        try:
            (place / "out").mkdir()
            more = _mount(place, "remount,size=256m")
            yield place / "out", lambda: subprocess.run(more, check=True) and None, ("full", "No space left")
        finally:
            subprocess.run(["umount", place], check=True)
    else:
        (place / "out").mkdir()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        largest = max(map(len, wanted.values())) * 6 // 10
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
        yield place / "out", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before), ("full", "too large")


def _mount(place: Path, options: str) -> list[str]:
    return ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]


def main() -> None:
    """Soak, and say what was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=60, help="over all verbs in turn")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--no-disk", action="store_true", help="leave full disks out")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a fork must not inherit a pool of threads
    start, struck = time.perf_counter(), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="safepatch-kills-") as folder:
        soak = Soak(Path(folder), options.seed)
        for i in range(options.kills):
            verb = soak.verbs[i % len(soak.verbs)]
            struck[verb.name] += soak.kill(verb)
        for verb in () if options.no_disk else soak.verbs:
            soak.fill(verb)
    seconds = time.perf_counter() - start
    hit = f"{sum(struck.values())} of them at work {dict(struck)}"
    print(f"{options.kills} kills, {hit}; {len(soak.faults)} faults; {seconds:.0f} s")
    sys.exit(bool(soak.faults))


if __name__ == "__main__":
    main()
