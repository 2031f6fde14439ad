"""Expression through a volume, after VORTEX (arXiv 2502.17761): planes, patches through depth, training."""
