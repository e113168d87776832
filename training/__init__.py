"""What `main.py` needs and a model does not: options, processes, optimisation, checkpoint files, logging, curves."""
