"""One process: its ranks, signals, seeds, files and downloads, and what it shows."""
