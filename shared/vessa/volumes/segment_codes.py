"""Standard codes of segments: SNOMED CT concepts for the class names that the field uses.

A viewer or archive then knows that a segment shows the liver, whatever language its label is in. Codes are
those of DICOM CID 7150 (categories) and the anatomy and lesion context groups of PS3.16.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

STRUCTURE = ("91723000", "Anatomical Structure")
LESION = ("49755003", "Morphologically Abnormal Structure")
_LEFT, _RIGHT = ("7771000", "Left"), ("24028007", "Right")


@dataclass(frozen=True)
class SegmentCode:
    """What a segment shows: (code, meaning) of SNOMED CT each; side: laterality, None where it has none."""

    category: tuple[str, str]
    kind: tuple[str, str]
    side: tuple[str, str] | None = None


# Pattern of the normalized class name (lower case, single spaces) -> category and type. The first match
# counts.
_TABLE: tuple[tuple[str, tuple[str, str], tuple[str, str]], ...] = (
    (r"((malignant|benign|liver|kidney|brain|pancreas|lung|enhancing) )?(tumou?r|neoplasm|cancer)",
     LESION, ("108369006", "Neoplasm")),
    (r"(colon |colorectal )?polyps?", LESION, ("68496003", "Polyp of colon")),
    (r".*\b(cyst|cysts)", LESION, ("367643001", "Cyst")),
    (r".*\b(edema|oedema)", LESION, ("79654002", "Edema")),
    (r".*\bnecrosis", LESION, ("6574001", "Necrosis")),
    (r".*\bnodules?", LESION, ("27925004", "Nodule")),
    (r".*\b(lesions?|melanoma|nevus)", LESION, ("52988006", "Lesion")),
    (r"(cavity of (the )?right ventricle|right ventric(le|ular)( cavity| blood ?pool| cavity of heart)?|rv)",
     STRUCTURE, ("53085002", "Right ventricle of heart")),
    (r"(cavity of (the )?left ventricle|left ventric(le|ular)( cavity| blood ?pool)?|lv)",
     STRUCTURE, ("87878005", "Left ventricle of heart")),
    (r"(left ventric(le|ular)|lv) (myocardium|myo|wall)",
     STRUCTURE, ("49848007", "Left Ventricle Myocardium")),
    (r"right atri(um|al.*)", STRUCTURE, ("73829009", "Right atrium")),
    (r"left atri(um|al.*)", STRUCTURE, ("82471001", "Left atrium")),
    (r"aorta", STRUCTURE, ("15825003", "Aorta")),
    (r"(inferior vena cava|postcava|ivc)", STRUCTURE, ("64131007", "Inferior vena cava")),
    (r"pulmonary artery", STRUCTURE, ("81040000", "Pulmonary artery")),
    (r"(portal vein.*)", STRUCTURE, ("32764006", "Portal vein")),
    (r"heart", STRUCTURE, ("80891009", "Heart")),
    (r"liver", STRUCTURE, ("10200004", "Liver")),
    (r"spleen", STRUCTURE, ("78961009", "Spleen")),
    (r"pancreas", STRUCTURE, ("15776009", "Pancreas")),
    (r"(left |right )?kidneys?( left| right)?", STRUCTURE, ("64033007", "Kidney")),
    (r"(left |right )?adrenal( gland)?s?", STRUCTURE, ("23451007", "Adrenal gland")),
    (r"gall ?bladder", STRUCTURE, ("28231008", "Gallbladder")),
    (r"(urinary )?bladder", STRUCTURE, ("89837001", "Urinary bladder")),
    (r"stomach", STRUCTURE, ("69695003", "Stomach")),
    (r"duodenum", STRUCTURE, ("38848004", "Duodenum")),
    (r"(o?esophagus)", STRUCTURE, ("32849002", "Esophagus")),
    (r"colon", STRUCTURE, ("71854001", "Colon")),
    (r"rectum", STRUCTURE, ("34402009", "Rectum")),
    (r"(small bowel|small intestine)", STRUCTURE, ("30315005", "Small intestine")),
    (r"prostate( gland)?", STRUCTURE, ("41216001", "Prostate")),
    (r"uterus", STRUCTURE, ("35039007", "Uterus")),
    (r"(left |right )?lungs?( left| right)?", STRUCTURE, ("39607008", "Lung")),
    (r"trachea", STRUCTURE, ("44567001", "Trachea")),
    (r"thyroid( gland)?", STRUCTURE, ("69748006", "Thyroid")),
    (r"(left |right )?(breast|mammary gland)", STRUCTURE, ("76752008", "Breast")),
    (r"(anterior |posterior |left |right )?hippocampus( head| body)?", STRUCTURE, ("5366008", "Hippocampus")),
    (r"brain ?stem", STRUCTURE, ("119238007", "Brain Stem")),
    (r"cerebellum", STRUCTURE, ("113305005", "Cerebellum")),
    (r"brain", STRUCTURE, ("12738006", "Brain")),
    (r"spinal cord", STRUCTURE, ("2748008", "Spinal cord")),
    (r"(left |right )?femurs?", STRUCTURE, ("71341001", "Femur")),
    (r"(vertebra|vertebrae|spine)", STRUCTURE, ("51282000", "Vertebra")),
    (r"(optic disc|optic disk)", STRUCTURE, ("81016008", "Optic nerve head")),
    (r"(left |right )?eyes?", STRUCTURE, ("81745001", "Eye")),
    (r"(fetal |foetal )?head", STRUCTURE, ("69536005", "Head")),
)  # fmt: skip


# Types that name their side themselves.
_SIDED = {
    "Right ventricle of heart",
    "Left ventricle of heart",
    "Left Ventricle Myocardium",
    "Right atrium",
    "Left atrium",
}


def code_of(name: str) -> SegmentCode:
    """Return the codes of a class name; an anatomical structure without a closer type when it is unknown."""
    plain = re.sub(r"[\s_\-+,/]+", " ", name.lower()).strip()
    sides = {"left": _LEFT, "right": _RIGHT}
    for pattern, category, kind in _TABLE:
        if re.fullmatch(pattern, plain):
            said = {side for side in sides if side in plain.split()}
            lateral = len(said) == 1 and kind[1] not in _SIDED
            return SegmentCode(category, kind, sides[said.pop()] if lateral else None)
    return SegmentCode(STRUCTURE, STRUCTURE)


def all_codes() -> Iterable[tuple[str, str]]:
    """Return every (code, meaning) in the table."""
    return {STRUCTURE, LESION, _LEFT, _RIGHT} | {kind for _, _, kind in _TABLE}
