"""What `resnet-fused bench` runs: workloads, variants to compare, interleaved timing, and its report."""
