"""What a host does around drawing: audit prompts beforehand, leave receipts, serve."""
