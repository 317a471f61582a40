"""Data sets in the formats that people have, read into one typed record, checked, and written for training."""
