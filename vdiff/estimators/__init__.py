"""Gradient estimators: a model and a bound become an objective."""
