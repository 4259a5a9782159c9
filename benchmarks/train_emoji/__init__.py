"""Trains the small models that ship with the package; see __main__.py."""
