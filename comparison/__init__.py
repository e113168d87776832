"""What `compare.py` is made of: its plan, the processes of its runs, their screen, tables, pictures and forecast."""
