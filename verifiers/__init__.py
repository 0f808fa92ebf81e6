"""Acceptance policies: which drafted path is kept, and which token follows it."""
