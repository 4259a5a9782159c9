"""Many requests on one loaded pipeline."""
