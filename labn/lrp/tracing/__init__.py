"""From a forward pass to a graph of operations: recorder, operations, graph, residual blocks."""
