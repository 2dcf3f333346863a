"""`fastmat bench attacks`: whole attacks beside their published loops and beside tuned ones, one attack a file."""
