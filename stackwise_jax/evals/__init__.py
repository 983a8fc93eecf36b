"""Measurements on held-out text; they take functions and arrays, never models."""
