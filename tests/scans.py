"""Write real DICOM and NIfTI files of a small phantom with pydicom and nibabel."""

import io

import nibabel as nib
import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    generate_uid,
)

WORDS = MultiFrameGrayscaleWordSecondaryCaptureImageStorage
OBLIQUE = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)  # rows run left and back, columns run down


def phantom(shape=(12, 10, 6)):
    """Return intensities (I, J, K) of a bright block in a dark field, with three different axes."""
    i, j, k = np.indices(shape)
    return (100 + 10 * i + j + 100 * ((i > 4) & (j > 3) & (k > 1))).astype(np.int16)


def written(file):
    data = io.BytesIO()
    file.save_as(data, enforce_file_format=True)
    return data.getvalue()


def dicom_slice(pixels, *, position=(0.0, 0.0, 0.0), orientation=(1, 0, 0, 0, 1, 0), uid="1.2.3.4", **more):
    """Return one CT image as a FileDataset. pixels: integers (rows, columns)."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    file.StudyInstanceUID, file.SeriesInstanceUID, file.FrameOfReferenceUID = "1.2.3", uid, "1.2.9"
    file.Modality, file.PatientID, file.PatientName = "CT", "p1", "Nobody^Here"
    file.StudyDate, file.StudyTime, file.SeriesNumber, file.InstanceNumber = "20200101", "120000", 1, 1
    file.ImagePositionPatient, file.ImageOrientationPatient = list(position), list(orientation)
    file.PixelSpacing, file.SliceThickness = [0.5, 0.7], 3.0
    _put_pixels(file, pixels)
    file.RescaleSlope, file.RescaleIntercept = 1, 0
    for name, value in more.items():
        setattr(file, name, value)
    return file


def _put_pixels(file, pixels):
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.Rows, file.Columns = pixels.shape[-2:]
    file.BitsAllocated = file.BitsStored = 16
    file.HighBit, file.PixelRepresentation = 15, 1
    file.PixelData = np.ascontiguousarray(pixels, "<i2").tobytes()


def dicom_series(voxels, *, orientation=OBLIQUE, step=3.0, **more):
    """Return the slices of (I, J, K) voxels as FileDatasets, stacked along their normal."""
    normal = np.cross(orientation[:3], orientation[3:])
    return [
        dicom_slice(
            voxels[:, :, k].T,
            position=[float(v) for v in np.array([10.0, -20.0, 30.0]) + k * step * normal],
            orientation=orientation,
            **more,
        )
        for k in range(voxels.shape[2])
    ]


def dicom_multiframe(voxels, step=3.0):
    """Return an enhanced multi-frame file with frames in reverse order, each with its position."""
    file = dicom_slice(voxels[:, :, 0].T)
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
        delattr(file, name)
    file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = (
        MultiFrameGrayscaleWordSecondaryCaptureImageStorage
    )
    _put_pixels(file, voxels[:, :, ::-1].transpose(2, 1, 0))
    file.NumberOfFrames = voxels.shape[2]
    shared, measures, orientation = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [0.5, 0.7], step
    orientation.ImageOrientationPatient = list(OBLIQUE)
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    file.SharedFunctionalGroupsSequence = [shared]
    normal, frames = np.cross(OBLIQUE[:3], OBLIQUE[3:]), []
    for k in reversed(range(voxels.shape[2])):
        frame, place = Dataset(), Dataset()
        place.ImagePositionPatient = [float(v) for v in np.array([10.0, -20.0, 30.0]) + k * step * normal]
        frame.PlanePositionSequence = [place]
        frames.append(frame)
    file.PerFrameFunctionalGroupsSequence = frames
    return file


def nifti(voxels, affine):
    return nib.Nifti1Image(voxels, affine).to_bytes()
