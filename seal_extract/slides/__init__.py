"""Slides: one file per family of readers, the listing of slides, and the overview of one."""
