"""The kinds of denoiser that patches know, and what training may ask of a frozen one."""
