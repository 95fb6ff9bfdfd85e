"""The language model that looks at template and image: in process, its prefix cache, and vLLM."""
