"""Safe readers, atomic writes, memory maps, image and FITS files, and the preprocessing of pictures."""
