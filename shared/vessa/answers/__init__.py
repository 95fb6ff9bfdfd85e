"""Answers as people look at them: labeled volumes, tables and pictures in notebooks."""
