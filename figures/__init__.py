"""Pictures of what a model knows of positions, for `similarity_visualize.py`."""
