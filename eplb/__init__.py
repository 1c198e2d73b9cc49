"""Expert placement and load balancing for mixture-of-experts models."""
