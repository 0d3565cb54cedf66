"""Rebuild the embedded model from the recipe: `python -m safepatch.tiny.build WORK` (hours on two cores; resumes).

Order: autoencoder, tokenizer and text encoder, UNet, detectors, siblings. Checkpoints stay in WORK, so an interrupted
build goes on where it stopped; what ships is written to `safepatch/assets`.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from safepatch.tiny.classifier import train_classifier
from safepatch.tiny.models import ASSETS, BASE, load_tiny
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
    (ASSETS / "siblings").mkdir(exist_ok=True)
    for name in RECIPES:
        build_sibling(name, work)


def build_sibling(name: str, work: Path) -> None:
    """Fine-tune one sibling of the shipped base and write its deltas into the package's assets."""
    base, recipe = load_tiny(BASE), RECIPES[name]
    out = ASSETS / "siblings" / f"{name}.safetensors"
    loss = denoising_loss(sibling_pool(base.vae, recipe), base.tokenizer, base.text_encoder)
    train_sibling(base.unet, loss, recipe, work / f"{name}.pt", out)


DETECTOR, SECOND = ASSETS / "detector.safetensors", ASSETS / "detector-second.safetensors"

if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny"))
