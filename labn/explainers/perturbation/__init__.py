"""Explainers that perturb the image: RISE and occlusion."""
