"""Scales and normalisations."""
