"""Costs of a run before it starts: parameters, FLOPs, memory, and the pipeline that takes least time."""
