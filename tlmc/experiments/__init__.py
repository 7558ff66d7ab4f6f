"""Experiments: what a run is, how it is carried out and recorded, and many of them as a sweep."""
