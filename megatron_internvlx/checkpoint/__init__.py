"""Weights between layouts and formats: shards of a layout, Hugging Face names, torch_dist files."""
