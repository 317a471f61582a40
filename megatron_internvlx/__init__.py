"""Megatron-InternVL-X: InternVL-X vision-language models trained on Megatron-Core."""

__version__ = "0.2.0"
