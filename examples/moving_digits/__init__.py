"""A small video diffusion transformer trained on moving digits: factorised attention over space and over time."""
