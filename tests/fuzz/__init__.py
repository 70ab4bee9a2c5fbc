"""A differential fuzz test: random models and random uses of them, on stock PyTorch and through rf.fuse."""
