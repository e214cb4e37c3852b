"""Where the cases of a data set lie, one file each, found by name."""
