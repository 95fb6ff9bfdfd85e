"""Single runs, comparisons of methods and the paper's tables."""
