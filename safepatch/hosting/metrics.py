"""What a server counts, for Prometheus: each application has a registry of its own."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from safepatch.hosting.worker import Worker

SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100)
IMAGES = (1, 2, 4, 8, 16, 32)
MEDIA_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counters and histograms of one server.

    Attributes:
        requests: by path and status code.
        images: drawn, by whether the patch acted on them.
        opened: images for which a category's gate opened.
        judged: prompts that a guard judged, by what came of them (`passed`, `claimed` and drawn nevertheless,
            `rewritten`, `blocked`, `failed`) and the category that claimed them.
    """

    def __init__(self) -> None:
        kept = self._registry = CollectorRegistry()
        self.requests = Counter("safepatch_requests", "answers to requests", ["path", "code"], registry=kept)
        self.images = Counter(
            "safepatch_images", "images, by whether the patch acted on them", ["acted"], registry=kept
        )
        self.opened = Counter("safepatch_gate_opened", "images for which a gate opened", ["category"], registry=kept)
        self.judged = Counter(
            "safepatch_guard_prompts", "prompts that the guard judged", ["outcome", "category"], registry=kept
        )
        self._seconds = Histogram("safepatch_batch_seconds", "seconds of a batch", buckets=SECONDS, registry=kept)
        self._batches = Histogram("safepatch_batch_images", "images of a batch", buckets=IMAGES, registry=kept)
        self._waiting = Gauge("safepatch_waiting", "images that wait to be drawn", registry=kept)

    def watch(self, images: int, seconds: float) -> None:
        """A batch was drawn."""
        self._batches.observe(images)
        self._seconds.observe(seconds)

    def page(self, worker: Worker) -> bytes:
        """All of them, as Prometheus reads them."""
        self._waiting.set(worker.waiting)
        return generate_latest(self._registry)
