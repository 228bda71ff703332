"""Triton kernels of Pi0, imported as `pi0exp.kernels`; torch and triton are their only imports."""
