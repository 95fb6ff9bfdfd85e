"""The language model that reads template and image: in this process, with a prefix cache, or by vLLM."""
