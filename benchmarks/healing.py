"""What healing should start from, and what a merged patch should read: the error against the bundle after equal steps.

    python benchmarks/healing.py --categories weapons alcohol --steps 80
    python benchmarks/healing.py --starts linear --instructions concatenated averaged learned

A start is a merge method, or `source`: one of the patches as it is. Instructions are concatenated, averaged state by
state, or concatenated and then learned with the patch. Of errors, 0 is the bundle and 1 is no patch.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from safepatch.artifact.patch_artifact import Part, PatchArtifact
from safepatch.demo import shipped_patch
from safepatch.diffusion import Components
from safepatch.merging import MergeRecipe, merge
from safepatch.models.load import load_pipeline
from safepatch.runtime.apply import activate
from safepatch.runtime.parts import ActivePart
from safepatch.training.gating import without_gate
from safepatch.training.healing import draw_bank, mean_error, train_to_match

READINGS = ("concatenated", "averaged", "learned")


def starting_point(start: str, sources: Sequence[str], instructions: dict[str, str]) -> PatchArtifact:
    """The patch that `start` names, reading all instructions."""
    if start != "source":
        return merge(sources, method=start, conflicts=False)
    patch = without_gate(PatchArtifact.open(sources[0]))
    return replace(patch, info=replace(patch.info, instructions=instructions))


def reading(how: str, part: ActivePart) -> ActivePart:
    """The part with other instruction states to read; the part's own are the instructions side by side."""
    states = part.instruction_states
    if how == "averaged":
        states = states.unflatten(1, (len(part.categories), -1)).mean(1)
    if how == "learned":  # as a parameter of the patch, it is trained with it
        part.patch.register_parameter("learned_instruction", nn.Parameter(states.clone()))
        states = dict(part.patch.named_parameters())["learned_instruction"]
    return part._replace(instruction_states=states)


def main(arguments: argparse.Namespace) -> None:
    """Print one line per start."""
    paths = [str(shipped_patch(name)) for name in arguments.categories]
    pipe = load_pipeline(arguments.model)
    components = Components.of(pipe).freeze()
    bundle = merge(paths, conflicts=False)
    sources = [activate(part, components) for part in bundle.parts()]
    bank = draw_bank(pipe, bundle, arguments.seed, is_gated=any(source.patch.gate for source in sources))
    recipe = MergeRecipe(tuple(paths), method="linear", seed=arguments.seed, heal=arguments.steps)
    print(f"{', '.join(arguments.categories)}, {arguments.steps} steps")
    print(f"{'start':<16}{'instructions':<16}{'before':>8}{'after':>8}{'s/step':>8}")
    for start, how in itertools.product(arguments.starts, arguments.instructions):
        merged = activate(Part(1.0, starting_point(start, paths, bundle.info.instructions)), components)
        merged = reading(how, merged)
        before, began = mean_error(merged, sources, components, bank, arguments.seed), time.perf_counter()
        train_to_match(merged, sources, components, bank, recipe)
        seconds = (time.perf_counter() - began) / arguments.steps
        after = mean_error(merged, sources, components, bank, arguments.seed)
        print(f"{start:<16}{how:<16}{before:>8.3f}{after:>8.3f}{seconds:>8.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--categories", nargs="+", default=["weapons", "alcohol"])
    parser.add_argument("--starts", nargs="+", default=["linear", "source"])
    parser.add_argument("--instructions", nargs="+", default=["concatenated"], choices=READINGS)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="tiny-sd")
    main(parser.parse_args())
