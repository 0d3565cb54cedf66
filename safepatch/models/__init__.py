"""Where pipelines come from: folders, single files, the Hub and the embedded models."""
