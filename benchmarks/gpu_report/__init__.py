"""One command that measures the trainer on one GPU: `python -m benchmarks.gpu_report`; see `__main__.py`."""
