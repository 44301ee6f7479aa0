"""Application 1: diffusion transformers."""
