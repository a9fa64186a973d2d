"""Explainers by relevance propagation: LRP and C3-LRP for classifiers, CRP for detectors."""
