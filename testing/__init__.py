"""What the tests and the benchmarks share: a pool of ranks, and a look into checkpoints."""
