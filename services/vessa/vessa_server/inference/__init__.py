"""The paper's inference (Sec. 3.1 and 3.2, Workflow), one module for each step.

retrieval (Eq. 1) -> first_pass -> region_of_interest -> language_prompt (h_seg at <SEG>) and template_memory
(SAM 2's memory) -> mask_prediction (memory attention, mask decoder) -> fusion. `annotator` runs the steps.
"""
