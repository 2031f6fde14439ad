"""Runs: slides in, embeddings out; options, resume, threads, cohorts and clusters."""
