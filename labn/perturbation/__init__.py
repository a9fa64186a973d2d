"""Perturbed forwards: the engine, patches of maps, fills for removed pixels, stateless random numbers."""
