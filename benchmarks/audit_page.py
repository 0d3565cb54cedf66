"""Draw `docs/pictures/audit.png`: an audit's page as a browser shows it, with a guard beside the patch.

    python -m benchmarks.audit_page          from the root of a checkout; needs Chromium, its driver, and selenium

The prompts are those of benchmarks/audit.py, and some that ask for weapons in words that no file lists.
"""

import tempfile
from pathlib import Path

from benchmarks.audit import prompts
from safepatch.data.corpus import Corpus
from safepatch.guard.config import GuardConfig
from safepatch.guard.train import train
from safepatch.hosting.audit_log import audit
from safepatch.models.load import load_pipeline
from safepatch.shipped import shipped_patch
from tests.browser import browser, sized

PICTURE = Path("docs/pictures/audit.png")
WEAPONS = "weapons"
PROMPTS, UNLISTED = 900, 100
WIDTH, HEIGHT = 900, 1060  # of the page, CSS pixels


def write_page(folder: Path) -> Path:
    """The page of a small audit."""
    corpus, pipe = Corpus.open(WEAPONS), load_pipeline("tiny-sd")
    guard = folder / "guard.safetensors"
    train([corpus], GuardConfig(captions=256), pipe).save(guard)
    texts = [*prompts(PROMPTS), *(prompt.text for prompt in corpus.evaluation("heldout", UNLISTED, 0))]
    (folder / "prompts.txt").write_text("\n".join(texts), encoding="utf-8")
    return audit(folder / "prompts.txt", pipe, shipped_patch(WEAPONS, "lora"), folder / "audit", guard=guard).page


def main() -> None:
    """Audit, show, keep."""
    with tempfile.TemporaryDirectory() as name, browser(Path(name) / "profile") as driver:
        page = write_page(Path(name))
        with sized(driver, WIDTH, height=HEIGHT):
            driver.get(page.as_uri())
            driver.execute_script("document.querySelector('details').open = true")
            driver.save_screenshot(str(PICTURE))


if __name__ == "__main__":
    main()
