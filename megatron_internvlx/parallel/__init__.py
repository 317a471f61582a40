"""Exchange between ranks: boundaries, batches, layouts and process groups."""
