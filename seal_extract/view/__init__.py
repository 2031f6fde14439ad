"""Pictures of what was found and cut."""
