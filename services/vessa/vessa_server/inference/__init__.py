"""The paper's inference: retrieve, first pass, region of interest, masks, fusion."""
