"""Reports that people look at: pages, tables and pictures, the same for annotator and trainer."""
