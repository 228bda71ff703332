"""What is measured beside the whole policy: parts of it, kernels, matrix products. `pi0exp.subject` is the protocol."""
