"""lorazor keeps only the LoRA adapters a model needs."""

__version__ = "0.1.0"
