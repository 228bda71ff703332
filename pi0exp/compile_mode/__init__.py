"""Whether and how torch.compile traces the stages."""
