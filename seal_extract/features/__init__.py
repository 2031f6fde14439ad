"""Feature files: HDF5, the layouts that other tools read, checks and exports."""
