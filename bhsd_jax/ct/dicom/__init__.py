"""DICOM: one file, the slices of a series in order, and the volume they make."""
