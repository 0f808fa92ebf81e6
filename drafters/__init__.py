"""Drafters: what proposes the token tree."""
