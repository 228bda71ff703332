"""Who mixes: backends for the slot `Attention.attend`."""
