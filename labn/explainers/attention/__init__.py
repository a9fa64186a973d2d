"""Maps from attention: those that a network computes for itself, and rollout."""
