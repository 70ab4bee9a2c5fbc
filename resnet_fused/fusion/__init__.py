"""Finding what can be fused in a model: tracing, matching, replacing. `resnet_fused.fuse` is the public side."""
