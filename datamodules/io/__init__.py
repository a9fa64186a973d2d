"""What the data modules are made of: sources of samples, splits, samplers, transforms, statistics, tar files."""
