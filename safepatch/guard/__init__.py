"""Which prompts are for a category: a classifier distilled from weak labelers, for hosts that may refuse."""
