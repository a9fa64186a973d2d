"""The mathematics of the metrics, without state."""
