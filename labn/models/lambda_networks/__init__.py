"""Lambda networks: the layer, its position path, its linear map for relevance propagation, and lambda ResNets."""
