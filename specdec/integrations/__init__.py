"""Drafters inside other engines."""
