"""Work on whole folders: annotate them, seed a bank, find unlabeled images."""
