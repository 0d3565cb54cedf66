"""A page of this machine's own: choose a model and patches, see base and patched side by side, attack, merge."""
