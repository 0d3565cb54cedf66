"""A receipt: how an image was made and what the patch did to it; signed, checked, and proven by drawing again."""

import tempfile
from pathlib import Path

import safepatch
from safepatch.diffusion import quiet
from safepatch.hosting.keys import keygen
from safepatch.hosting.making import Asked
from safepatch.hosting.receipt import verify_image
from safepatch.hosting.replay import replay
from safepatch.hosting.stamp import Stamp

PATCH = Path("patches/lora/weapons.safetensors")
pipe, receipts = quiet(safepatch.load_pipeline("tiny-sd")), []
with tempfile.TemporaryDirectory() as name:
    image = Path(name) / "image.png"
    private, public = keygen(Path(name) / "me.pem")
    for prompt in ("a dog on a blue background", "a knife on a blue background"):
        asked = Asked.of(pipe, prompt, seed=3, steps=4, guidance_scale=None, negative_prompt=None)
        with safepatch.apply(pipe, PATCH) as handle:
            print(*Stamp.of(private).draw(pipe, handle, asked, image), sep="\n")
        verified = verify_image(image, public)  # raises where a pixel, or a word of the receipt, was changed
        print(*verified.lines(), *replay(image, verified, pipe, PATCH, prompt), sep="\n")
        receipts.append(verified.receipt)

dog, knife = receipts
assert dog["identical_to_base"]
assert dog["denoising"]["acted_on"] == []
assert not knife["identical_to_base"]
assert knife["denoising"]["acted_on"] == [0, 1, 2, 3]
