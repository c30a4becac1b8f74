"""Bytes by key. Nothing here knows what a model is."""
