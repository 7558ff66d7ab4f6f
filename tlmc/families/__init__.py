"""Families of potentials, a folder each: architecture, start models, and how they learn.

A family is found by its folder alone (:mod:`tlmc.potentials.registry`), so that a new one changes nothing outside.
"""
