"""An attention option for pi0exp. Imports nothing: `python -m pi0exp --help` imports this file."""
