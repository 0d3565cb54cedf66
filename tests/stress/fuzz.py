"""Altered patch files through every reader: nothing altered is accepted, and what is refused is told in one line.

    python tests/stress/fuzz.py [--mutants 3000] [--seed 0]

Half of the mutants are files with bytes flipped, cut out or put in. The other half are lies: some value of the header
or its metadata, or the tensors' data, is replaced, and the content hash computed anew, so that it tells nothing. Each
goes through every reader there is, on a small random pipeline. Counted, and all to be 0:

- accepted: a file with flipped bytes was opened and says something else than the original;
- tracebacks: a reader raised anything but a `SafepatchError`, or one of several lines;
- hangs: a reader took more than 5 seconds of CPU time, or 60 seconds altogether;
- memory: a reader's peak was 500 MB above what the process had before.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch

from safepatch import apply, fuse
from safepatch.artifact.container import HASH_KEY, NO_HASH, _parse_header
from safepatch.artifact.hashing import Hashing
from safepatch.artifact.info import BUNDLE, read_info
from safepatch.artifact.patch_artifact import PatchArtifact, verify
from safepatch.cli import artifact as verbs
from safepatch.diffusion import Components
from safepatch.errors import SafepatchError
from safepatch.export.lora_out import export
from safepatch.merging import merge, split
from safepatch.patch.drift import ENCODER, drift, sketch
from safepatch.patch.files import check_fits, to_artifact
from safepatch.patch.text import TextPatch
from tests.small import awaken, images, new_artifact, new_small_pipe

CPU_SECONDS, SECONDS, MEMORY = 5, 60, 500_000_000
NASTY: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 0.5, -0.0, 1e308, 10**7, 10**12, 10**30, float("nan"), float("inf")),
    *("", "a", "\ud800", "\x1b[2Jok\r\n", "\u202egnp", "1", "0x" + "f" * 64, "lite", "bundle", "F64", "a" * 100_000),
    *([], {}, [1], [0, 0], ["F16", [3]], {"a": 1}, {"threshold": 2}, [[]] * 3),
)
Reader = Callable[[Path], object]


# Mutants


def flipped(data: bytes, rng: random.Random) -> bytes:
    """The file with some bytes changed, cut out, doubled or put in; the header as often as the data."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        header = 8 + int.from_bytes(data[:8], "little")
        place = rng.randrange(min(header if rng.random() < 0.6 else len(made), len(made)) or 1)
        length = rng.choice((1, 1, 4, 100))
        change = rng.randrange(5)
        if change == 0:
            made[place] ^= 1 << rng.randrange(8)
        elif change == 1:
            made[place : place + length] = rng.randbytes(length)
        elif change == 2:
            del made[place : place + length]
        elif change == 3:
            made[place:place] = made[place : place + length]
        else:
            made = made[:place] if rng.random() < 0.3 else made + rng.randbytes(length)
        made = made or bytearray(b"\0")
    return bytes(made)


def lying(data: bytes, rng: random.Random) -> bytes:
    """The file with a value of its header replaced, and a hash that fits."""
    end = 8 + int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:end]), bytearray(data[end:])
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.random()
        if kind < 0.15:
            _poison(body, rng)
        elif kind < 0.35:
            _change(header, rng)
        else:
            _change_metadata(header, rng)
    return rehashed(header, bytes(body))


def _change_metadata(header: dict[str, Any], rng: random.Random) -> None:
    """Change a value somewhere inside one of the metadata's texts, most of which are JSON."""
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not metadata:
        return
    key = rng.choice(sorted(metadata))
    try:
        inside = json.loads(metadata[key])
        assert isinstance(inside, dict | list)
        nested = inside.get("sources") if isinstance(inside, dict) else None
        if nested and rng.random() < 0.3 and "metadata" in nested[0]:
            _change_metadata({"__metadata__": nested[0]["metadata"]}, rng)
        else:
            _change(inside, rng)
        metadata[key] = json.dumps(inside)
    except (ValueError, AssertionError, TypeError, AttributeError, LookupError):
        metadata[key] = rng.choice([item for item in NASTY if isinstance(item, str)])


def _change(tree: Any, rng: random.Random) -> None:
    """Replace, remove, double or rename one value anywhere in nested tables and lists."""
    places = [(parent, key) for parent, key in _places(tree) if key != "__metadata__"]
    if not places:
        return
    parent, key = rng.choice(places)
    change = rng.randrange(8)
    if change == 0:
        del parent[key]
    elif change == 1 and isinstance(parent, dict):
        parent[str(rng.choice(NASTY))] = parent.pop(key)
    elif change == 2:
        other, place = rng.choice(places)
        with contextlib.suppress(LookupError, TypeError):
            parent[key] = other[place]
    else:
        parent[key] = rng.choice(NASTY)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def _poison(body: bytearray, rng: random.Random) -> None:
    """Data that are not finite, or zero, in part or everywhere."""
    value = rng.choice((b"\x00\x7e", b"\x00\x7c", b"\x00\x00"))
    start = 2 * rng.randrange(max(len(body) // 2, 1)) if rng.random() < 0.5 else 0
    stop = min(start + 2, len(body)) if start else len(body)
    body[start:stop] = value * ((stop - start) // 2)


def rehashed(header: Mapping[str, Any], body: bytes) -> bytes:
    """The file of this header, with the hash that it has, where it can have one."""
    said = dict(header)
    if isinstance(said.get("__metadata__"), dict) and HASH_KEY in said["__metadata__"]:
        said["__metadata__"] = {**said["__metadata__"], HASH_KEY: NO_HASH}
    text = json.dumps(said).encode()
    text += b" " * (-len(text) % 8)
    with contextlib.suppress(SafepatchError):
        hashing = Hashing(_parse_header(text))
        hashing.update(body)
        text = text.replace(NO_HASH.encode(), hashing.content_hash().encode(), 1)
    return len(text).to_bytes(8, "little") + text + body


# Readers


def readers(folder: Path) -> dict[str, Reader]:
    """Everything that opens a patch file, by name."""
    pipe = new_small_pipe()
    ours = sketch(pipe.unet)
    good = {kind: new_artifact(pipe.unet, kind, 3) for kind in ("control", "lite", "lora")}
    goods = {kind: _named(good[kind], "gore").save(folder / f"good-{kind}.safetensors") for kind in good}

    def check(path: Path) -> None:
        info = read_info(path)
        check_fits(info, pipe.unet.config)
        if ENCODER in info.base:
            drift(ours, info.base[ENCODER])

    def inspect(path: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            verbs.inspect(path)
            verbs.inspect(path, as_json=True)
        bad = [line for line in printed.getvalue().split("\n") if not line.isprintable()]
        assert not bad, f"printed {bad[0]!r}"

    def attach(path: Path) -> None:
        with apply(pipe, path):
            images(pipe)

    def merged(path: Path, method: str) -> None:
        kind = read_info(path).kind
        merge([path, goods.get(kind, goods["lora"])], folder / "merged.safetensors", method)

    def parted(path: Path) -> None:
        for category in read_info(path).categories:
            split(path, category)

    return {
        "open": PatchArtifact.open,
        "verify": lambda path: verify(path, allow_zero=True),
        "inspect": inspect,
        "check": check,
        "apply": attach,
        "bundle": lambda path: merged(path, BUNDLE),
        "linear": lambda path: merged(path, "linear"),
        "cat": lambda path: merged(path, "cat"),
        "split": parted,
        "export": lambda path: export(path, folder / "exported.safetensors"),
        "fuse": lambda path: fuse(copy.deepcopy(pipe), path),
    }


def originals(folder: Path) -> list[Path]:
    """One small file of each form: kinds, a gate, dense and low-rank, merges, both sides, an older format."""
    pipe = new_small_pipe()
    single = {kind: new_artifact(pipe.unet, kind).astype(torch.float16) for kind in ("control", "lite", "lora")}
    gate = {f"lora.gate.{name}.delta": 0.1 * torch.ones(shape) for name, shape in _GATE.items()}
    config = single["lora"].info.config
    config = {**config, "layout": {**config["layout"], "gate": 4}, "gate": {"weapons": {"threshold": 0.4}}}
    single["gated"] = PatchArtifact({**single["lora"].tensors, **gate}, replace(single["lora"].info, config=config))
    single["low-rank"] = single["control"].compress(2)
    text = TextPatch.of(Components.of(pipe), "text_encoder", rank=4)
    single["text"] = to_artifact(awaken(text), Components.of(pipe), {"weapons": "no weapons"}).astype(torch.float16)
    single["old"] = replace(single["lora"], info=replace(single["lora"].info, format_version=1))
    files = {name: artifact.save(folder / f"{name}.safetensors") for name, artifact in single.items()}
    other = _named(single["lora"], "gore").save(folder / "other.safetensors")
    for method in (BUNDLE, "cat"):
        files[method] = folder / f"{method}.safetensors"
        merge([files["lora"], other], files[method], method)
    files["two-sided"] = folder / "two-sided.safetensors"
    merge([files["lora"], files["text"]], files["two-sided"])
    return list(files.values())


_GATE = {"detect": (1, 4, 192), "detect_bias": (1, 4), "weigh": (1, 4), "bias": (1,)}


def _named(artifact: PatchArtifact, category: str) -> PatchArtifact:
    return replace(artifact, info=replace(artifact.info, instructions={category: f"no {category}"}, title=""))


# Counting


@dataclass
class Result:
    """What was found.

    Attributes:
        counts: mutants, runs of readers, files that passed, and each kind of failure.
        examples: some lines about each kind of failure.
    """

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def failures(self) -> dict[str, int]:
        """What is to be 0."""
        return {name: self.counts[name] for name in ("accepted", "tracebacks", "hangs", "memory")}

    def fail(self, kind: str, line: str) -> None:
        """Count a failure and keep what it was."""
        self.counts[kind] += 1
        self.examples.setdefault(kind, []).append(line)


class Hang(BaseException):
    """A reader took too long."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raises `Hang` inside the block when it takes too long."""

    def stop(*_: object) -> None:
        raise Hang

    clocks = {signal.SIGALRM: (signal.ITIMER_REAL, SECONDS), signal.SIGPROF: (signal.ITIMER_PROF, CPU_SECONDS)}
    before = {number: signal.signal(number, stop) for number in clocks}
    try:
        for clock, seconds in clocks.values():
            signal.setitimer(clock, seconds)
        yield
    finally:
        for number, (clock, _) in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])


def fuzz(
    mutants: int,
    seed: int = 0,
    also: Mapping[str, Reader] | None = None,
    patience: Callable[[], bool] = lambda: True,
) -> Result:
    """Run `mutants` altered files through all readers, and `also` through those, while there is patience."""
    result, rng = Result(), random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, ways = originals(folder), {**readers(folder), **(also or {})}
        contents = {path: path.read_bytes() for path in files}
        said = {path: _said(path) for path in files}
        for number in range(mutants):
            if not patience():
                break
            path = files[number // 2 % len(files)]
            is_lie = number % 2 == 1
            mutant = folder / "mutant.safetensors"
            mutant.write_bytes((lying if is_lie else flipped)(contents[path], rng))
            result.counts["mutants"] += 1
            what = f"{'lie' if is_lie else 'flip'} {number} of {path.stem}"
            for name, reader in ways.items():
                passed = _run(result, name, reader, mutant, what)
                if passed and name == "open" and not is_lie and _said(mutant) != said[path]:
                    result.fail("accepted", what)
    return result


def _run(result: Result, name: str, reader: Reader, path: Path, what: str) -> bool:
    """Whether the reader took the file; counts whatever else than taking or refusing it does."""
    before, passed = _reset_peak(), False
    result.counts["runs"] += 1
    try:
        with bounded():
            reader(path)
        passed = True
        result.counts[f"{name} passed"] += 1
    except SafepatchError as error:
        if not str(error).isprintable():
            result.fail("tracebacks", f"{what}, {name}: not one plain line: {error!r}")
    except Hang:
        result.fail("hangs", f"{what}, {name}")
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "/safepatch/" in f.filename]
        place += f" from {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
        result.fail("tracebacks", f"{what}, {name}: {type(error).__name__} at {place}: {str(error)[:150]}")
    if (peak := _peak()) - before > MEMORY:
        result.fail("memory", f"{what}, {name}: {(peak - before) / 1e6:.0f} MB")
    return passed


def _said(path: Path) -> tuple[object, ...]:
    """All that a file says: its description and its tensors."""
    artifact = PatchArtifact.open(path, allow_zero=True)
    return artifact.info, artifact.content_hash


def _reset_peak() -> int:
    """Bytes of memory in use, from which on the peak is told; where it cannot be reset it is the process's own."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    with contextlib.suppress(OSError):
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(lines[key].split()[0])
    return 0


def main() -> None:
    """Run, print what was found, exit with 1 if anything was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0, help="stop after so long; 0: when all are done")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    result = fuzz(
        options.mutants,
        options.seed,
        patience=lambda: not options.minutes or time.monotonic() - start < 60 * options.minutes,
    )
    seconds, cpu = time.monotonic() - start, time.process_time()
    for kind, lines in result.examples.items():
        print(f"{kind}:", *(f"  {line}" for line in lines[:20]), sep="\n")
    print(f"{dict(result.counts)} in {seconds:.0f} s ({cpu:.0f} s of CPU time)")
    print(", ".join(f"{name} {count}" for name, count in result.failures.items()))
    sys.exit(any(result.failures.values()))


if __name__ == "__main__":
    main()
