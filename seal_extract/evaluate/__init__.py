"""How well embeddings predict gene expression, compared with colour features, chance and the base encoder."""
