"""How a model is run without being changed: modes, fast copies, fingerprints, temporary hooks."""
