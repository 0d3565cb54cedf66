"""How much is learned from, and how its pictures are drawn."""

from dataclasses import dataclass
from pathlib import Path

from safepatch.data.corpus import COMPANIONS
from safepatch.data.shards import usual_cache
from safepatch.diffusion.askable import require_drawable
from safepatch.errors import ConfigError


@dataclass(frozen=True)
class DataConfig:
    """What to learn from.

    Attributes:
        pairs: unsafe prompts with their safe twins, and as many prompts that must stay as they are.
        companions: share of the captions made of concepts that show something harmless too.
        wordless: share of the pairs of a batch that show the unsafe picture under words that say nothing of it, for a
            patch whose gate looks at pictures; both members of as many pairs are drawn. 0 for none.
        steps: denoising steps in which the model draws a picture of each.
        guidance: of its classifier-free guidance; what suits the family if not given.
        size: of the pictures in pixels; the model's own if not given.
        batch_size: pictures that are drawn at once.
        cache: folder where what was drawn is kept; the user's cache folder if not given.
        seed: of prompts and pictures.
        select: detector that must find the category in an unsafe picture and not in its safe twin, for objectives that
            learn from both; it should be another than the one that judges the patch. None takes all pictures.
        tries: with `select`, how often a pair is drawn before it is left out.
        strength: for objectives that learn from both pictures of a pair: the safe one is the unsafe one drawn again,
            with as much noise, in (0, 1], by the safe prompt and away from the unsafe one. None draws it from the noise
            that the unsafe one was drawn from.
    """

    pairs: int = 768
    companions: float = COMPANIONS
    wordless: float = 0.0
    steps: int = 10
    guidance: float | None = None
    size: int | None = None
    batch_size: int = 16
    cache: str | None = None
    seed: int = 0
    select: str | None = None
    tries: int = 4
    strength: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        for name in ("pairs", "steps", "batch_size", "tries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, not {getattr(self, name)}")
        if self.size is not None and self.size < 1:
            raise ConfigError(f"data.size must be at least 1 pixel, not {self.size}")
        require_drawable(self.steps, self.guidance)
        for name in ("companions", "wordless"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.{name} must be within [0, 1], not {getattr(self, name)}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ConfigError(f"data.strength must be above 0 and at most 1, not {self.strength}")

    @property
    def folder(self) -> Path:
        """Where rows are kept."""
        return Path(self.cache).expanduser() if self.cache else usual_cache()
