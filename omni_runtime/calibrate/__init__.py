"""`omni calibrate`: the numbers that a method needs, fitted to a model."""
