"""sdops: operations on Stable Diffusion model files."""

__version__ = "0.1.0"
