"""Write a lora patch into a copy of a checkpoint, which any diffusers program then loads without safepatch."""

import tempfile
from pathlib import Path

from diffusers import StableDiffusionPipeline

import safepatch
from safepatch.runtime.fuse import fuse_model

with tempfile.TemporaryDirectory() as folder:
    config = safepatch.load_train_config(
        Path("configs/patches/lora/weapons.yaml"),
        [f"output={folder}/run", "training.steps=2", "training.batch_size=2", "data.pairs=4"],
    )
    patch = safepatch.train(safepatch.load_pipeline("tiny-sd"), config)  # two steps: fuse works, the patch does not yet
    model = fuse_model("tiny-sd-twemoji", patch, f"{folder}/safer")
    fused = StableDiffusionPipeline.from_pretrained(model).unet.state_dict()

host = safepatch.load_pipeline("tiny-sd-twemoji").unet.state_dict()
changed = sorted(name for name, weight in fused.items() if not weight.equal(host[name]))
print(f"{len(changed)} of {len(fused)} tensors changed, e.g. {changed[0]}")
assert changed
assert all(".attentions." in name for name in changed)
