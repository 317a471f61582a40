"""How a run starts, goes on after a fault, is stopped, and ends."""
