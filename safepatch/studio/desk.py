"""What the page's buttons do: settings in, values out; one model is held at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from safepatch.diffusion import quiet
from safepatch.errors import ConfigError
from safepatch.progress import bar
from safepatch.studio import attacking, chosen, commands
from safepatch.studio.attacking import Attacked
from safepatch.studio.drawing import Pair, draw
from safepatch.studio.judging import Judge
from safepatch.studio.merged import Merged, merged
from safepatch.studio.settings import Settings


@dataclass
class Desk:
    """Where pictures are asked for, by one thread at a time.

    Attributes:
        load: a model's name to its pipeline.
        start: what is set before anybody sets anything.
        detector: that judges pictures; None is the embedded models' own for these, and nobody for others.
        device: where it judges.
        allow_pickle: whether a model may be a pickle.
        opening: words of a command line that say how models are opened.
    """

    load: Callable[[str], Any]
    start: Settings = field(default_factory=Settings)
    detector: str | None = None
    device: str = "cpu"
    allow_pickle: bool = False
    opening: Sequence[str] = ()
    _held: tuple[str, Any, Judge] | None = field(default=None, repr=False)

    def draw(self, settings: Settings) -> list[Pair]:
        """Base and patched, seed by seed; raises `SafepatchError` for what cannot be drawn so."""
        pipe, judge = self._model(settings)
        if not settings.patches:
            return draw(pipe, None, 1.0, settings, judge)
        return draw(pipe, chosen.opened(settings), self._scale(settings), settings, judge)

    def attack(self, settings: Settings) -> Attacked:
        """What an attack brings back; raises `SafepatchError` for what cannot be attacked so."""
        if not settings.patches:
            raise ConfigError("nothing to attack; tick a patch under Patches")
        pipe, judge = self._model(settings)
        return attacking.attack(pipe, chosen.opened(settings), self._scale(settings), settings, judge)

    def merge(self, settings: Settings, is_kept: bool) -> Merged:
        """The chosen patches as one; raises `SafepatchError` for what cannot be merged so."""
        return merged(settings, is_kept)

    def sliders(self, settings: Settings) -> list[chosen.Slider]:
        """The strengths that can be set."""
        return chosen.sliders(settings, chosen.infos(settings))

    def commands(self, settings: Settings) -> list[str]:
        """The same as command lines."""
        return commands.commands(settings, self.sliders(settings), self.opening)

    def _scale(self, settings: Settings) -> Any:
        return chosen.scale(self.sliders(settings))

    def _model(self, settings: Settings) -> tuple[Any, Judge]:
        """The pipeline, once patches are known to fit it; the one before is let go."""
        chosen.require_fits(settings, self.allow_pickle)
        if self._held is None or self._held[0] != settings.model:
            self._held = None
            with bar(desc=f"loading {settings.model}"):
                judge = Judge.of(settings.model, self.detector, self.device)
                self._held = settings.model, quiet(self.load(settings.model)), judge
        return self._held[1:]
