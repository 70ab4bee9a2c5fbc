"""What is kept between calls: programs, the kernels that run them for a kind of input, and folded and packed parameters."""
