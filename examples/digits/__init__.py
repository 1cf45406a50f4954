"""Two small diffusion transformers trained on real 8x8 digits: what every quality figure of omnifx is measured on."""
