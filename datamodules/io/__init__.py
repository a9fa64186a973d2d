"""Building blocks of the data modules: sources of samples, splits, samplers, transforms, statistics, tar files."""
