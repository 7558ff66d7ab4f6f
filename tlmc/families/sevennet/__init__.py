"""The SevenNet family: equivariant message passing, trained on inorganic crystals; SevenNet-0.

Needs the optional package of ``pip install 'tlmc[sevennet]'``.
"""
