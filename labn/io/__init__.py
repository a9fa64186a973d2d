"""Files: safe readers, atomic writes, memory maps, images, FITS, and the preprocessing of pictures."""
