"""What models make of positions, as tensors only: views of layers, attention maps. No plotting."""
