"""What Stage 1 learns from: tasks of real and synthetic studies, augmentation, phantoms."""
