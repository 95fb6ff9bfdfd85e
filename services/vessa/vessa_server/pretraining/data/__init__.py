"""Training data of Stage 1: tasks of real and synthetic studies, augmentation, phantoms."""
