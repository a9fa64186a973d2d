"""Train, explain and honestly evaluate image models (LABN, PID, LRP on ResNets, and their baselines)."""
