"""Start, resumption after a fault, stop and end of a run."""
