"""Write reports with tables and pictures, for annotator and trainer alike."""
