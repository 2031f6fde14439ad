"""Genes: predict expression from embeddings, embed expression, and search slides by both."""
