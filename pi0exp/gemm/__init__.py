"""Who multiplies: backends for the slot `Linear.matmul`."""
