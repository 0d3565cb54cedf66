"""Rebuild the embedded model from the recipe: `python -m safepatch.tiny.build WORK` (hours on two cores; resumes).

Order: autoencoder, tokenizer and text encoder, UNet, detectors, the transformer, siblings. Checkpoints stay in WORK,
so an interrupted build goes on where it stopped; what ships is written to `safepatch/assets`.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from safepatch.tiny.classifier import train_classifier
from safepatch.tiny.models import ASSETS, BASE, FLOW, load_tiny
from safepatch.tiny.sd3 import POOL as FLOW_POOL
from safepatch.tiny.sd3 import Texts, counting, flow_loss, train_transformer
from safepatch.tiny.sd3_files import save_sd3, shared_parts
from safepatch.tiny.sd3_text import train_second_encoder
from safepatch.tiny.second import train_second
from safepatch.tiny.siblings import RECIPES, sibling_pool, train_sibling
from safepatch.tiny.text import train_text_encoder
from safepatch.tiny.unet import POOL, assemble, denoising_loss, encode_pool, train_unet
from safepatch.tiny.vae import VENDOR_WEIGHTS, psnr, train_vae


def build(work: Path) -> None:
    """Run the whole recipe with checkpoints in `work` and write what ships into the package's assets."""
    work.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    vae = train_vae(work / "vae.pt").eval()
    print("autoencoder PSNR, dB:", {vendor: round(psnr(vae, vendor), 1) for vendor in VENDOR_WEIGHTS})
    tokenizer, text_encoder, accuracy = train_text_encoder(work / "text.pt")
    print(f"text encoder reads both concepts of {accuracy:.1%} of unseen captions")
    text_encoder.eval()
    unet = train_unet(encode_pool(vae, "noto", POOL, seed=7), tokenizer, text_encoder, work / "unet.pt")
    assemble(unet, vae, text_encoder, tokenizer).to(torch.float16).save_pretrained(ASSETS / BASE)
    classifier = train_classifier(load_tiny(BASE), work / "detector.pt")
    save_file({k: v.half() if v.is_floating_point() else v for k, v in classifier.state_dict().items()}, DETECTOR)
    second = train_second(load_tiny(BASE), work / "second.pt")
    save_file({k: v.half() for k, v in second.state_dict().items()}, SECOND)
    build_flow(work)
    (ASSETS / "siblings").mkdir(exist_ok=True)
    for name in RECIPES:
        build_sibling(name, work)


def build_flow(work: Path) -> None:
    """Train the transformer of SD3's layout on the shipped base's latents and words, and write its folder."""
    parts = shared_parts(ASSETS / BASE)
    tokenizer, first = parts["tokenizer"], parts["text_encoder"]
    second, accuracy = train_second_encoder(tokenizer, first.config, work / "text-second.pt")
    print(f"second text encoder reads both concepts of {accuracy:.1%} of unseen captions")
    pool = encode_pool(parts["vae"], "noto", FLOW_POOL, seed=7)
    transformer = train_transformer(pool, Texts(tokenizer, first, second), work / "transformer.pt")
    save_sd3(transformer, second, ASSETS / BASE, ASSETS / FLOW)


def build_sibling(name: str, work: Path) -> None:
    """Fine-tune one sibling of the shipped base or transformer and write its deltas into the package's assets."""
    recipe = RECIPES[name]
    base, out = load_tiny(recipe.base), ASSETS / "siblings" / f"{name}.safetensors"
    pool = sibling_pool(base.vae, recipe)
    if recipe.base == FLOW:
        host, loss = counting(base.transformer), flow_loss(pool, Texts.of(base))
    else:
        host, loss = base.unet, denoising_loss(pool, base.tokenizer, base.text_encoder)
    train_sibling(host, loss, recipe, work / f"{name}.pt", out)


DETECTOR, SECOND = ASSETS / "detector.safetensors", ASSETS / "detector-second.safetensors"

if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny"))
