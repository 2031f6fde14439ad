"""Align an encoder with spatial transcriptomics: one page per method, one loop for all of them."""
