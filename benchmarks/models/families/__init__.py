"""The builders of the tiny pipelines, a file for each family of models."""
