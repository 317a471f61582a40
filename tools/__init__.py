"""Command-line tools; each module is a script of its own."""
