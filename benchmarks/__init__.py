"""Measurements of specdec: the MT-Bench speed-up, peers on the same weights, kernels."""
