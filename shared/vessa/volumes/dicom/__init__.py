"""DICOM: images, their geometry and series, and segmentations of them."""
