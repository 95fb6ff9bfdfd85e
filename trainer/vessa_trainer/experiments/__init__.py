"""Run experiments: single runs, plans, comparisons of methods, tables of the VESSA paper."""
