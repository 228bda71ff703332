"""Whether kernels are launched one by one or replayed as a captured graph."""
