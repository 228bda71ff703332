"""The plain Pi0: what every optimization is compared with."""
