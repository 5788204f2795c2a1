"""Files: manifests, cases, the prepared store, predictions, tables, NIfTI and seg.nrrd, each read with suspicion."""
