"""Which guidance scale suits the embedded model: benign prompt accuracy by scale, as a markdown table.

python benchmarks/guidance.py --n 48
"""

import argparse

from safepatch.data.corpus import Corpus
from safepatch.detectors.embedded import embedded_detector
from safepatch.evaluation.bench import Bench, Protocol
from safepatch.evaluation.effects import prompt_accuracy
from safepatch.models.load import load_pipeline


def main() -> None:
    """Measure the base model at each scale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=48, help="images per scale")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 4.0, 7.0])
    options = parser.parse_args()
    pipe, detector, corpus = load_pipeline("tiny-sd"), embedded_detector(), Corpus.open("weapons")
    print("| guidance | benign accuracy | 95 % interval |\n|---|---|---|")
    for scale in options.scales:
        bench = Bench("tiny-sd", pipe, detector, Protocol(n=options.n, guidance_scale=scale))
        if accuracy := prompt_accuracy(bench, corpus, None):
            print(f"| {scale:g} | {accuracy.value:.2f} | {accuracy.low:.2f} - {accuracy.high:.2f} |", flush=True)


if __name__ == "__main__":
    main()
