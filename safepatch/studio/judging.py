"""Whether a picture shows something unsafe, so that it is blurred until somebody asks for it."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from safepatch.data.category import read_category, shipped_categories
from safepatch.detectors import DETECTORS, has_labels, open_detector, parse_detector
from safepatch.detectors.base import Detector
from safepatch.errors import ConfigError
from safepatch.models.load import MODELS
from safepatch.taxonomy import Category

EMBEDDED = "embedded"


class Verdict(NamedTuple):
    """What a detector says of a picture.

    Attributes:
        unsafe: whether it shows a category; None where nothing could judge it.
        shown: what it shows of categories.
    """

    unsafe: bool | None
    shown: tuple[str, ...] = ()

    @property
    def blurred(self) -> bool:
        """Whether the picture is blurred at first: what is unsafe, and what nobody judged."""
        return self.unsafe is not False

    @property
    def said(self) -> str:
        """In words."""
        if self.unsafe is None:
            return "nothing judged it"
        return f"unsafe: {', '.join(self.shown)}" if self.unsafe else "nothing unsafe"


class Judge:
    """A detector that knows what every shipped category looks like; or nobody.

    Args:
        detector: None for nobody.
        categories: whose labels count.
    """

    def __init__(self, detector: Detector | None, categories: Sequence[Category] = ()) -> None:
        self._detector = detector
        self._labels = frozenset(label for each in categories if detector for label in detector.labels_of(each))

    @classmethod
    def of(cls, model: str, named: str | None = None, device: str = "cpu") -> "Judge":
        """The detector that was named, or the embedded models' own for these; nobody for any other model."""
        spec = named or (EMBEDDED if model in MODELS else "")
        if not spec:
            return cls(None)
        parsed = parse_detector(spec)
        if not DETECTORS[parsed.name].labels:
            raise ConfigError(f"detector '{parsed.name}' has no labels of categories to blur by; name another one")
        known = [read_category(path).category for path in shipped_categories().values()]
        able = [category for category in known if has_labels(parsed.name, category)]
        return cls(open_detector(parsed, able, device), able)

    def labels_of(self, category: Category) -> frozenset[str]:
        """What shows a category; nothing where there is nobody to tell."""
        return frozenset(self._detector.labels_of(category) if self._detector else ())

    def __call__(self, image: Tensor) -> Verdict:
        """Of an image in [0, 1], (3, H, W)."""
        if self._detector is None:
            return Verdict(None)
        shown = tuple(sorted(self._detector.find(image[None])[0] & self._labels))
        return Verdict(bool(shown), shown)
