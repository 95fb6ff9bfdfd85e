"""The folder of an image as the name of its patient."""
