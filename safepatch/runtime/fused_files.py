"""The files of a model, copied with a lora patch in the weights of what denoises, one tensor at a time."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torch import Tensor

from safepatch.diffusion import UNET, denoiser, denoiser_entry, read_json
from safepatch.errors import BaseMismatch, ConfigError, SafepatchError, UnsupportedModel
from safepatch.files import replacing
from safepatch.models.flow_file import FlowFile
from safepatch.models.flow_layout import Place
from safepatch.models.folder import whole_name
from safepatch.models.load import load_tiny
from safepatch.models.text_layout import TEXT_MODEL, text_places
from safepatch.models.weights import (
    Change,
    PickledWeights,
    Stored,
    Weights,
    denoiser_weights,
    open_weights,
    write_changed,
    write_pickle_changed,
)
from safepatch.runtime.update import Update

NOTE = "fused.safepatch"  # metadata key of a fused file; a fused folder has a file of that name, and .json
AVERAGED = "model_ema."  # names of a single file's second UNet, which would not be patched
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".gguf")
Tell = Callable[[str], object]


class Piece(NamedTuple):
    """A weight that changes, in the tensor of a file.

    Attributes:
        update: of its component.
        name: as the patch calls it.
        place: where in the tensor it is.
    """

    update: Update
    name: str
    place: Place


Changed = Mapping[str, Sequence[Piece]]  # by name of a file's tensor


class Job(NamedTuple):
    """What is fused into the files of a model.

    Attributes:
        update: what is added.
        config: of what denoises.
        note: what a fused model says of it.
        allow_pickle: read pickles too.
        tell: is told what is fused and what is left out.
    """

    update: Update
    config: Mapping[str, Any]
    note: dict[str, Any]
    allow_pickle: bool
    tell: Tell

    def changed(self, files: Sequence[Weights]) -> Mapping[Path, Changed]:
        """By file, which of its tensors change.

        Raises:
            BaseMismatch: when `files`, which belong together, lack one.
            ConfigError: when one cannot take a small difference.
            UnsupportedModel: when one is stored in few bits, or half of it is missing.
        """
        found: dict[Path, dict[str, list[Piece]]] = {file.path: {} for file in files}
        for component in self.update.components:
            update, places = self.update.of_component(component), self._places(files, component)
            update.require({name: _stored(file, place) for name, (file, place) in places.items()})
            for name in update.names:
                file, place = places[name]
                found[file.path].setdefault(place.name, []).append(Piece(update, name, place))
        return found

    def _places(self, files: Sequence[Weights], component: str) -> dict[str, tuple[Weights, Place]]:
        """Where the weights of a component are, by the patch's names."""
        if component != UNET.component:
            return {name: (file, place) for file in files for name, place in text_places(file, component).items()}
        if len(files) == 1 and (flow := FlowFile.of(files[0])):
            return {name: (files[0], place) for name, place in flow.places.items()}
        return {name: (file, Place(stored)) for name, (file, stored) in denoiser_weights(files, self.config).items()}

    def write(self, weights: Weights, out: BinaryIO, names: Changed, metadata: Mapping[str, str]) -> None:
        """Write a file, changed, as safetensors."""
        kept = {name for name in weights.tensors if not name.startswith(AVERAGED)}
        write_changed(weights, out, kept, names, change(names), metadata)

    def noted(self, notes: str) -> str:
        """The notes of what was fused so far, and this one; raises `SafepatchError` when it is among them."""
        try:
            earlier = json.loads(notes)
            known = {each.get("weights", each["hash"]) for each in earlier}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SafepatchError(f"what this model says of patches in it is damaged: '{NOTE}'; remove it") from error
        if known & {self.note["weights"], self.note["hash"]}:
            title = self.note["title"]
            raise SafepatchError(f"'{title}' was fused into this model already; fuse it into the original")
        return json.dumps([*earlier, self.note], sort_keys=True)


def fuse_embedded(model: Path, folder: Path, job: Job) -> None:
    """A sibling has no folder of its own: it is built, changed and saved."""
    pipe = load_tiny(str(model))
    for component in job.update.components:
        update = job.update.of_component(component)
        changed = denoiser(pipe) if component == UNET.component else getattr(pipe, component)
        weights = {plain_name(name, component): weight for name, weight in changed.named_parameters()}
        for name in update.names:
            weights[name].data = update.added(name, weights[name].data)
    pipe.save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):
        shutil.copymode(folder / "model_index.json", path)  # safetensors keeps its files from everyone else
    (folder / f"{NOTE}.json").write_text(job.noted("[]") + "\n", "utf-8")


def fuse_file(model: Path, out: Path, job: Job) -> None:
    """Write a single file changed, without its averaged UNet."""
    if out.suffix != ".safetensors" or out.resolve() == model.resolve():
        raise SafepatchError(f"a single file is fused into another .safetensors file, not {out}; choose another -o")
    weights = open_weights(model, job.allow_pickle)
    names = job.changed([weights])[model]
    metadata = {**weights.metadata, NOTE: job.noted(weights.metadata.get(NOTE, "[]"))}
    with replacing(out, durable=False) as file:
        job.write(weights, file, names, metadata)


def fuse_folder(model: Path, folder: Path, job: Job) -> None:
    """Copy a folder, changed wherever weights of its denoiser may be: in its component, and beside the others."""
    index = read_json(model / "model_index.json")
    denoiser, _ = denoiser_entry(index)
    changes = {denoiser if name == UNET.component else name: name for name in job.update.components}
    note = model / f"{NOTE}.json"
    notes = job.noted(note.read_text("utf-8") if note.is_file() else "[]")
    groups: dict[str, list[Path]] = {}
    plain: list[Path] = []
    for path in _files(model, job.tell):
        place = path.relative_to(model)
        is_others = place.parts[0] in index and place.parts[0] not in changes
        is_loose = place.parts[0] not in index and denoiser not in changes  # the denoiser's, if anybody's
        if is_others or is_loose or path.suffix.lower() not in WEIGHTS:
            plain.append(path)
        else:
            groups.setdefault(place.with_name(whole_name(place)).as_posix(), []).append(path)
    own = {part: job._replace(update=job.update.of_component(name)) for part, name in changes.items()}
    fused = [
        name
        for name, paths in groups.items()
        if _fuse_group(name, paths, model, folder, own.get(name.split("/")[0], own.get(denoiser, job)))
    ]
    for part in changes:
        if not any(name.startswith(f"{part}/") for name in fused):
            raise SafepatchError(f"{part}/ holds no weights that can be fused; save the model as safetensors first")
    for path in plain:
        if not _lists_absent(path, folder / path.parent.relative_to(model)):
            shutil.copyfile(path, _target(path, model, folder))
    (folder / note.name).write_text(notes + "\n", "utf-8")


def change(names: Changed) -> Change:
    """What becomes of the tensors of one file that change."""

    def changed(stored: str, tensor: Tensor) -> Tensor:
        for update, name, place in names[stored]:
            tensor = place.put(tensor, update.added(name, place.take(tensor)))
        return tensor

    return changed


def plain_name(name: str, component: str) -> str:
    """A weight's name as patches have it: of a text encoder without the prefix that some classes and files add."""
    return name if component == UNET.component else name.removeprefix(TEXT_MODEL)


def _stored(file: Weights, place: Place) -> Stored:
    """A weight as it is stored, by its shape; where its own bytes are is of no use here."""
    whole = file.tensors[place.name]
    return whole._replace(shape=place.shape(whole.shape))


def _fuse_group(name: str, paths: list[Path], model: Path, folder: Path, job: Job) -> bool:
    """Write the files of one variant of the weights, all its shards, if they can be fused; says whether they can."""
    try:
        files = [open_weights(path, job.allow_pickle) for path in paths]
        changed = job.changed(files)
    except (UnsupportedModel, BaseMismatch, ConfigError) as error:
        job.tell(f"left out: {name} ({error})")
        return False
    for weights in files:
        with _target(weights.path, model, folder).open("xb") as file:
            names = changed[weights.path]
            if isinstance(weights, PickledWeights):
                write_pickle_changed(weights, file, names, change(names))
            else:
                job.write(weights, file, names, weights.metadata)
    job.tell(f"fused: {name}")
    return True


def _files(model: Path, tell: Tell) -> Iterator[Path]:
    """The files of a folder but for hidden folders at its top, where git and the Hub's client keep copies."""
    for top, folders, names in os.walk(model, followlinks=True):
        hidden = [name for name in folders if name.startswith(".") and Path(top) == model]
        for name in hidden:
            tell(f"left out: {name}/ (hidden)")
        folders[:] = sorted(set(folders) - set(hidden))
        yield from (Path(top) / name for name in sorted(names))


def _lists_absent(path: Path, folder: Path) -> bool:
    """Whether a file lists shards of which `folder`, the copy of its own, has none."""
    if ".index." not in path.name or path.suffix != ".json":
        return False
    shards = read_json(path).get("weight_map", {}).values()
    return not any((folder / shard).exists() for shard in set(shards))


def _target(path: Path, model: Path, folder: Path) -> Path:
    """Where a file of the model goes; its folder is made."""
    target = folder / path.relative_to(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    return target
