"""Adapt the Segment Anything Model to brain-tumour MRI, and find out whether it helped."""

__version__ = "0.1.0"
