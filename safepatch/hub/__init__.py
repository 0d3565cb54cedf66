"""Patches on the Hugging Face Hub: what names one, how it gets there and back, and the card that goes with it."""

from safepatch.hub.card import LORA_FILE, Beside, card, stated_base
from safepatch.hub.fetching import Fetched, fetch, located, source_of
from safepatch.hub.figures import figures
from safepatch.hub.pushing import Pushed, license_of, push, require_repo, require_token
from safepatch.hub.reference import PATCH_FILE, Reference

__all__ = [
    "LORA_FILE",
    "PATCH_FILE",
    "Beside",
    "Fetched",
    "Pushed",
    "Reference",
    "card",
    "fetch",
    "figures",
    "license_of",
    "located",
    "push",
    "require_repo",
    "require_token",
    "source_of",
    "stated_base",
]
