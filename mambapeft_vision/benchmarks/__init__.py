"""The mini benchmark and the measurements of speed."""
