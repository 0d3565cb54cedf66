"""What a patch does, measured: detectors, metrics with intervals, and the suite that writes `results.jsonl`."""
