"""Template banks: templates, their index, stores and permissions."""
