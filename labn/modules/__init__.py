"""LightningModules: loss, optimiser groups and accuracy, nothing else."""
