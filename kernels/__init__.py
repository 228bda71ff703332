"""Triton kernels of Pi0, imported as `pi0exp.kernels`; all but `bench` import torch, triton and each other only."""
