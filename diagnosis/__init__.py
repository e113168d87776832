"""What `diagnose.py` is made of: checkpoints and their images, the measures over them, tables and pictures."""
