"""A run folder: who is at work in it, its checkpoints, and going on from one of them."""
