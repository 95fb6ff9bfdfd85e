"""The command line of the annotator."""
