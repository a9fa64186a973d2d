"""The rules of relevance propagation, one small function each."""
