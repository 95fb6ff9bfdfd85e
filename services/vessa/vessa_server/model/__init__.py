"""The annotator's network: retriever, language model, segmenter, and the format of their weights."""
