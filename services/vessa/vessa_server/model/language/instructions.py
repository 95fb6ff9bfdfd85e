"""The instruction bank: instructions for the language model and the answers that it is trained on.

The first two instructions are the paper's own examples (Figure 3, section 3.1).
"""

INSTRUCTIONS = (
    "Segment the target image following the reference segmentation pattern (green overlay).",
    "Apply the segmentation pattern from the template (green overlay) to the target image.",
    "The reference image shows a structure in green overlay. Segment the same structure in the target image.",
    "Two images are given: a reference with a segmentation mask in green overlay, and the target image.",
    "Find in the target image what the green overlay marks in the reference image.",
    "Use the annotated reference image as a guide and outline the matching region in the target image.",
)

DEFAULT_INSTRUCTION = INSTRUCTIONS[0]


def ask(instruction: str, class_name: str) -> str:
    """Return the text between the template and the target image."""
    return f"{instruction} Structure: {spell_out(class_name)}. Target:"


def answer(class_name: str) -> str:
    """Return the answer that is teacher-forced; the state at <SEG> becomes the prompt."""
    return f"The {spell_out(class_name)} is <SEG>"


_SHORT = {
    "lv": "left ventricle",
    "rv": "right ventricle",
    "la": "left atrium",
    "ra": "right atrium",
    "myo": "myocardium",
    "ao": "aorta",
    "ivc": "inferior vena cava",
    "gb": "gallbladder",
}


def spell_out(class_name: str) -> str:
    """Replace abbreviations by the words of Stage 1: "RV cavity" becomes "right ventricle cavity"."""
    return " ".join(_SHORT.get(word.lower(), word) for word in class_name.split())
