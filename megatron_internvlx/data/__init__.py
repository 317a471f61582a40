"""From annotation files to micro-batches: manifest, conversation, tiles, packing, plan, loader."""
