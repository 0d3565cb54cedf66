"""The card of a patch on the Hub: everything it says stands in the patch, or was given with it."""

import html
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from safepatch.artifact.describe import described
from safepatch.artifact.info import PatchInfo
from safepatch.diffusion import UNET, config_kind, family
from safepatch.errors import printable
from safepatch.hub.reference import PATCH_FILE

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for first
# Licences that the Hub's front matter is written with as they are; any other is `other` and its name.
LICENSES = frozenset(("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
                      "openrail", "openrail++", "creativeml-openrail-m", "gpl-3.0", "agpl-3.0"))  # fmt: skip


@dataclass(frozen=True)
class Beside:
    """What a card says that does not stand in the patch.

    Attributes:
        repo: `user/name` that it is for.
        content_hash: of the patch.
        sha256: of files by name.
        base_model: Hub id of the model that it is for; what the patch records if empty.
        license: what the patch states if empty.
        figures: table of what was measured, as Markdown.
        why_no_lora: one line, where there is no LoRA of the patch.
    """

    repo: str
    content_hash: str
    sha256: dict[str, str]
    base_model: str = ""
    license: str = ""
    figures: str = ""
    why_no_lora: str = ""


def card(info: PatchInfo, beside: Beside) -> str:
    """README.md of a repository that holds this patch; texts from the patch are escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["plain"] = plain
    base, gates = beside.base_model or stated_base(info), _gates(info)
    return environment.get_template("card.md.j2").render(
        front=_front(info, beside, base),
        info=info,
        beside=beside,
        base=base,
        family=family(info.fingerprint),
        is_unet=config_kind(info.fingerprint) is UNET,
        gates=gates,
        learned=[name for name, gate in gates.items() if gate.get("learned")],
        recipe=described(info)["recipe"],
        license=beside.license or info.license,
        patch_file=PATCH_FILE,
        lora_file=LORA_FILE,
    )


def stated_base(info: PatchInfo) -> str:
    """The Hub id that a patch, or every part of a bundle, was trained on; empty where none is recorded."""
    named = {leaf.config.get("model", "") for leaf in _leaves(info)}
    only = named.pop() if len(named) == 1 else ""
    return only if isinstance(only, str) and "/" in only else ""


def plain(text: Any) -> str:
    """`text` on one line, of which Markdown and HTML show every character as it is."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(printable(str(text)), quote=False))


def _front(info: PatchInfo, beside: Beside, base: str) -> str:
    """The front matter, by which the Hub finds and shows it."""
    license, lora = (beside.license or info.license).lower(), not beside.why_no_lora
    named = {"license": license} if license in LICENSES else {"license": "other", "license_name": _name(license)}
    data: dict[str, Any] = {
        "library_name": "diffusers" if lora else "safepatch",
        "pipeline_tag": "text-to-image",
        "tags": ["safepatch", "safety", "text-to-image", info.kind],
        **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
        **(named if license else {}),
    }
    return ModelCardData(**data).to_yaml()


def _name(license: str) -> str:
    """The licence as the Hub takes a name."""
    return re.sub(r"[^a-z0-9.+-]+", "-", license).strip("-")


def _leaves(info: PatchInfo) -> Iterator[PatchInfo]:
    """The patches that a bundle keeps apart; any other patch alone."""
    if not info.is_bundle:
        yield info
        return
    for source in info.sources:
        yield from _leaves(PatchInfo.from_metadata(source["metadata"]))


def _gates(info: PatchInfo) -> dict[str, dict[str, Any]]:
    """Category -> the record of its gate, empty where it has none."""
    records = {name: gate for leaf in _leaves(info) for name, gate in leaf.config.get("gate", {}).items()}
    return {name: records.get(name, {}) for name in info.categories}
