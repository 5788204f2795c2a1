"""Synthetic data: a phantom cohort that looks like BraTS, and shapes for pre-training a promptable model."""
