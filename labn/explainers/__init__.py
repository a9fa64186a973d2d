"""Explainers: small objects called as `maps = explainer(model, images, targets)`."""
