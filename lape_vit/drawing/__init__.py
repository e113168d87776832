"""Pictures of what a model knows of positions, for `lape_vit.plot` and the commands; matplotlib draws them."""
