"""Detectors: what does an image show? They judge patches and never choose what a patch is trained on."""
