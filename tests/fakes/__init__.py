"""Small real implementations that stand in for what a test cannot afford to start."""
