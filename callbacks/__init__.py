"""Lightning callbacks that drive explanation and evaluation."""
