"""Describe the collections that the paper trains and tests on, and those of the shipped weights.

Nothing here is downloaded. Licences are those known at the time of writing: read and accept the terms of the
source before you train. The paper mentions seven Stage-1 sets and lists six; an additional entry in
`COLLECTIONS` would be the seventh. Other folders work too: `open_dataset` reads them by their layout.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# File names that each reader of `vessa.datasets` expects.
LAYOUTS = {
    "BiomedParse": (
        "train/<id>_<modality>_<site>.png with train_mask/<same>_<target>.png, test/ with test_mask/ alike"
    ),
    "PngFolder": "images/<patient>_<slice>.png, masks/<same name>.png, meta.json",
    "Ssl4mis": "data/slices/<patient>_frame<NN>_slice_<n>.h5, data/<patient>_frame<NN>.h5",
    "NnUnet": "dataset.json, imagesTr/<case>_0000.nii.gz, labelsTr/<case>.nii.gz",
}


@dataclass(frozen=True)
class Collection:
    """Describe one data set by the statements of its source.

    use: "stage1" or "stage2" of the paper, or "shipped" for training data of the shipped weights
    folders: usual names of the folder
    layout: a key of LAYOUTS
    classes: names of the classes in that layout
    patient: regular expression of a whole group name
    splits: origin of the training and test split
    licence: statement of the source
    ships: whether weights trained on it may be redistributed
    obtain: where to request it
    note: advice before use
    """

    name: str
    title: str
    use: Literal["stage1", "stage2", "shipped"]
    modality: str
    images: str
    classes: tuple[str, ...]
    patient: str
    example: str
    splits: str
    licence: str
    ships: bool
    obtain: str
    folders: tuple[str, ...]
    layout: str = "BiomedParse"
    note: str = ""


_AS_BIOMEDPARSE = "BiomedParse's own train/ and test/, by patient"
_PREPARED = "the prepared copy is part of BiomedParseData (Zhao et al., Nature Methods 2025)"

COLLECTIONS: tuple[Collection, ...] = (
    Collection(
        name="amos22",
        title="AMOS 2022, abdominal multi-organ segmentation (Ji et al., NeurIPS 2022)",
        use="stage1",
        modality="CT and MRI of the abdomen",
        images="500 CT and 100 MRI volumes",
        classes=(
            "adrenal gland",
            "aorta",
            "bladder",
            "duodenum",
            "esophagus",
            "gallbladder",
            "kidney",
            "liver",
            "pancreas",
            "postcava",
            "prostate or uterus",
            "spleen",
            "stomach",
        ),
        patient=r"amos_\d{4}",
        example="amos_0581_55_MRI_abdomen_aorta.png",
        splits=_AS_BIOMEDPARSE,
        licence="stated differently: a non-commercial one with the paper, CC BY 4.0 with the Zenodo record",
        ships=False,
        obtain=f"amos22.grand-challenge.org, DOI 10.5281/zenodo.7155725; {_PREPARED}",
        folders=("amos22/CT", "amos22/MRI"),
        note=(
            "Two folders, one data set each. Shares the abdomen with AbdomenCT-1K: say so beside its figures."
        ),
    ),
    Collection(
        name="LGG",
        title="Lower-grade glioma, FLAIR abnormality (Buda et al. 2019, from TCGA-LGG)",
        use="stage1",
        modality="MRI FLAIR of the brain",
        images="110 patients",
        classes=("lower-grade glioma",),
        patient=r"TCGA_[A-Z]{2}_\d{4}",
        example="TCGA_HT_7694_19950404_0_MRI-FLAIR_brain_lower-grade+glioma.png",
        splits=_AS_BIOMEDPARSE,
        licence="images CC BY 3.0 (The Cancer Imaging Archive), masks CC BY-NC-SA 4.0",
        ships=False,
        obtain=f"The Cancer Imaging Archive, TCGA-LGG, with the masks of Buda et al.; {_PREPARED}",
        folders=("LGG",),
    ),
    Collection(
        name="MMs",
        title="M&Ms, cardiac segmentation of many centers, vendors and diseases (Campello et al., TMI 2021)",
        use="stage1",
        modality="MRI of the heart, cine short axis",
        images="375 patients",
        classes=("left heart ventricle", "myocardium", "right heart ventricle"),
        patient=r"[A-Z]\d[A-Z]\d[A-Z]\d",
        example="A2L1N6_sa_0_3_MRI_heart_left+heart+ventricle.png",
        splits=_AS_BIOMEDPARSE,
        licence="research, after registration with the challenge",
        ships=False,
        obtain=f"the challenge's page at the University of Barcelona, ub.edu/mnms; {_PREPARED}",
        folders=("MMs",),
        note="Shares the heart with ACDC, a test set of Stage 2: say so beside its figures.",
    ),
    Collection(
        name="CAMUS",
        title="CAMUS, echocardiography with several structures (Leclerc et al., TMI 2019)",
        use="stage1",
        modality="ultrasound of the heart, two and four chambers",
        images="2,000 images of 500 patients",
        classes=("left heart atrium", "left heart ventricle", "myocardium"),
        patient=r"patient\d{4}",
        example="patient0001_2CH_ED_ultrasound_heart_myocardium.png",
        splits=_AS_BIOMEDPARSE,
        licence="non-commercial research",
        ships=False,
        obtain=f"CREATIS, Human Heart Project (creatis.insa-lyon.fr/Challenge/camus); {_PREPARED}",
        folders=("CAMUS",),
        note="The prepared copy was not available: the file names follow the rule of the other sets.",
    ),
    Collection(
        name="ChestXray",
        title="Montgomery and Shenzhen chest X-rays with lung masks (Jaeger et al. 2014)",
        use="stage1",
        modality="X-ray of the chest",
        images="896 radiographs by the paper's count",
        classes=("left lung", "lung", "right lung"),
        patient=r"(CHN|MCU)CXR_\d{4}",
        example="CHNCXR_0641_1_X-Ray_chest_left+lung.png",
        splits=_AS_BIOMEDPARSE,
        licence="free to use with citation (U.S. National Library of Medicine); no licence of a known kind",
        ships=False,
        obtain=f"U.S. National Library of Medicine, tuberculosis chest X-ray sets; {_PREPARED}",
        folders=("CXR_Masks_and_Labels",),
        note="The masks of one lung cover those of both: 'lung' has the pixels that neither covers.",
    ),
    Collection(
        name="BUSI",
        title="BUSI, breast ultrasound images (Al-Dhabyani et al., Data in Brief 2020)",
        use="stage1",
        modality="ultrasound of the breast",
        images="780 images, 133 of them without a lesion",
        classes=("benign tumor", "malignant tumor"),
        patient=r"(benign|malignant|normal) ?\(?\d+\)?",
        example="benign (415)_ultrasound_breast_benign+tumor.png",
        splits="BiomedParse's own train/ and test/, by image: patients are not named",
        licence="none stated with the images",
        ships=False,
        obtain=f"Cairo University, page of A. Fahmy, DOI 10.1016/j.dib.2019.104863; {_PREPARED}",
        folders=("BreastUS",),
        note=(
            "Some images occur twice, even in both classes (Pawlowska et al. 2023). Remove those that `vessa "
            "verify` lists, or assign both to one patient in groups.json."
        ),
    ),
    Collection(
        name="ACDC",
        title="ACDC, automated cardiac diagnosis challenge (Bernard et al., TMI 2018)",
        use="stage2",
        modality="MRI of the heart, cine short axis",
        images="150 patients, 100 of them in the SSL4MIS copy",
        classes=("right ventricle cavity", "left ventricle myocardium", "left ventricle cavity"),
        patient=r"patient\d{3}",
        example="patient001_frame01_slice_5.h5",
        splits="SSL4MIS: 70 training, 10 validation, 20 test patients; the paper: 80 % and 20 %",
        licence="CC BY-NC-SA 4.0",
        ships=False,
        obtain="CREATIS, Human Heart Project (creatis.insa-lyon.fr/Challenge/acdc); SSL4MIS has HDF5 files",
        folders=("ACDC",),
        layout="Ssl4mis",
        note=(
            "Never in Stage 1. Sixteen slices are the same in patient074 and patient076: keep both patients "
            "in one part, as SSL4MIS does."
        ),
    ),
    Collection(
        name="AbdomenCT-1K",
        title="AbdomenCT-1K (Ma et al., TPAMI 2022)",
        use="stage2",
        modality="CT of the abdomen",
        images="more than 1,000 volumes of 12 centers",
        classes=("liver", "kidney", "spleen", "pancreas"),
        patient=r"Case_\d{5}",
        example="imagesTr/Case_00001_0000.nii.gz",
        splits="the paper: CC scans for training, DD scans for testing",
        licence="that of each source, non-commercial ones among them (KiTS, LiTS)",
        ships=False,
        obtain="github.com/JunMa11/AbdomenCT-1K, after registration; DOI 10.1109/TPAMI.2021.3100536",
        folders=("AbdomenCT-1K",),
        layout="NnUnet",
        note="Never in Stage 1.",
    ),
    Collection(
        name="sunnybrook",
        title="Sunnybrook Cardiac Data (Radau et al. 2009)",
        use="shipped",
        modality="MRI of the heart, cine short axis",
        images="45 patients",
        classes=("LV cavity (endocardial contour)",),
        patient=r"SC[-_A-Z0-9]+",
        example="SC-HF-I-01_0048.png",
        splits="by patient, drawn by the seed of the run",
        licence="CC0",
        ships=True,
        obtain="Cardiac Atlas Project, Sunnybrook Cardiac Data (cardiacatlas.org)",
        folders=("sunnybrook",),
        layout="PngFolder",
    ),
    Collection(
        name="hc18",
        title="HC18, fetal head circumference (van den Heuvel et al., PLOS ONE 2018)",
        use="shipped",
        modality="ultrasound of the fetal head",
        images="999 images of 806 examinations",
        classes=("fetal head",),
        patient=r"hc\d{3}",
        example="hc000_1.png",
        splits="by examination, drawn by the seed of the run",
        licence="CC BY 4.0",
        ships=True,
        obtain="hc18.grand-challenge.org, DOI 10.5281/zenodo.1327317",
        folders=("hc18",),
        layout="PngFolder",
    ),
    Collection(
        name="dsb2018",
        title="Nuclei of the 2018 Data Science Bowl, BBBC038 (Caicedo et al., Nature Methods 2019)",
        use="shipped",
        modality="microscopy of nuclei",
        images="400 of the 664 images of stage 1",
        classes=("nucleus (instances merged)",),
        patient=r"[0-9a-f]{12}",
        example="00071198d059_0.png",
        splits="by image, drawn by the seed of the run",
        licence="CC0",
        ships=True,
        obtain="Broad Bioimage Benchmark Collection, BBBC038",
        folders=("dsb2018",),
        layout="PngFolder",
    ),
)


def collection(name: str) -> Collection:
    """Return the collection of a name, ignoring case. Raises ValueError that lists the known names."""
    for entry in COLLECTIONS:
        if entry.name.lower() == name.lower():
            return entry
    known = ", ".join(entry.name for entry in COLLECTIONS)
    raise ValueError(f"No collection is named '{name}'. Known collections: {known}.")


def recognize(folder: str | Path) -> Collection | None:
    """Return the collection that a data folder is named after; None for other folders.

    `.../amos22/CT` is amos22 by its last two parts, `.../MMs` is MMs by its last one; case does not count.
    """
    parts = [part.lower() for part in Path(folder).resolve().parts]
    for entry in COLLECTIONS:
        for name in entry.folders:
            wanted = name.lower().split("/")
            if parts[-len(wanted) :] == wanted:
                return entry
    return None


def fits_patient(entry: Collection, group: str) -> bool:
    """Return whether a group name matches the patient names of a collection."""
    return re.fullmatch(entry.patient, group) is not None
