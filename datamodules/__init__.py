"""LightningDataModules, one per data set."""
