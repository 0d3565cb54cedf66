"""Write a lora patch into a copy of a checkpoint, which any diffusers program then loads without safepatch."""

import tempfile

from diffusers import StableDiffusionPipeline

import safepatch

with tempfile.TemporaryDirectory() as folder:
    model = safepatch.fuse_model("tiny-sd-twemoji", "patches/lora/weapons.safetensors", f"{folder}/safer")
    fused = StableDiffusionPipeline.from_pretrained(model).unet.state_dict()

host = safepatch.load_pipeline("tiny-sd-twemoji").unet.state_dict()
changed = sorted(name for name, weight in fused.items() if not weight.equal(host[name]))
print(f"{len(changed)} of {len(fused)} tensors changed, e.g. {changed[0]}")
assert changed
assert all(".attentions." in name for name in changed)
