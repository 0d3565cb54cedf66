"""Apply a patch to a pipeline, see that it changes the image, and that taking it off leaves no trace."""

import torch

import safepatch

pipe = safepatch.load_pipeline("tiny-sd")  # a diffusers StableDiffusionPipeline; also a folder or a Hub id


def draw(seed: int = 3) -> torch.Tensor:
    """One image of the same prompt and noise, in [0, 1], (1, 3, 64, 64)."""
    generator = torch.Generator().manual_seed(seed)
    prompt = "a knife on a blue background"
    return pipe(prompt, num_inference_steps=10, guidance_scale=1.5, generator=generator, output_type="pt").images


base = draw()
with safepatch.apply(pipe, "patches/control/weapons.safetensors", scale=1.0) as handle:
    patched = draw()
    print(handle.stats)

assert (base - patched).abs().mean() > 0.01
assert torch.equal(base, draw())  # outside the block, the pipeline is bit-identical to before
