"""What crosses ranks: boundaries, batches, layouts and process groups."""
