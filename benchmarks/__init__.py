"""Measurements; each module says its command, and writes a dated table under results/."""
