"""A category file of one's own to begin with: commented, and valid as it is."""

from pathlib import Path

from safepatch.data.category import NAME
from safepatch.errors import ConfigError, SafepatchError

_YAML = """\
# A category for safepatch, to be edited.  Try it:  safepatch train {name}.yaml model=YOUR-MODEL --dry-run
# Whatever you leave out has a sensible default. Prompts that involve minors are left out, always.
name: {name}
definition: one line by which a person can decide whether an image belongs to it
# What a control or lite patch reads; a lora patch does without.
instruction: "no {name}, show something harmless instead"

# Unsafe prompts, each with its safe twin (column `safe`). CSV, TSV, JSONL, JSON, TOML or txt; the columns of public
# sets (I2P, CoPro, Ring-A-Bell, COCO, LECO ...) are found by their names.
pairs: {name}.csv
# Where the safe twin comes from: column | replace | target | empty | guided.
rewrite: {{by: column}}
#   replace: each concept below becomes its replacement
#   target:  {{by: target, target: "a quiet landscape"}}, one prompt for all
#   guided:  nobody writes a twin: the model is pushed away from whichever of the concepts below a prompt names

# Instead of a file of prompts, or beside it: phrases as they stand in a prompt. Templates multiply them, and the
# `heldout` names are kept for evaluation. Diverse wordings beat one word.
concepts:
  - name: a thing to remove
    synonyms: [another name of the thing]
    heldout: [a name that training does not see]
    replacement: a harmless thing

# Wordings, {{x}} being a concept and {{y}} something harmless beside it, and lists of harmless things. Shipped ones are
# used; each of these takes their place.
# templates: ["{{x}}", "a photo of {{x}}", "{{x}} and {{y}} on a {{color}} wall"]
# heldout_templates: ["there is {{x}} here"]
# fills: {{color: [white, blue]}}
# companions: [common.txt]
# benign: [common.txt]

# Harmless things that look like it, and must stay as they are. This list is worth the most time.
lookalikes: [a harmless thing]
# Files of whole prompts that must stay as they are, and other categories that are none of this patch's business.
retain: []
neighbours: []
# Unsafe prompts for evaluation only; one that is also among `pairs` is an error.
# heldout: {name}-heldout.csv

# Which labels of a detector count as this category; only evaluation reads them.
labels:
  clip: ["a photo of a thing to remove"]
  # safety-checker: [nsfw]
  # q16: [inappropriate]
"""
_CSV = """\
# One row a prompt. Rows of your own first; fifty that differ are better than five hundred that do not.
prompt,safe
a thing to remove on a table,a harmless thing on a table
a photo of a thing to remove in a garden,a photo of a harmless thing in a garden
"""


def write_category(name: str, folder: Path) -> list[Path]:
    """Write `<name>.yaml` and `<name>.csv` into `folder` and return their paths.

    Raises:
        ConfigError: for a name that cannot be a category's, or files that are there already.
        SafepatchError: when the folder cannot be written.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(f"'{name}' cannot be a category's name; use letters, digits, - and _")
    texts = {folder / f"{name}.yaml": _YAML.format(name=name), folder / f"{name}.csv": _CSV}
    for path in texts:
        if path.exists():
            raise ConfigError(f"{path} is there already; choose another name, or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SafepatchError(f"cannot write to {folder} ({error.strerror}); choose another -o") from error
    return list(texts)
