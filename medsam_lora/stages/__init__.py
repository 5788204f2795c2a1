"""One function per stage of the pipeline: plain arguments in, files and an outcome out."""
