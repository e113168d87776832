"""What `similarity_visualize.py` draws beyond one model: checkpoints side by side, and the page to explore them."""
