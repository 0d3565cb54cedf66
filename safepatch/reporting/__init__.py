"""A folder of results becomes one self-contained page: reads `results.jsonl` and images only, never a model."""
