"""Masks of whole folders by a trained student, and its ONNX export."""
