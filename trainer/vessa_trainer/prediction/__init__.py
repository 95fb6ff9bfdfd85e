"""Predict masks of whole folders by a trained student, and export it as ONNX."""
