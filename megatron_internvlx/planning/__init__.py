"""What a run costs before it starts: parameters, FLOPs, memory, and the pipeline that takes least time."""
