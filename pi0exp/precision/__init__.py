"""In which numbers the policy is computed; the reference and the tolerance follow from it."""
