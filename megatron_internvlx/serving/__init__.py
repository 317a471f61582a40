"""Exported models in vLLM: a plugin that vLLM loads by its entry point. Only `phases` can be imported without vLLM."""
