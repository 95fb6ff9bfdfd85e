"""Stage 1: pretraining the annotator as a reference-guided segmentation assistant (paper section 3.1)."""
