"""Using a patch: find a model by name, attach a patch to its pipeline, and make sure that it ran."""
