"""A patch on a model of others, from a folder or a single file in the original layout, also image to image.

`python examples/04_your_checkpoint.py CHECKPOINT.safetensors PATCH.safetensors TOKENIZER_FOLDER "PROMPT"` takes yours,
offline, with a prompt that the patch is for; without arguments, a folder with another vendor's model stands in for it.
"""

import sys
import tempfile

import torch
from diffusers import AutoPipelineForImage2Image

import safepatch

PROMPT = sys.argv[4] if len(sys.argv) > 4 else "a knife on a blue background"


def draw(pipe: object, **more: object) -> torch.Tensor:
    """One image of one prompt from the same noise, in [0, 1], (1, 3, H, W)."""
    options = {"num_inference_steps": 6, "guidance_scale": 4.0, "output_type": "pt", **more}
    return pipe(PROMPT, generator=torch.Generator().manual_seed(3), **options).images


with tempfile.TemporaryDirectory() as folder:
    if len(sys.argv) == 1:
        safepatch.load_pipeline("tiny-sd-twemoji").save_pretrained(folder)
    model, patch, tokenizer = sys.argv[1:4] or (folder, "patches/control/weapons.safetensors", None)
    print(safepatch.check(model, patch))  # one line if it does not fit, before any weight is read
    pipe = safepatch.load_pipeline(model, tokenizer=tokenizer)

base = draw(pipe)
with safepatch.apply(pipe, patch):
    patched = draw(pipe)
    img2img = AutoPipelineForImage2Image.from_pipe(pipe)  # made from a patched pipeline, so patched
    (status,) = safepatch.status(img2img)
    print(status, draw(img2img, image=base, strength=0.8).shape)

assert status.active
assert not torch.equal(base, patched)
assert torch.equal(base, draw(pipe))
