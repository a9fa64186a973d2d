"""Lambda networks: the layer, its position path, the linear map that relevance passes through, and ResNets of them."""
