"""Trained functions in files: saved by `jax.export`, called from any JAX code without the code that made them."""
