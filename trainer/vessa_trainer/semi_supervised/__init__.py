"""UniMatch V2 with the annotator's labels: objective, loop, feedback (Eq. 4 to 9)."""
