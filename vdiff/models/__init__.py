"""Latent-variable models: one file, one factory."""
