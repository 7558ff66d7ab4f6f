"""The tables of the thesis: ablations and the case study, as lists of runs and layouts of what was recorded."""
