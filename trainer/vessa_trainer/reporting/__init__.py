"""Reports, plots, trackers and diagnostics of runs."""
