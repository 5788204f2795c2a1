"""The sub-commands of ``medsam-lora``: each parses its options, calls one stage and prints what came of it.

A command imports its stage inside the function, so that ``--help`` and ``info`` answer without torch.
"""
