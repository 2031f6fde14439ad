"""The grid of patches, and the stream of their pixels in batches on the device."""
