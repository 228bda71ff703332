"""What happens to cameras that are not there."""
