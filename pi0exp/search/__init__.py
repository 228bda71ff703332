"""study=search: Optuna proposes stacks, the study's own frame measures them, the best one becomes a named stack."""
