"""The annotator's network: retriever, language model, segmenter, and how their weights are kept."""
