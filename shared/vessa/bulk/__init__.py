"""Work on whole folders: annotate them, seed a bank, rank unlabeled images."""
