"""Helpers that know nothing of the project but each other: errors, files and locks, checks, progress, start-up."""
