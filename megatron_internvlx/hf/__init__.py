"""The remote code that an exported directory carries: plain PyTorch and transformers, nothing of this package."""
