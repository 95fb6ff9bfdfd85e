"""The annotator's labels: fetched ahead, cached, measured."""
