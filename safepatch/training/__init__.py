"""Training a patch: one loop for every kind and every objective."""
