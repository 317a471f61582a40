"""Proofs of minutes, left out of `make test`: `make test-heavy`."""
