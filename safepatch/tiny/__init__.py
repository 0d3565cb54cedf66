"""The embedded model: a small but real Stable Diffusion, trained on scenes of openly licensed emoji."""
