"""Preparing task folders: fetching, unpacking, checking and importing images."""
